"""`Pool` over a custom role: calls, streams, cancellation, timeouts, state."""

from __future__ import annotations

import copy
import dataclasses
import gc
import inspect
import os
import pickle
import resource
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import pytest
from conftest import echo_role, eventually

from inferpool import (
    CallCancelled,
    CallTimeout,
    ContextLengthExceeded,
    EmbedConfig,
    ModelNotFound,
    PayloadTooLarge,
    Policy,
    Pool,
    PoolClosed,
    RemoteError,
    Role,
    Stream,
    WorkerCrashed,
)
from inferpool._transport import HostChannel
from inferpool.host.drive import ThreadDriver
from inferpool.testing import scripted_embed


def test_a_call_gets_its_answer(pool: Pool) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    answer = pool.call("echo", "echo", {"x": array, "raw": b"\0\xff", "t": (1, (2.5, None))})
    np.testing.assert_array_equal(answer["x"], array)
    assert answer["raw"] == b"\0\xff"
    assert answer["t"] == (1, (2.5, None))


def test_an_array_arrives_writable_and_aligned(pool: Pool) -> None:
    answer = pool.call("echo", "echo", np.zeros(5000))
    answer[0] = 1.0
    assert answer.ctypes.data % 64 == 0


def test_dataclasses_and_structs_arrive_as_their_fields(pool: Pool) -> None:
    @dataclasses.dataclass
    class Point:
        x: int

    class Pair(msgspec.Struct):
        left: Point
        right: bytes

    answer = pool.call("echo", "echo", Pair(Point(1), b"r"))
    assert answer == {"left": {"x": 1}, "right": b"r"}


def test_a_handler_that_sends_nothing_answers_none(pool: Pool) -> None:
    assert pool.call("echo", "nothing") is None
    assert list(pool.stream("echo", "nothing")) == []


def test_a_call_with_several_items_is_refused(pool: Pool) -> None:
    with pytest.raises(ValueError, match="more than one item"):
        pool.call("echo", "count", 3)
    assert pool.call("echo", "echo", 1) == 1


def test_a_stream_yields_its_items_in_order(pool: Pool) -> None:
    assert list(pool.stream("echo", "count", 5000)) == list(range(5000))


def test_a_payload_larger_than_the_ring_arrives_intact_both_ways(pool: Pool) -> None:
    array = np.random.default_rng(0).integers(0, 1 << 60, size=(64 << 20) // 8)
    np.testing.assert_array_equal(pool.call("echo", "echo", array), array)


def test_streams_of_large_items_flow_while_others_are_served(pool: Pool) -> None:
    sizes = [3_000_000, 0, 10_000_000, 17]
    with pool.stream("echo", "sized", sizes) as stream:
        received = [len(item) for item in stream]
    assert received == sizes


def test_several_requests_larger_than_the_ring_wait_for_a_busy_worker(pool: Pool) -> None:
    payload = b"x" * (16 << 20)
    busy = pool.stream("echo", "sleep", 0.3)
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda: answers.append(len(pool.call("echo", "echo", payload))))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    assert list(busy) == [0.3]
    for thread in threads:
        thread.join()
    assert answers == [len(payload)] * 4


