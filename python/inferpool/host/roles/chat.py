"""The ``chat`` role as `Pool` and `AsyncPool` offer it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypedDict, Unpack

from inferpool.host.calls import Driver, Steps, call, open_call
from inferpool.host.drive import LoopDriver, ThreadDriver
from inferpool.host.stream import AsyncStream, Stream
from inferpool.host.supervisor import Supervisor
from inferpool.messages import ChatDelta, ChatRequest, ChatResult, read

__all__ = ["AsyncChat", "Chat", "ChatOptions", "Messages"]

Messages = str | Sequence[Mapping[str, str]]
"""A prompt, or a conversation of ``{"role": ..., "content": ...}`` turns as OpenAI has them."""


class ChatOptions(TypedDict, total=False):
    """Options of a chat call. Names are OpenAI's or llama.cpp's; defaults are llama.cpp's."""

    max_tokens: int | None
    """Tokens of the answer at most; None: until the context is full."""
    temperature: float
    """Default 0.8; 0 always takes the most likely token."""
    top_k: int
    """Default 40; 0 is off."""
    top_p: float
    """Default 0.95; 1 is off."""
    min_p: float
    """Default 0.05; 0 is off."""
    repeat_penalty: float
    """Default 1, which is off."""
    seed: int | None
    """The same seed and request give the same answer."""
    stop: list[str]
    """Texts that end the answer; they are not part of it."""


class Chat:
    """The ``chat`` role of a `Pool`."""

    def __init__(self, supervisor: Supervisor, driver: ThreadDriver) -> None:
        self._supervisor = supervisor
        self._driver = driver

    def __call__(
        self,
        messages: Messages,
        *,
        timeout: float | None = None,
        **options: Unpack[ChatOptions],
    ) -> ChatResult:
        """Answer a conversation.

        Args:
            messages: a prompt, or turns with ``role`` and ``content``.
            timeout: seconds until `CallTimeout`.
            **options: see `ChatOptions`.

        Raises:
            ContextLengthExceeded: the conversation does not fit into the model's context.
            TypeError: an unknown option, or one of the wrong type.
            ValueError: an option out of range.
        """
        request = _chat_request(messages, options)
        return self._driver.run(_chat(self._supervisor, self._driver, request, timeout))

    def stream(
        self,
        messages: Messages,
        *,
        timeout: float | None = None,
        **options: Unpack[ChatOptions],
    ) -> Stream[ChatDelta]:
        """Answer a conversation piece by piece, as tokens are decoded.

        The request is sent at once; arguments are those of a plain call. Closing the stream, or
        dropping it, stops the model.
        """
        request = _chat_request(messages, options)
        opening = partial(open_call, self._supervisor, self._driver, "chat.stream", request)
        return Stream(self._driver, opening, timeout, _chat_deltas)


class AsyncChat:
    """The ``chat`` role of an `AsyncPool`."""

    def __init__(self, supervisor: Supervisor, driver: LoopDriver) -> None:
        self._supervisor = supervisor
        self._driver = driver

    async def __call__(
        self,
        messages: Messages,
        *,
        timeout: float | None = None,
        **options: Unpack[ChatOptions],
    ) -> ChatResult:
        """As `Chat.__call__`."""
        request = _chat_request(messages, options)
        return await self._driver.run(_chat(self._supervisor, self._driver, request, timeout))

    def stream(
        self,
        messages: Messages,
        *,
        timeout: float | None = None,
        **options: Unpack[ChatOptions],
    ) -> AsyncStream[ChatDelta]:
        """As `Chat.stream`, for ``async for``. The request is sent with the first item."""
        request = _chat_request(messages, options)
        opening = partial(open_call, self._supervisor, self._driver, "chat.stream", request)
        return AsyncStream(self._driver, opening, timeout, _chat_deltas)


def _chat_request(messages: Messages, options: ChatOptions) -> ChatRequest:
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    return read({"messages": messages, **options}, ChatRequest)


def _chat(
    supervisor: Supervisor, driver: Driver, request: ChatRequest, timeout: float | None
) -> Steps[ChatResult]:
    payload = yield from call(supervisor, driver, "chat", request, timeout)
    return read(payload, ChatResult)


def _chat_deltas(items: Sequence[Any]) -> Sequence[ChatDelta]:
    return [read(item, ChatDelta) for item in items]
