"""The messages of a chat call: what is asked, and what comes back.

Names and shapes are OpenAI's where it has one. `inferpool.messages` has them too, beside all
others.
"""

from __future__ import annotations

import math
import re
from typing import Any, Literal

import msgspec

from inferpool.config import MAX_CONTEXT_LENGTH

__all__ = [
    "ChatDelta",
    "ChatMessage",
    "ChatRequest",
    "ChatResult",
    "Conversation",
    "FinishReason",
    "Function",
    "FunctionCall",
    "FunctionDelta",
    "FunctionName",
    "JsonSchema",
    "Logprobs",
    "NamedTool",
    "Priority",
    "ResponseFormat",
    "Sampling",
    "TextPart",
    "Timings",
    "TokenLogprob",
    "Tool",
    "ToolCall",
    "ToolCallDelta",
    "TopLogprob",
    "Usage",
]

FinishReason = Literal["stop", "length", "tool_calls"]

Priority = Literal["interactive", "bulk"]
"""Whether somebody waits for the answer. Bulk requests get what the others leave."""


class JsonSchema(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A JSON schema as OpenAI wraps it; ``name``, ``description`` and ``strict`` are ignored."""

    schema: dict[str, Any] | bool
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an answer must be: any text, any JSON object, or an instance of a JSON schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def __post_init__(self) -> None:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError(f"response_format {self.type!r}: json_schema belongs to 'json_schema'")


class Sampling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the tokens of an answer are chosen.

    Names are those of OpenAI and of llama.cpp's server; defaults, and the order in which the
    options act, are llama.cpp's (``common_params_sampling``).
    """

    max_tokens: int | None = None
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = 64
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    mirostat: Literal[0, 1, 2] = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    seed: int | None = None
    logit_bias: dict[int | str, float] = {}
    logprobs: bool = False
    top_logprobs: int = 0
    stop: list[str] = []
    grammar: str | None = None
    response_format: ResponseFormat | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {self.max_tokens}")
        for name, (least, most) in _SAMPLING_RANGES.items():
            value = getattr(self, name)
            # Written so that NaN fails too.
            if value is not None and not least <= value <= most:
                raise ValueError(f"{name} must be between {least} and {most}, not {value}")
        if self.grammar is not None and self.response_format is not None:
            raise ValueError("grammar and response_format exclude each other")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=True")
        _check_logit_bias(self.logit_bias)
        for name, most in _MOST_TEXTS.items():
            texts = getattr(self, name)
            if len(texts) > most:
                raise ValueError(f"{name} must hold at most {most} texts, not {len(texts)}")
            if "" in texts:
                raise ValueError(f"{name} must not hold an empty string")


def _check_logit_bias(logit_bias: dict[int | str, float]) -> None:
    for token, bias in logit_bias.items():
        if not (isinstance(token, int) or token.isdecimal()):
            raise ValueError(f"logit_bias: {token!r} is not a token id")
        # Minus infinity bans a token.
        if not (-1e6 <= bias <= 1e6 or bias == -math.inf):
            raise ValueError(
                f"logit_bias of token {token} must be between -1e6 and 1e6, not {bias}"
            )


# Each is looked for at every token, or compared with the whole vocabulary, while others wait.
_MOST_TEXTS = {"stop": 256, "dry_sequence_breakers": 64}

_SAMPLING_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 1e6),
    "top_k": (0, (1 << 31) - 1),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0),
    "xtc_probability": (0.0, 1.0),
    "xtc_threshold": (0.0, 1.0),
    # llama.cpp divides by it, in 32 bits.
    "repeat_penalty": (1e-6, 1e6),
    "repeat_last_n": (0, MAX_CONTEXT_LENGTH),
    "frequency_penalty": (-1e6, 1e6),
    "presence_penalty": (-1e6, 1e6),
    "dry_multiplier": (0.0, 1e6),
    "dry_base": (0.0, 1e6),
    "dry_allowed_length": (0, MAX_CONTEXT_LENGTH),
    "dry_penalty_last_n": (0, MAX_CONTEXT_LENGTH),
    "mirostat_tau": (0.0, 1e6),
    "mirostat_eta": (0.0, 1e6),
    # llama.cpp takes the largest 32-bit number for "choose one".
    "seed": (0, (1 << 32) - 2),
    "top_logprobs": (0, 20),
}


