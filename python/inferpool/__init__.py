"""Local models for Python hosts, each role in its own process.

    from inferpool import Pool

    with Pool(chat="smollm2", embed="minilm") as pool:
        vectors = pool.embed(["bees dance", "markets fall"])
        for delta in pool.chat.stream("Why do bees dance?"):
            print(delta.text, end="", flush=True)

Names are imported when they are first used: a worker, which imports this package too, needs
none of the host's.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inferpool.config import ChatConfig, EmbedConfig, RerankConfig, Role, VisionConfig
    from inferpool.errors import (
        CallCancelled,
        CallError,
        CallTimeout,
        ContextLengthExceeded,
        InferpoolError,
        InvalidRequest,
        ModelError,
        ModelLoadError,
        ModelNotFound,
        PayloadTooLarge,
        PoolClosed,
        ProtocolError,
        QueueFull,
        RemoteError,
        WorkerCrashed,
        WorkerError,
        WorkerStartError,
    )
    from inferpool.host.pool import AsyncPool, Pool
    from inferpool.host.stream import AsyncStream, Stream
    from inferpool.host.supervisor import RoleStatus
    from inferpool.messages import (
        ChatDelta,
        ChatResult,
        PdfPage,
        RerankResult,
        SandboxReport,
        Timings,
        Usage,
    )

_HOMES = {
    "inferpool.config": ["ChatConfig", "EmbedConfig", "RerankConfig", "Role", "VisionConfig"],
    "inferpool.errors": [
        "CallCancelled",
        "CallError",
        "CallTimeout",
        "ContextLengthExceeded",
        "InferpoolError",
        "InvalidRequest",
        "ModelError",
        "ModelLoadError",
        "ModelNotFound",
        "PayloadTooLarge",
        "PoolClosed",
        "ProtocolError",
        "QueueFull",
        "RemoteError",
        "WorkerCrashed",
        "WorkerError",
        "WorkerStartError",
    ],
    "inferpool.host.pool": ["AsyncPool", "Pool"],
    "inferpool.host.stream": ["AsyncStream", "Stream"],
    "inferpool.host.supervisor": ["RoleStatus"],
    "inferpool.messages": [
        "ChatDelta",
        "ChatResult",
        "PdfPage",
        "RerankResult",
        "SandboxReport",
        "Timings",
        "Usage",
    ],
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AsyncPool",
    "AsyncStream",
    "CallCancelled",
    "CallError",
    "CallTimeout",
    "ChatConfig",
    "ChatDelta",
    "ChatResult",
    "ContextLengthExceeded",
    "EmbedConfig",
    "InferpoolError",
    "InvalidRequest",
    "ModelError",
    "ModelLoadError",
    "ModelNotFound",
    "PayloadTooLarge",
    "PdfPage",
    "Pool",
    "PoolClosed",
    "ProtocolError",
    "QueueFull",
    "RemoteError",
    "RerankConfig",
    "RerankResult",
    "Role",
    "RoleStatus",
    "SandboxReport",
    "Stream",
    "Timings",
    "Usage",
    "VisionConfig",
    "WorkerCrashed",
    "WorkerError",
    "WorkerStartError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
