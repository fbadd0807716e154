"""Many lifetimes of a worker leave nothing behind: the short form of `make cycles`."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from pathlib import Path

import pytest
from conftest import children, descriptors, echo_role
from hypothesis import settings

from inferpool import Pool

THOROUGH = settings().max_examples == settings.get_profile("thorough").max_examples
CYCLES, WARM_UP = (1000, 100) if THOROUGH else (20, 5)


def resident() -> int:
    """Bytes of this process that are in RAM and its own."""
    statm = Path("/proc/self/statm").read_text().split()
    return (int(statm[1]) - int(statm[2])) * os.sysconf("SC_PAGE_SIZE")


def segments() -> int:
    """Mapped segments and logs of workers."""
    return Path("/proc/self/maps").read_text().count("inferpool-") + sum(
        "inferpool-" in os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.islink(f"/proc/self/fd/{fd}")
    )


def slope(values: list[int]) -> float:
    """Least squares, per step."""
    middle = (len(values) - 1) / 2
    spread = sum((index - middle) ** 2 for index in range(len(values)))
    return sum((index - middle) * value for index, value in enumerate(values)) / spread


def lifetime(number: int) -> None:
    """One way after the other for a worker to live and to end."""
    with Pool(echo=echo_role()) as pool:
        assert pool.call("echo", "echo", b"x" * 5000) == b"x" * 5000
        match number % 4:
            case 0:
                with pytest.raises(Exception, match="died"):
                    pool.call("echo", "exit", 1)
            case 1:
                assert next(pool.stream("echo", "count", None)) == 0
            case 2:
                pool.cancel("echo")
            case 3:
                assert asyncio.run(pool.as_async().call("echo", "sleep", 0.001)) == 0.001


@pytest.mark.timeout(3600 if THOROUGH else 120)
def test_lifetimes_leave_nothing_behind() -> None:
    for number in range(WARM_UP):
        lifetime(number)
    gc.collect()
    shared = set(os.listdir("/dev/shm"))
    before = (descriptors(), threading.active_count(), len(children()), segments())
    memory = []
    for number in range(CYCLES):
        lifetime(number)
        if number % 4 == 3:
            gc.collect()
            memory.append(resident())
    assert (descriptors(), threading.active_count(), len(children()), segments()) == before
    ours = {name for name in set(os.listdir("/dev/shm")) - shared if "inferpool" in name}
    assert not ours
    growth = slope(memory) / 4
    print(f"{CYCLES} lifetimes, {growth:.0f} bytes each")
    if THOROUGH:  # over a few, an arena that is made once looks like a leak
        assert growth < 1024
