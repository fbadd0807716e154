"""What the tests share."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from inferpool import Pool, Role


def echo_role(**options: object) -> Role:
    return Role("echo_role:make_session", "echo_role:HANDLERS", options)


def children() -> set[int]:
    """Process ids of this process's children."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        found.update(map(int, (task / "children").read_text().split()))
    return found


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether the condition comes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def pool() -> Iterator[Pool]:
    with Pool(echo=echo_role()) as pool:
        yield pool


@pytest.fixture(autouse=True)
def no_worker_outlives_its_test() -> Iterator[None]:
    before = children()
    yield
    gc.collect()
    assert eventually(lambda: children() <= before), "a worker outlived its test"
