"""The ``chat`` role as `Pool` and `AsyncPool` offer it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeVar, Unpack

import msgspec

from inferpool.host.calls import Deadline, Driver, Naming, Steps, call, open_call
from inferpool.host.drive import LoopDriver, ThreadDriver
from inferpool.host.roles.naming import ModelOption, naming
from inferpool.host.roles.texts import plain
from inferpool.host.stream import AsyncStream, Stream
from inferpool.host.supervisor import Supervisor
from inferpool.messages import ChatDelta, ChatMessage, ChatRequest, ChatResult, Priority, read

__all__ = [
    "AsyncChat",
    "Chat",
    "ChatOptions",
    "Messages",
    "Sampling",
    "as_deltas",
    "as_turns",
    "ask",
    "read_given",
]

T = TypeVar("T", bound=msgspec.Struct)

Messages = str | Sequence[Mapping[str, Any] | ChatMessage]
"""What a user says, or a conversation of ``{"role": ..., "content": ...}`` turns as OpenAI has
them, tool calls and their results among them."""


class Sampling(ModelOption, total=False):
    """How an answer is chosen. Names are OpenAI's or llama.cpp's; defaults are llama.cpp's.

    The options act in the order of this list, which is llama.cpp's; the value that turns each
    off is given. One that is None is as if it were not given.
    """

    max_tokens: int | None
    """Tokens of the answer at most; None: until the context is full."""
    stop: str | Sequence[str] | None
    """A text that ends the answer, or up to 256 of them; they are not part of it."""
    grammar: str | None
    """GBNF that the answer must follow (``grammars/README.md`` of llama.cpp)."""
    response_format: Mapping[str, Any] | None
    """``{"type": "json_object"}``, or ``{"type": "json_schema", "json_schema": {"schema": ...}}``:
    the answer is such JSON, unless it is cut by ``max_tokens``."""
    logprobs: bool | None
    """Tell how likely each token was, before any of the following acted."""
    top_logprobs: int | None
    """Tell that of the likeliest tokens too, up to 20 for each place. Default 0."""
    logit_bias: Mapping[int, float] | Mapping[str, float] | None
    """Added to the logit of a token, by its id; minus infinity bans it."""
    repeat_penalty: float | None
    """Divides the logit of tokens seen lately. Default 1, which is off."""
    frequency_penalty: float | None
    """Subtracted for each time a token was seen lately. Default 0, which is off."""
    presence_penalty: float | None
    """Subtracted if a token was seen lately. Default 0, which is off."""
    repeat_last_n: int | None
    """How many of the last tokens, prompt included, these three look at. Default 64."""
    dry_multiplier: float | None
    """Strength of the penalty on growing repetitions (DRY). Default 0, which is off."""
    dry_base: float | None
    """By what each further token of a repetition multiplies it. Default 1.75."""
    dry_allowed_length: int | None
    """Length from which on a repetition is penalised. Default 2."""
    dry_penalty_last_n: int | None
    """How many of the last tokens are searched for repetitions. Default 64."""
    dry_sequence_breakers: Sequence[str] | None
    """Up to 64 texts that end a repetition. Default newline, colon, quotation mark and asterisk."""
    top_k: int | None
    """Keep the likeliest tokens, this many. Default 40; 0 is off."""
    typical_p: float | None
    """Keep the locally typical tokens of this mass. Default 1, which is off."""
    top_p: float | None
    """Keep the likeliest tokens of this mass. Default 0.95; 1 is off."""
    min_p: float | None
    """Keep tokens at least this likely, relative to the likeliest. Default 0.05; 0 is off."""
    xtc_probability: float | None
    """How often all but the least likely of the tokens above ``xtc_threshold`` are excluded.
    Default 0, which is off."""
    xtc_threshold: float | None
    """Default 0.1."""
    temperature: float | None
    """Default 0.8; 0 always takes the likeliest token."""
    mirostat: Literal[0, 1, 2] | None
    """Aim at a surprise of ``mirostat_tau`` instead, by version 1 or 2; of the options above only
    ``logit_bias`` and ``temperature`` act then. Default 0, which is off."""
    mirostat_tau: float | None
    """Surprise to aim at, in bits. Default 5."""
    mirostat_eta: float | None
    """How fast. Default 0.1."""
    seed: int | None
    """The same seed and request give the same answer, unless other calls are served meanwhile,
    which changes the rounding."""


class CompletionOptions(Sampling, total=False):
    """Options of a text's completion."""

    cache_prompt: bool | None
    """Whether to continue from what an earlier prompt left in memory. That saves most of a prompt's
    time but may change the rounding, and so a token now and then. None: unless a seed is given."""
    priority: Priority | None
    """Default "interactive"; "bulk" waits until no other call waits for its turn."""


