"""Calls of many callers in one batch: what the ``embed`` and ``rerank`` sessions share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from inferpool.engine.packing import Job, Packer
from inferpool.worker import Reply

__all__ = ["PackedCalls"]

_RETRY_SECONDS = 0.001
"""How long a full reply ring is left to its reader before the next look."""


class PackedCalls:
    """The deferred calls of a session, and the jobs that compute their answers."""

    def __init__(self, packer: Packer) -> None:
        self._packer = packer
        self._computing: dict[Job, tuple[Reply, str, Callable[[Any], Any]]] = {}
        self._unsent: list[tuple[Reply, str, Any]] = []

    def submit(self, reply: Reply, kind: str, job: Job, finish: Callable[[Any], Any]) -> None:
        """Defer a call.

        Args:
            reply: where the answer goes.
            kind: kind of the answer.
            job: computes the rows of the answer.
            finish: makes the answer of them.
        """
        reply.defer()
        self._computing[job] = (reply, kind, finish)
        self._packer.submit(job)

    def step(self) -> float | None:
        """Compute one batch for whoever waits; see `inferpool.worker.Session`."""
        try:
            for job in self._packer.step():
                reply, kind, finish = self._computing.pop(job)
                if job.error is not None:
                    reply.fail(job.error)
                else:
                    self._unsent.append((reply, kind, finish(job.rows)))
            self._unsent = [answer for answer in self._unsent if not _send(*answer)]
        except BaseException:
            # The loop fails all these calls: none of them must be answered again.
            self._packer.forget()
            self._computing.clear()
            self._unsent.clear()
            raise
        if self._packer.busy:
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
