"""What a model says, piece by piece, to what a caller reads."""

from __future__ import annotations

from collections.abc import Iterable

from inferpool.engine.text import TextStream
from inferpool.messages import (
    ChatDelta,
    ChatResult,
    Conversation,
    FinishReason,
    Logprobs,
    TokenLogprob,
)

__all__ = ["AnswerParser", "collect"]


class AnswerParser:
    """Turns the bytes of one answer's tokens into deltas.

    It knows nothing of how tokens are made or batched: push each token's bytes until
    `stopped`, then finish.
    """

    def __init__(self, request: Conversation) -> None:
        self._text = TextStream(request.stop)

    @property
    def stopped(self) -> bool:
        """Whether the answer has ended by what it says: a stop string was found."""
        return self._text.stopped

    def push(self, data: bytes, logprob: TokenLogprob | None = None) -> ChatDelta | None:
        """Add the bytes of a token, and how likely it was if that was asked for.

        Returns:
            What is certain now, or None if nothing is.
        """
        text = self._text.push(data)
        if logprob is not None:
            return ChatDelta(text=text, logprobs=Logprobs(content=[logprob]))
        return ChatDelta(text=text) if text else None

    def finish(self, reason: FinishReason) -> ChatDelta:
        """The last delta, with what was held back; usage and timings are the caller's to add.

        Args:
            reason: why no more tokens come.
        """
        return ChatDelta(text=self._text.finish(), finish_reason=reason)


def collect(deltas: Iterable[ChatDelta]) -> ChatResult:
    """The whole answer that ``deltas`` make, the last of which must say how it ended."""
    pieces = []
    logprobs = []
    last = None
    for last in deltas:
        pieces.append(last.text)
        if last.logprobs is not None:
            logprobs += last.logprobs.content
    if last is None or last.finish_reason is None or last.usage is None or last.timings is None:
        raise AssertionError("the last delta says how the answer ended")
    return ChatResult(
        text="".join(pieces),
        finish_reason=last.finish_reason,
        usage=last.usage,
        timings=last.timings,
        logprobs=Logprobs(content=logprobs) if logprobs else None,
    )