@pytest.mark.parametrize(
    "payload",
    [{1, 2}, object(), 1 << 64, "\udcff", np.array([object()]), {b"key": 1}, bytearray(b"x")],
    ids=repr,
)
def test_what_cannot_travel_is_refused_at_the_sender(pool: Pool, payload: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        pool.call("echo", "echo", payload)
    assert pool.status()["echo"].in_flight == 0


def test_a_frame_above_the_limit_is_refused(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inferpool.host.incarnation._FRAME_LIMIT", 1 << 20)
    with pytest.raises(PayloadTooLarge):
        pool.call("echo", "echo", b"x" * (2 << 20))
    with pytest.raises(PayloadTooLarge):
        pool.call("echo", "sized", [2 << 20])
    assert pool.call("echo", "echo", 1) == 1


@pytest.mark.parametrize(
    ("kind", "payload", "type_name"),
    [
        ("raise", "value", "ValueError"),
        ("raise", "exit", "SystemExit"),
        ("raise", "interrupt", "KeyboardInterrupt"),
        ("raise", "missing", "KeyError"),
        ("raise", "detailed", "Detailed"),
        ("raise", "long", "ValueError"),
        ("unencodable", None, "TypeError"),
        ("no such kind", None, "ValueError"),
    ],
)
def test_a_handler_that_fails_answers_its_call_and_the_loop_goes_on(
    pool: Pool, kind: str, payload: object, type_name: str
) -> None:
    pid = pool.call("echo", "facts")["pid"]
    with pytest.raises(RemoteError) as caught:
        pool.call("echo", kind, payload)
    assert caught.value.type_name == type_name
    assert "Traceback" in caught.value.remote_traceback
    assert pool.call("echo", "facts")["pid"] == pid


def test_a_timeout_ends_the_call_and_the_worker_stays_usable(pool: Pool) -> None:
    pid = pool.call("echo", "facts")["pid"]
    with pytest.raises(CallTimeout):
        pool.call("echo", "wait_for_abort", timeout=0.05)
    assert pool.call("echo", "facts")["pid"] == pid


def test_a_stream_beside_a_call_that_timed_out_is_dropped_with_its_caller(pool: Pool) -> None:
    def use() -> None:
        stream = pool.stream("echo", "count", None)
        next(stream)
        pool.call("echo", "echo", timeout=0.05)
        pytest.fail("the worker waits for the stream's reader")

    gc.collect()
    gc.disable()
    try:
        with pytest.raises(CallTimeout) as caught:
            use()
        del caught
        assert pool.call("echo", "facts", timeout=10)["dropped"] == 2
    finally:
        gc.enable()


def test_a_zero_timeout_is_no_hang_and_a_negative_one_an_error(pool: Pool) -> None:
    with pytest.raises(CallTimeout):
        pool.call("echo", "sleep", 1, timeout=0)
    with pytest.raises(ValueError, match="timeout"):
        pool.call("echo", "echo", timeout=-1)


def test_a_stream_keeps_what_came_before_its_timeout(pool: Pool) -> None:
    pool.start()
    stream = pool.stream("echo", "wait_for_abort", timeout=0.5)
    assert next(stream) is None
    with pytest.raises(CallTimeout):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)


def test_an_error_of_a_stream_is_not_told_to_come_of_another(pool: Pool) -> None:
    with pytest.raises(RemoteError) as caught:
        next(pool.stream("echo", "no such kind"))
    assert caught.value.__context__ is None


def test_a_call_is_cancelled_from_another_thread(pool: Pool) -> None:
    pool.start()
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            list(pool.stream("echo", "wait_for_abort"))
        except CallCancelled as error:
            caught.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    assert eventually(lambda: pool.cancel("echo") == 1)
    thread.join(10)
    assert len(caught) == 1
    assert pool.call("echo", "echo", 1) == 1


def test_a_call_that_is_about_to_be_opened_is_cancelled(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool.start()
    counts: list[int] = []

    def cancel(driver: ThreadDriver, incarnation: object) -> None:
        counts.append(pool.cancel("echo"))

    monkeypatch.setattr(ThreadDriver, "notifier", cancel)
    with pytest.raises(CallCancelled):
        pool.stream("echo", "wait_for_abort", timeout=10)
    assert counts == [1]
    monkeypatch.undo()
    assert pool.call("echo", "echo", 1) == 1


def test_a_call_whose_request_is_half_sent_is_cancelled_from_another_thread() -> None:
    policy = Policy(cancel_grace=60.0)
    with Pool(echo=echo_role(), policy=policy, close_timeout=0.0) as pool:
        pool.start()
        cancelled: list[str] = []

        def call(kind: str, payload: object) -> None:
            with pytest.raises(CallCancelled):
                pool.call("echo", kind, payload)
            cancelled.append(kind)

        busy = threading.Thread(target=call, args=("sleep", 60.0))
        upload = threading.Thread(target=call, args=("echo", b"x" * (16 << 20)))
        busy.start()
        assert eventually(lambda: pool.status()["echo"].workers[0].calls[0].taken)
        upload.start()
        assert eventually(lambda: pool.status()["echo"].counters["full_waits"] == 1)
        sleep, echo = pool.status()["echo"].workers[0].calls
        assert (sleep.taken, echo.taken, pool.status()["echo"].queue) == (True, False, 1)
        assert pool.cancel("echo") == 2
        for thread in (busy, upload):
            thread.join(10)
        assert sorted(cancelled) == ["echo", "sleep"]


def test_a_request_is_neither_sent_nor_taken_while_a_thread_sends_it() -> None:
    channel = HostChannel(ring_capacity=4096, frame_limit=1 << 20, wait="park")
    call = channel.open([b"x" * 20_000])

    def send() -> None:
        with pytest.raises(CallCancelled):
            call.send()

    sender = threading.Thread(target=send)
    sender.start()
    assert eventually(lambda: channel.counters()["parks"] > 0)
    assert (call.sent, call.taken) == (False, False)
    call.cancel()
    sender.join(10)
    assert not sender.is_alive()
    assert (call.sent, channel.counters()["full_waits"]) == (False, 1)
    assert channel.in_flight() == []


def test_a_stream_is_cancelled_while_another_thread_leads(pool: Pool) -> None:
    slow = pool.stream("echo", "wait_for_abort")
    next(slow)
    errors: list[BaseException] = []

    def wait(stream: object) -> None:
        try:
            next(stream)  # type: ignore[call-overload]
        except CallCancelled as error:
            errors.append(error)

    second = pool.stream("echo", "sleep", 0)
    threads = [threading.Thread(target=wait, args=(each,)) for each in (slow, second)]
    for thread in threads:
        thread.start()
    second.cancel()
    slow.cancel()
    for thread in threads:
        thread.join(10)
    assert errors
    assert pool.call("echo", "echo", 1) == 1


@pytest.mark.parametrize(("kind", "payload"), [("wait_for_abort", None), ("flood", 3900)])
def test_closing_a_stream_from_another_thread_ends_the_iteration(
    pool: Pool, kind: str, payload: int | None
) -> None:
    for _ in range(20):
        stream = pool.stream("echo", kind, payload)
        next(stream)
        errors: list[BaseException] = []

        def iterate(stream: Stream[Any] = stream, errors: list[BaseException] = errors) -> None:
            try:
                for _ in stream:
                    pass
            except BaseException as error:  # noqa: BLE001
                errors.append(error)

        thread = threading.Thread(target=iterate)
        thread.start()
        time.sleep(0.01)
        stream.close()
        thread.join(10)
        assert (errors, thread.is_alive()) == ([], False)
    assert pool.call("echo", "echo", 1) == 1


@pytest.mark.parametrize("how", ["close", "with", "drop"])
def test_an_endless_stream_stops_when_it_is_let_go(pool: Pool, how: str) -> None:
    stream = pool.stream("echo", "count", None)
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    if how == "close":
        stream.close()
        stream.close()
        assert list(stream) == []
    elif how == "with":
        with stream:
            pass
    else:
        del stream
    facts = pool.call("echo", "facts", timeout=10)
    assert facts["dropped"] == 1


def test_an_unread_stream_pauses_the_worker_instead_of_filling_memory(pool: Pool) -> None:
    stream = pool.stream("echo", "count", None)
    next(stream)
    received = []

    def settled() -> bool:
        pool.ping()
        received.append(pool.status()["echo"].counters["frames_received"])
        return len(received) > 10 and received[-1] == received[-10]

    assert eventually(settled)
    assert received[-1] < 20_000
    assert [next(stream) for _ in range(20_000)] == list(range(1, 20_001))
    stream.close()


def test_cancelling_twice_and_after_the_end_changes_nothing(pool: Pool) -> None:
    stream = pool.stream("echo", "count", 1)
    assert list(stream) == [0]
    stream.cancel()
    stream.cancel()
    stream.close()
    assert pool.call("echo", "echo", 1) == 1


def hold_the_gil(pool: Pool) -> Stream[Any]:
    """A stream whose handler holds the worker's GIL for longer than any test takes."""
    pool.start()
    held = pool.stream("echo", "hold_gil", 60.0)
    assert eventually(lambda: pool.status()["echo"].workers[0].calls[0].taken)
    return held


def test_ping_answers_while_a_handler_holds_the_gil(pool: Pool) -> None:
    held = hold_the_gil(pool)
    for _ in range(100):
        assert pool.ping("echo", timeout=5) < 5
    assert pool.status()["echo"].in_flight == 1
    pool.close(timeout=0)
    with pytest.raises(PoolClosed):
        next(held)


def test_close_while_a_handler_holds_the_gil(pool: Pool) -> None:
    held = hold_the_gil(pool)
    pool.close(timeout=0.2)
    with pytest.raises(PoolClosed):
        next(held)


def test_close_ends_calls_in_other_threads_and_is_final(pool: Pool) -> None:
    pool.start()
    outcomes: list[str] = []

    def wait() -> None:
        try:
            pool.call("echo", "wait_for_abort")
        except PoolClosed:
            outcomes.append("closed")

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert eventually(lambda: pool.status()["echo"].in_flight == 3)
    pool.close()
    for thread in threads:
        thread.join(10)
    assert outcomes == ["closed"] * 3
    pool.close()
    with pytest.raises(PoolClosed):
        pool.call("echo", "echo")
    assert pool.status()["echo"].state == "stopped"


def test_status_tells_what_a_role_is_doing(pool: Pool) -> None:
    assert pool.status()["echo"].state == "stopped"
    assert pool.start() is pool
    status = pool.status()["echo"]
    assert (status.state, status.incarnation, status.in_flight) == ("ready", 1, 0)
    assert status.pid == pool.call("echo", "facts")["pid"]
    assert status.uptime is not None
    assert status.load_seconds is not None


def test_counters_say_what_the_channel_did(pool: Pool) -> None:
    size = 9 << 20  # more than two rings
    assert pool.call("echo", "echo", b"x" * size) == b"x" * size
    assert list(pool.stream("echo", "count", 3)) == [0, 1, 2]
    counters = pool.status()["echo"].counters
    assert counters["frames_sent"] == 3  # and the start message
    assert counters["frames_received"] == 2 + 2 + 4
    assert counters["bytes_sent"] > size
    assert counters["bytes_received"] > size
    assert counters["fragments"] > 18
    assert counters["full_waits"] >= 0
    assert (counters["rescued_waits"], counters["dropped_late"], counters["violations"]) == (
        0,
        0,
        0,
    )
    pool.close()
    assert pool.status()["echo"].counters == counters


def test_the_end_of_the_start_comes_in_time() -> None:
    with Pool(echo=echo_role(end_late=True)) as pool:
        stream = pool.stream("echo", "count", 1)  # who waits looks whether the worker stands
        assert list(stream) == [0]
        assert pool.status()["echo"].counters["dropped_late"] == 0


def test_an_idle_pool_sleeps() -> None:
    with Pool(a=echo_role(), b=echo_role()) as pool:
        pool.start()
        pids = [status.pid for status in pool.status().values()]

        def switches() -> int:
            lines = [
                line
                for pid in pids
                for status in Path(f"/proc/{pid}/task").glob("*/status")
                for line in status.read_text().splitlines()
            ]
            return sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)

        def asleep() -> bool:
            before = switches()
            time.sleep(1)
            return switches() == before

        # The last spin after the start takes a moment, and more on a busy machine.
        assert eventually(asleep)


def test_status_while_a_worker_loads() -> None:
    with Pool(slow=echo_role(load_seconds=30)) as pool:
        pool.ping()
        assert pool.status()["slow"].state == "starting"


def test_roles_do_not_wait_for_each_other() -> None:
    with Pool(one=echo_role(), two=echo_role()) as pool:
        pool.start()
        busy = pool.stream("one", "wait_for_abort")
        next(busy)
        assert pool.call("two", "echo", 2, timeout=10) == 2
        assert pool.ping() < 5
        pids = {status.pid for status in pool.status().values()}
        assert len(pids) == 2


def test_options_reach_the_session_and_roles_their_name() -> None:
    with Pool(echo=echo_role(some=[1, b"2"])) as pool:
        facts = pool.call("echo", "facts")
    assert (facts["role"], facts["options"]) == ("echo", {"some": [1, b"2"]})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "at least one role"),
        ({"chta": "smollm2"}, "'chta' is neither an option"),
        ({"embed": 3}, "embed takes"),
    ],
)
def test_a_pool_refuses_what_it_does_not_know(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Pool(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"wait": "busy"},
        {"log_level": "LOUD"},
        {"memory_budget": 0},
        {"close_timeout": float("nan")},
        {"../role": echo_role()},
    ],
    ids=str,
)
def test_a_pool_refuses_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options)).strip("./")):
        Pool(echo=echo_role(), **options)  # type: ignore[arg-type]


