"""Token bytes to text that can be shown at once."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

__all__ = ["TextStream", "overlap"]


class TextStream:
    """Joins the bytes of tokens into whole characters, and ends at a stop string.

    A character or a stop string may span tokens, so text that could still turn out to be
    part of one is held back. Bytes that are not UTF-8 become U+FFFD.

    Attributes:
        stopped: whether a stop string was found; it is not part of the text.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, data: bytes) -> str:
        """Add the bytes of a token; return the text that is certain now."""
        return self._release(self._decoder.decode(data))

    def finish(self) -> str:
        """Return what was held back, when no more tokens come."""
        text = self._release(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            # The one that is complete first, however the text was cut into tokens.
            return text[: min(found)[1]]
        n_held = max((overlap(text, stop) for stop in self._stop), default=0)
        certain = len(text) - n_held
        self._held = text[certain:]
        return text[:certain]


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``, not all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
