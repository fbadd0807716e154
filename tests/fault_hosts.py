"""Ways for a host to go wrong, or to be used badly, and what must come of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from conftest import eventually, is_running
from fault_rows import PHASES, POLICY, Trial, in_thread
from faults import FailingCall

from inferpool import CallCancelled, Policy, Pool, PoolClosed, Role, WorkerCrashed, WorkerStartError
from inferpool.testing import signal_worker

TESTS = str(Path(__file__).parent)
HOST_DEATH = 2.0
"""Seconds within which no worker may be left of a host that died."""
CTRL_C = 0.1
"""Seconds within which Ctrl-C must end a blocking call."""
ERRORS = ("EMFILE", "ENOMEM", "EAGAIN")
PREAMBLE = f"""
import os, sys, threading, time
sys.path.insert(0, {TESTS!r})
from inferpool import Policy, Pool, PoolClosed, Role
def pool_of(policy=None, **options):
    return Pool(bad=Role("fault_role:make_session", "fault_role:HANDLERS", options, policy=policy))
def say_pid(known=None):
    while not os.path.exists(mark): time.sleep(0.005)
    print(known or pool.status()["bad"].pid, flush=True)
def background(work):
    threading.Thread(target=work, daemon=True).start()
def print_later(work):
    threading.Thread(target=lambda: print(work())).start()
