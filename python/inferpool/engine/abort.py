"""How a call that is being served can be stopped, from Python and from native code."""

from __future__ import annotations

import ctypes
import time
from typing import Protocol, Self

__all__ = ["AbortToken", "Deadline"]

_Poll = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)


class AbortToken(Protocol):
    """A flag that another thread sets and that llama.cpp polls without the GIL."""

    def is_set(self) -> bool:
        """Whether the call should end now."""

    def union(self, other: Self, /) -> Self:
        """A token that is set once this one is, or ``other``."""

    @property
    def callback(self) -> int:
        """Address of a C function ``bool (*)(void *)`` that returns the flag.

        It must be callable from any thread, with or without the GIL.
        """

    @property
    def data(self) -> int:
        """Address that is passed to `callback`; valid as long as this object lives."""


class Deadline:
    """An abort token that is set once ``abort`` is, or after some seconds.

    A look at it takes the GIL, so it is for work that nothing else in the process competes with.
    """

    def __init__(self, abort: AbortToken | None, seconds: float) -> None:
        self._abort = abort
        self._at = time.monotonic() + seconds
        self._poll = _Poll(lambda _data: self.is_set())

    @property
    def expired(self) -> bool:
        """Whether the time has come."""
        return time.monotonic() >= self._at

    def is_set(self) -> bool:
        """See `AbortToken`."""
        return self.expired or (self._abort is not None and self._abort.is_set())

    def union(self, other: Self, /) -> Self:
        """Not needed: work under a deadline serves one call."""
        raise NotImplementedError

    @property
    def callback(self) -> int:
        """See `AbortToken`."""
        return ctypes.cast(self._poll, ctypes.c_void_p).value or 0

    @property
    def data(self) -> int:
        """See `AbortToken`."""
        return 0