def test_an_unknown_role_and_a_malformed_path_are_refused(pool: Pool) -> None:
    with pytest.raises(ValueError, match="no role 'nope'"):
        pool.call("nope", "echo")
    with pytest.raises(AttributeError, match="no role 'chat'"):
        pool.chat("hello")
    with pytest.raises(ValueError, match=r"package\.module:attribute"):
        Role("echo_role", "echo_role:HANDLERS")


def test_a_role_that_a_pool_lacks_is_an_attribute_that_it_lacks(pool: Pool) -> None:
    for each in (pool, pool.as_async()):
        assert not hasattr(each, "chat")
        assert callable(mock.Mock(spec=each).status)
        assert "status" in dict(inspect.getmembers(each))


@pytest.mark.parametrize(
    "option", [{"replicas": 0}, {"replicas": 65}, {"retry": -1}, {"retry": 11}], ids=str
)
def test_what_the_host_knows_of_a_role_is_bounded(option: dict[str, int]) -> None:
    for make in (EmbedConfig, partial(Role, "a:b")):
        with pytest.raises(ValueError, match=f"{next(iter(option))} must be between"):
            make("c:d", **option)  # type: ignore[arg-type]


def test_paths_may_be_of_any_type_but_one_is_no_sequence() -> None:
    model = Path("/no/such/model.gguf")
    with Pool(embed=EmbedConfig(model)) as pool, pytest.raises(ModelNotFound):  # type: ignore[arg-type]
        pool.embed(["text"])
    role = Role("echo_role:make_session", "echo_role:HANDLERS", readable=[Path("/usr")])
    with Pool(echo=role) as pool:
        assert pool.call("echo", "echo", 1) == 1
    with pytest.raises(TypeError, match="model must be a name or a path, not int"):
        EmbedConfig(5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="readable must be a sequence of paths"):
        Role("a:b", "c:d", readable="/folder")


