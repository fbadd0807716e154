"""How a call that is being served can be stopped, from Python and from native code."""

from __future__ import annotations

from typing import Protocol, Self

__all__ = ["AbortToken"]


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