class FunctionCall(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which function a model calls, and with what."""

    name: str
    arguments: str
    """JSON text of an object, as the model wrote it."""


class ToolCall(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A tool call of an assistant's turn."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class TextPart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of a message's content; the role ``chat`` knows texts only."""

    type: Literal["text"]
    text: str


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One turn of a conversation, in OpenAI's shape."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    """``"developer"``, OpenAI's newer name, becomes ``"system"``, which is what templates know."""
    content: str | list[TextPart] | None = None
    tool_calls: list[ToolCall] = []
    """Of an assistant's turn: the calls that it made."""
    tool_call_id: str | None = None
    """Of a tool's turn: the call that it answers."""
    name: str | None = None
    reasoning_content: str | None = None
    """Of an assistant's turn: what it thought, for templates that repeat it."""

    def __post_init__(self) -> None:
        if self.role == "developer":
            msgspec.structs.force_setattr(self, "role", "system")
        if self.content is None and not self.tool_calls:
            raise ValueError(f"a message of role {self.role!r} needs content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls belong to role 'assistant', not {self.role!r}")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("tool_call_id belongs to a message of role 'tool', which needs it")
        if "\0" in self.text:
            raise ValueError(f"content of role {self.role!r} holds a NUL character")

    @property
    def text(self) -> str:
        """Its content as one text: parts are joined by newlines, as llama.cpp's server does."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""


class Conversation(Sampling, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A conversation, and how its next turn is to be made."""

    messages: list[ChatMessage]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.messages:
            raise ValueError("messages must not be empty")


class Function(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A function that a model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of its arguments; None for a function without."""
    strict: bool | None = None
    """Ignored."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-zA-Z0-9_.-]{1,64}", self.name):
            raise ValueError(f"function name {self.name!r} is not 1 to 64 of a-z A-Z 0-9 _ . -")


class Tool(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A tool as OpenAI describes it."""

    type: Literal["function"]
    function: Function


class FunctionName(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A function by its name alone."""

    name: str


class NamedTool(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The one tool that the answer must call."""

    function: FunctionName
    type: Literal["function"] = "function"


_GIVEN_TO_TEMPLATES = frozenset({"messages", "tools", "add_generation_prompt"})


class ChatRequest(Sampling, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A conversation whose next turn is wanted, or a prompt that is to be continued as it is."""

    messages: list[ChatMessage] | None = None
    prompt: str | None = None
    tools: list[Tool] = []
    tool_choice: Literal["auto", "none", "required"] | NamedTool = "auto"
    truncation: Literal["auto", "disabled"] = "auto"
    chat_template_kwargs: dict[str, Any] = {}
    cache_prompt: bool | None = None
    priority: Priority = "interactive"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("either messages or prompt is needed, not both")
        if self.messages is None:
            if self.prompt == "" or self.tools or self.chat_template_kwargs:
                raise ValueError(
                    "prompt must not be empty, and takes neither tools nor chat_template_kwargs"
                )
            return
        if not self.messages:
            raise ValueError("messages must not be empty")
        _check_results(self.messages)
        if given := _GIVEN_TO_TEMPLATES & self.chat_template_kwargs.keys():
            raise ValueError(f"chat_template_kwargs can't replace {', '.join(sorted(given))}")
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) != len(names):
            raise ValueError("two tools have the same name")
        forced = self.tool_choice not in {"auto", "none"}
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice {self.tool_choice.function.name!r} is not in tools")
        if forced and not names:
            raise ValueError("tool_choice 'required' needs tools")
        if forced and (self.grammar is not None or self.response_format is not None):
            raise ValueError("tool_choice excludes grammar and response_format")


def _check_results(messages: list[ChatMessage]) -> None:
    """Every result of a tool must answer a call of the assistant's turn before it."""
    waiting: set[str] = set()
    for place, message in enumerate(messages):
        if message.role != "tool":
            waiting = {call.id for call in message.tool_calls}
        elif message.tool_call_id in waiting:
            waiting.discard(message.tool_call_id)
        else:
            raise ValueError(
                f"messages[{place}]: tool_call_id {message.tool_call_id!r} answers no tool call "
                "of the assistant's turn before it"
            )


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of a chat call."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Where the time of a chat call went, in seconds, measured in the worker."""

    prompt_seconds: float
    """From the start of the call to its first token."""
    completion_seconds: float
    """From the first token to the last."""


class TopLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """A token that the model could have chosen, as OpenAI describes it."""

    token: str
    """Its text; bytes that are not UTF-8 by themselves show as U+FFFD."""
    logprob: float
    """Natural logarithm of its probability before any sampling option acted."""
    bytes: list[int]
    """Its text as bytes, exactly."""


class TokenLogprob(TopLogprob, frozen=True, kw_only=True):
    """A token of the answer."""

    top_logprobs: list[TopLogprob] = []
    """The likeliest tokens at its place, in that order; ``top_logprobs`` of them."""


class Logprobs(msgspec.Struct, frozen=True, kw_only=True):
    """How likely the tokens were, one entry per token."""

    content: list[TokenLogprob]


class FunctionDelta(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a function call: its name comes first and once, its arguments bit by bit."""

    name: str | None = None
    arguments: str = ""


class ToolCallDelta(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a tool call. ``id`` and ``type`` come with its first piece."""

    index: int
    """Which of the answer's calls it belongs to, counted from 0."""
    function: FunctionDelta
    id: str | None = None
    type: Literal["function"] | None = None


class ChatDelta(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a streamed answer. The last one has ``finish_reason``, usage and timings.

    With ``logprobs`` there is a delta for each token, whose text may come later: text that
    could still become a stop string, a marker, or half a character, is held back.
    """

    text: str = ""
    reasoning: str = ""
    """What the model thinks, apart from what it says."""
    tool_calls: list[ToolCallDelta] = []
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    dropped_messages: int = 0
    """With ``finish_reason``: how many messages were left out for want of context."""


class ChatResult(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer."""

    text: str
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    reasoning: str = ""
    """What the model thought, apart from what it says."""
    tool_calls: list[ToolCall] = []
    logprobs: Logprobs | None = None
    dropped_messages: int = 0
    """How many messages, the oldest ones, were left out for want of context."""

    @property
    def message(self) -> ChatMessage:
        """The answer as a turn, to be appended to the conversation."""
        return ChatMessage(
            "assistant",
            self.text,
            tool_calls=self.tool_calls,
            reasoning_content=self.reasoning or None,
        )
