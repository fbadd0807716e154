"""The worker runtime where a whole pool does not reach: early shutdown, odd frames, fakes."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from conftest import echo_role, eventually

from inferpool import CallCancelled, Pool, RemoteError, codec
from inferpool._transport import HostChannel
from inferpool.host.process import RoleLogFile, WorkerProcess
from inferpool.messages import Sandbox, Start, WorkerArguments
from inferpool.worker import Reply, RoleConfig, WorkerLoopState, run_worker

CONFIG = Start(
    role="fake",
    incarnation=1,
    session="a:b",
    handlers="a:b",
    options={},
    log_path=None,
    log_level="INFO",
    sys_path=[],
)


class FakeToken:
    callback = 0
    data = 0

    def is_set(self) -> bool:
        return False


class FakeRequest:
    """Records what becomes of a request."""

    def __init__(self, parts: codec.Parts) -> None:
        self.parts = parts
        self.call = 1
        self.abort = FakeToken()
        self.cancelled = False
        self.sent: list[Any] = []
        self.outcome: list[str] = []

    def send(self, parts: codec.Parts) -> None:
        self.sent.append(codec.decode(parts))

    def try_send(self, parts: codec.Parts) -> bool:
        self.send(parts)
        return True

    def fail(self, parts: codec.Parts) -> None:
        self.outcome.append(codec.decode(parts)[1]["type_name"])

    def end(self) -> None:
        self.outcome.append("end")


class FakeChannel:
    """Hands out requests, then shuts down."""

    unexpected_control = 0

    def __init__(self, requests: Sequence[FakeRequest | None]) -> None:
        self.requests = list(requests)
        self.abort = FakeToken()
        self.events: list[str] = []

    @property
    def shutting_down(self) -> bool:
        return not self.requests

    def receive(self, timeout: float | None = None) -> FakeRequest | None:
        self.events.append(f"receive({timeout})")
        return self.requests.pop(0)

    def shut_down(self) -> None:
        self.events.append("shut down")

    def join_heartbeat(self) -> None:
        self.events.append("heartbeat joined")


class FakeLog:
    def limit_size(self) -> None:
        """Nothing is written."""


@pytest.fixture(autouse=True)
def keep_stdio(monkeypatch: pytest.MonkeyPatch) -> None:
    """`run_worker` in this process must leave the test runner's streams alone."""
    monkeypatch.setattr("inferpool.worker.runtime.redirect_stdio", lambda path: None)
    monkeypatch.setattr(
        "inferpool.worker.runtime.configure_worker_logging", lambda path, level: FakeLog()
    )


class FakeSession:
    def __init__(self, channel: FakeChannel) -> None:
        self.channel = channel

    def close(self) -> None:
        self.channel.events.append("session closed")


def run(
    channel: FakeChannel, session_class: type[FakeSession] = FakeSession, **handlers: Any
) -> None:
    def make_session(role_config: RoleConfig, abort: Any) -> FakeSession:
        assert role_config is CONFIG
        assert abort is channel.abort
        return session_class(channel)

    run_worker(channel, CONFIG, session_factory=make_session, kind_handlers=handlers)  # type: ignore[arg-type]


def test_the_end_comes_in_order_and_the_session_closes_once() -> None:
    channel = FakeChannel([])
    run(channel)
    assert channel.events == ["shut down", "session closed", "heartbeat joined"]


def test_a_request_given_up_half_sent_is_ended_unserved() -> None:
    request = FakeRequest([])
    run(FakeChannel([request]))
    assert (request.sent, request.outcome) == ([], ["end"])


