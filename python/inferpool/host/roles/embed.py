"""The ``embed`` role as `Pool` and `AsyncPool` offer it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from inferpool.errors import ProtocolError
from inferpool.host.calls import Driver, Steps, call
from inferpool.host.drive import LoopDriver, ThreadDriver
from inferpool.host.supervisor import Supervisor
from inferpool.messages import EmbedRequest, read

__all__ = ["AsyncEmbed", "Embed"]


class Embed:
    """The ``embed`` role of a `Pool`."""

    def __init__(self, supervisor: Supervisor, driver: ThreadDriver) -> None:
        self._supervisor = supervisor
        self._driver = driver

    def __call__(
        self,
        texts: Sequence[str],
        *,
        normalize: bool = True,
        truncate: bool = False,
        timeout: float | None = None,
    ) -> np.ndarray:
        """Embed texts.

        Args:
            texts: the texts, in any number.
            normalize: scale each vector to length 1.
            truncate: cut texts that are longer than the model's context.
            timeout: seconds until `CallTimeout`.

        Returns:
            float32 of shape (len(texts), d), row i for text i; d is the model's dimension.

        Raises:
            ContextLengthExceeded: a text is too long, and `truncate` is off.
            TypeError: `texts` is no sequence of str.
        """
        request = _request(texts, normalize, truncate)
        return self._driver.run(_embed(self._supervisor, self._driver, request, timeout))


class AsyncEmbed:
    """The ``embed`` role of an `AsyncPool`."""

    def __init__(self, supervisor: Supervisor, driver: LoopDriver) -> None:
        self._supervisor = supervisor
        self._driver = driver

    async def __call__(
        self,
        texts: Sequence[str],
        *,
        normalize: bool = True,
        truncate: bool = False,
        timeout: float | None = None,
    ) -> np.ndarray:
        """As `Embed.__call__`."""
        request = _request(texts, normalize, truncate)
        return await self._driver.run(_embed(self._supervisor, self._driver, request, timeout))


def _request(texts: Sequence[str], normalize: bool, truncate: bool) -> EmbedRequest:
    if isinstance(texts, str):
        raise TypeError("texts must be a sequence of str, not a str")
    fields = {"texts": list(texts), "normalize": normalize, "truncate": truncate}
    return read(fields, EmbedRequest)


def _embed(
    supervisor: Supervisor, driver: Driver, request: EmbedRequest, timeout: float | None
) -> Steps[np.ndarray]:
    vectors = yield from call(supervisor, driver, "embed", request, timeout)
    if not isinstance(vectors, np.ndarray):
        raise ProtocolError(f"not an array of embeddings: {type(vectors).__name__}")
    return vectors
