"""Faults on demand: system calls that fail in one thread and in all that it starts.

Both ways are seccomp filters, so they hold for good: use a thread that ends.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import select
import struct
import subprocess
import sys
from collections.abc import Iterable

_X86 = platform.machine() == "x86_64"
SECCOMP = 317 if _X86 else 277
LANDLOCK = 444
# What can fail for want of descriptors, memory or processes when a worker is started.
FALLIBLE = (
    {
        "open": 2,
        "mmap": 9,
        "mprotect": 10,
        "pipe": 22,
        "socketpair": 53,
        "clone": 56,
        "fork": 57,
        "vfork": 58,
        "execve": 59,
        "fcntl": 72,
        "ftruncate": 77,
        "mkdir": 83,
        "prctl": 157,
        "openat": 257,
        "eventfd2": 290,
        "dup3": 292,
        "pipe2": 293,
        "memfd_create": 319,
        "dup2": 33,
        "setpgid": 109,
    }
    if _X86
    else {
        "eventfd2": 19,
        "dup3": 24,
        "fcntl": 25,
        "mkdirat": 34,
        "ftruncate": 46,
        "openat": 56,
        "pipe2": 59,
        "setpgid": 154,
        "prctl": 167,
        "socketpair": 199,
        "clone": 220,
        "execve": 221,
        "mmap": 222,
        "mprotect": 226,
        "memfd_create": 279,
    }
) | {"pidfd_open": 434, "clone3": 435}

_ALLOW, _ERRNO, _NOTIFY = 0x7FFF0000, 0x00050000, 0x7FC00000
_NEW_LISTENER = 8
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_CONTINUE = 1
_libc = ctypes.CDLL(None, use_errno=True)


def fail_system_calls(numbers: Iterable[int], error: str) -> None:
    """Make these system calls of this thread, and of all that it starts, fail from now on."""
    _install(numbers, _ERRNO | getattr(errno, error), 0)


class FailingCall:
    """Lets the nth system call of `FALLIBLE` fail that a thread and its children make.

    What a child does after its ``execve`` counts too. Made before `arm`, since it is a process of
    its own: whoever makes such a call waits for its answer, maybe with the GIL.
    """

    def __init__(self, nth: int, error: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-E", __file__, str(nth), str(getattr(errno, error))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._failed: str | None = None

    def arm(self) -> None:
        """Start counting in this thread, which is of no use once the process has ended."""
        listener = _install(FALLIBLE.values(), _NOTIFY, _NEW_LISTENER)
        assert self._process.stdin is not None
        print(os.getpid(), listener, file=self._process.stdin, flush=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "armed\n"
        os.close(listener)

    def end(self) -> str:
        """Stop answering. The name of the call that failed; none if so many were not made."""
        if self._failed is None:
            self._process.terminate()
            self._failed = self._process.communicate()[0].strip()
        return self._failed


def _answer(nth: int, error: int) -> None:
    """The process of a `FailingCall`."""
    names = {number: name for name, number in FALLIBLE.items()}
    pid, remote = map(int, sys.stdin.readline().split())
    listener = _libc.syscall(438, os.pidfd_open(pid), remote, 0)  # pidfd_getfd
    print("armed", flush=True)
    watched = select.poll()
    watched.register(listener, select.POLLIN)
    count = 0
    while all(event & select.POLLIN for _, event in watched.poll()):
        notice = ctypes.create_string_buffer(80)
        if _ioctl(listener, _RECEIVE, notice) < 0:
            continue  # whoever made the call is gone
        count += 1
        identity, _, _, number = struct.unpack_from("=QIIi", notice)
        answer = (-error, 0) if count == nth else (0, _CONTINUE)
        _ioctl(listener, _SEND, struct.pack("=QqiI", identity, 0, *answer))
        if count == nth:
            print(names[number], flush=True)


def _ioctl(descriptor: int, request: int, argument: object) -> int:
    # Not fcntl.ioctl: it copies, and raises for what is usual here.
    result: int = _libc.ioctl(descriptor, ctypes.c_ulong(request), argument)
    return result


def _install(numbers: Iterable[int], action: int, flags: int) -> int:
    program = struct.pack("=HBBI", 0x20, 0, 0, 0)  # load the number
    for number in numbers:
        program += struct.pack("=HBBI", 0x15, 0, 1, number)  # equal?
        program += struct.pack("=HBBI", 0x06, 0, 0, action)
    program += struct.pack("=HBBI", 0x06, 0, 0, _ALLOW)
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    if _libc.prctl(38, 1, 0, 0, 0) != 0:  # no new privileges
        raise OSError(ctypes.get_errno(), "prctl")
    result: int = _libc.syscall(SECCOMP, 1, flags, header)
    if result < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return result


if __name__ == "__main__":
    _answer(*map(int, sys.argv[1:]))
