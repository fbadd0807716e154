"""The ``rerank`` role as `Pool` and `AsyncPool` offer it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from inferpool.host.calls import Driver, Naming, Steps, call
from inferpool.host.drive import LoopDriver, ThreadDriver
from inferpool.host.roles.naming import ModelOption, naming
from inferpool.host.roles.texts import plain, plain_texts
from inferpool.host.supervisor import Supervisor
from inferpool.messages import Priority, RerankRequest, RerankResult, read

__all__ = ["AsyncRerank", "Rerank", "RerankOptions"]


class RerankOptions(ModelOption, total=False):
    """Options of a rerank call."""

    top_n: int | None
    """How many of the best documents to return, at least 1; default: all."""
    normalize: bool
    """Default false. True: map scores to 0 … 1, by ``1 / (1 + exp(-score))``. Models that are asked
    for yes or no, such as Qwen3-Reranker, give the probability of yes either way."""
    truncate: bool
    """Default false: a document that is longer, together with the query, than the model's context
    is an error. True: cut it."""
    priority: Priority
    """Default "interactive"; "bulk" gets the room in batches that other calls leave."""


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
        timeout: float | None = None,
        **options: Unpack[RerankOptions],
    ) -> list[RerankResult]:
        """Order documents by how well they answer a query.

        Args:
            query: what is asked.
            documents: the texts, in any number.
            timeout: seconds until `CallTimeout`.
            **options: see `RerankOptions`, and `ModelOption` for ``model``.

        Returns:
            The best document first, with its index and relevance score; among equal scores the
            one that was given first.

        Raises:
            ContextLengthExceeded: a document is too long, and ``truncate`` is off, or the query is.
            TypeError: `documents` is not a sequence of str, `query` not a str, or an
                option is unknown.
            ValueError: ``top_n`` is less than 1.
            InvalidRequest: the query and a document give no token.
        """
        request = _request(query, documents, options)
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
        timeout: float | None = None,
        **options: Unpack[RerankOptions],
    ) -> list[RerankResult]:
        """As `Rerank.__call__`."""
        request = _request(query, documents, options)
        return await self._driver.run(_rerank(self._supervisor, self._driver, request, timeout))


def _request(
    query: str, documents: Sequence[str], options: RerankOptions
) -> RerankRequest | Naming:
    model = options.pop("model", None)
    fields = {"query": plain(query), "documents": plain_texts("documents", documents), **options}
    return naming(model, read(fields, RerankRequest))


def _rerank(
    supervisor: Supervisor, driver: Driver, request: RerankRequest | Naming, timeout: float | None
) -> Steps[list[RerankResult]]:
    items = yield from call(supervisor, driver, "rerank", request, timeout)
    return read(items, list[RerankResult])