mark = sys.argv[1]
wait = {{"mark": mark, "seconds": 60}}
"""
# Reaches a phase and prints the worker's pid.
REACH = {
    "idle": "pool = pool_of(); pool.call('bad', 'echo'); open(mark, 'w'); say_pid()",
    "loading": (
        "pool = pool_of(phase='loading', **wait)\n"
        "background(lambda: pool.call('bad', 'echo')); say_pid()"
    ),
    "request": (
        "pool = pool_of(); background(lambda: pool.call('bad', 'request', wait)); say_pid()"
    ),
    "stream": "pool = pool_of(); stream = pool.stream('bad', 'stream', wait); say_pid()",
    "large": "pool = pool_of(); stream = pool.stream('bad', 'large', wait); say_pid()",
    "closing": (
        "pool = pool_of(phase='closing', **wait); pool.call('bad', 'echo')\n"
        "known = pool.status()['bad'].pid\n"
        "background(lambda: pool.close(timeout=60)); say_pid(known)"
    ),
}


@contextlib.contextmanager
def host(script: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A host that prints its worker's pid and goes on."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", PREAMBLE + script, f"{folder}/mark"]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
            try:
                assert process.stdout is not None
                line = process.stdout.readline()
                if not line:
                    raise AssertionError(process.communicate()[1])
                yield process, int(line)
            finally:
                process.kill()


def host_dies(phase: str, how: str) -> float:
    script = f"{REACH[phase]}\nsys.stdin.readline()\nos._exit(3)\n"
    with host(script) as (process, pid):
        began = time.monotonic()
        if how == "SIGKILL":
            process.kill()
        else:
            assert process.stdin is not None
            print(file=process.stdin, flush=True)
        process.wait()
        assert eventually(lambda: not is_running(pid), HOST_DEATH)
        return time.monotonic() - began


def host_is_stopped(phase: str, seconds: float) -> float:
    """The worker works on meanwhile, and must not be taken for stuck afterwards."""
    # Much shorter than the stop, and the work goes on for a while after it.
    policy = f"Policy(stuck_after={min(1.0, seconds / 3)})"
    work = f"{{'seconds': {seconds + 1.0}, 'mark': mark}}"
    scripts = {
        "idle": (
            f"pool = pool_of({policy}); pool.call('bad', 'echo'); open(mark, 'w'); say_pid()\n"
            "time.sleep(0.5); print(pool.call('bad', 'echo', 'answer'))\n"
        ),
        "loading": (
            f"pool = pool_of({policy}, phase='loading', **{work})\n"
            "print_later(lambda: pool.call('bad', 'echo', 'answer')); say_pid()\n"
        ),
        "request": (
            f"pool = pool_of({policy})\n"
            f"print_later(lambda: pool.call('bad', 'poll', {work})); say_pid()\n"
        ),
        "stream": (
            f"pool = pool_of({policy}); stream = pool.stream('bad', 'count')\n"
            "items = [next(stream) for _ in range(3)]; open(mark, 'w'); say_pid()\n"
            "items += [next(stream) for _ in range(2000)]\n"
            "print('answer' if items == list(range(2003)) else items)\n"
        ),
        # One waits behind the answer that nobody reads, and so looks at the worker.
        "large": (
            f"pool = pool_of({policy}); stream = pool.stream('bad', 'large', {work})\n"
            "background(lambda: pool.call('bad', 'echo')); say_pid(); time.sleep(0.5)\n"
            "print({16 << 20: 'answer'}[len(next(stream))])\n"
        ),
        "closing": (
            f"pool = pool_of({policy}, phase='closing', **{work}); pool.call('bad', 'echo')\n"
            "pid = pool.status()['bad'].pid; background(lambda: say_pid(pid))\n"
            f"pool.close(timeout={seconds + 3.0})\n"
            "end = pool.status()['bad'].last_exit\n"
            "print('answer' if end.endswith('exit code 0; closed') else end)\n"
        ),
    }
    with host(scripts[phase]) as (process, _):
        process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        process.send_signal(signal.SIGCONT)
        began = time.monotonic()
        output, errors = process.communicate(timeout=30)
        assert (output, errors) == ("answer\n", ""), errors
        return time.monotonic() - began


def host_exits(where: str) -> float:
    """With a call in flight; quietly, and with its workers."""
    scripts = {
        "main thread": "stream = pool.stream('bad', 'count'); next(stream); say_pid()",
        "other thread": (
            "work = dict(wait, seconds=0.5)\n"
            "threading.Thread(target=lambda: pool.call('bad', 'request', work)).start(); say_pid()"
        ),
        "daemon thread": (
            "def work():\n"
            "    try: pool.call('bad', 'request', wait)\n"
            "    except PoolClosed: pass\n"
            "background(work); say_pid()"
        ),
        "event loop": (
            "import asyncio\n"
            "async def main():\n"
            "    task = asyncio.create_task(pool.as_async().call('bad', 'request', wait))\n"
            "    await asyncio.to_thread(say_pid)\n"
            "asyncio.run(main())"
        ),
    }
    script = f"pool = pool_of()\npool.call('bad', 'echo')\nopen(mark, 'w')\n{scripts[where]}\n"
    if where != "main thread":
        script = script.replace("open(mark, 'w')\n", "")
    with host(script) as (process, pid):
        began = time.monotonic()
        output, errors = process.communicate(timeout=30)
        assert (output, errors, process.returncode) == ("", "", 0), errors
        assert eventually(lambda: not is_running(pid), HOST_DEATH)
        return time.monotonic() - began


def forked_child_uses_the_pool() -> float:
    script = (
        "pool = pool_of(); pool.call('bad', 'echo'); open(mark, 'w'); say_pid()\n"
        "began = time.monotonic()\n"
        "if os.fork() == 0:\n"
        "    try: pool.call('bad', 'echo')\n"
        "    except PoolClosed: os._exit(7)\n"
        "    os._exit(1)\n"
        "print(os.waitstatus_to_exitcode(os.wait()[1]), pool.call('bad', 'echo', 'next'))\n"
        "print(time.monotonic() - began)\n"
    )
    with host(script) as (process, _):
        output, errors = process.communicate(timeout=30)
        answer, _, took = output.partition("\n")
        assert (answer, errors) == ("7 next", ""), errors
        return float(took)


@contextlib.contextmanager
def pool(log_dir: Path | None = None, **options: object) -> Iterator[Pool]:
    role = Role("fault_role:make_session", "fault_role:HANDLERS", options, policy=POLICY)
    with Pool(bad=role, log_dir=log_dir, close_timeout=1.0) as made:
        yield made


def timed(work: Callable[[Pool], object], **options: object) -> float:
    """Seconds that the work takes; afterwards the next call must be answered."""
    with pool(**options) as made:
        made.call("bad", "echo")
        began = time.monotonic()
        work(made)
        took = time.monotonic() - began
        assert made.call("bad", "echo", "next", timeout=20) == "next"
        assert made.status()["bad"].in_flight == 0
        return took


def log_trouble(how: str) -> float:
    """Costs the log only."""
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder) / "logs"
        logs.mkdir()
        if how == "full disk":
            (logs / "worker-bad.log").symlink_to("/dev/full")
        with pool(log_dir=logs) as made:
            made.call("bad", "echo")
            if how == "folder removed":
                shutil.rmtree(logs)
            began = time.monotonic()
            assert made.call("bad", "chatter", 100) == 100
            with contextlib.suppress(WorkerCrashed):
                made.call("bad", "request", {"fault": "_exit(0)"})
                raise AssertionError("no crash")
            took = time.monotonic() - began
            assert made.call("bad", "echo", 1) == 1
            return took


def module_cannot_be_imported() -> float:
    """The role's module is broken, and then mended."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ending:
        module = Path(folder) / "broken_role.py"
        module.write_text("import no_such_module\n")
        sys.path.append(folder)
        ending.callback(sys.path.remove, folder)
        role = Role("broken_role:make_session", "broken_role:HANDLERS", policy=POLICY)
        made = ending.enter_context(Pool(bad=role, close_timeout=1.0))
        began = time.monotonic()
        with pytest.raises(WorkerStartError, match="ModuleNotFoundError"):
            made.call("bad", "echo", timeout=20)
        took = time.monotonic() - began
        module.write_text("from fault_role import HANDLERS, make_session\n")
        assert made.call("bad", "echo", "next", timeout=20) == "next"
        return took


