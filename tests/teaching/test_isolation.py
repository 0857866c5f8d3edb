"""What holds without namespaces: each claim in a small process of its own."""

import subprocess
import sys

import pytest

from configurator import ROOT

ORPHANS = """
import os, time
from teaching.isolation import adopt_orphans, end_children
adopt_orphans()
read, write = os.pipe()
child = os.fork()
if child == 0:
    if os.fork() == 0:  # its own child leaves the group and would stay behind
        os.setsid()
        os.write(write, str(os.getpid()).encode())
        time.sleep(600)
    os._exit(0)
os.waitpid(child, 0)
orphan = int(os.read(read, 20))
os.kill(orphan, 0)
end_children()
try:
    os.kill(orphan, 0)
except ProcessLookupError:
    print("gone")
"""

LANDLOCK = """
import ctypes, os, sys, tempfile
from pathlib import Path
from teaching import isolation
from configurator import ROOT

isolation.hide_and_freeze = lambda *_: False
folder, scratch = tempfile.mkdtemp(), tempfile.mkdtemp()
os.chmod(folder, 0o755)
Path(folder, "own.py").write_text("1")
libc, source = ctypes.CDLL(None), os.fsencode(ROOT / "lora.py")
holds = isolation.protect([], folder, scratch)
print("read-only files" in holds)
print([libc.open(source, 0), libc.open(source, 2), libc.open(b"/tmp/x", 0o101, 0o600),
       libc.open(os.fsencode(folder) + b"/own.py", 2)])
print(Path(folder, "own.py").read_text(), Path(scratch, "new").write_text("12"))
import wave  # of the standard library, not yet loaded
"""


def run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_process_that_left_its_group_ends_without_namespaces_too() -> None:
    assert run(ORPHANS) == "gone\n"


def test_without_namespaces_landlock_guards_the_files() -> None:
    holds, refused, own = run(LANDLOCK).splitlines()
    if holds == "False":
        pytest.skip("this system has no Landlock")
    assert (refused, own) == ("[-1, -1, -1, -1]", "1 2")
