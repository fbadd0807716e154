"""The typed requests and results that cross between host and worker.

They travel as maps; each side converts and validates them on arrival. A field that is not
listed here is refused by name, on both sides.
"""

from __future__ import annotations

import math
from typing import Any, Literal, TypeVar

import msgspec

from inferpool.config import MAX_CONTEXT_LENGTH

__all__ = [
    "READY_KIND",
    "ChatDelta",
    "ChatMessage",
    "ChatRequest",
    "ChatResult",
    "Conversation",
    "EmbedRequest",
    "ErrorInfo",
    "JsonSchema",
    "Logprobs",
    "PdfPage",
    "PdfRequest",
    "Priority",
    "Ready",
    "RerankRequest",
    "RerankResult",
    "ResponseFormat",
    "Sampling",
    "Sandbox",
    "SandboxReport",
    "Start",
    "Timings",
    "TokenLogprob",
    "TopLogprob",
    "Usage",
    "VisionRequest",
    "WorkerArguments",
    "read",
]

FinishReason = Literal["stop", "length"]

READY_KIND = "inferpool.ready"
"""Kind of a request that every worker answers with nothing, once its session stands."""

Priority = Literal["interactive", "bulk"]
"""Whether somebody waits for the answer. Bulk requests get what the others leave."""

_T = TypeVar("_T")


def read(fields: Any, message: type[_T]) -> _T:
    """Make a message, or a config, of what came from a user or from the other side.

    Raises:
        TypeError: for an unknown field, or one of the wrong type; by name.
        ValueError: for a wrong value; by name.
    """
    known = getattr(message, "__dataclass_fields__", None)
    if known is not None:
        # msgspec ignores surplus fields of dataclasses.
        for name in fields:
            if name not in known:
                raise TypeError(f"{message.__name__} has no option {name!r}")
    try:
        # Bytes come as bytes, never as text in base64.
        return msgspec.convert(fields, message, builtin_types=(bytes,))
    except msgspec.ValidationError as error:
        # "Expected `int`, got `str` - at `$.seed`", where $ is the whole message.
        text = f"{message.__name__}: {error}".replace("`$.", "`").replace(" - at `$`", "")
        # Checks in __post_init__ know what kind of error it is; msgspec wraps them.
        if isinstance(error.__cause__, ValueError) or str(error).startswith("Invalid"):
            raise ValueError(text) from error
        raise TypeError(text) from error


class Sandbox(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a worker shall give up before it opens anything; see `inferpool.Role`."""

    level: Literal["basic", "confined", "strict"]
    readable: list[str] = []
    """Files, and folders with all that they hold; names that `locate` knows."""
    locate: str | None = None
    """Import path of a callable from an entry of `readable` to the paths that it stands for."""
    log_path: str | None = None
    """The only file to write."""


class SandboxReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a worker gave up, as tried by itself before its session was built.

    Attributes:
        level: ``"basic"``: a scrubbed environment, no inherited descriptors, a process group of
            its own, no new privileges, no core dumps, a bound on descriptors. ``"confined"``:
            also no files but those of the interpreter, the role and its log, no network, no
            other programs and processes. ``"partial"``: some of that.
        missing: what of the level that was asked for is missing, and why.
    """

    level: Literal["basic", "partial", "confined"]
    missing: list[str] = []


class WorkerArguments(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The command line of a worker, as JSON: how to reach its host."""

    fds: list[int]
    """Inherited descriptors, in the order of ``HostChannel.worker_fds``."""
    host_pid: int
    frame_limit: int
    wait: str
    sandbox: Sandbox


class Start(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The first frame of an incarnation: everything a worker needs to know."""

    role: str
    incarnation: int
    session: str
    handlers: str
    options: dict[str, Any]
    log_path: str | None
    log_level: str
    sys_path: list[str]


class Ready(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The answer to `Start` once the session stands."""

    load_seconds: float
    sandbox: SandboxReport


class ErrorInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An exception in the worker, as the body of an ERROR frame."""

    type_name: str
    message: str
    traceback: str
    details: dict[str, Any] = {}


class EmbedRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Texts to embed. The answer is a float32 array of shape (len(texts), d)."""

    texts: list[str]
    normalize: bool = True
    truncate: bool = False
    prompt_name: str | None = None
    dimensions: int | None = None
    priority: Priority = "interactive"

    def __post_init__(self) -> None:
        if self.dimensions is not None and self.dimensions < 1:
            raise ValueError(f"dimensions must be at least 1, not {self.dimensions}")


class RerankRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Documents to order by how well they answer a query; the answer is `RerankResult` items."""

    query: str
    documents: list[str]
    top_n: int | None = None
    normalize: bool = False
    truncate: bool = False
    priority: Priority = "interactive"

    def __post_init__(self) -> None:
        if self.top_n is not None and self.top_n < 1:
            raise ValueError(f"top_n must be at least 1, not {self.top_n}")


class RerankResult(msgspec.Struct, frozen=True, kw_only=True):
    """One document of a rerank call."""

    index: int
    """Its place among the documents given."""
    relevance_score: float
    """The model's score; higher is more relevant. Only its order is meaningful between models."""


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
        for name in ("stop", "dry_sequence_breakers"):
            if "" in getattr(self, name):
                raise ValueError(f"{name} must not hold an empty string")


def _check_logit_bias(logit_bias: dict[int | str, float]) -> None:
    for token, bias in logit_bias.items():
        if not (isinstance(token, int) or token.isdecimal()):
            raise ValueError(f"logit_bias: {token!r} is no token id")
        # Minus infinity bans a token.
        if not bias < math.inf:
            raise ValueError(f"logit_bias of token {token} must be a number, not {bias}")


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


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Conversation(Sampling, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A conversation, and how its next turn is to be made."""

    messages: list[ChatMessage]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.messages:
            raise ValueError("messages must not be empty")


class ChatRequest(Conversation, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A conversation among others."""

    cache_prompt: bool | None = None
    priority: Priority = "interactive"


class VisionRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Images, and a conversation about them; they come before the text of its last turn."""

    images: list[Any]
    """Bytes of PNG, JPEG or WebP files, or uint8 arrays of shape (height, width, 3)."""
    chat: Conversation


class PdfRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A PDF document, and what to ask about each of its pages. The answer is `PdfPage` items."""

    document: bytes
    chat: Conversation
    password: str | None = None
    pages: list[int] | None = None
    dpi: int = 144
    page_timeout: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.dpi <= 1200:
            raise ValueError(f"dpi must be between 1 and 1200, not {self.dpi}")
        if self.page_timeout is not None and not self.page_timeout > 0:
            raise ValueError(f"page_timeout must be above 0, not {self.page_timeout}")


class PdfPage(msgspec.Struct, frozen=True, kw_only=True):
    """The answer about one page."""

    page: int
    """Its number, counted from 1."""
    total: int
    """How many pages the document has."""
    text: str
    finish_reason: Literal["stop", "length", "timeout"]
    """``"timeout"``: the page took longer than it may, and the text is what there was by then."""
    usage: Usage | None
    """None after a timeout."""


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
    """Its text; bytes that are no UTF-8 by themselves show as U+FFFD."""
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


class ChatDelta(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a streamed answer. The last one has ``finish_reason``, usage and timings.

    With ``logprobs`` there is a delta for each token, whose text may come later: text that
    could still become a stop string, or half a character, is held back.
    """

    text: str = ""
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timings: Timings | None = None


class ChatResult(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer."""

    text: str
    finish_reason: FinishReason
    usage: Usage
    logprobs: Logprobs | None = None
    timings: Timings
