"""What can be said of roles and their workers, for people and monitoring."""

from __future__ import annotations

from dataclasses import dataclass

from inferpool.messages import SandboxReport

__all__ = ["CallStatus", "RoleStatus", "WorkerStatus"]


@dataclass(frozen=True, kw_only=True)
class CallStatus:
    """A call that a worker is not done with."""

    kind: str
    age: float
    """Seconds since it was made."""
    taken: bool
    """Whether the worker has begun with it; others wait in its queue."""
    given_up: bool
    """Whether its caller has given it up, by a timeout or by cancelling it."""


@dataclass(frozen=True, kw_only=True)
class WorkerStatus:
    """One worker process."""

    state: str
    """``"starting"``, ``"ready"``, ``"busy"`` (calls are in flight) or ``"dead"`` (until the
    next call)."""
    pid: int
    incarnation: int
    """Which of the role's workers this is, from 1."""
    replica: int
    """Which of the role's replicas it is, from 0."""
    uptime: float
    """Seconds since it was started."""
    loading: float
    """How much of the session has been built, from 0 to 1, as far as the worker says."""
    load_seconds: float | None
    """Seconds that its session took to build."""
    sandbox: SandboxReport | None
    """What it gave up before it opened anything; None until its session stands."""
    memory: int | None
    """Bytes in RAM, mapped model files included."""
    calls: tuple[CallStatus, ...]
    """Oldest first."""
    progress: dict[str, int]
    """What its heartbeat last said, if it was asked: ``requests`` taken and ``finished``,
    ``replies`` sent, ``polls`` of abort tokens. It is asked while callers wait."""
    frozen: float
    """Seconds for which callers have seen no progress, though the worker had a CPU."""


@dataclass(frozen=True, kw_only=True)
class RoleStatus:
    """What is known of a role right now.

    ``pid``, ``uptime``, ``loading``, ``load_seconds`` and ``sandbox`` are those of its first worker
    that lives.
    """

    role: str
    model: str | None
    """By name or path, as its next worker will have it; None for a role without one."""
    state: str
    """``"busy"``, ``"ready"`` or ``"starting"``: the first of these that any of its workers is;
    without a worker ``"dead"`` (until the next call), ``"stopped"`` or ``"degraded"``."""
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
    queue: int
    """Those of them that no worker has begun with."""
    memory: int
    """Bytes that the role's workers have in RAM, mapped model files included."""
    restarts: int
    """Workers that crashed or had to be killed."""
    last_exit: str | None
    """How the last worker that has ended did so, and what it was doing."""
    degraded: str | None
    """Why the role takes no calls, see `RoleDegraded`."""
    workers: tuple[WorkerStatus, ...]
    counters: dict[str, int]
    """What the channels of all its workers have done so far: ``frames_sent`` and
    ``bytes_sent`` (requests), ``frames_received`` and ``bytes_received`` (answers),
    ``fragments`` (records of frames that took several), ``parks`` (sleeps of waiting threads),
    ``spins_won`` (waits that ended before a sleep), ``wakes_sent`` and ``wakes_suppressed``
    (the worker slept, or was awake), ``full_waits`` (requests that had to wait for
    space or a free call slot),
    ``rescued_waits`` (lost wake-ups; 0 unless there is a bug), ``dropped_late`` (frames for
    calls given up before), ``violations`` (of the format, by a worker)."""
