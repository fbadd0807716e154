"""The ``rerank`` role, worker side: a query and documents in, scores out."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, closing
from functools import partial
from typing import Any, cast

from inferpool.config import RerankConfig
from inferpool.engine.abort import AbortToken
from inferpool.engine.reranker import Reranker
from inferpool.messages import RerankRequest, read
from inferpool.roles.load import load_model
from inferpool.roles.packed import PackedCalls
from inferpool.worker import KindHandler, Reply, RoleConfig, WorkerLoopState

__all__ = ["HANDLERS", "RerankSession", "make_session"]


class RerankSession:
    """A loaded reranker.

    Attributes:
        reranker: makes the scores.
        calls: the calls under way; those of several callers share batches.
    """

    def __init__(self, config: RerankConfig, abort: AbortToken | None) -> None:
        with ExitStack() as resources:
            model = load_model(config, abort)
            resources.enter_context(closing(model))
            self.reranker = Reranker(
                model,
                n_batch=config.n_batch,
                n_seq_max=config.n_seq_max,
                n_threads=config.n_threads,
                flash_attn=config.flash_attn,
            )
            resources.enter_context(closing(self.reranker))
            self.calls = PackedCalls(self.reranker.packer)
            self._resources = resources.pop_all()

    def step(self) -> float | None:
        """Compute one batch; see `inferpool.worker.Session`."""
        return self.calls.step()

    def close(self) -> None:
        """Free the model and its context. Closing twice is harmless."""
        self._resources.close()


def make_session(role_config: RoleConfig, abort: AbortToken | None) -> RerankSession:
    """Load the model that ``role_config.options`` (a `RerankConfig` as a map) names.

    Raises:
        TypeError, ValueError: for a bad option, by name.
        ModelNotFound: if there is no such model.
        ModelLoadError: if it can't be loaded, or is no reranker.
        CallCancelled: if ``abort`` was set meanwhile.
    """
    return RerankSession(read(role_config.options, RerankConfig), abort)


def handle_rerank(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
    """Answer a `RerankRequest` with a list of `RerankResult`, the best one first."""
    request = read(payload, RerankRequest)
    session = cast(RerankSession, state.session)
    job = session.reranker.job(request, reply.abort)
    session.calls.submit(reply, "rerank", job, partial(session.reranker.finish, request=request))


HANDLERS: Mapping[str, KindHandler] = {"rerank": handle_rerank}
