"""Faults on demand: system calls that fail in this thread and in all that it starts."""

from __future__ import annotations

import ctypes
import errno
import platform
import struct
from collections.abc import Iterable

_X86 = platform.machine() == "x86_64"
LANDLOCK = [444]
SECCOMP = [317 if _X86 else 277]

_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_LOAD_NUMBER = struct.pack("=HBBI", 0x20, 0, 0, 0)


def fail_system_calls(numbers: Iterable[int], error: str) -> None:
    """Make these system calls of this thread, and of all that it starts, fail from now on."""
    program = _LOAD_NUMBER
    for number in numbers:
        program += struct.pack("=HBBI", 0x15, 0, 1, number)  # equal?
        program += struct.pack("=HBBI", 0x06, 0, 0, _ERRNO | getattr(errno, error))
    program += struct.pack("=HBBI", 0x06, 0, 0, _ALLOW)
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((38, 1, 0, 0, 0), (22, 2, header, 0, 0)):  # no new privileges; the filter
        if libc.prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), "prctl")
