"""Ways for a worker to go wrong, in every phase of its life, and what must come of it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from conftest import children, descriptors, eventually, is_running
from fault_role import LARGE

from inferpool import (
    Policy,
    Pool,
    RemoteError,
    Role,
    WorkerCrashed,
    WorkerStartError,
    WorkerStuck,
)

START_TIMEOUT, STUCK_AFTER, CLOSE_TIMEOUT = 2.0, 1.0, 1.0
POLICY = Policy(
    stuck_after=STUCK_AFTER,
    cancel_grace=0.5,
    max_crashes=1 << 16,
    backoff=0.0,
)
PHASES = ("idle", "loading", "request", "stream", "large", "closing")
SLACK = 1.0
"""Seconds that a verdict may take above its configured bound."""
PROMPT = 2.0
"""Seconds within which an error must be known, on a busy machine."""

NEXT_WORKER = 5.0
"""Seconds until a new worker answers, on a busy machine; nobody waited for the old one."""

Inflict = Callable[[int], object]


@dataclass(frozen=True)
class Trial:
    """A row in a phase, to be tried any number of times.

    Attributes:
        bound: seconds that `run` may return.
        run: does it, and raises an AssertionError if something is not as it must be.
        at_rest: whether it mostly waits, so that many can be tried at once.
    """

    row: str
    phase: str
    bound: float
    run: Callable[[], float]
    at_rest: bool = False


@dataclass(frozen=True)
class Row:
    """One fault: from outside by `inflict`, which gets the worker's pid, or by the role itself."""

    name: str
    outcome: dict[str, type[BaseException] | None]
    """By phase: what the call in flight raises, or None if it is answered."""
    bound: float
    """Seconds from the fault to the outcome."""
    inflict: Inflict | None = None
    loading_bound: float | None = None
    seconds: float = 30.0
    """What the role does meanwhile, if the fault comes from outside and is survived."""
    log: Literal["full", "removed"] | None = None
    """What happens to the role's log: no space from the start, or no folder from the fault on."""

    @property
    def is_deadly(self) -> bool:
        """Whether the worker dies of it at once."""
        return self.outcome.get("request") is WorkerCrashed

    def bound_in(self, phase: str) -> float:
        """Seconds until the outcome in this phase."""
        if phase == "closing":
            return CLOSE_TIMEOUT + SLACK
        if phase == "idle" and self.outcome[phase] is None:
            return NEXT_WORKER
        loading = phase == "loading" and self.loading_bound is not None
        return self.loading_bound if loading and self.loading_bound else self.bound


def _deaths() -> dict[str, type[BaseException] | None]:
    crashed = dict.fromkeys(("request", "stream", "large"), WorkerCrashed)
    return {"idle": None, "loading": WorkerStartError, **crashed, "closing": None}


def _verdicts() -> dict[str, type[BaseException] | None]:
    stuck = dict.fromkeys(("idle", "request", "stream", "large"), WorkerStuck)
    return {"loading": WorkerStartError, **stuck, "closing": None}


def _raises() -> dict[str, type[BaseException] | None]:
    return {
        "loading": WorkerStartError,
        "request": RemoteError,
        "stream": RemoteError,
        "closing": None,
    }


def _kill(number: signal.Signals) -> Inflict:
    return lambda pid: os.kill(pid, number)


