"""Properties over real processes: the order of frames, and the end of everything."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from unittest import mock

from conftest import TIRELESS, children, descriptors, echo_role, eventually
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
)

from inferpool import (
    CallCancelled,
    CallTimeout,
    Pool,
    PoolClosed,
    Stream,
    WorkerCrashed,
    WorkerStartError,
    WorkerStuck,
)

# Around the borders of a record, a ring of 8 KiB, and its quarter.
SIZES = st.one_of(
    st.integers(0, 100),
    st.sampled_from([1023, 1024, 1984, 2015, 2016, 2017, 4096, 8192, 8193]),
    st.integers(0, 60_000),
)


ENDS = (CallCancelled, CallTimeout, PoolClosed, WorkerCrashed, WorkerStartError, WorkerStuck)
"""How a call may end that did not get its answer."""


def outcome_of(call: Callable[[], object]) -> str:
    try:
        call()
    except ENDS as error:
        return type(error).__name__
    return "answer"


class FrameOrder(RuleBasedStateMachine):
    """Calls and streams of all sizes through a tiny ring, read, left and cancelled at will.

    Each item says by its content which place in which stream it has, so an item lost, doubled,
    reordered or handed to another call shows.
    """

    streams = Bundle("streams")

    @initialize()
    def start(self) -> None:
        with mock.patch("inferpool.host.incarnation._RING_CAPACITY", 8192):
            self.pool = Pool(echo=echo_role())
            self.pool.start()

    @rule(target=streams, sizes=st.lists(SIZES, max_size=30))
    def open(self, sizes: list[int]) -> tuple[Stream[bytes], Iterator[bytes]]:
        expected = (bytes([index % 256]) * size for index, size in enumerate(sizes))
        return self.pool.stream("echo", "sized", sizes), expected

    @rule(stream=streams, items=st.integers(1, 10))
    def read(self, stream: tuple[Stream[bytes], Iterator[bytes]], items: int) -> None:
        received, expected = stream
        for _ in range(items):
            assert next(received, None) == next(expected, None)

    @rule(stream=consumes(streams))
    def read_to_the_end(self, stream: tuple[Stream[bytes], Iterator[bytes]]) -> None:
        received, expected = stream
        assert list(received) == list(expected)

    @rule(stream=consumes(streams))
    def close(self, stream: tuple[Stream[bytes], Iterator[bytes]]) -> None:
        stream[0].close()
        assert list(stream[0]) == []

    @rule(size=SIZES, tag=st.integers(0, 255))
    def call(self, size: int, tag: int) -> None:
        payload = [tag, bytes([tag]) * size]
        # Unread streams may hold the worker, which serves one request at a time.
        with contextlib.suppress(CallTimeout):
            assert self.pool.call("echo", "echo", payload, timeout=0.05) == payload

    @rule()
    def ping(self) -> None:
        assert self.pool.ping() < 5

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            self.pool.close()


class Lifecycle(RuleBasedStateMachine):
    """Everything that can happen to a pool and its worker, in any order.

    Each call has exactly one outcome, whatever happens; a worker that lives serves the next
    call; and at the end nothing is left.
    """

    def __init__(self) -> None:
        super().__init__()
        with Pool(echo=echo_role()) as pool:  # this thread's own doorbell, made once, stays
            pool.ping()
        gc.collect()
        self.children = children()
        self.descriptors = descriptors()
        self.pool = Pool(echo=echo_role(), policy=TIRELESS, close_timeout=0.5)
        self.stopped: int | None = None
        self.crashes = 0
        self.closed = False
        self.background: list[tuple[threading.Thread, list[str]]] = []

    def pid(self) -> int | None:
        return self.pool.status()["echo"].pid

    @rule(kind=st.sampled_from(["echo", "sleep", "wait_for_abort"]))
    def call(self, kind: str) -> None:
        payload = 0.01 if kind == "sleep" else None
        outcome = outcome_of(lambda: self.pool.call("echo", kind, payload, timeout=0.3))
        if self.closed:
            assert outcome == "PoolClosed"

    @rule()
    def crash(self) -> None:
        if not self.closed and self.stopped is None:
            self.pool.cancel("echo")
            self.crashes += 1  # the same request twice would be poisonous
            code = self.crashes % 256
            outcome = outcome_of(lambda: self.pool.call("echo", "exit", code, timeout=30))
            # Before its first answer a worker counts as starting.
            assert outcome in ("WorkerCrashed", "WorkerStartError")

    @rule()
    def the_next_call_works(self) -> None:
        if not self.closed and self.stopped is None:
            self.pool.cancel("echo")
            assert self.pool.call("echo", "echo", "next", timeout=30) == "next"

    @rule(kind=st.sampled_from(["echo", "wait_for_abort"]))
    def call_in_the_background(self, kind: str) -> None:
        outcomes: list[str] = []
        try:
            # Sent from here, so that a later cancel meets it.
            stream = self.pool.stream("echo", kind, 1, timeout=60)
        except ENDS:
            return
        thread = threading.Thread(target=lambda: outcomes.append(outcome_of(lambda: list(stream))))
        thread.start()
        self.background.append((thread, outcomes))

    @rule(items=st.integers(0, 20))
    def stream_and_drop(self, items: int) -> None:
        with contextlib.suppress(*ENDS):
            stream = self.pool.stream("echo", "count", None, timeout=0.3)
            assert [next(stream) for _ in range(items)] == list(range(items))

    @rule()
    def cancel(self) -> None:
        self.pool.cancel("echo")

    @rule()
    def ping(self) -> None:
        with contextlib.suppress(*ENDS):
            self.pool.ping(timeout=0.1)

    @rule()
    def kill(self) -> None:
        if (pid := self.pid()) is not None:
            os.kill(pid, signal.SIGKILL)
            assert eventually(lambda: self.pid() != pid)
            self.stopped = None

    @rule()
    def stop(self) -> None:
        if (pid := self.pid()) is not None:
            os.kill(pid, signal.SIGSTOP)
            self.stopped = pid

    @rule()
    def go_on(self) -> None:
        if self.stopped is not None and self.stopped == self.pid():
            os.kill(self.stopped, signal.SIGCONT)
        self.stopped = None

    @rule()
    def close(self) -> None:
        self.pool.close()
        self.closed = True

    @rule()
    def restart(self) -> None:
        self.pool.close()
        self.pool = Pool(echo=echo_role(), policy=TIRELESS, close_timeout=0.5)
        self.closed, self.stopped = False, None

    @invariant()
    def status_can_always_be_told(self) -> None:
        status = self.pool.status()["echo"]
        assert status.state in ("stopped", "starting", "ready", "busy", "dead")
        assert status.in_flight >= 0

    def teardown(self) -> None:
        self.pool.close()
        for thread, outcomes in self.background:
            thread.join(20)
            assert len(outcomes) == 1, "a call without an outcome"
        self.background.clear()
        gc.collect()
        assert eventually(lambda: children() <= self.children)
        assert eventually(lambda: descriptors() <= self.descriptors)


SLOW = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    # Processes are no function of their seed: a smaller example would be another run.
    "phases": [Phase.explicit, Phase.reuse, Phase.generate],
    "print_blob": True,
}
TestFrameOrder = FrameOrder.TestCase
TestFrameOrder.settings = settings(max_examples=25, stateful_step_count=40, **SLOW)
TestLifecycle = Lifecycle.TestCase
TestLifecycle.settings = settings(max_examples=15, stateful_step_count=20, **SLOW)