@pytest.mark.parametrize("value", [1.0, True, np.int64(1)])
@pytest.mark.parametrize("option", ["replicas", "retry", "n_batch"])
def test_a_config_names_what_is_no_int(option: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"{option} must be an int, not "):
        EmbedConfig("minilm", **{option: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [partial(Pool, embed="minilm"), partial(EmbedConfig, "minilm")])
def test_a_policy_is_no_dict(make: Callable[..., object]) -> None:
    with pytest.raises(TypeError, match="policy must be a Policy, not dict"):
        make(policy={"max_queue": 3})


@pytest.mark.parametrize("option", ["start_timeout", "stuck_after", "max_crashes", "max_queue"])
def test_a_policy_names_what_is_of_the_wrong_type(option: str) -> None:
    with pytest.raises(TypeError, match=f"{option} must be an? (number|int), not str"):
        Policy(**{option: "5"})  # type: ignore[arg-type]


def test_a_pool_that_is_dropped_ends_its_workers() -> None:
    pool = Pool(echo=echo_role())
    pid = pool.call("echo", "facts")["pid"]
    assert pid
    del pool  # the fixture that watches for workers does the rest


def test_more_calls_than_slots_wait_their_turn(pool: Pool) -> None:
    pool.start()
    busy = pool.stream("echo", "sleep", 0.3)
    streams = [pool.stream("echo", "echo", number) for number in range(255)]
    extra: list[object] = []
    thread = threading.Thread(target=lambda: extra.append(pool.call("echo", "echo", "extra")))
    thread.start()
    assert list(busy) == [0.3]
    assert [next(stream) for stream in streams] == list(range(255))
    thread.join(10)
    assert extra == ["extra"]


def test_cancelling_calls_does_not_cancel_the_start_of_their_worker() -> None:
    with Pool(slow=echo_role(load_seconds=0.5)) as pool:
        stream = pool.stream("slow", "echo", 1)
        assert pool.cancel("slow") == 1
        with pytest.raises(CallCancelled):
            next(stream)
        assert pool.call("slow", "echo", 2) == 2
        assert pool.status()["slow"].incarnation == 1


def test_a_request_given_up_before_it_is_served_is_not_served(pool: Pool) -> None:
    busy = pool.stream("echo", "sleep", 0.3)
    deadly = pool.stream("echo", "exit", 1)
    deadly.close()
    assert list(busy) == [0.3]
    facts = pool.call("echo", "facts")
    assert (facts["dropped"], pool.status()["echo"].incarnation) == (1, 1)


def test_the_status_tells_how_far_a_worker_has_loaded() -> None:
    with Pool(echo=echo_role(load_seconds=1.0)) as pool:
        assert pool.status()["echo"].loading == 0.0
        answer = pool.stream("echo", "count", 1)
        parts = {pool.status()["echo"].loading}
        while pool.status()["echo"].state == "starting":
            parts.add(pool.status()["echo"].loading)
        assert list(answer) == [0]
        assert len(parts) > 10
        assert all(0.0 <= part <= 1.0 for part in parts)
        assert pool.status()["echo"].loading == 1.0


def test_a_large_request_waits_for_a_worker_that_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inferpool.host.calls.QUEUE_SECONDS", 0.1)
    with Pool(echo=echo_role(load_seconds=0.5)) as pool:
        assert len(pool.call("echo", "echo", b"x" * (8 << 20))) == 8 << 20


def test_a_stream_and_a_role_keep_their_pool() -> None:
    def stream() -> Stream[int]:
        return Pool(echo=echo_role()).stream("echo", "count", 3)

    assert list(stream()) == [0, 1, 2]
    assert Pool(embed=scripted_embed(4)).embed(["bees"]).shape == (1, 4)


@pytest.mark.parametrize(
    "error",
    [
        WorkerCrashed("it died", role="echo", pid=7, exit="SIGKILL", log_tail="last words"),
        RemoteError("KeyError", "no such key", "traceback"),
        ContextLengthExceeded("too long", asked=9, context=4),
        CallTimeout("no answer within 1 s"),
        PayloadTooLarge("too large"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_can_be_copied_and_pickled(error: Exception) -> None:
    error.add_note("a note")
    for other in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert type(other) is type(error)
        assert (other.args, other.__dict__) == (error.args, error.__dict__)


@pytest.mark.parametrize("act", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_pool_is_not_copied_and_says_so(pool: Pool, act: Callable[[object], object]) -> None:
    for each in (pool, pool.as_async()):
        with pytest.raises(TypeError, match="a pool can be neither copied nor sent"):
            act(each)


def test_an_error_keeps_nothing_of_its_call(pool: Pool) -> None:
    with pytest.raises(CallTimeout) as caught:
        pool.call("echo", "sleep", 0.3, timeout=0.05)
    assert pickle.loads(pickle.dumps(caught.value)).rung == caught.value.rung


def test_threads_may_share_a_stream(pool: Pool) -> None:
    stream = pool.stream("echo", "count", 5000)
    received: list[int] = []
    threads = [threading.Thread(target=lambda: received.extend(stream)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(received) == list(range(5000))


def test_abandoned_streams_give_their_slots_back(pool: Pool) -> None:
    for _ in range(600):
        assert next(pool.stream("echo", "count", None)) == 0
    assert pool.call("echo", "echo", 1) == 1
    assert pool.status()["echo"].in_flight == 0


def test_memory_stays_flat_over_many_calls(pool: Pool) -> None:
    def resident_kib(pid: int) -> int:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * resource.getpagesize() // 1024

    def many() -> None:
        for _ in range(10_000):
            pool.call("echo", "echo", (b"x" * 3000, [1, "two"]))

    many()
    worker = pool.call("echo", "facts")["pid"]
    before = [resident_kib(os.getpid()), resident_kib(worker)]
    many()
    after = [resident_kib(os.getpid()), resident_kib(worker)]
    growth = [now - then for now, then in zip(after, before, strict=True)]
    assert max(growth) < 128, growth  # 13 bytes a call
