"""The ``embed`` role, worker side: texts in, one float32 array out."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

from inferpool.config import EmbedConfig
from inferpool.engine.abort import AbortToken
from inferpool.engine.embedder import Embedder
from inferpool.messages import EmbedRequest, read
from inferpool.roles.packed import PackedSession
from inferpool.worker import KindHandler, Reply, RoleConfig, WorkerLoopState

__all__ = ["HANDLERS", "make_session"]


def make_session(role_config: RoleConfig, abort: AbortToken | None) -> PackedSession:
    """Load the model that ``role_config.options`` (an `EmbedConfig` as a map) names.

    Raises:
        TypeError, ValueError: for a bad option, by name.
        ModelNotFound: if there is no such model.
        ModelLoadError: if it can't be loaded, or gives no vectors.
        CallCancelled: if ``abort`` was set meanwhile.
    """
    config = read(role_config.options, EmbedConfig)
    return PackedSession(config, abort, partial(Embedder, prompts=config.prompts))


def handle_embed(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
    """Answer an `EmbedRequest` with a float32 array of shape (len(texts), d)."""
    cast(PackedSession, state.session).submit(reply, "embed", read(payload, EmbedRequest))


HANDLERS: Mapping[str, KindHandler] = {"embed": handle_embed}
