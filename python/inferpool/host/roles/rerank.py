"""The ``rerank`` role as `Pool` and `AsyncPool` offer it."""

from __future__ import annotations

from collections.abc import Sequence

from inferpool.host.calls import Driver, Steps, call
from inferpool.host.drive import LoopDriver, ThreadDriver
from inferpool.host.supervisor import Supervisor
from inferpool.messages import RerankRequest, RerankResult, read

__all__ = ["AsyncRerank", "Rerank"]


class Rerank:
    """The ``rerank`` role of a `Pool`."""

    def __init__(self, supervisor: Supervisor, driver: ThreadDriver) -> None:
        self._supervisor = supervisor
        self._driver = driver

    def __call__(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top_n: int | None = None,
        normalize: bool = False,
        truncate: bool = False,
        timeout: float | None = None,
    ) -> list[RerankResult]:
        """Order documents by how well they answer a query.

        Args:
            query: what is asked.
            documents: the texts, in any number.
            top_n: how many of the best to return; None returns all.
            normalize: map scores to 0 … 1, by ``1 / (1 + exp(-score))``. Models that are asked for
                yes or no, such as Qwen3-Reranker, give the probability of yes either way.
            truncate: cut documents that are longer, together with the query, than the model's
                context.
            timeout: seconds until `CallTimeout`.

        Returns:
            The best document first, with its index and relevance score; among equal scores the
            one that was given first.

        Raises:
            ContextLengthExceeded: a document is too long, and `truncate` is off, or the query is.
            TypeError: `documents` is no sequence of str, or `query` no str.
            ValueError: `top_n` is less than 1.
        """
        request = _request(query, documents, top_n, normalize, truncate)
        return self._driver.run(_rerank(self._supervisor, self._driver, request, timeout))


class AsyncRerank:
    """The ``rerank`` role of an `AsyncPool`."""

    def __init__(self, supervisor: Supervisor, driver: LoopDriver) -> None:
        self._supervisor = supervisor
        self._driver = driver

    async def __call__(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top_n: int | None = None,
        normalize: bool = False,
        truncate: bool = False,
        timeout: float | None = None,
    ) -> list[RerankResult]:
        """As `Rerank.__call__`."""
        request = _request(query, documents, top_n, normalize, truncate)
        return await self._driver.run(_rerank(self._supervisor, self._driver, request, timeout))


def _request(
    query: str, documents: Sequence[str], top_n: int | None, normalize: bool, truncate: bool
) -> RerankRequest:
    if isinstance(documents, str):
        raise TypeError("documents must be a sequence of str, not a str")
    fields = {
        "query": query,
        "documents": list(documents),
        "top_n": top_n,
        "normalize": normalize,
        "truncate": truncate,
    }
    return read(fields, RerankRequest)


def _rerank(
    supervisor: Supervisor, driver: Driver, request: RerankRequest, timeout: float | None
) -> Steps[list[RerankResult]]:
    items = yield from call(supervisor, driver, "rerank", request, timeout)
    return read(items, list[RerankResult])
