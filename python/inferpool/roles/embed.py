"""The ``embed`` role, worker side: texts in, one float32 array out."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, closing
from functools import partial
from typing import Any, cast

from inferpool.config import EmbedConfig
from inferpool.engine.abort import AbortToken
from inferpool.engine.embedder import Embedder
from inferpool.messages import EmbedRequest, read
from inferpool.roles.load import load_model
from inferpool.roles.packed import PackedCalls
from inferpool.worker import KindHandler, Reply, RoleConfig, WorkerLoopState

__all__ = ["HANDLERS", "EmbedSession", "make_session"]


class EmbedSession:
    """A loaded embedding model.

    Attributes:
        embedder: makes the vectors.
        calls: the calls under way; those of several callers share batches.
    """

    def __init__(self, config: EmbedConfig, abort: AbortToken | None) -> None:
        with ExitStack() as resources:
            model = load_model(config, abort)
            resources.enter_context(closing(model))
            self.embedder = Embedder(
                model,
                n_batch=config.n_batch,
                n_seq_max=config.n_seq_max,
                n_threads=config.n_threads,
                flash_attn=config.flash_attn,
                prompts=config.prompts,
            )
            resources.enter_context(closing(self.embedder))
            self.calls = PackedCalls(self.embedder.packer)
            self._resources = resources.pop_all()

    def step(self) -> float | None:
        """Compute one batch; see `inferpool.worker.Session`."""
        return self.calls.step()

    def close(self) -> None:
        """Free the model and its context. Closing twice is harmless."""
        self._resources.close()


def make_session(role_config: RoleConfig, abort: AbortToken | None) -> EmbedSession:
    """Load the model that ``role_config.options`` (an `EmbedConfig` as a map) names.

    Raises:
        TypeError, ValueError: for a bad option, by name.
        ModelNotFound: if there is no such model.
        ModelLoadError: if it can't be loaded, or gives no vectors.
        CallCancelled: if ``abort`` was set meanwhile.
    """
    return EmbedSession(read(role_config.options, EmbedConfig), abort)


def handle_embed(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
    """Answer an `EmbedRequest` with a float32 array of shape (len(texts), d)."""
    request = read(payload, EmbedRequest)
    session = cast(EmbedSession, state.session)
    job = session.embedder.job(request, reply.abort)
    session.calls.submit(reply, "embed", job, partial(session.embedder.finish, request=request))


HANDLERS: Mapping[str, KindHandler] = {"embed": handle_embed}
