"""The typed requests and results that cross between host and worker.

They travel as maps; each side converts and validates them on arrival. A field that is not
listed here is refused by name, on both sides.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import msgspec

from inferpool import errors
from inferpool.chat_messages import (
    ChatDelta,
    ChatMessage,
    ChatRequest,
    ChatResult,
    Conversation,
    FinishReason,
    Function,
    FunctionCall,
    FunctionDelta,
    FunctionName,
    JsonSchema,
    Logprobs,
    NamedTool,
    Priority,
    ResponseFormat,
    Sampling,
    TextPart,
    Timings,
    TokenLogprob,
    Tool,
    ToolCall,
    ToolCallDelta,
    TopLogprob,
    Usage,
)

__all__ = [
    "READY_KIND",
    "ChatDelta",
    "ChatMessage",
    "ChatRequest",
    "ChatResult",
    "Conversation",
    "EmbedRequest",
    "ErrorInfo",
    "FinishReason",
    "Function",
    "FunctionCall",
    "FunctionDelta",
    "FunctionName",
    "JsonSchema",
    "Logprobs",
    "NamedTool",
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
    "TextPart",
    "Timings",
    "TokenLogprob",
    "Tool",
    "ToolCall",
    "ToolCallDelta",
    "TopLogprob",
    "Usage",
    "VisionRequest",
    "WorkerArguments",
    "read",
]

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
        # Bytes come as bytes, never as text in base64.
        return msgspec.convert(fields, message, builtin_types=(bytes,))
    except AttributeError as error:  # numpy's objects pass for mappings, and have no keys
        raise TypeError(f"{message.__name__}: {error}") from error
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

    def exception(self) -> errors.InferpoolError:
        """What the caller gets.

        A `ModelError` or `CallError` of this package comes back as itself, anything else as
        `RemoteError`.
        """
        cls = getattr(errors, self.type_name, None) if self.type_name in errors.__all__ else None
        if cls is errors.ContextLengthExceeded:
            exceeded = errors.ContextLengthExceeded(self.message)
            exceeded.details = self.details  # whose names may be any
            return exceeded
        travels = cls is not None and issubclass(cls, (errors.ModelError, errors.CallError))
        if cls is None or not travels or cls is errors.RemoteError:
            return errors.RemoteError(self.type_name, self.message, self.traceback)
        error: errors.InferpoolError = cls(self.message)
        error.add_note(self.traceback)
        return error


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
    finish_reason: FinishReason | Literal["timeout"]
    """``"timeout"``: the page ran out of time, and the text is what had been written by then."""
    usage: Usage | None
    """None after a timeout."""
