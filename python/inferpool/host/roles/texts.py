"""Texts as users have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["plain", "plain_texts"]


def plain(text: Any) -> Any:
    """A str of the class str; numpy's arrays, for one, hold a subclass. Others as they are."""
    return str.__str__(text) if isinstance(text, str) else text


def plain_texts(name: str, texts: Sequence[str]) -> list[str]:
    """The texts of an argument.

    Raises:
        TypeError: it is a str itself.
    """
    if isinstance(texts, str):
        raise TypeError(f"{name} must be a sequence of str, not a str")
    return list(map(plain, texts))
