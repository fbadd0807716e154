"""The ``rerank`` role, worker side: a query and documents in, scores out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from inferpool.config import RerankConfig
from inferpool.engine.abort import AbortToken
from inferpool.engine.reranker import Reranker
from inferpool.messages import RerankRequest, read
from inferpool.roles.packed import PackedSession
from inferpool.worker import KindHandler, Reply, RoleConfig, WorkerLoopState

__all__ = ["HANDLERS", "make_session"]


def make_session(role_config: RoleConfig, abort: AbortToken | None) -> PackedSession:
    """Load the model that ``role_config.options`` (a `RerankConfig` as a map) names.

    Raises:
        TypeError, ValueError: for a bad option, by name.
        ModelNotFound: if there is no such model.
        ModelLoadError: if it can't be loaded, or is not a reranker.
        CallCancelled: if ``abort`` was set meanwhile.
    """
    return PackedSession(read(role_config.options, RerankConfig), abort, Reranker)


def handle_rerank(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
    """Answer a `RerankRequest` with a list of `RerankResult`, the best one first."""
    cast(PackedSession, state.session).submit(reply, "rerank", read(payload, RerankRequest))


HANDLERS: Mapping[str, KindHandler] = {"rerank": handle_rerank}
