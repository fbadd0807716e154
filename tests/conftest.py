"""What the tests share."""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from engine_fakes import SETTINGS
from hypothesis import settings

from inferpool import Policy, Pool, Role, config

# Coverage of workers.
config.INHERITED_VARIABLES.append("COVERAGE_*")

if TYPE_CHECKING:
    from llama_cpp import Llama

    from inferpool.engine.model import Model

# How long an example takes says more of the machine than of the code.
settings.register_profile("house", parent=settings(), deadline=None)
settings.register_profile("thorough", deadline=None, max_examples=200)
settings.load_profile("house")

TIRELESS = Policy(max_crashes=1 << 16, backoff=0.0)
"""Restarts a role however often it crashes."""


def echo_role(**options: object) -> Role:
    return Role("echo_role:make_session", "echo_role:HANDLERS", options)


def children() -> set[int]:
    """Process ids of this process's children."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that ended
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
    """Whether a process exists and is not a zombie.

    Its first thread may be one while others still end; only then does the kernel tell.
    """
    try:
        threads = os.listdir(f"/proc/{pid}/task")
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return len(threads) > 1 or stat.rpartition(")")[2].split()[0] != "Z"


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def pool() -> Iterator[Pool]:
    with Pool(echo=echo_role()) as pool:
        yield pool


@pytest.fixture(scope="session")
def model() -> Iterator[Model]:
    """The default chat model."""
    from inferpool.engine.model import Model
    from inferpool.models import resolve

    loaded = Model(resolve("smollm2"))
    yield loaded
    loaded.close()


@pytest.fixture(scope="session")
def reference() -> Iterator[Llama]:
    """The default chat model, as the high-level API of llama-cpp-python runs it."""
    from llama_cpp import Llama

    from inferpool.engine.backend import lib, model_params
    from inferpool.models import resolve

    with pytest.MonkeyPatch.context() as patch:
        # The reference must get past what is broken in the library too.
        params = model_params()
        patch.setattr(lib, "llama_model_default_params", lambda: params)
        llama = Llama(
            str(resolve("smollm2")),
            **SETTINGS,
            n_threads_batch=SETTINGS["n_threads"],
            verbose=False,
        )
    yield llama
    llama.close()


@pytest.fixture(autouse=True)
def no_worker_outlives_its_test() -> Iterator[None]:
    before = children()
    yield
    gc.collect()
    assert eventually(lambda: children() <= before), "a worker outlived its test"