def slow_consumer(made: Pool) -> None:
    stream = made.stream("bad", "numbers", 50_000)
    for expected, number in enumerate(stream):
        assert number == expected
        if number % 5_000 == 0:
            time.sleep(0.02)
            assert made.call("bad", "echo", 1) is not None if number == 49_999 else True


def abandoned_consumer(made: Pool) -> None:
    for _ in range(5):
        next(made.stream("bad", "count"))


def double_cancel(made: Pool) -> None:
    with in_thread(lambda: made.call("bad", "poll", {"seconds": 20})) as call:
        assert eventually(lambda: made.status()["bad"].in_flight == 1)
        assert made.cancel("bad") == 1
        assert made.cancel("bad") in {0, 1}
        assert isinstance(call.exception(20), CallCancelled)


def cancel_at_every_await(made: Pool) -> None:
    """Cancels a task after so many turns of its loop, until it ends by itself first."""

    async def attempt(turns: int) -> bool:
        task = asyncio.create_task(made.as_async().call("bad", "echo", "answer"))
        for _ in range(turns):
            await asyncio.sleep(0)
            if task.done():
                break
        task.cancel()
        try:
            return bool(await task == "answer")
        except asyncio.CancelledError:
            return False

    outcomes = [asyncio.run(attempt(turns)) for turns in (*range(12), 1 << 30)]
    assert outcomes[0] is False
    assert outcomes[-1] is True


def close_races_calls() -> float:
    outcomes: Counter[str] = Counter()
    with pool() as made:
        made.call("bad", "echo")

        def caller() -> None:
            try:
                while True:
                    assert made.call("bad", "echo", 1, timeout=20) == 1
                    outcomes["answer"] += 1
            except PoolClosed:
                outcomes["closed"] += 1

        threads = [threading.Thread(target=caller) for _ in range(6)]
        for thread in threads:
            thread.start()
        time.sleep(0.2)
        began = time.monotonic()
        made.close()
        for thread in threads:
            thread.join(20)
        took = time.monotonic() - began
    assert outcomes["closed"] == 6, outcomes
    return took


def close_and_restart() -> float:
    began = time.monotonic()
    for turn in range(3):
        with pool() as made:
            assert made.call("bad", "echo", turn) == turn
        with contextlib.suppress(PoolClosed):
            made.call("bad", "echo")
            raise AssertionError("a closed pool answers")
    return time.monotonic() - began


def several_event_loops(made: Pool) -> None:
    async def ask(number: int) -> None:
        assert await made.as_async().call("bad", "echo", number) == number

    async def nest() -> None:
        await asyncio.gather(ask(1), asyncio.to_thread(asyncio.run, ask(2)), ask(3))

    for _ in range(3):
        asyncio.run(nest())


