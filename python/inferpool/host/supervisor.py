"""Keeps at most one worker alive for a role."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass

from inferpool.errors import PoolClosed
from inferpool.host.incarnation import Incarnation, RoleSpec
from inferpool.messages import SandboxReport

__all__ = ["RoleStatus", "Supervisor"]


@dataclass(frozen=True, kw_only=True)
class RoleStatus:
    """What is known of a role right now."""

    role: str
    state: str
    """``"stopped"``, ``"starting"``, ``"ready"`` or ``"dead"`` (until the next call)."""
    pid: int | None
    incarnation: int
    """How many workers the role has had so far."""
    uptime: float | None
    """Seconds since the worker was started."""
    loading: float
    """How much of the session has been built, from 0 to 1, as far as the worker says."""
    load_seconds: float | None
    """Seconds that the session took to build."""
    sandbox: SandboxReport | None
    """What the worker gave up before it opened anything; None until its session stands."""
    in_flight: int
    """Calls that have not ended."""
    counters: dict[str, int]
    """What the channels of all its workers have done so far: ``frames_sent`` and
    ``bytes_sent`` (requests), ``frames_received`` and ``bytes_received`` (answers),
    ``fragments`` (records of frames that took several), ``parks`` (sleeps of waiting threads),
    ``spins_won`` (waits that ended before a sleep), ``wakes_sent`` and ``wakes_suppressed``
    (the worker slept, or was awake), ``full_waits`` (for space or a free call slot),
    ``rescued_waits`` (lost wake-ups; 0 unless there is a bug), ``dropped_late`` (frames for
    calls given up before), ``violations`` (of the format, by a worker)."""


class Supervisor:
    """Starts a role's worker when it is needed, and again after it died."""

    def __init__(self, spec: RoleSpec) -> None:
        self.spec = spec
        self._lock = threading.Lock()
        self.at_hand: Incarnation | None = None
        """The worker that may get a call without another question, see `calls.try_call`."""
        self._count = 0
        self._closed = False
        # Of the workers before this one.
        self._counters: Counter[str] = Counter()

    def incarnation(self) -> Incarnation:
        """The living worker, started if there is none. Does not wait for its session.

        Raises:
            PoolClosed: `close` was called.
            WorkerStartError: the process could not be started.
        """
        current = self.at_hand
        if current is not None and not current.ended:
            return current
        with self._lock:
            if self._closed:
                raise PoolClosed("the pool is closed")
            current = self.at_hand
            if current is None or not current.alive:
                if current is not None:
                    self._end(current)
                self._count += 1
                current = self.at_hand = Incarnation(self.spec, self._count)
            return current

    def replace(self, incarnation: Incarnation) -> None:
        """Take note that a worker died before it took a call."""
        with self._lock:
            if self.at_hand is incarnation:
                self._end(incarnation)

    def cancel_all(self) -> int:
        """Cancel the calls in flight, and say how many those were."""
        current = self.at_hand
        return 0 if current is None else current.cancel_all()

    def ask_to_end(self) -> None:
        """Refuse calls from now on, fail those in flight, and tell the worker to end."""
        with self._lock:
            self._closed = True
            if self.at_hand is not None:
                self.at_hand.ask_to_end()

    def end(self, timeout: float) -> None:
        """After `ask_to_end`: make sure that the worker has ended within `timeout` seconds."""
        current = self.at_hand
        if current is not None:
            self._end(current, timeout)

    def _end(self, incarnation: Incarnation, timeout: float = 0.0) -> None:
        incarnation.end(timeout)
        self._counters.update(incarnation.channel.counters())
        # Its memory and descriptors go, even if a closed pool is kept.
        self.at_hand = None

    def status(self) -> RoleStatus:
        """See `RoleStatus`."""
        current = self.at_hand
        if current is None or self._closed:
            state = "stopped"
        elif not current.alive:
            state = "dead"
        else:
            state = "ready" if current.is_ready() else "starting"
        counters = self._counters.copy()
        if current is not None:
            counters.update(current.channel.counters())
        running = current if state in ("starting", "ready") else None
        ready = running.ready if running else None
        return RoleStatus(
            role=self.spec.name,
            state=state,
            pid=running.pid if running else None,
            incarnation=self._count,
            uptime=time.monotonic() - running.started if running else None,
            loading=1.0 if ready else running.loading if running else 0.0,
            load_seconds=ready.load_seconds if ready else None,
            sandbox=ready.sandbox if ready else None,
            in_flight=len(running.in_flight()) if running else 0,
            counters=dict(counters),
        )
