"""The ``embed`` role as `Pool` and `AsyncPool` offer it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import numpy as np

from inferpool.errors import ProtocolError
from inferpool.host.calls import Driver, Naming, Steps, call
from inferpool.host.drive import LoopDriver, ThreadDriver
from inferpool.host.roles.naming import ModelOption, naming
from inferpool.host.roles.texts import plain, plain_texts
from inferpool.host.supervisor import Supervisor
from inferpool.messages import EmbedRequest, Priority, read

__all__ = ["AsyncEmbed", "Embed", "EmbedOptions"]


class EmbedOptions(ModelOption, total=False):
    """Options of an embed call."""

    normalize: bool
    """Default true: scale each vector to Euclidean length 1."""
    truncate: bool
    """Default false: a text that is longer than the model's context is an error. True: cut it."""
    dimensions: int | None
    """Keep this many components of each vector, and then normalise. For models that were trained
    so that the first components are a vector of their own (Matryoshka); default: all."""
    priority: Priority
    """Default "interactive"; "bulk" gets the room in batches that other calls leave."""


class Embed:
    """The ``embed`` role of a `Pool`."""

    def __init__(self, supervisor: Supervisor, driver: ThreadDriver) -> None:
        self._supervisor = supervisor
        self._driver = driver

    def __call__(
        self,
        texts: Sequence[str],
        *,
        prompt_name: str | None = None,
        timeout: float | None = None,
        **options: Unpack[EmbedOptions],
    ) -> np.ndarray:
        """Embed texts, as they are or with what the model wants in front of them.

        Args:
            texts: the texts, in any number.
            prompt_name: which of the model's prefixes to put in front of each text, such as
                "query" or "document"; None puts none.
            timeout: seconds until `CallTimeout`.
            **options: see `EmbedOptions`, and `ModelOption` for ``model``.

        Returns:
            float32 of shape (len(texts), d), row i for text i; d is the model's dimension, or
            ``dimensions``.

        Raises:
            ContextLengthExceeded: a text is too long, and ``truncate`` is off.
            TypeError: `texts` is not a sequence of str, or an unknown option.
            InvalidRequest: more dimensions than the model has, no such prompt, or a text that
                gives no token.
        """
        request = _request(texts, prompt_name, options)
        return self._driver.run(_embed(self._supervisor, self._driver, request, timeout))

    def embed_query(
        self, text: str, *, timeout: float | None = None, **options: Unpack[EmbedOptions]
    ) -> np.ndarray:
        """The vector of a search query, with the model's prefix for queries; shape (d,)."""
        vectors = self([text], prompt_name="query", timeout=timeout, **options)
        return vectors.reshape(-1)

    def embed_documents(
        self,
        texts: Sequence[str],
        *,
        timeout: float | None = None,
        **options: Unpack[EmbedOptions],
    ) -> np.ndarray:
        """As a plain call, with the model's prefix for documents."""
        return self(texts, prompt_name="document", timeout=timeout, **options)


class AsyncEmbed:
    """The ``embed`` role of an `AsyncPool`."""

    def __init__(self, supervisor: Supervisor, driver: LoopDriver) -> None:
        self._supervisor = supervisor
        self._driver = driver

    async def __call__(
        self,
        texts: Sequence[str],
        *,
        prompt_name: str | None = None,
        timeout: float | None = None,
        **options: Unpack[EmbedOptions],
    ) -> np.ndarray:
        """As `Embed.__call__`."""
        request = _request(texts, prompt_name, options)
        return await self._driver.run(_embed(self._supervisor, self._driver, request, timeout))

    async def embed_query(
        self, text: str, *, timeout: float | None = None, **options: Unpack[EmbedOptions]
    ) -> np.ndarray:
        """As `Embed.embed_query`."""
        vectors = await self([text], prompt_name="query", timeout=timeout, **options)
        return vectors.reshape(-1)

    async def embed_documents(
        self,
        texts: Sequence[str],
        *,
        timeout: float | None = None,
        **options: Unpack[EmbedOptions],
    ) -> np.ndarray:
        """As `Embed.embed_documents`."""
        return await self(texts, prompt_name="document", timeout=timeout, **options)


def _request(
    texts: Sequence[str], prompt_name: str | None, options: EmbedOptions
) -> EmbedRequest | Naming:
    model = options.pop("model", None)
    prompt_name = plain(prompt_name)
    fields = {"texts": plain_texts("texts", texts), "prompt_name": prompt_name, **options}
    return naming(model, read(fields, EmbedRequest))


def _embed(
    supervisor: Supervisor, driver: Driver, request: EmbedRequest | Naming, timeout: float | None
) -> Steps[np.ndarray]:
    vectors = yield from call(supervisor, driver, "embed", request, timeout)
    if not isinstance(vectors, np.ndarray):
        raise ProtocolError(f"not an array of embeddings: {type(vectors).__name__}")
    return vectors
