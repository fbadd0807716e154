"""The typed requests and results that cross between host and worker.

They travel as maps; each side converts and validates them on arrival. A field that is not
listed here is refused by name, on both sides.
"""

from __future__ import annotations

import math
from typing import Any, Literal, TypeVar

import msgspec

__all__ = [
    "READY_KIND",
    "ChatDelta",
    "ChatMessage",
    "ChatRequest",
    "ChatResult",
    "EmbedRequest",
    "ErrorInfo",
    "Ready",
    "RerankRequest",
    "RerankResult",
    "Start",
    "Timings",
    "Usage",
    "WorkerArguments",
    "read",
]

FinishReason = Literal["stop", "length"]

READY_KIND = "inferpool.ready"
"""Kind of a request that every worker answers with nothing, once its session stands."""

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
        return msgspec.convert(fields, message)
    except msgspec.ValidationError as error:
        # "Expected `int`, got `str` - at `$.seed`", where $ is the whole message.
        text = f"{message.__name__}: {error}".replace("`$.", "`").replace(" - at `$`", "")
        # Checks in __post_init__ know what kind of error it is; msgspec wraps them.
        if isinstance(error.__cause__, ValueError) or str(error).startswith("Invalid"):
            raise ValueError(text) from error
        raise TypeError(text) from error


class WorkerArguments(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The command line of a worker, as JSON: how to reach its host."""

    fds: list[int]
    """Inherited descriptors, in the order of ``HostChannel.worker_fds``."""
    host_pid: int
    frame_limit: int
    wait: str


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


class RerankRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Documents to order by how well they answer a query; the answer is `RerankResult` items."""

    query: str
    documents: list[str]
    top_n: int | None = None
    normalize: bool = False
    truncate: bool = False

    def __post_init__(self) -> None:
        if self.top_n is not None and self.top_n < 1:
            raise ValueError(f"top_n must be at least 1, not {self.top_n}")


class RerankResult(msgspec.Struct, frozen=True, kw_only=True):
    """One document of a rerank call."""

    index: int
    """Its place among the documents given."""
    relevance_score: float
    """The model's score; higher is more relevant. Only its order is meaningful between models."""


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class ChatRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A conversation and how to sample its next turn.

    The defaults of the sampling options are llama.cpp's (``common_params_sampling``).
    """

    messages: list[ChatMessage]
    max_tokens: int | None = None
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int | None = None
    stop: list[str] = []

    def __post_init__(self) -> None:
        if not self.messages:
            raise ValueError("messages must not be empty")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {self.max_tokens}")
        # Written so that NaN fails too.
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 or more, not {self.temperature}")
        if not 0 <= self.top_k < 1 << 31:
            raise ValueError(f"top_k must be 0 (off) or more, not {self.top_k}")
        for name in ("top_p", "min_p"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be between 0 and 1, not {getattr(self, name)}")
        if not 0.0 < self.repeat_penalty < math.inf:
            raise ValueError(f"repeat_penalty must be above 0, not {self.repeat_penalty}")
        # llama.cpp takes the largest 32-bit number for "choose one".
        if self.seed is not None and not 0 <= self.seed < (1 << 32) - 1:
            raise ValueError(f"seed must be between 0 and 2**32 - 2, not {self.seed}")
        if "" in self.stop:
            raise ValueError("stop must not hold an empty string")


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


class ChatDelta(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a streamed answer. The last one has ``finish_reason``, usage and timings."""

    text: str
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timings: Timings | None = None


class ChatResult(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer."""

    text: str
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