def _pause(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(0.5, os.kill, (pid, signal.SIGCONT)).start()


def _leave(pid: int) -> None:
    """The fault is not the worker's."""


ROWS = [
    *(
        Row(name, _deaths(), PROMPT, _kill(signal.Signals[name]))
        for name in ("SIGKILL", "SIGSEGV", "SIGABRT")
    ),
    Row("SIGSTOP, then SIGCONT", dict.fromkeys(PHASES), 2.0, _pause, seconds=0.6),
    Row(
        "SIGSTOP for good",
        _verdicts(),
        STUCK_AFTER + SLACK,
        _kill(signal.SIGSTOP),
        loading_bound=START_TIMEOUT + SLACK,
    ),
    *(
        Row(name, _deaths(), PROMPT)
        for name in ("_exit(0)", "exit(0) from C", "abort()", "null pointer", "stack overflow")
    ),
    Row("allocation until RLIMIT_AS", _raises(), PROMPT),
    Row(
        "hang with the GIL",
        _verdicts(),
        STUCK_AFTER + SLACK,
        loading_bound=START_TIMEOUT + SLACK,
    ),
    Row(
        "hang without the GIL",
        {
            "loading": WorkerStartError,
            "request": WorkerStuck,
            "stream": WorkerStuck,
            "closing": None,
        },
        STUCK_AFTER + SLACK,
        loading_bound=START_TIMEOUT + SLACK,
    ),
    *(Row(name, _raises(), PROMPT) for name in ("Exception", "KeyboardInterrupt", "SystemExit")),
    Row("unencodable reply", {"request": RemoteError, "stream": RemoteError}, PROMPT),
    *(
        # What happens in the phase "request" is more than a fault in it: see `fault_hosts`.
        Row(name, dict.fromkeys(set(PHASES) - {"request"}), PROMPT, _leave, seconds=0.3, log=log)
        for name, log in (("the log's full disk", "full"), ("the log's folder removed", "removed"))
    ),
]


class Bystander:
    """Another pool's stream, which must go on whatever happens beside it."""

    def __init__(self) -> None:
        self._pool = Pool(good=Role("fault_role:make_session", "fault_role:HANDLERS"))
        # What a first call makes for good: this thread's doorbell.
        self._pool.call("good", "echo")
        self._stream = self._pool.stream("good", "count")
        self._seen = 0
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for expected, number in enumerate(self._stream):
                assert number == expected
                self._seen += 1
        except BaseException as error:  # noqa: BLE001
            self._error = error

    def check(self) -> None:
        """Require that the stream has gone on without a gap, and still does."""
        seen = self._seen
        assert eventually(lambda: self._seen > seen or self._error is not None)
        assert self._error is None, self._error

    def close(self) -> None:
        """End the stream and its worker."""
        self._pool.close()
        self._thread.join()


@functools.cache
def bystander() -> Bystander:
    """The one of this process."""
    return Bystander()


@dataclass
class Case:
    """One try of a row in a phase."""

    row: Row
    phase: str
    folder: Path

    @property
    def _logs(self) -> Path:
        return self.folder / "logs"

    def where(self) -> dict[str, Any]:
        """What the role is told: how to go wrong, or for how long to wait for it."""
        told: dict[str, Any] = {"phase": self.phase, "mark": str(self.folder / "mark")}
        if self.row.inflict is None:
            return {**told, "fault": self.row.name}
        return {**told, "seconds": self.row.seconds}

    def run(self) -> float:
        """Seconds from the fault to its outcome.

        Raises:
            AssertionError: something is not as it must be, or is left behind.
        """
        bystander().check()
        gc.collect()
        before = children(), descriptors(), threading.active_count()
        options = self.where() if self.phase in ("loading", "closing") else {}
        policy = POLICY
        if self.phase == "loading" and self.row.loading_bound is not None:
            policy = dataclasses.replace(POLICY, start_timeout=START_TIMEOUT)
        bad = Role("fault_role:make_session", "fault_role:HANDLERS", options, policy=policy)
        log_dir = None if self.row.log is None else self._logs
        if log_dir is not None:
            log_dir.mkdir()
        if self.row.log == "full":
            (self._logs / "worker-bad.log").symlink_to("/dev/full")
        with Pool(bad=bad, close_timeout=CLOSE_TIMEOUT, log_dir=log_dir) as pool:
            took: float = getattr(self, f"_{self.phase}")(pool)
            if self.phase != "closing":
                assert pool.call("bad", "echo", "next", timeout=20) == "next"
                assert pool.status()["bad"].in_flight == 0
        bystander().check()
        gc.collect()  # errors that were kept here hold the frames, and so the calls, of their way
        assert eventually(
            lambda: (children(), descriptors(), threading.active_count()) == before,
            CLOSE_TIMEOUT + SLACK,
        ), "something was left behind"
        return took

    def _reached(self) -> None:
        assert eventually(Path(self.where()["mark"]).exists), "the phase was not reached"

    def _hit(self, pool: Pool) -> float:
        """Inflict the fault now, or take note that the role has done so."""
        self._reached()
        began = time.monotonic()
        if self.row.inflict is not None:
            pid = pool.status()["bad"].pid
            assert pid is not None
            self._inflict(pid)
        return began

    def _inflict(self, pid: int) -> None:
        assert self.row.inflict is not None
        self.row.inflict(pid)
        if self.row.log == "removed":
            shutil.rmtree(self._logs)

    def _judge(self, outcome: Callable[[], Any], began: float, answer: Any) -> float:
        """Require that the call in flight ends once, as it must, in time."""
        result: Any = None
        error: BaseException | None = None
        try:
            result = outcome()
        except BaseException as caught:  # noqa: BLE001
            error = caught
        took = time.monotonic() - began
        expected = self.row.outcome[self.phase]
        if expected is None:
            assert error is None, f"unexpected {error!r}"
            assert result == answer
        else:
            assert type(error) is expected, f"not {expected.__name__}: {error!r}, {result!r:.100}"
        return took

    def _idle(self, pool: Pool) -> float:
        pool.call("bad", "idle", {} if self.row.inflict else self.where())
        if self.row.inflict is not None:
            Path(self.where()["mark"]).touch()
        began = self._hit(pool)
        if self.row.is_deadly:
            assert eventually(lambda: pool.status()["bad"].state == "dead")
        return self._judge(lambda: pool.call("bad", "echo", 1, timeout=20), began, 1)

    def _loading(self, pool: Pool) -> float:
        with in_thread(lambda: pool.call("bad", "echo", 1, timeout=20)) as call:
            return self._judge(call.result, self._hit(pool), 1)

    def _request(self, pool: Pool) -> float:
        pool.call("bad", "echo")
        with in_thread(lambda: pool.call("bad", "request", self.where(), timeout=20)) as call:
            return self._judge(call.result, self._hit(pool), "answer")

    def _stream(self, pool: Pool) -> float:
        pool.call("bad", "echo")
        stream = pool.stream("bad", "stream", self.where(), timeout=20)
        assert [next(stream) for _ in range(3)] == [0, 1, 2]
        took = self._judge(lambda: next(stream), self._hit(pool), "answer")
        assert list(stream) == [], "a stream ends once"
        return took

    def _large(self, pool: Pool) -> float:
        pool.call("bad", "echo")
        pid = pool.status()["bad"].pid
        assert pid is not None
        # Nobody reads, so the worker waits in the middle of its answer.
        stream = pool.stream("bad", "large", self.where(), timeout=20)
        began = self._hit(pool)
        if self.row.is_deadly:
            assert eventually(lambda: not is_running(pid))
            began = time.monotonic()
        return self._judge(lambda: [len(item) for item in stream], began, [LARGE])

    def _closing(self, pool: Pool) -> float:
        pool.call("bad", "echo")
        pid = pool.status()["bad"].pid
        assert pid is not None
        with in_thread(pool.close) as closed:
            self._reached()
            began = time.monotonic()
            if self.row.inflict is not None:
                self._inflict(pid)
            closed.result(20)
            return time.monotonic() - began


@contextlib.contextmanager
def in_thread(work: Callable[[], Any]) -> Iterator[Future[Any]]:
    with ThreadPoolExecutor(1) as threads:
        yield threads.submit(work)


def worker_trials() -> list[Trial]:
    """Every row in every phase."""
    return [
        Trial(row.name, phase, row.bound_in(phase), partial(_try, row, phase))
        for row in ROWS
        for phase in PHASES
        if phase in row.outcome
    ]


def _try(row: Row, phase: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        return Case(row, phase, Path(folder)).run()
