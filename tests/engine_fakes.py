"""What a worker gives to the engine and the roles, without a worker; how they are set up."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

from inferpool.engine.chat import ChatEngine
from inferpool.messages import ChatDelta, ChatRequest

__all__ = ["SETTINGS", "CountdownAbort", "FakeCaller", "FakeReply", "stream", "tokens"]

# One thread: two of them, waiting for each other on busy cores, take many times as long.
SETTINGS: dict[str, Any] = {"n_ctx": 1024, "n_batch": 64, "n_threads": 1, "flash_attn": True}

_Callback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)


class CountdownAbort:
    """An abort token in Python: set once it has been polled ``polls`` times; None never sets it.

    Attributes:
        native_polls: how often the native side has polled.
    """

    def __init__(self, polls: int | None = None) -> None:
        self._left = polls
        self.native_polls = 0
        self._native = _Callback(self._poll_native)

    def is_set(self) -> bool:
        if self._left is None:
            return False
        self._left = max(self._left - 1, 0)
        return self._left == 0

    def union(self, other: CountdownAbort) -> CountdownAbort:
        return _Either(self, other)

    @property
    def callback(self) -> int:
        address = ctypes.cast(self._native, ctypes.c_void_p).value
        assert address is not None
        return address

    @property
    def data(self) -> int:
        return 0

    def _poll_native(self, _data: int | None) -> bool:
        self.native_polls += 1
        return self.is_set()


class _Either(CountdownAbort):
    def __init__(self, *tokens: CountdownAbort) -> None:
        super().__init__()
        self._tokens = tokens

    def is_set(self) -> bool:
        return sum(token.is_set() for token in self._tokens) > 0  # each of them counts its polls


class FakeReply:
    """Keeps what a handler sends.

    Attributes:
        sent: kind and payload of each item.
        outcome: "deferred", "ended" or the error that ended the call; None before.
        full: how often `try_send` is still going to refuse.
    """

    def __init__(self, abort: CountdownAbort | None = None) -> None:
        self.abort = abort or CountdownAbort()
        self.sent: list[tuple[str, Any]] = []
        self.outcome: Any = None
        self.full = 0

    @property
    def cancelled(self) -> bool:
        return self.abort.is_set()

    def send(self, kind: str, payload: Any) -> None:
        self.sent.append((kind, payload))

    def try_send(self, kind: str, payload: Any) -> bool:
        if self.full:
            self.full -= 1
            return False
        self.send(kind, payload)
        return True

    def defer(self) -> None:
        self.outcome = "deferred"

    def end(self) -> None:
        assert self.outcome == "deferred", "a call ends once"
        self.outcome = "ended"

    def fail(self, error: BaseException) -> None:
        assert self.outcome == "deferred", "a call ends once"
        self.outcome = error


class FakeCaller:
    """Keeps what the scheduler tells it.

    Attributes:
        deltas: what it has taken.
        room: pieces that it takes before it is behind; None for no end.
        outcome: how the answer ended: "end", an error, or None while it has not.
    """

    def __init__(self, abort: CountdownAbort | None = None) -> None:
        self.abort = abort or CountdownAbort()
        self.deltas: list[ChatDelta] = []
        self.room: int | None = None
        self.gone = False
        self.outcome: str | BaseException | None = None

    @property
    def cancelled(self) -> bool:
        return self.gone or self.abort.is_set()

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    def tell(self, delta: ChatDelta) -> bool:
        if self.room is not None:
            if not self.room:
                return False
            self.room -= 1
        self.deltas.append(delta)
        return True

    def end(self) -> None:
        assert self.outcome is None
        self.outcome = "end"

    def fail(self, error: BaseException) -> None:
        assert self.outcome is None
        self.outcome = error


def tokens(engine: ChatEngine, request: ChatRequest, n: int) -> list[int]:
    """The first ``n`` tokens of an answer, or all if it has fewer."""
    caller = FakeCaller()
    engine.submit(request, caller)
    engine.step()
    [answer] = engine._scheduler._active
    while len(answer.tokens) < n and caller.outcome is None:
        engine.step()
    caller.gone = True
    engine.step()
    return answer.tokens[:n]


def stream(
    engine: ChatEngine, request: ChatRequest, abort: CountdownAbort | None = None
) -> Iterator[ChatDelta]:
    """The pieces of one answer; dropping the iterator cancels it."""
    caller = FakeCaller(abort)
    engine.submit(request, caller)
    try:
        while caller.outcome is None:
            engine.step()
            yield from caller.deltas
            caller.deltas.clear()
    finally:
        caller.gone = True
        engine.step()
    if isinstance(caller.outcome, BaseException):
        raise caller.outcome