def test_a_request_that_cannot_be_decoded_is_answered_and_the_loop_goes_on() -> None:
    broken, good = FakeRequest(b"\xc1"), FakeRequest(codec.encode("echo", 1))

    def echo(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
        reply.send("echo", payload)

    run(FakeChannel([broken, good]), echo=echo)
    assert broken.outcome == ["ProtocolError"]
    assert (good.sent, good.outcome) == ([("echo", 1)], ["end"])


def test_requests_are_counted_and_given_up_ones_too() -> None:
    seen: list[tuple[int, int]] = []

    def give_up(reply: Any, payload: Any, state: WorkerLoopState) -> None:
        seen.append((state.served, state.dropped))
        reply._request.cancelled = True
        raise CallCancelled

    requests = [FakeRequest(codec.encode("give_up", None)) for _ in range(3)]
    run(FakeChannel(requests), give_up=give_up)
    assert seen == [(0, 0), (1, 1), (2, 2)]
    assert [request.outcome for request in requests] == [["end"]] * 3


def test_a_handler_that_gives_up_by_itself_tells_its_caller() -> None:
    def give_up(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
        assert not reply.abort.is_set()
        raise CallCancelled

    request = FakeRequest(codec.encode("give_up", None))
    run(FakeChannel([request]), give_up=give_up)
    assert request.outcome == ["CallCancelled"]


def test_an_unexpected_control_message_is_logged_and_dropped(tmp_path: Path) -> None:
    with Pool(echo=echo_role(), log_dir=tmp_path) as pool:
        pool.start()
        incarnation = pool._core.supervisor("echo").start()
        control = socket.socket(fileno=os.dup(incarnation.channel.descriptors()[1]))
        with control:
            control.send(b"garbage")
            control.send(b"\xff" * 48)
        log = tmp_path / "worker-echo.log"
        assert eventually(lambda: "unexpected control message (2 so far)" in log.read_text())
        assert pool.call("echo", "echo", 1) == 1
        assert pool.ping() < 5
        assert pool.status()["echo"].incarnation == 1


class SteppingSession(FakeSession):
    """Answers what was deferred, one step each."""

    def __init__(self, channel: FakeChannel) -> None:
        super().__init__(channel)
        self.waiting: list[Reply] = []

    def step(self) -> float | None:
        self.channel.events.append("step")
        reply = self.waiting.pop(0)
        assert not reply.cancelled
        assert reply.try_send("late", None)
        reply.end()
        return 0.0 if self.waiting else None


def submit(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
    state.session.waiting.append(reply)  # type: ignore[attr-defined]
    reply.defer()


def test_deferred_calls_are_served_by_steps_between_requests() -> None:
    first, second = (FakeRequest(codec.encode("submit", None)) for _ in range(2))
    channel = FakeChannel([first, second, None, None, None])
    run(channel, SteppingSession, submit=submit)
    assert [request.outcome for request in (first, second)] == [["end"], ["end"]]
    assert first.sent == [("late", None)]
    steps = ["receive(None)", "receive(0.0)", "receive(0.0)", "step", "receive(0.0)", "step"]
    assert channel.events[: len(steps)] == steps
    assert channel.events[len(steps)] == "receive(None)"


def test_steps_are_made_however_many_requests_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inferpool.worker.runtime.TAKING_SECONDS", 0.0)
    requests = [FakeRequest(codec.encode("submit", None)) for _ in range(5)]
    channel = FakeChannel(requests)
    run(channel, SteppingSession, submit=submit)
    assert channel.events.count("step") == len(requests)


def test_a_session_without_steps_may_end_its_calls_from_elsewhere() -> None:
    replies: list[Reply] = []

    def keep(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
        reply.defer()
        replies.append(reply)

    request = FakeRequest(codec.encode("keep", None))
    channel = FakeChannel([request, None])
    run(channel, keep=keep)
    assert channel.events[:2] == ["receive(None)", "receive(None)"]
    replies[0].end()
    assert request.outcome == ["end"]


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError


class Undetailed(Exception):
    @property
    def details(self) -> dict[str, int]:
        raise RuntimeError


@pytest.mark.parametrize("error", [Unprintable(), Undetailed()])
def test_an_error_that_fails_to_describe_itself_ends_its_call_and_no_more(
    error: Exception,
) -> None:
    def fail(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
        raise error

    requests = [FakeRequest(codec.encode("fail", None)) for _ in range(2)]
    run(FakeChannel(requests), fail=fail)
    assert [request.outcome for request in requests] == [[type(error).__name__]] * 2


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, 0), (SystemExit(), 0), (SystemExit(7), 7), (SystemExit("why"), 1), (ValueError(), 1)],
    ids=repr,
)
def test_a_process_that_a_handler_forked_ends_when_it_comes_back(
    monkeypatch: pytest.MonkeyPatch, error: BaseException | None, status: int
) -> None:
    statuses: list[int] = []
    monkeypatch.setattr(os, "_exit", statuses.append)

    def fork(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
        state.forked = True
        if error is not None:
            raise error

    run(FakeChannel([FakeRequest(codec.encode("fork", None))]), fork=fork)
    assert statuses == [status]


def test_an_error_that_only_has_the_name_of_one_of_ours_is_not_taken_for_it() -> None:
    def fail(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
        raise asyncio.QueueFull

    request = FakeRequest(codec.encode("fail", None))
    run(FakeChannel([request]), fail=fail)
    assert request.outcome == ["asyncio.queues.QueueFull"]


def test_a_step_that_raises_fails_what_was_deferred_and_the_loop_goes_on() -> None:
    def submit_nowhere(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
        reply.defer()

    first, second = (FakeRequest(codec.encode("submit", None)) for _ in range(2))
    run(FakeChannel([first, None, second, None]), SteppingSession, submit=submit_nowhere)
    assert [request.outcome for request in (first, second)] == [["IndexError"], ["IndexError"]]


def test_a_role_imports_numpy_with_its_first_array() -> None:
    with Pool(echo=echo_role()) as pool:
        assert pool.call("echo", "echo", [b"x" * 5000, (1, "two")]) == [b"x" * 5000, (1, "two")]
        assert not pool.call("echo", "facts")["numpy"]
        assert pool.call("echo", "echo", np.arange(3)).tolist() == [0, 1, 2]
        assert pool.call("echo", "facts")["numpy"]


def test_an_error_too_long_for_a_frame_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inferpool.host.incarnation._FRAME_LIMIT", 1 << 16)
    with Pool(echo=echo_role()) as pool:
        with pytest.raises(RemoteError) as caught:
            pool.call("echo", "raise", "long")
        assert caught.value.type_name == "ValueError"
        assert pool.call("echo", "echo", 1) == 1


@pytest.mark.parametrize("capacity", [0, 64, 100, 2**32])
def test_a_ring_of_a_size_that_no_ring_has(capacity: int) -> None:
    with pytest.raises(ValueError, match=f"a power of two from 128 to 2.*31, not {capacity}$"):
        HostChannel(ring_capacity=capacity, frame_limit=4096, wait="park")


def test_a_worker_told_to_end_before_it_was_told_what_to_be() -> None:
    channel = HostChannel(ring_capacity=4096, frame_limit=4096, wait="park")
    log = RoleLogFile(None, "unborn")
    fds = channel.worker_fds()
    arguments = WorkerArguments(
        fds=fds,
        host_pid=os.getpid(),
        frame_limit=4096,
        wait="park",
        sandbox=Sandbox(level="basic"),
    )
    process = WorkerProcess(msgspec.json.encode(arguments).decode(), fds, log, {}, None)
    channel.watch(process.pid)
    channel.close()
    assert process.reap(30) == "exit code 0"
    log.close()
