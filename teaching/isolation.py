"""Lock the process of a submission in: limits, a read-only view of the files, no network.

Linux's namespaces hide the solution, make all files read-only and take the network away, without
any right that a user lacks; some systems forbid them. There, Landlock guards the files alone. A
hook on Python's own calls refuses the same things with a clear message, and is all that is left
where there is neither: code that calls the kernel by itself passes it. `protect` returns what
holds, so that nobody has to guess.
"""

import ctypes
import os
import resource
import signal
import struct
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from configurator import ROOT

NEW_USER, NEW_MOUNT = 0x10000000, 0x20000  # of unshare(2)
NEW_NETWORK, NEW_PROCESSES = 0x40000000, 0x20000000
BIND, RECURSIVE, PRIVATE = 4096, 0x4000, 1 << 18  # of mount(2)
MOUNT_SETATTR, HERE, AT_RECURSIVE, READ_ONLY = 442, -100, 0x8000, 1
CHILD_SUBREAPER = 36  # of prctl(2)
NO_NEW_RIGHTS = 38
CREATE_RULES, ADD_RULE, RESTRICT_SELF, BENEATH = 444, 445, 446, 1  # landlock(7)
ACCESSES = ((5, 16), (3, 15), (2, 14), (1, 13))  # version, number of the accesses it knows
READ, WRITE = 0b1101, 0b10  # execute, read files and folders; write files
TCP, SIGNALS_AND_SOCKETS = 3, 3  # bind and connect; to processes outside
SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc", "/proc", "/sys")
SCRATCH_SIZE = b"size=64m"
NOBODY, PROCESSES = 65534, 16
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
MIB = 2**20
OUTPUT_MIB = 1
FORBIDDEN = {
    "starts another process": (
        "os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn", "os.system",
        "subprocess.Popen", "pty.spawn"),
    "uses the network": ("socket.connect", "socket.bind", "socket.getaddrinfo",
                         "socket.gethostbyname", "socket.sendto"),
    "sends a signal to a process": ("os.kill", "os.killpg", "signal.pthread_kill"),
    "changes files or their rights": (
        "os.remove", "os.rename", "os.rmdir", "os.chmod", "os.chown", "os.link", "os.symlink",
        "os.truncate", "shutil.rmtree", "shutil.move"),
}
REASONS = {event: reason for reason, events in FORBIDDEN.items() for event in events}