def ctrl_c(blocking: str) -> float:
    """From the signal to `KeyboardInterrupt`; on the main thread only."""
    slow: dict[str, object] = {}
    with contextlib.ExitStack() as ending:
        if blocking == "start":
            folder = ending.enter_context(tempfile.TemporaryDirectory())
            slow = {"phase": "loading", "mark": f"{folder}/mark", "seconds": 2.0}
        made = ending.enter_context(pool(**slow))
        if blocking != "start":
            made.call("bad", "echo")
        poll = {"seconds": 20}
        calls: dict[str, Callable[[], object]] = {
            "call": lambda: made.call("bad", "poll", poll),
            "stream": lambda: next(made.stream("bad", "poll", poll)),
            "a large request": lambda: made.call("bad", "echo", b"x" * (64 << 20)),
            "ping": lambda: made.ping("bad", timeout=20),
            "start": made.start,
            "close": lambda: made.close(timeout=20),
        }
        pid = made.status()["bad"].pid
        if blocking in {"ping", "close", "a large request"}:
            signal_worker(made, "bad", "SIGSTOP")
        sent: list[float] = []

        def interrupt() -> None:
            sent.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)

        timer = threading.Timer(0.3, interrupt)
        timer.start()
        try:
            calls[blocking]()
        except KeyboardInterrupt:
            took = time.monotonic() - sent[0]
        else:
            timer.cancel()
            raise AssertionError("it was not interrupted")
        timer.join()
        if blocking in {"ping", "a large request"}:
            assert pid is not None
            os.kill(pid, signal.SIGCONT)
        if blocking != "close":
            assert made.call("bad", "echo", 1, timeout=20) == 1
        return took


def failing_start(nth: int, error: str) -> float:
    """The nth system call of a worker's start fails, in the host or in the worker."""
    outcome: list[object] = []
    policy = Policy(start_timeout=10.0, max_crashes=1 << 16, backoff=0.0)
    role = Role("fault_role:make_session", "fault_role:HANDLERS", policy=policy)
    with contextlib.ExitStack() as ending:
        failing = FailingCall(nth, error)
        ending.callback(failing.end)
        made = ending.enter_context(Pool(bad=role, close_timeout=1.0))

        def work() -> None:
            failing.arm()
            try:
                outcome.append(made.call("bad", "echo", 1, timeout=20))
            except (WorkerStartError, OSError, MemoryError) as caught:
                outcome.append(caught)

        began = time.monotonic()
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(20)
        took = time.monotonic() - began
        assert not thread.is_alive(), "the call hangs"
        assert made.call("bad", "echo", "next", timeout=20) == "next"
        made.close()
        failed = failing.end()
    # Some can be done without: a file that is looked for, say. The thread's own doorbell is not the
    # worker's, and its want is a builtin error.
    typed = (OSError, MemoryError) if failed == "eventfd2" else WorkerStartError
    assert outcome == [1] or isinstance(outcome[0], (typed, WorkerStartError)), (failed, outcome)
    return took


def host_trials(*, long: bool) -> list[Trial]:
    """Every row; the long form stops hosts for 30 s and fails every system call in turn."""
    stop = 30.0 if long else 1.5
    calls = [*range(1, 50), *range(60, 700, 20)] if long else [3, 7, 12, 20, 27, 33]
    alone: dict[str, Callable[[], float]] = {
        "a forked child uses the pool": forked_child_uses_the_pool,
        "close races calls": close_races_calls,
        "close, and a new pool": close_and_restart,
    }
    used: dict[str, Callable[[Pool], object]] = {
        "slow consumer": slow_consumer,
        "abandoned consumer": abandoned_consumer,
        "double cancel": double_cancel,
        "cancel at every await": cancel_at_every_await,
        "several and nested event loops": several_event_loops,
    }
    blocking = ("call", "stream", "a large request", "ping", "start", "close")
    return [
        *(
            Trial(f"host {how}", phase, HOST_DEATH, partial(host_dies, phase, how))
            for how in ("SIGKILL", "os._exit")
            for phase in PHASES
        ),
        *(
            Trial(
                f"host SIGSTOP for {stop:g} s",
                phase,
                5.0,
                partial(host_is_stopped, phase, stop),
                at_rest=True,
            )
            for phase in PHASES
        ),
        *(
            Trial("host exits with a call in flight", where, 3.0, partial(host_exits, where))
            for where in ("main thread", "other thread", "daemon thread", "event loop")
        ),
        Trial("import error in the role's module", "loading", 2.0, module_cannot_be_imported),
        *(
            Trial("the log's " + how, "request", 2.0, partial(log_trouble, how))
            for how in ("full disk", "folder removed")
        ),
        *(Trial(name, "request", 5.0, run) for name, run in alone.items()),
        *(Trial(name, "request", 10.0, partial(timed, work)) for name, work in used.items()),
        *(Trial("Ctrl-C", where, CTRL_C, partial(ctrl_c, where)) for where in blocking),
        *(
            Trial(
                f"{error} in a worker's start",
                f"call {nth}",
                12.0,
                partial(failing_start, nth, error),
            )
            for error in ERRORS
            for nth in calls
        ),
    ]
