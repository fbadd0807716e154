"""Tells a busy worker from a stuck one.

Nobody watches a worker that has nothing to do. While calls are in flight, whoever waits for one
looks at least every `SLICE_SECONDS`: it takes the heartbeat's last answer and asks again, without
waiting. Time counts as frozen only when it was looked at: a host that was itself stopped, or too
busy to look, has seen nothing. Nor does time count for which the worker only waited for a CPU: on
a busy machine it may be seconds from one graph node of a long prompt to the next.
"""

from __future__ import annotations

import contextlib
import threading
import time

from inferpool._transport import Call, HostChannel, Progress
from inferpool.errors import CallTimeout, InferpoolError
from inferpool.host.process import thread_times

__all__ = ["SIGNAL_SECONDS", "SLICE_SECONDS", "Watch"]

SLICE_SECONDS = 0.2
"""How long a caller waits at most before it looks at its worker's progress."""
SIGNAL_SECONDS = 0.05
"""How long the main thread waits at most before it looks for signals. Mostly they interrupt its
wait, but the kernel may give one to another thread, and Python's handlers run in this one only."""
_LATE_SECONDS = 1.0
"""Passed between two looks only if the host itself did not run."""
_LEAST_SHARE = 0.1
"""Of the time without progress counts in any case: what waits for a CPU may be another thread than
the one that is stuck."""


class Watch:
    """How long one worker has made no progress.

    Attributes:
        frozen: seconds since the last sign of progress, as far as they were observed and the worker
            had a CPU.
    """

    def __init__(self, channel: HostChannel, pid: int) -> None:
        self.frozen = 0.0
        self._pid = pid
        self._threads: dict[int, tuple[bool, float]] = {}
        self._progress: Progress | None = None
        self._channel = channel
        # A signal's handler may look amid a look.
        self._lock = threading.RLock()
        self._question: Call | None = None
        self._looked = time.monotonic()

    def counts(self) -> dict[str, int]:
        """What the heartbeat said last, by name; nothing before its first answer."""
        last = self._progress
        if last is None:
            return {}
        return {
            "requests": last.requests,
            "replies": last.replies,
            "finished": last.finished,
            "polls": last.polls,
        }

    def begin(self) -> None:
        """Start the count anew: the first call begins, or the session stands."""
        self._looked = time.monotonic()
        self._question = None
        self.frozen = 0.0

    def look(self) -> float:
        """Ask again, without waiting, and return what `frozen` is then."""
        # Only `with` gives it back whenever a signal's handler raises; who waits, waits shortly.
        with self._lock:
            now = time.monotonic()
            passed = now - self._looked
            if passed < SLICE_SECONDS / 2:
                return self.frozen
            self._looked = now
            news = self._hear()
            late = passed > _LATE_SECONDS
            if news or (news is False and self._channel.reader_behind):
                self.frozen = 0.0
                self._threads = {}
            elif not late:
                self.frozen += max(passed * _LEAST_SHARE, passed - self._starved(passed))
            # Last: it wakes the heartbeat, which then waits for a CPU itself.
            self._ask()
            # What a late look heard is as old as that; the next one decides.
            return 0.0 if late else self.frozen

    def _starved(self, passed: float) -> float:
        """For how much of the time a thread of the worker waited for a CPU; 0 at the first look."""
        before, self._threads = self._threads, thread_times(self._pid)
        waits = [
            passed - (used - before[thread][1])
            for thread, (wants_cpu, used) in self._threads.items()
            if wants_cpu and thread in before
        ]
        return max(waits, default=0.0)

    def _hear(self) -> bool | None:
        """Whether the heartbeat's answer has news; None while there is none."""
        question, before = self._question, self.counts()
        if question is None:
            return True
        try:
            self._progress = question.next(timeout=0).progress
        except CallTimeout:
            return None
        except InferpoolError:
            self._question = None  # the worker has ended, which its calls learn by themselves
            return True
        self._question = None
        return self.counts() != before

    def _ask(self) -> None:
        """Ask the heartbeat again, if it has answered."""
        if self._question is None:
            with contextlib.suppress(InferpoolError):
                self._question = self._channel.ping()
