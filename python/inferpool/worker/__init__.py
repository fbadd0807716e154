"""The worker process: its entry point, its dispatch loop and its log.

Authors of custom roles meet `RoleConfig`, `Reply` and `WorkerLoopState` here, as arguments of
their session factory and handlers.
"""

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
    "run_worker",
]