def limit(seconds: float, memory_mib: int) -> None:
    """Limit processor time, further memory, the size of a file that is written, and core dumps."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    ceilings = {
        resource.RLIMIT_AS: used + memory_mib * MIB, resource.RLIMIT_CPU: int(seconds) + 1,
        resource.RLIMIT_FSIZE: OUTPUT_MIB * MIB, resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 256,
    }
    for kind, most in ceilings.items():
        resource.setrlimit(kind, (most, most))


def protect(hidden: Sequence[str], folder: str, scratch: str) -> list[str]:
    """Hide the paths `hidden`, make all but `scratch` read-only; return what the kernel ensures.

    `folder` holds the submission.
    """
    with suppress(OSError):
        if hide_and_freeze([os.fsencode(path) for path in hidden], os.fsencode(scratch)):
            become_first_process()
            return ["no network", "read-only files", "the solution hidden",
                    "the end of every process it started"]
    holds = []
    with suppress(OSError):
        if os.geteuid() == 0 and all(
                folder.stat().st_mode & 0o001 for prefix in (sys.prefix, sys.base_prefix)
                for folder in Path(prefix, "lib").parents):
            os.chown(scratch, NOBODY, NOBODY)
            resource.setrlimit(resource.RLIMIT_NPROC, (PROCESSES, PROCESSES))
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            holds.append("a user of its own")
    with suppress(OSError):
        readable = [path for path in needed_paths(folder) if os.path.isdir(path)]
        if restrict(readable, scratch):
            inside = any(ROOT.is_relative_to(path) for path in readable)
            holds += ["read-only files", *([] if inside else ["the solution hidden"])]
    return holds


def needed_paths(folder: str) -> list[str]:
    """Return the folders that Python, its packages and a submission in `folder` read."""
    packages = [path for path in sys.path if not str(ROOT).startswith(os.path.abspath(path))
                and not os.path.abspath(path).startswith(str(ROOT))]
    return [folder, sys.prefix, sys.base_prefix, *packages, *SYSTEM]


def restrict(readable: Sequence[str], scratch: str) -> bool:
    """Let Landlock, which needs no right, refuse all files but these; tell whether it can."""
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(CREATE_RULES, None, 0, 1)
    if version < 1:
        return False
    every = (1 << next(bits for least, bits in ACCESSES if version >= least)) - 1
    attributes = (ctypes.c_uint64 * 3)(every, TCP, SIGNALS_AND_SOCKETS)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = libc.syscall(CREATE_RULES, ctypes.byref(attributes), size, 0)
    allowed = {path: READ for path in readable} | {"/dev": READ | WRITE, scratch: every}
    for path, access in allowed.items():
        place = os.open(path, os.O_PATH)
        libc.syscall(ADD_RULE, rules, BENEATH, struct.pack("=Qi", access & every, place), 0)
        os.close(place)
    libc.prctl(NO_NEW_RIGHTS, 1, 0, 0, 0)
    done = not libc.syscall(RESTRICT_SELF, rules, 0)
    os.close(rules)
    return done


def hide_and_freeze(hidden: Sequence[bytes], scratch: bytes) -> bool:
    """Enter namespaces in which only `scratch` can be written; tell whether that worked."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(NEW_USER | NEW_MOUNT | NEW_NETWORK | NEW_PROCESSES):
        return False
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY, 0, 0, 0)
    faults = [libc.mount(b"none", b"/", None, RECURSIVE | PRIVATE, None)]
    for path in hidden:
        folder = os.path.isdir(path)
        faults.append(libc.mount(b"tmpfs", path, b"tmpfs", 0, b"size=4k") if folder
                      else libc.mount(b"/dev/null", path, None, BIND, None))
    faults += [
        libc.syscall(MOUNT_SETATTR, HERE, b"/", AT_RECURSIVE, ctypes.byref(attributes), 32),
        libc.mount(b"tmpfs", scratch, b"tmpfs", 0, SCRATCH_SIZE),
        # In a second namespace these mounts are locked: nobody can take them off again.
        libc.unshare(NEW_USER | NEW_MOUNT)]
    return not any(faults)


def become_first_process() -> None:
    """Go on in a child, the first of its namespace: with it the kernel ends all others there."""
    pid = os.fork()
    if pid:
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            os.kill(os.getpid(), os.WTERMSIG(status))
        os._exit(os.WEXITSTATUS(status))


def adopt_orphans() -> None:
    """Become the parent of whatever descendant loses its own, instead of the system's first."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(CHILD_SUBREAPER, 1, 0, 0, 0)


def end_children() -> None:
    """Kill every child of this process, and what they leave behind in turn."""
    while pids := [int(pid) for path in Path("/proc/self/task").glob("*/children")
                   for pid in path.read_text().split()]:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)


def refuse(hidden: Sequence[str], scratch: str) -> None:
    """Let Python refuse what a submission has no need for, with a message; for good."""
    own = tuple(os.path.join(path, "") for path in (scratch, "/dev"))
    kept = tuple(hidden)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            path, flags = os.path.abspath(os.fsdecode(arguments[0])), arguments[2] or 0
            if flags & WRITES and not path.startswith(own):
                raise PermissionError(f"it writes {path}, which a submission may not")
            if any(path == each or path.startswith(each + os.sep) for each in kept):
                raise PermissionError(f"it reads {path}, which a submission may not")
        elif event in REASONS:
            path = arguments[0] if arguments else None
            inside = path.startswith(own) if isinstance(path, str) else event == "os.truncate"
            if not inside:  # an open file, a number, was opened by the rules above
                raise PermissionError(f"it {REASONS[event]}, which a submission may not")

    sys.addaudithook(hook)
