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
    from inferpool.config import (
        ChatConfig,
        EmbedConfig,
        Policy,
        RerankConfig,
        Role,
        VisionConfig,
    )
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
        PoisonousRequest,
        PoolClosed,
        ProtocolError,
        QueueFull,
        RemoteError,
        RoleDegraded,
        WorkerCrashed,
        WorkerError,
        WorkerStartError,
        WorkerStuck,
    )
    from inferpool.host.pool import AsyncPool, Pool
    from inferpool.host.status import CallStatus, RoleStatus, WorkerStatus
    from inferpool.host.stream import AsyncStream, Stream
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
    "inferpool.config": [
        "ChatConfig",
        "EmbedConfig",
        "Policy",
        "RerankConfig",
        "Role",
        "VisionConfig",
    ],
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
        "PoisonousRequest",
        "PoolClosed",
        "ProtocolError",
        "QueueFull",
        "RemoteError",
        "RoleDegraded",
        "WorkerCrashed",
        "WorkerError",
        "WorkerStartError",
        "WorkerStuck",
    ],
    "inferpool.host.pool": ["AsyncPool", "Pool"],
    "inferpool.host.stream": ["AsyncStream", "Stream"],
    "inferpool.host.status": ["CallStatus", "RoleStatus", "WorkerStatus"],
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
    "CallStatus",
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
    "PoisonousRequest",
    "Policy",
    "Pool",
    "PoolClosed",
    "ProtocolError",
    "QueueFull",
    "RemoteError",
    "RerankConfig",
    "RerankResult",
    "Role",
    "RoleDegraded",
    "RoleStatus",
    "SandboxReport",
    "Stream",
    "Timings",
    "Usage",
    "VisionConfig",
    "WorkerCrashed",
    "WorkerError",
    "WorkerStartError",
    "WorkerStatus",
    "WorkerStuck",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
