"""What `doctor` asks the machine."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
from collections.abc import Callable
from pathlib import Path

__all__ = ["REQUIRED", "cpu_features", "cpu_quota", "landlock_abi", "usable_cpus"]

# Instruction sets that llama.cpp has kernels for; x86 first, then Arm.
_FEATURES = re.compile(
    r"sse4_2|avx|avx2|avx512\w+|avx_vnni|fma|f16c|bmi2|amx_\w+|asimd|asimddp|i8mm|sve|sve2|sme"
)
_SYS_LANDLOCK_CREATE_RULESET = 444
_LANDLOCK_CREATE_RULESET_VERSION = 1


def cpu_features() -> list[str]:
    """The instruction sets of the first CPU that matter to llama.cpp, in the kernel's names."""
    try:
        info = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return []
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", info, re.MULTILINE)
    return [name for name in found[1].split() if _FEATURES.fullmatch(name)] if found else []


def usable_cpus() -> int:
    """CPUs that this process may run on; llama.cpp gets as many threads."""
    return len(os.sched_getaffinity(0))


def cpu_quota() -> float | None:
    """CPUs' worth of time that a container limits us to; None for no limit that is visible."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # "max 100000" is not a limit
        return None


def landlock_abi() -> int | None:
    """Version of the kernel's Landlock interface, or None if it is missing or switched off."""
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype = ctypes.c_long
    version = syscall(
        ctypes.c_long(_SYS_LANDLOCK_CREATE_RULESET),
        ctypes.c_void_p(),
        ctypes.c_size_t(0),
        ctypes.c_uint(_LANDLOCK_CREATE_RULESET_VERSION),
    )
    return int(version) if version > 0 else None


def _try_memfd() -> None:
    fd = os.memfd_create("inferpool-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    finally:
        os.close(fd)


def _try_pidfd() -> None:
    os.close(os.pidfd_open(os.getpid()))


def _try_eventfd() -> None:
    os.close(os.eventfd(0))


REQUIRED: list[tuple[str, str, Callable[[], None]]] = [
    ("memfd sealing", "shared memory that can't shrink under its reader", _try_memfd),
    ("pidfd_open", "noticing at once that a worker ended", _try_pidfd),
    ("eventfd", "waking the threads and event loops that wait", _try_eventfd),
]
"""Facilities of the kernel that the transport can't do without: name, use, a try."""
