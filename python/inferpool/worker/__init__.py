"""The worker process: its entry point, its dispatch loop and its log.

Authors of custom roles meet `RoleConfig`, `Reply` and `WorkerLoopState` here, as arguments of
their session factory and handlers.

Names are imported when they are first used: the entry point enters the sandbox before anything
that starts threads is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inferpool.worker.log import configure_worker_logging, redirect_stdio
    from inferpool.worker.runtime import (
        AbortToken,
        KindHandler,
        Reply,
        RoleConfig,
        Session,
        WireKind,
        WorkerChannel,
        WorkerLoopState,
        WorkerRole,
        report_loading,
        run_worker,
    )

__all__ = [
    "AbortToken",
    "KindHandler",
    "Reply",
    "RoleConfig",
    "Session",
    "WireKind",
    "WorkerChannel",
    "WorkerLoopState",
    "WorkerRole",
    "configure_worker_logging",
    "redirect_stdio",
    "report_loading",
    "run_worker",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "log" if name in {"configure_worker_logging", "redirect_stdio"} else "runtime"
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value
