"""Properties over real processes: the order of frames, and the end of everything."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import pytest
from conftest import TIRELESS, children, descriptors, echo_role, eventually
from history import Event, History
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


RESTLESS = dataclasses.replace(
    TIRELESS, start_timeout=20.0, stuck_after=1.0, cancel_grace=0.3, idle_timeout=0.3
)


class Lifecycle(RuleBasedStateMachine):
    """Everything that can happen to a pool and its workers, in any order.

    Each call has exactly one outcome, whatever happens; a worker that lives serves the next
    call; nothing reaches a call that is not its own; and at the end nothing is left.
    """

    def __init__(self) -> None:
        super().__init__()
        with Pool(echo=echo_role()) as pool:  # this thread's own doorbell, made once, stays
            pool.ping()
        gc.collect()
        self.children = children()
        self.descriptors = descriptors()
        self.crashes = 0
        self.background: list[threading.Thread] = []
        self.histories: list[tuple[History, dict[int, int]]] = []
        self.open_pool(replicas=1)

    def open_pool(self, replicas: int) -> None:
        self.role = dataclasses.replace(echo_role(), replicas=replicas)
        self.pool = Pool(echo=self.role, policy=RESTLESS, close_timeout=0.5)
        self.stopped: set[int] = set()
        self.closed = False
        self.history = History()
        self.lengths: dict[int, int] = {}
        self.histories.append((self.history, self.lengths))

    def pid(self) -> int | None:
        return self.pool.status()["echo"].pid

    def is_stopped(self) -> bool:
        return any(each.pid in self.stopped for each in self.pool.status()["echo"].workers)

    @rule()
    def start(self) -> None:
        outcome = outcome_of(lambda: self.pool.start(timeout=0.3))
        if self.closed:
            assert outcome == "PoolClosed"

    @rule(kind=st.sampled_from(["echo", "sleep", "wait_for_abort", "hold_gil"]))
    def call(self, kind: str) -> None:
        payload = 0.01 if kind in ("sleep", "hold_gil") else None
        outcome = outcome_of(lambda: self.pool.call("echo", kind, payload, timeout=0.3))
        if self.closed:
            assert outcome == "PoolClosed"

    @rule()
    def crash(self) -> None:
        if not self.closed and not self.is_stopped():
            self.pool.cancel("echo")
            self.crashes += 1  # the same request twice would be poisonous
            code = self.crashes % 256
            outcome = outcome_of(lambda: self.pool.call("echo", "exit", code, timeout=30))
            # Before its first answer a worker counts as starting.
            assert outcome in ("WorkerCrashed", "WorkerStartError")

    @rule()
    def the_next_call_works(self) -> None:
        if not self.closed and not self.is_stopped():
            self.pool.cancel("echo")
            assert self.pool.call("echo", "echo", "next", timeout=30) == "next"

    @rule()
    def even_a_stopped_worker_is_soon_replaced(self) -> None:
        if not self.closed:
            self.pool.cancel("echo")
            outcome = outcome_of(lambda: self.pool.call("echo", "echo", "next", timeout=30))
            assert outcome in ("answer", "WorkerStuck", "WorkerCrashed", "WorkerStartError")

    def begin(self, items: int) -> int:
        tag = self.history.begin()
        self.lengths[tag] = items
        return tag

    @rule(items=st.integers(0, 3000), timeout=st.sampled_from([0.05, 60.0]))
    def stream(self, items: int, timeout: float) -> None:
        tag = self.begin(items)
        open_stream = partial(self.pool.stream, "echo", "tagged", [tag, items], timeout=timeout)
        self.history.follow(tag, open_stream, ENDS)

    @rule(items=st.integers(0, 30_000))
    def stream_in_the_background(self, items: int) -> None:
        tag = self.begin(items)
        open_stream = partial(self.pool.stream, "echo", "tagged", [tag, items], timeout=60)
        thread = threading.Thread(target=self.history.follow, args=(tag, open_stream, ENDS))
        thread.start()
        self.background.append(thread)

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
    def configure(self) -> None:
        if self.closed:
            with pytest.raises(PoolClosed):
                self.pool.configure("echo", self.role)
        else:
            self.pool.configure("echo", self.role)

    @rule()
    def kill(self) -> None:
        if (pid := self.pid()) is not None:
            with contextlib.suppress(ProcessLookupError):  # released meanwhile
                os.kill(pid, signal.SIGKILL)
            assert eventually(lambda: self.pid() != pid)

    @rule()
    def stop(self) -> None:
        if (pid := self.pid()) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
            self.stopped.add(pid)

    @rule()
    def go_on(self) -> None:
        for each in self.pool.status()["echo"].workers:
            if each.pid in self.stopped:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each.pid, signal.SIGCONT)
        self.stopped.clear()

    @rule(drain=st.booleans())
    def close(self, drain: bool) -> None:
        self.pool.close(drain=drain, timeout=0.5)
        self.closed = True
        self.history.closed()

    @rule(replicas=st.integers(1, 2))
    def restart(self, replicas: int) -> None:
        self.pool.close()
        self.open_pool(replicas)

    @invariant()
    def status_can_always_be_told(self) -> None:
        status = self.pool.status()["echo"]
        assert status.state in ("stopped", "starting", "ready", "busy", "dead")
        assert status.in_flight >= 0

    def teardown(self) -> None:
        self.pool.close()
        for thread in self.background:
            thread.join(20)
            assert not thread.is_alive(), "a call without an outcome"
        self.background.clear()
        for history, lengths in self.histories:
            history.check(lengths)
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
# `make properties` asks for the thorough profile.
LONG = {"max_examples": 200, "stateful_step_count": 50}
SHORT = {"max_examples": 15, "stateful_step_count": 20}
THOROUGH = settings().max_examples == settings.get_profile("thorough").max_examples
TestFrameOrder = FrameOrder.TestCase
TestFrameOrder.settings = settings(max_examples=25, stateful_step_count=40, **SLOW)
TestLifecycle = pytest.mark.timeout(7200 if THOROUGH else 60)(Lifecycle.TestCase)
TestLifecycle.settings = settings(**(LONG if THOROUGH else SHORT), **SLOW)


def test_a_history_with_a_fault_is_refused() -> None:
    faults: dict[str, list[Event]] = {
        "outcomes \\[\\]": [],
        "order": [Event(1, "item", [7, 1, 1])],
        "another": [Event(1, "item", [7, 2, 0])],
        "two workers": [Event(1, "item", [7, 1, 0]), Event(1, "item", [8, 1, 1])],
        "ended early": [Event(1, "outcome", "answer")],
        "after the outcome": [Event(1, "outcome", "PoolClosed")] * 2,
    }
    for message, events in faults.items():
        history = History()
        history.begin()
        for event in events:
            history._add(event)
        if not any(event.what == "outcome" for event in events) and events:
            history._add(Event(1, "outcome", "CallTimeout"))
        with pytest.raises(AssertionError, match=message):
            history.check({1: 1})
    late = History()
    late.closed()
    late.follow(late.begin(), lambda: [[7, 1, 0]], ENDS)
    with pytest.raises(AssertionError, match="after the end"):
        late.check({1: 1})
