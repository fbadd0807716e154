"""Restarts, verdicts, releases: what the host does about its workers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, cast

import pytest
from conftest import children, echo_role, eventually, is_running

from inferpool import (
    AsyncPool,
    CallCancelled,
    CallTimeout,
    PoisonousRequest,
    Policy,
    Pool,
    PoolClosed,
    QueueFull,
    RoleDegraded,
    WorkerCrashed,
    WorkerStartError,
    WorkerStuck,
)
from inferpool._transport import HostChannel
from inferpool.host.calls import OpenCall
from inferpool.host.incarnation import Incarnation
from inferpool.host.process import WorkerProcess, call_later
from inferpool.host.restart import CrashRecord
from inferpool.host.watch import Watch

CPU = min(os.sched_getaffinity(0))


def crash(pool: Pool, code: int, role: str = "echo") -> None:
    with pytest.raises(WorkerCrashed):
        pool.call(role, "exit", code)


# Restarts.


def test_too_many_crashes_degrade_the_role_until_it_is_reset() -> None:
    policy = Policy(max_crashes=2, backoff=0.0)
    with Pool(echo=echo_role(), other=echo_role(), policy=policy) as pool:
        for code in (1, 2, 3):
            pool.call("echo", "echo")
            crash(pool, code)
        for _ in range(2):
            with pytest.raises(RoleDegraded, match=r"crashed 3 times in 60 s; last: .*exit code 3"):
                pool.call("echo", "echo")
        status = pool.status()["echo"]
        assert (status.state, status.restarts, status.incarnation) == ("degraded", 3, 3)
        assert status.degraded is not None
        assert pool.call("other", "echo", 1) == 1
        pool.reset("echo")
        assert pool.call("echo", "echo", 1) == 1
        assert pool.status()["echo"].degraded is None


def test_crashes_outside_of_the_window_do_not_count() -> None:
    policy = Policy(max_crashes=1, crash_window=0.2, backoff=0.0)
    with Pool(echo=echo_role(), policy=policy) as pool:
        for code in range(4):
            pool.call("echo", "echo")
            crash(pool, code)
            time.sleep(0.25)
        assert pool.call("echo", "echo", 1) == 1


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_second_restart_in_a_row_waits(asynchronous: bool) -> None:
    with Pool(echo=echo_role(), policy=Policy(backoff=1.0)) as pool:
        for code in (1, 2):
            pool.call("echo", "echo")
            crash(pool, code)
        with pytest.raises(CallTimeout):
            pool.call("echo", "echo", timeout=0.05)
        assert pool.status()["echo"].incarnation == 2
        if asynchronous:
            assert asyncio.run(pool.as_async().call("echo", "echo", 1)) == 1
        else:
            assert pool.call("echo", "echo", 1) == 1
        assert pool.status()["echo"].incarnation == 3


def test_pauses_double_up_to_a_limit_and_are_shortened_at_random(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A clock that stands still, so that no time passes between a crash and the look at its pause.
    monkeypatch.setattr("inferpool.host.restart.time", SimpleNamespace(monotonic=lambda: 0.0))

    def pauses() -> list[float]:
        record = CrashRecord(Policy(max_crashes=100, backoff=0.5))
        seen = []
        for _ in range(7):
            record.crashed(at_load=False, suspect=None, how="SIGSEGV")
            seen.append(record.pause())
        return seen

    several = [pauses() for _ in range(40)]
    for place, full in enumerate([0.0, 0.5, 1.0, 2.0, 4.0, 5.0, 5.0]):
        shortest, *_, longest = sorted(each[place] for each in several)
        assert full / 2 <= shortest <= longest <= full
        assert full == 0.0 or longest - shortest > full / 10


def test_a_pause_has_its_limit_after_any_number_of_crashes() -> None:
    record = CrashRecord(Policy(max_crashes=5000, crash_window=1e6))
    for _ in range(1100):
        record.crashed(at_load=False, suspect=None, how="SIGSEGV")
    assert 0 < record.pause() <= 5


def test_the_heartbeat_that_a_look_wakes_does_not_count_as_waiting_for_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []

    class Channel:
        reader_behind = False

        def ping(self) -> Any:
            log.append("ping")
            still = SimpleNamespace(requests=1, replies=0, finished=0, polls=0)
            return SimpleNamespace(next=lambda timeout: SimpleNamespace(progress=still))

    def times(pid: int) -> dict[int, tuple[bool, float]]:
        log.append("threads")
        return {1: (False, 0.0)}

    seconds = iter([0.0, 0.2, 0.4, 0.6, 0.8])
    clock = SimpleNamespace(monotonic=lambda: next(seconds))
    monkeypatch.setattr("inferpool.host.watch.time", clock)
    monkeypatch.setattr("inferpool.host.watch.thread_times", times)
    watch = Watch(cast("HostChannel", Channel()), 1)
    frozen = [watch.look() for _ in range(4)]
    assert log == ["ping", "ping", "threads", "ping", "threads", "ping"]
    assert frozen == pytest.approx([0.0, 0.0, 0.2, 0.4])


def test_a_look_that_a_signal_s_handler_ends_is_not_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks: list[None] = []
    seconds = itertools.count(0.0, 0.2)
    monkeypatch.setattr(
        "inferpool.host.watch.time", SimpleNamespace(monotonic=partial(next, seconds))
    )
    channel = SimpleNamespace(reader_behind=False, ping=lambda: looks.append(None))
    watch = Watch(cast("HostChannel", channel), 1)

    def interrupt(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal place
        if frame.f_code is not Watch.look.__code__:
            return None
        place -= event == "line"
        if place == 0:
            raise KeyboardInterrupt
        return interrupt

    for each in range(1, 8):
        place = each
        before = sys.gettrace()
        sys.settrace(interrupt)
        with contextlib.suppress(KeyboardInterrupt):
            watch.look()
        sys.settrace(before)
        looks.clear()
        other = threading.Thread(target=watch.look, daemon=True)
        other.start()
        other.join(10)
        assert len(looks) == 1


@pytest.mark.parametrize("kind", ["call", "stream"])
def test_a_call_that_a_signal_s_handler_ends_as_it_begins_is_not_in_flight(
    pool: Pool, kind: str
) -> None:
    pool.call("echo", "echo")
    (incarnation,) = pool._core.supervisor("echo")._members
    steps = (Incarnation.begin, Incarnation.begun, OpenCall.__init__)
    codes = {step.__code__ for step in steps}

    def interrupt(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal place
        if frame.f_code not in codes:
            return None
        place -= event in {"line", "return"}
        if place == 0:
            raise KeyboardInterrupt
        return interrupt

    for each in itertools.count(1):
        place = each
        before = sys.gettrace()
        sys.settrace(interrupt)
        with contextlib.suppress(KeyboardInterrupt):
            if kind == "call":
                pool.call("echo", "sleep", 0.001)
            else:
                pool.stream("echo", "nothing").close()
        sys.settrace(before)
        assert not incarnation.flights, each
        if place > 0:
            break


def test_a_request_that_crashed_two_workers_is_refused() -> None:
    with Pool(echo=echo_role(), policy=Policy(backoff=0.0)) as pool:
        for _ in range(2):
            pool.call("echo", "echo")
            crash(pool, 7)
        with pytest.raises(PoisonousRequest):
            pool.call("echo", "exit", 7)
        assert pool.call("echo", "echo", 1) == 1
        pool.reset("echo")
        crash(pool, 7)


def test_what_cannot_travel_is_refused_after_a_crash_as_before(pool: Pool) -> None:
    pool.call("echo", "echo")
    crash(pool, 7)
    for payload in (1 << 64, "\udcff"):
        with pytest.raises(ValueError, match="payload cannot be encoded"):
            pool.call("echo", "echo", payload)


def test_a_request_is_not_blamed_for_what_others_do() -> None:
    policy = Policy(max_crashes=100, backoff=0.0)
    with Pool(echo=echo_role(), policy=policy) as pool:
        for turn in range(3):
            pool.call("echo", "echo")
            busy = pool.stream("echo", "wait_for_abort")
            next(busy)
            queued = pool.stream("echo", "count", 1)
            pid = pool.status()["echo"].pid
            assert pid is not None
            # First from outside; then by the one that the worker is busy with.
            os.kill(pid, signal.SIGKILL if turn < 2 else signal.SIGSEGV)
            for stream in (busy, queued):
                with pytest.raises(WorkerCrashed):
                    next(stream)
        assert list(pool.stream("echo", "count", 1)) == [0]


def test_a_request_that_its_worker_let_go_of_is_not_blamed_for_a_later_crash() -> None:
    policy = Policy(max_crashes=100, backoff=0.0)
    with Pool(echo=echo_role(), policy=policy) as pool:
        for _ in range(3):
            stream = pool.stream("echo", "wait_for_abort")
            next(stream)
            del stream
            assert eventually(lambda: not pool.status()["echo"].workers[0].calls)
            stream = pool.stream("echo", "wait_for_abort")
            next(stream)
            pid = pool.status()["echo"].pid
            assert pid is not None
            stream.close()
            # Seen past the incarnation, which nobody asks whether the worker has let go.
            assert eventually(stream._opened.call.is_over)
            os.kill(pid, signal.SIGSEGV)
            assert eventually(lambda: pool.status()["echo"].state == "dead")
            assert str(pool.status()["echo"].last_exit).endswith("ended: SIGSEGV")


def test_a_request_that_its_worker_kept_is_blamed() -> None:
    policy = Policy(max_crashes=100, backoff=0.0)
    with Pool(echo=echo_role(), policy=policy) as pool:
        for _ in range(2):
            pool.start()
            given_up = pool.stream("echo", "sleep", 60)
            assert eventually(lambda: pool.status()["echo"].queue == 0)
            given_up.close()
            pid = pool.status()["echo"].pid
            assert pid is not None
            os.kill(pid, signal.SIGSEGV)
            assert eventually(lambda: pool.status()["echo"].state == "dead")
            assert "in flight: sleep (" in str(pool.status()["echo"].last_exit)
        with pytest.raises(PoisonousRequest):
            pool.stream("echo", "sleep", 60)


def test_a_model_that_crashes_twice_at_load_is_quarantined() -> None:
    with Pool(bad=echo_role(exit=9), policy=Policy(max_crashes=9, backoff=0.0)) as pool:
        for _ in range(2):
            with pytest.raises(WorkerStartError, match="exit code 9"):
                pool.call("bad", "echo")
        with pytest.raises(RoleDegraded, match="while it loaded, 2 times in a row"):
            pool.call("bad", "echo")
        pool.configure("bad", echo_role())
        assert pool.call("bad", "echo", 1) == 1


@pytest.mark.parametrize(("retry", "outcome"), [(0, "crash"), (1, "answer")])
def test_a_call_is_made_again_only_if_its_role_allows_it(
    tmp_path: Path, retry: int, outcome: str
) -> None:
    role = echo_role()
    role = type(role)(role.session, role.handlers, retry=retry)
    with Pool(echo=role) as pool:
        pool.start()
        marker = str(tmp_path / "crashed")
        try:
            answer = pool.call("echo", "exit_once", marker)
        except WorkerCrashed:
            answer = "crash"
        assert answer == outcome
        assert pool.status()["echo"].restarts == 1


# Verdicts.


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("how", ["sleep", "hold_gil", "compute", "stopped"])
def test_a_worker_without_progress_is_stuck(how: str, asynchronous: bool) -> None:
    with Pool(echo=echo_role(), policy=Policy(stuck_after=0.5)) as pool:
        pid = pool.call("echo", "facts")["pid"]
        if how == "stopped":
            os.kill(pid, signal.SIGSTOP)
        kind = "sleep" if how == "stopped" else how
        payload = {"cpu": CPU, "seconds": 60.0} if how == "compute" else 60.0
        with pytest.raises(WorkerStuck, match=r"made no progress for 0\.5 s") as caught:
            if asynchronous:
                asyncio.run(pool.as_async().call("echo", kind, payload))
            else:
                pool.call("echo", kind, payload)
        assert (caught.value.pid, caught.value.exit) == (pid, "SIGKILL")
        assert kind in caught.value.in_flight[0]
        assert not is_running(pid)
        assert pool.call("echo", "echo", 1) == 1


def test_a_worker_that_is_slow_to_go_is_ended_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reap = WorkerProcess.reap
    # As when the kernel takes longer than that, with a driver that hangs or much memory to free.
    monkeypatch.setattr(WorkerProcess, "reap", lambda process, timeout: reap(process, 10) and None)
    with Pool(echo=echo_role(), policy=Policy(stuck_after=0.3, backoff=0.0)) as pool:
        pool.start()
        with pytest.raises(WorkerStuck) as caught:
            pool.call("echo", "sleep", 60.0)
        assert caught.value.exit == "unknown, since it was not gone 5 s after SIGKILL"
        assert "ready in" in caught.value.log_tail
        assert pool.call("echo", "echo", 1) == 1


def test_a_worker_that_looks_at_its_token_is_busy() -> None:
    with Pool(echo=echo_role(), policy=Policy(stuck_after=0.4)) as pool:
        assert pool.call("echo", "poll_for", 1.5) == 1.5
        status = pool.status()["echo"]
        assert status.restarts == 0
        assert status.workers[0].progress["polls"] > 0


def test_a_worker_that_waits_for_a_cpu_is_not_stuck() -> None:
    loop = f"import os\nos.sched_setaffinity(0, {{{CPU}}})\nwhile True: pass"
    with contextlib.ExitStack() as ending:
        for _ in range(7):
            process = ending.enter_context(subprocess.Popen([sys.executable, "-c", loop]))
            ending.callback(process.kill)
        pool = ending.enter_context(Pool(echo=echo_role(), policy=Policy(stuck_after=2.0))).start()
        # A tenth of the waiting counts, so beside more load than this one's the bound is not near.
        began = time.monotonic()
        assert pool.call("echo", "compute", {"cpu": CPU, "seconds": 0.4}) == "answer"
        assert time.monotonic() - began > 2.0
        assert pool.status()["echo"].restarts == 0


def test_a_worker_that_waits_for_its_reader_is_not_stuck() -> None:
    with Pool(echo=echo_role(), policy=Policy(stuck_after=0.4)) as pool:
        unread = pool.stream("echo", "count", None)
        assert next(unread) == 0
        with pytest.raises(CallTimeout):
            pool.call("echo", "echo", timeout=1.5)
        assert next(unread) == 1
        assert pool.status()["echo"].restarts == 0


def test_a_host_that_was_stopped_finds_nobody_stuck() -> None:
    script = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from conftest import echo_role\n"
        "from inferpool import Policy, Pool\n"
        "with Pool(echo=echo_role(), policy=Policy(stuck_after=2.0)) as pool:\n"
        "    pool.start()\n"
        "    print('go', flush=True)\n"
        "    print(pool.call('echo', 'sleep', 4.5), pool.status()['echo'].restarts)\n"
    )
    arguments = [sys.executable, "-c", script, str(Path(__file__).parent)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as host:
        assert host.stdout is not None
        assert host.stdout.readline() == "go\n"
        time.sleep(0.8)
        host.send_signal(signal.SIGSTOP)
        time.sleep(3.0)
        host.send_signal(signal.SIGCONT)
        assert host.stdout.read() == "4.5 0\n"


# The cancel ladder.


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_worker_that_keeps_a_cancelled_call_is_killed(asynchronous: bool) -> None:
    with Pool(echo=echo_role(), policy=Policy(cancel_grace=0.3)) as pool:
        pid = pool.call("echo", "facts")["pid"]
        stream = pool.stream("echo", "sleep", 60)
        assert eventually(lambda: pool.status()["echo"].queue == 0)
        stream.cancel()
        with pytest.raises(CallCancelled) as caught:
            next(stream)
        assert caught.value.rung == "abort"
        if asynchronous:
            assert asyncio.run(pool.as_async().call("echo", "echo", 1, timeout=30)) == 1
        else:
            assert pool.call("echo", "echo", 1, timeout=30) == 1
        assert caught.value.rung == "kill"
        assert not is_running(pid)
        last = pool.status()["echo"].last_exit
        assert last is not None
        assert "did not let go of a cancelled call within 0.3 s" in last
        assert "sleep" in last


def test_a_worker_is_killed_without_a_next_call() -> None:
    with Pool(echo=echo_role(), policy=Policy(cancel_grace=0.2)) as pool:
        pid = pool.call("echo", "facts")["pid"]
        stream = pool.stream("echo", "hold_gil", 60.0)
        assert eventually(lambda: pool.status()["echo"].queue == 0)
        assert pool.cancel("echo") == 1
        with pytest.raises(CallCancelled):
            next(stream)
        assert eventually(lambda: not is_running(pid))


def test_a_worker_that_gets_on_with_others_may_keep_a_cancelled_call() -> None:
    with Pool(echo=echo_role(), policy=Policy(cancel_grace=0.3)) as pool:
        pool.start()
        # It looks at its token, and so makes progress, but does not heed it.
        stream = pool.stream("echo", "poll_for", 1.5)
        other = pool.stream("echo", "count", 3)
        assert eventually(lambda: pool.status()["echo"].queue == 1)
        stream.cancel()
        assert list(other) == [0, 1, 2]
        with pytest.raises(CallCancelled) as caught:
            next(stream)
        assert caught.value.rung == "grace"
        assert pool.status()["echo"].restarts == 0


def test_a_worker_that_lets_go_in_time_lives(pool: Pool) -> None:
    pid = pool.call("echo", "facts")["pid"]
    stream = pool.stream("echo", "wait_for_abort")
    next(stream)
    stream.cancel()
    with pytest.raises(CallCancelled) as caught:
        next(stream)
    assert pool.call("echo", "facts")["pid"] == pid
    assert caught.value.rung == "abort"


def test_a_call_that_was_never_begun_costs_nobody_the_worker() -> None:
    with Pool(echo=echo_role(), policy=Policy(cancel_grace=0.1)) as pool:
        pool.start()
        busy = pool.stream("echo", "sleep", 1.0)
        with pytest.raises(CallTimeout) as caught:
            pool.call("echo", "echo", timeout=0.05)
        assert list(busy) == [1.0]
        assert caught.value.rung == "flag"
        assert pool.status()["echo"].restarts == 0


def test_a_slow_start_outlives_the_calls_that_give_up() -> None:
    policy = Policy(cancel_grace=0.1)
    with Pool(slow=echo_role(load_seconds=1.0), policy=policy) as pool:
        with pytest.raises(CallTimeout):
            pool.call("slow", "echo", timeout=0.1)
        assert pool.call("slow", "echo", 1) == 1
        assert pool.status()["slow"].incarnation == 1


# Evidence.


def test_a_crash_error_says_what_was_in_flight_and_what_native_code_said(tmp_path: Path) -> None:
    with Pool(echo=echo_role(), log_dir=tmp_path) as pool:
        pool.start()
        with pytest.raises(WorkerCrashed) as caught:
            pool.call("echo", "assert")
        error = caught.value
        assert error.exit == "SIGABRT"
        assert error.native_message is not None
        assert "GGML_ASSERT(index < " in error.native_message
        assert error.native_message in str(error).splitlines()[0]
        assert error.in_flight[0].startswith("assert (")
        assert pool.status()["echo"].last_exit is not None
    log = (tmp_path / "worker-echo.log").read_text()
    assert "(incarnation 1) ended: SIGABRT; in flight: assert (" in log


def test_a_clean_end_is_in_the_log_too(tmp_path: Path) -> None:
    with Pool(echo=echo_role(), log_dir=tmp_path) as pool:
        pool.start()
        stream = pool.stream("echo", "wait_for_abort")
        next(stream)
        stream.close()
        assert eventually(stream._opened.call.is_over)
    last = (tmp_path / "worker-echo.log").read_text().splitlines()[-1]
    assert last.endswith("(incarnation 1) ended: exit code 0; closed")


# Releases.


def test_a_time_may_be_without_end() -> None:
    timer = call_later(float("inf"), lambda: None)
    assert timer is not None
    timer.join(0.1)
    assert timer.is_alive()
    timer.cancel()
    timer.join(10)


def test_a_system_without_threads_to_spare_changes_no_outcome(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = pool.call("echo", "facts")["pid"]

    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(CallTimeout):
        pool.call("echo", "wait_for_abort", timeout=0.1)
    assert eventually(lambda: pool.status()["echo"].state == "ready")
    pool.configure("echo", echo_role(new=True))
    assert not is_running(pid)
    assert pool.call("echo", "echo", 1) == 1


def test_an_idle_worker_is_released_and_pings_are_no_use() -> None:
    with Pool(echo=echo_role(), policy=Policy(idle_timeout=0.4)) as pool:
        pid = pool.call("echo", "facts")["pid"]
        deadline = time.monotonic() + 10
        while is_running(pid) and time.monotonic() < deadline:
            with contextlib.suppress(PoolClosed):
                pool.ping()
            time.sleep(0.05)
        # A ping that found no worker has started one.
        assert not is_running(pid)
        assert pool.status()["echo"].restarts == 0
        assert pool.call("echo", "echo", 1) == 1


class Meanwhile:
    """A channel on which something else happens just before a call is sent."""

    def __init__(self, channel: Any, act: Callable[[], object]) -> None:
        self._channel = channel
        self._act = act

    def ask(self, *arguments: Any) -> Any:
        self._act()
        return self._channel.ask(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)


@pytest.mark.parametrize("how", ["release", "configure"])
def test_a_worker_that_is_being_called_is_not_ended(pool: Pool, how: str) -> None:
    pid = pool.call("echo", "facts")["pid"]
    supervisor = pool._core.supervisor("echo")
    incarnation = supervisor.at_hand
    assert incarnation is not None
    acts = {
        "release": lambda: supervisor.release(incarnation),
        "configure": lambda: pool.configure("echo", echo_role()),
    }
    channel = incarnation.channel
    incarnation.channel = Meanwhile(channel, acts[how])  # type: ignore[assignment]
    assert pool.call("echo", "echo", "answer") == "answer"
    incarnation.channel = channel
    if how == "configure":
        assert eventually(lambda: not is_running(pid))
    assert (pool.call("echo", "facts")["pid"] == pid) is (how == "release")


def test_a_worker_that_is_being_ended_is_not_called(pool: Pool) -> None:
    pid = pool.call("echo", "facts")["pid"]
    supervisor = pool._core.supervisor("echo")
    incarnation = supervisor.at_hand
    assert incarnation is not None
    retire, answers = incarnation.retire, []
    caller = threading.Thread(target=lambda: answers.append(pool.call("echo", "sleep", 0.3)))

    def retire_and_wait(**options: bool) -> bool:
        idle = retire(**options)
        caller.start()
        time.sleep(0.05)
        return idle

    incarnation.retire = retire_and_wait  # type: ignore[method-assign]
    assert supervisor.release(incarnation)
    caller.join(20)
    assert answers == [0.3]
    assert eventually(lambda: not is_running(pid))


def test_a_busy_worker_outlives_the_idle_timeout() -> None:
    with Pool(echo=echo_role(), policy=Policy(idle_timeout=0.2)) as pool:
        pool.start()
        assert pool.call("echo", "sleep", 1.0) == 1.0
        assert pool.status()["echo"].incarnation == 1
        assert eventually(lambda: pool.status()["echo"].state == "stopped")


def test_a_worker_to_be_kept_alive_is_not_released() -> None:
    policy = Policy(idle_timeout=0.1, keep_alive=True)
    with Pool(echo=echo_role(), policy=policy) as pool:
        pid = pool.call("echo", "facts")["pid"]
        time.sleep(0.5)
        assert pool.call("echo", "facts")["pid"] == pid


def test_above_the_memory_budget_the_least_recently_used_idle_worker_goes() -> None:
    roles = {name: echo_role() for name in ("old", "young", "busy", "new")}
    kept = replace(echo_role(), policy=Policy(keep_alive=True))
    with Pool(kept=kept, **roles, memory_budget=1) as pool:
        stream = pool.stream("busy", "count", None)
        next(stream)
        pool.call("kept", "echo")
        assert pool.status()["busy"].pid is not None
        pool.call("old", "echo")
        assert eventually(lambda: pool.status()["old"].memory > 1 << 20)
        pool.call("new", "echo")
        states = {name: each.pid is not None for name, each in pool.status().items()}
        assert states == {"kept": True, "busy": True, "new": True, "old": False, "young": False}
        assert next(stream) == 1


def test_no_more_workers_go_than_must_and_the_last_used_stays() -> None:
    roles = {name: echo_role() for name in ("first", "second", "third")}
    with Pool(**roles) as pool:
        pool.start()
        size = max(each.memory for each in pool.status().values())
    with Pool(**roles, memory_budget=int(2.5 * size)) as pool:
        for role in ("first", "second", "first", "third"):
            pool.call(role, "echo")
        states = {name: each.pid is not None for name, each in pool.status().items()}
        assert states == {"first": True, "second": False, "third": True}


def test_a_worker_that_a_swap_has_left_with_its_calls_counts_for_the_memory_budget() -> None:
    with Pool(swapped=echo_role()) as pool:
        pool.start()
        size = pool.status()["swapped"].memory
    with Pool(swapped=echo_role(), idle=echo_role(), memory_budget=int(2.5 * size)) as pool:
        pool.start()
        stream = pool.stream("swapped", "count", None)
        next(stream)
        pool.configure("swapped", echo_role())
        pool.call("swapped", "echo")
        assert pool.status()["idle"].pid is None
        assert next(stream) == 1


def test_a_role_is_given_another_model_while_others_stream() -> None:
    with Pool(echo=echo_role(), other=echo_role()) as pool:
        other = pool.stream("other", "count", 20_000)
        old = pool.stream("echo", "count", 1000)
        next(old)
        pid = pool.status()["echo"].pid
        assert pid is not None
        pool.configure("echo", echo_role(load_seconds=0.1))
        assert pool.call("echo", "facts")["pid"] != pid
        assert list(old) == list(range(1, 1000))
        assert eventually(lambda: not is_running(pid))
        assert list(other) == list(range(20_000))
        assert pool.status()["echo"].restarts == 0
        with pytest.raises(TypeError):
            pool.configure("echo", "a model")
    with pytest.raises(PoolClosed):
        pool.configure("echo", echo_role())


def test_a_draining_close_lets_calls_end_and_refuses_new_ones() -> None:
    pool = Pool(echo=echo_role())
    pool.start()
    answers: list[object] = []
    threads = [
        threading.Thread(target=lambda: answers.append(pool.call("echo", "sleep", 0.3)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    assert eventually(lambda: pool.status()["echo"].in_flight == 3)
    closer = threading.Thread(target=lambda: pool.close(drain=True))
    closer.start()
    deadline = time.monotonic() + 10
    with pytest.raises(PoolClosed):
        while time.monotonic() < deadline:
            pool.call("echo", "echo")
    for thread in [*threads, closer]:
        thread.join(20)
    assert answers == [0.3] * 3


@pytest.mark.parametrize("asynchronous", [False, True])
def test_draining_ends_with_its_timeout(asynchronous: bool) -> None:
    pool = Pool(echo=echo_role(), close_timeout=0.2)
    stream = pool.stream("echo", "wait_for_abort")
    next(stream)
    if asynchronous:
        asyncio.run(pool.as_async().aclose(drain=True, timeout=0.2))
    else:
        pool.close(drain=True, timeout=0.2)
    with pytest.raises(PoolClosed):
        next(stream)


def test_an_event_loop_drains_too() -> None:
    async def main() -> None:
        pool = AsyncPool(echo=echo_role())
        await pool.start()
        call = asyncio.create_task(pool.call("echo", "sleep", 0.3))
        await asyncio.sleep(0.05)
        await pool.aclose(drain=True)
        assert await call == 0.3

    asyncio.run(main())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_start_reports_each_worker_as_it_is_ready(asynchronous: bool) -> None:
    reports: list[str] = []
    roles = {"slow": echo_role(load_seconds=1.0), "quick": echo_role()}

    def progress(role: str, seconds: float) -> None:
        assert seconds > 0
        reports.append(role)

    if asynchronous:

        async def main() -> None:
            async with AsyncPool(**roles) as pool:
                await pool.start(progress=progress)

        asyncio.run(main())
    else:
        with Pool(**roles) as pool:
            pool.start(progress=progress)
    assert reports == ["quick", "slow"]


# Queues and replicas.


def test_a_start_is_bounded_neither_as_a_call_nor_as_a_queue() -> None:
    policy = Policy(call_timeout=0.1, max_queue=1)
    with Pool(echo=replace(echo_role(load_seconds=0.4), replicas=2), policy=policy) as pool:
        pool.start()
        assert pool.status()["echo"].state == "ready"


def test_a_role_s_new_policy_holds_for_what_comes_and_not_for_what_was() -> None:
    with Pool(echo=echo_role()) as pool:
        pool.start()
        stream = pool.stream("echo", "sleep", 20)
        pool.configure("echo", replace(echo_role(), policy=Policy(max_crashes=0)))
        before = pool.status()["echo"].pid
        assert before is not None
        os.kill(before, signal.SIGSEGV)
        with pytest.raises(WorkerCrashed):
            list(stream)
        assert pool.call("echo", "echo", 1) == 1

        pool.configure("echo", replace(echo_role(), policy=Policy(idle_timeout=600.0)))
        pool.call("echo", "echo")
        pool.configure("echo", replace(echo_role(), policy=Policy(idle_timeout=0.1)))
        pool.call("echo", "echo")
        assert eventually(lambda: pool.status()["echo"].state == "stopped")

        pool.configure("echo", replace(echo_role(), policy=Policy(idle_timeout=0.1)))
        pool.call("echo", "echo")
        pool.configure(
            "echo", replace(echo_role(), policy=Policy(idle_timeout=0.1, keep_alive=True))
        )
        pool.call("echo", "echo")
        time.sleep(0.3)
        assert pool.status()["echo"].state == "ready"


def test_a_signal_may_close_the_pool_while_it_buries_a_worker(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reap = WorkerProcess.reap

    def reap_amid_a_signal(process: WorkerProcess, timeout: float) -> str:
        monkeypatch.undo()
        os.kill(os.getpid(), signal.SIGUSR1)
        return reap(process, timeout)

    before = signal.signal(signal.SIGUSR1, lambda *_: pool.close())
    try:
        pool.call("echo", "echo")
        monkeypatch.setattr(WorkerProcess, "reap", reap_amid_a_signal)
        crash(pool, 1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    with pytest.raises(PoolClosed):
        pool.call("echo", "echo")


@pytest.mark.parametrize("how", ["close", "call", "configure"])
def test_a_signal_may_use_the_pool_while_it_starts_a_worker(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    acts = {
        "close": pool.close,
        "call": lambda: pool.call("echo", "echo"),
        "configure": lambda: pool.configure("echo", echo_role(new=True)),
    }
    spawn = WorkerProcess.__init__

    def spawn_amid_a_signal(*arguments: Any) -> None:
        monkeypatch.undo()
        spawn(*arguments)
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, lambda *_: acts[how]())
    try:
        monkeypatch.setattr(WorkerProcess, "__init__", spawn_amid_a_signal)
        if how == "close":
            with pytest.raises(PoolClosed):
                pool.call("echo", "echo")
            assert children() == set()
        else:
            assert pool.call("echo", "facts")["options"] == (
                {"new": True} if how == "configure" else {}
            )
            assert len(children()) == 1
            assert pool.status()["echo"].restarts == 0
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_signal_may_close_the_pool_while_it_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = Incarnation.ask_to_end

    def ask_amid_a_signal(incarnation: Incarnation) -> None:
        monkeypatch.undo()
        os.kill(os.getpid(), signal.SIGUSR1)
        ask(incarnation)

    pool = Pool(echo=replace(echo_role(), replicas=2)).start()
    before = signal.signal(signal.SIGUSR1, lambda *_: pool.close())
    try:
        monkeypatch.setattr(Incarnation, "ask_to_end", ask_amid_a_signal)
        pool.close()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_full_queue_refuses_at_once() -> None:
    with Pool(echo=echo_role(), policy=Policy(max_queue=2)) as pool:
        streams = [pool.stream("echo", "wait_for_abort") for _ in range(2)]
        with pytest.raises(QueueFull, match="has 2 calls in flight"):
            pool.call("echo", "echo")
        for stream in streams:
            stream.close()
        assert pool.call("echo", "echo", 1) == 1


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("why", ["held", "pause", "slots"])
def test_cancelling_all_calls_ends_those_that_no_worker_has_yet(
    why: str, asynchronous: bool
) -> None:
    policy = Policy(cancel_grace=60, backoff=60)
    cancelled: list[object] = []

    def wait() -> None:
        try:
            if asynchronous:
                asyncio.run(pool.as_async().call("echo", "echo"))
            else:
                pool.call("echo", "echo")
        except CallCancelled as error:
            cancelled.append(error)

    with Pool(echo=echo_role(), policy=policy, close_timeout=0.1) as pool:
        pool.start()
        busy = []
        if why == "pause":
            for code in (1, 2):
                crash(pool, code)
        else:
            busy = [pool.stream("echo", "sleep", 60)]
            assert eventually(lambda: pool.status()["echo"].queue == 0)
        if why == "held":
            busy.pop().close()
        elif why == "slots":
            busy += [pool.stream("echo", "echo") for _ in range(255)]
        threads = [threading.Thread(target=wait) for _ in range(2)]
        for thread in threads:
            thread.start()
        assert eventually(lambda: pool.status()["echo"].in_flight == len(busy) + 2)
        assert pool.status()["echo"].queue == (257 if why == "slots" else 2)
        assert pool.cancel("echo") == len(busy) + 2
        for thread in threads:
            thread.join(10)
        assert len(cancelled) == 2
        assert pool.status()["echo"].in_flight == 0


@pytest.mark.parametrize("why", ["held", "pause"])
def test_requests_that_wait_for_their_worker_are_in_the_queue_too(why: str) -> None:
    policy = Policy(max_queue=1, cancel_grace=60, backoff=60)
    waiting: list[object] = []

    def wait() -> None:
        try:
            pool.call("echo", "echo")
        except PoolClosed as error:
            waiting.append(error)

    with Pool(echo=echo_role(), policy=policy) as pool:
        pool.start()
        if why == "held":
            stream = pool.stream("echo", "sleep", 60)
            assert eventually(lambda: pool.status()["echo"].queue == 0)
            stream.close()
        else:
            for code in (1, 2):
                crash(pool, code)
        thread = threading.Thread(target=wait)
        thread.start()
        # The pause is not over yet.
        assert eventually(lambda: pool.status()["echo"].queue == 1, seconds=2)
        assert pool.status()["echo"].in_flight == 1
        with pytest.raises(QueueFull, match="has 1 calls in flight"):
            pool.call("echo", "echo")
        pool.close(timeout=0.1)
        thread.join(20)
    assert len(waiting) == 1


def test_a_role_may_have_a_timeout_for_calls_without_one() -> None:
    with Pool(echo=echo_role(), policy=Policy(call_timeout=0.2)) as pool:
        pool.start(timeout=30)
        with pytest.raises(CallTimeout, match=r"within 0\.2 s"):
            pool.call("echo", "wait_for_abort")
        assert pool.call("echo", "sleep", 0.5, timeout=30) == 0.5


def test_calls_go_to_the_least_busy_replica() -> None:
    role = echo_role()
    role = type(role)(
        role.session,
        role.handlers,
        replicas=2,
        environment=[{"INFERPOOL_TEST": "a"}, {"INFERPOOL_TEST": "b"}],
    )
    with Pool(echo=role) as pool:
        assert pool.call("echo", "environment", "INFERPOOL_TEST") == "a"
        assert len(pool.status()["echo"].workers) == 1, "one caller needs one worker"
        busy = pool.stream("echo", "wait_for_abort")
        next(busy)
        assert pool.call("echo", "environment", "INFERPOOL_TEST") == "b"
        busy.close()
        pool.start()
        pids = {each.pid for each in pool.status()["echo"].workers}
        assert len(pids) == 2
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert eventually(lambda: not any(map(is_running, pids)))
        assert pool.call("echo", "echo", 1) == 1
        assert pool.ping() < 5


def test_a_dropped_stream_that_its_worker_keeps_does_not_keep_the_next_call() -> None:
    with Pool(echo=echo_role(), policy=Policy(cancel_grace=0.3)) as pool:
        pool.start()
        stream = pool.stream("echo", "sleep", 60)
        assert eventually(lambda: pool.status()["echo"].queue == 0)
        del stream
        assert pool.call("echo", "echo", 1, timeout=30) == 1
        assert pool.status()["echo"].restarts == 1
