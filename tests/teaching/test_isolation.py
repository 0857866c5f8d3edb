"""What holds without namespaces: each claim in a small process of its own."""

import subprocess
import sys

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


def run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_process_that_left_its_group_ends_without_namespaces_too() -> None:
    assert run(ORPHANS) == "gone\n"