class ChatOptions(CompletionOptions, total=False):
    """Options of a chat call."""

    tools: Sequence[Mapping[str, Any]] | None
    """What the model may call: ``{"type": "function", "function": {"name": ..., "description": ...,
    "parameters": a JSON schema}}``."""
    tool_choice: Literal["auto", "none", "required"] | Mapping[str, Any] | None
    """Whether it must: ``"required"``, or ``{"type": "function", "function": {"name": ...}}`` for a
    certain one; the answer is then a well-formed call. Default ``"auto"``."""
    chat_template_kwargs: Mapping[str, Any] | None
    """What the model's chat template knows besides messages and tools, such as
    ``{"enable_thinking": False}`` for Qwen 3 or ``{"reasoning_effort": "low"}`` for gpt-oss."""
    truncation: Literal["auto", "disabled"] | None
    """``"auto"``, the default, drops the oldest exchanges of a conversation that the context can't
    hold, but not system messages and the last user's turn; ``"disabled"`` raises
    `ContextLengthExceeded`. Without ``max_tokens`` it keeps a quarter of the context free."""


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
            messages: what the user says, or turns with ``role`` and ``content``.
            timeout: seconds until `CallTimeout`.
            **options: see `ChatOptions`, and `ModelOption` for ``model``.

        Raises:
            ContextLengthExceeded: what has to stay of the conversation, and ``max_tokens``, do
                not fit into the model's context; ``details`` has the numbers.
            TypeError: an unknown option, or one of the wrong type.
            ValueError: an option out of range, or messages that make no conversation.
            InvalidRequest: the model can't do what is asked; it is a ValueError too.
        """
        request = _chat_request(messages, options)
        return self._driver.run(ask(self._supervisor, self._driver, "chat", request, timeout))

    def complete(
        self, prompt: str, *, timeout: float | None = None, **options: Unpack[CompletionOptions]
    ) -> ChatResult:
        """Continue a text as it is, without the model's chat template.

        Arguments and errors are those of a plain call, but for messages and tools.
        """
        request = _completion_request(prompt, options)
        return self._driver.run(ask(self._supervisor, self._driver, "chat", request, timeout))

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
        return Stream(self._driver, opening, timeout, as_deltas)

    def stream_complete(
        self, prompt: str, *, timeout: float | None = None, **options: Unpack[CompletionOptions]
    ) -> Stream[ChatDelta]:
        """As `complete`, piece by piece."""
        request = _completion_request(prompt, options)
        opening = partial(open_call, self._supervisor, self._driver, "chat.stream", request)
        return Stream(self._driver, opening, timeout, as_deltas)


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
        return await self._driver.run(ask(self._supervisor, self._driver, "chat", request, timeout))

    async def complete(
        self, prompt: str, *, timeout: float | None = None, **options: Unpack[CompletionOptions]
    ) -> ChatResult:
        """As `Chat.complete`."""
        request = _completion_request(prompt, options)
        return await self._driver.run(ask(self._supervisor, self._driver, "chat", request, timeout))

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
        return AsyncStream(self._driver, opening, timeout, as_deltas)

    def stream_complete(
        self, prompt: str, *, timeout: float | None = None, **options: Unpack[CompletionOptions]
    ) -> AsyncStream[ChatDelta]:
        """As `Chat.stream_complete`, for ``async for``."""
        request = _completion_request(prompt, options)
        opening = partial(open_call, self._supervisor, self._driver, "chat.stream", request)
        return AsyncStream(self._driver, opening, timeout, as_deltas)


def read_given(options: Mapping[str, Any], message: type[T]) -> T:
    """`read` what OpenAI's clients pass and return: None for what is not given, one text as stop.

    Raises:
        TypeError, ValueError: as `read`.
    """
    fields = {
        name: plain(value)
        for name, value in options.items()
        # An option that is unknown is refused whatever it is.
        if value is not None or name not in message.__struct_fields__
    }
    if isinstance(fields.get("stop"), str):
        fields["stop"] = [fields["stop"]]
    if isinstance(fields.get("messages"), Sequence):
        fields["messages"] = turns = [_given_in(turn) for turn in fields["messages"]]
        for turn in turns:
            if isinstance(turn, dict) and isinstance(turn.get("content"), list | tuple):
                turn["content"] = [_given_in(part) for part in turn["content"]]
    return read(fields, message)


def _given_in(value: Any) -> Any:
    """A mapping without what is None, and with texts as `plain` has them. Others as they are."""
    if not isinstance(value, Mapping):
        return value
    return {name: plain(each) for name, each in value.items() if each is not None}


def _chat_request(messages: Messages, options: ChatOptions) -> ChatRequest | Naming:
    model = options.pop("model", None)
    return naming(model, read_given({"messages": as_turns(messages), **options}, ChatRequest))


def _completion_request(prompt: str, options: CompletionOptions) -> ChatRequest | Naming:
    model = options.pop("model", None)
    return naming(model, read_given({"prompt": prompt, **options}, ChatRequest))


def ask(
    supervisor: Supervisor,
    driver: Driver,
    kind: str,
    request: Any,
    timeout: float | Deadline | None,
) -> Steps[ChatResult]:
    """Make a call of this kind whose answer is a `ChatResult`."""
    payload = yield from call(supervisor, driver, kind, request, timeout)
    return read(payload, ChatResult)


def as_turns(messages: Messages) -> Sequence[Mapping[str, Any] | ChatMessage]:
    """A conversation, of which a str is the only turn."""
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else messages


def as_deltas(items: Sequence[Any]) -> Sequence[ChatDelta]:
    """The items of a streamed answer, checked."""
    return [read(item, ChatDelta) for item in items]
