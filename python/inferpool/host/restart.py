"""When a role gets another worker after a crash, and which requests it no longer gets."""

from __future__ import annotations

import secrets
import time
from collections import Counter, deque

from inferpool import codec
from inferpool.config import Policy
from inferpool.host.flight import Flight, digest

__all__ = ["CrashRecord"]

_MAX_BACKOFF = 5.0
"""Seconds between restarts at most."""
_MAX_DOUBLINGS = 64
"""Any backoff is at its limit by then, and a float not yet."""
_LOAD_CRASHES = 2
"""Crashes at load, one after the other, that put a model into quarantine."""
_POISONOUS = 2
"""Crashes that make a request poisonous."""
_MAX_SUSPECTS = 256
"""Requests that are remembered because they crashed a worker."""

_jitter = secrets.SystemRandom().uniform


class CrashRecord:
    """What is remembered of a role's crashes.

    Attributes:
        suspects: how often each request, by its digest, crashed a worker.
        degraded: why the role gets no more workers; None while it does.
    """

    def __init__(self, policy: Policy) -> None:
        self.degraded: str | None = None
        self._policy = policy
        self._recent: deque[float] = deque()
        self._at_load = 0
        self.suspects: Counter[bytes] = Counter()
        self._not_before = 0.0

    def crashed(self, *, at_load: bool, suspect: Flight | None, how: str) -> None:
        """Note that a worker crashed.

        Args:
            at_load: whether building its session did that.
            suspect: the request that did it, if that is known.
            how: it ended, for people.
        """
        now = time.monotonic()
        policy = self._policy
        self._recent.append(now)
        while self._recent and now - self._recent[0] > policy.crash_window:
            self._recent.popleft()
        if at_load:
            self._at_load += 1
        if suspect is not None:
            if len(self.suspects) >= _MAX_SUSPECTS:
                del self.suspects[next(iter(self.suspects))]
            self.suspects[digest(suspect.parts)] += 1
        recent = len(self._recent)
        if recent > 1:
            pause = min(_MAX_BACKOFF, policy.backoff * 2.0 ** min(recent - 2, _MAX_DOUBLINGS))
            self._not_before = now + _jitter(pause / 2, pause)
        if self._at_load >= _LOAD_CRASHES:
            self.degraded = f"crashed while it loaded, {self._at_load} times in a row; last: {how}"
        elif recent > policy.max_crashes:
            self.degraded = f"crashed {recent} times in {policy.crash_window:g} s; last: {how}"

    def loaded(self) -> None:
        """Note that a session stood."""
        self._at_load = 0

    def pause(self) -> float:
        """Seconds until another worker may be started."""
        return max(0.0, self._not_before - time.monotonic())

    def is_poisonous(self, parts: codec.Parts) -> bool:
        """Whether this request has crashed workers twice."""
        return bool(self.suspects) and self.suspects[digest(parts)] >= _POISONOUS
