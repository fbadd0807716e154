"""Calls of many callers in one batch: what the ``embed`` and ``rerank`` roles share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from inferpool.config import EmbedConfig, RerankConfig
from inferpool.engine.abort import AbortToken
from inferpool.engine.model import Model
from inferpool.engine.packing import Job, Packer
from inferpool.roles.load import load_model
from inferpool.worker import Reply

__all__ = ["PackedEngine", "PackedSession"]

_RETRY_SECONDS = 0.001
"""How long a full reply ring is left to its reader before the next look."""


class PackedEngine(Protocol):
    """What a role makes of a model that pools."""

    def job(self, request: Any, abort: AbortToken | None) -> Job:
        """What is to be computed for a request, whose texts are tokenised bit by bit."""

    def finish(self, rows: npt.NDArray[np.float32], request: Any) -> Any:
        """The answer to ``request``, of the rows of its job."""


class PackedSession:
    """A loaded model, and the deferred calls that it computes together.

    Attributes:
        engine: makes jobs of requests, and answers of their rows.
        packer: computes the jobs.
    """

    def __init__(
        self,
        config: EmbedConfig | RerankConfig,
        abort: AbortToken | None,
        make_engine: Callable[[Model, Packer], PackedEngine],
    ) -> None:
        with ExitStack() as resources:
            model = load_model(config, abort)
            resources.enter_context(closing(model))
            self.packer = Packer(
                model,
                n_batch=config.n_batch,
                n_seq_max=config.n_seq_max,
                n_threads=config.n_threads,
                flash_attn=config.flash_attn,
            )
            resources.enter_context(closing(self.packer))
            self.engine = make_engine(model, self.packer)
            self._resources = resources.pop_all()
        self._computing: dict[Job, tuple[Reply, str, Any]] = {}
        self._unsent: list[tuple[Reply, str, Any]] = []

    def close(self) -> None:
        """Free the model and its context. Closing twice is harmless."""
        self._resources.close()

    def submit(self, reply: Reply, kind: str, request: Any) -> None:
        """Defer a call; its answer will be of ``kind``.

        Raises:
            InferpoolError: as the engine's ``job``.
        """
        job = self.engine.job(request, reply.abort)
        reply.defer()
        self._computing[job] = (reply, kind, request)
        self.packer.submit(job)

    def step(self) -> float | None:
        """Read texts and compute a batch for whoever waits; see `inferpool.worker.Session`."""
        try:
            for job in self.packer.step():
                reply, kind, request = self._computing.pop(job)
                if job.error is not None:
                    reply.fail(job.error)
                else:
                    self._unsent.append((reply, kind, self.engine.finish(job.rows, request)))
            self._unsent = [answer for answer in self._unsent if not _send(*answer)]
        except BaseException:
            # The loop fails all these calls: none of them must be answered again.
            self.packer.forget()
            self._computing.clear()
            self._unsent.clear()
            raise
        if self.packer.busy:
            return 0.0
        return _RETRY_SECONDS if self._unsent else None


def _send(reply: Reply, kind: str, answer: Any) -> bool:
    """Whether the call is settled: the answer is out, or can't go out."""
    try:
        if not reply.try_send(kind, answer):
            return False
    except Exception as error:  # noqa: BLE001  # its caller's to know, and nobody else's
        reply.fail(error)
    else:
        reply.end()
    return True
