"""Texts to vectors: many sequences in one batch, float32 straight into a numpy array."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from inferpool.engine.abort import AbortToken
from inferpool.engine.backend import lib
from inferpool.engine.model import Model
from inferpool.engine.packing import Job, Packer
from inferpool.errors import ContextLengthExceeded, ModelLoadError

__all__ = ["Embedder"]


class Embedder:
    """The pooled vectors of a model's texts.

    Attributes:
        dimension: length d of a vector.
        n_ctx: tokens a text may have at most, special tokens included.
    """

    def __init__(
        self,
        model: Model,
        *,
        n_batch: int,
        n_seq_max: int,
        n_threads: int | None = None,
        flash_attn: bool = True,
    ) -> None:
        """Prepare ``model``, which stays the caller's to close.

        Args:
            model: an embedding model.
            n_batch: tokens decoded together at most; no text can be longer than this.
            n_seq_max: texts decoded together at most.
            n_threads: None takes the CPUs this process may run on.
            flash_attn: whether to use flash attention.

        Raises:
            ModelLoadError: if the model gives no vector for a text, or memory is short.
        """
        self._model = model
        self._packer = Packer(
            model,
            n_batch=n_batch,
            n_seq_max=n_seq_max,
            n_threads=n_threads,
            flash_attn=flash_attn,
        )
        try:
            self._require_pooling()
        except ModelLoadError:
            self._packer.close()
            raise
        self.dimension = model.n_embd
        self.n_ctx = self._packer.n_ctx

    def close(self) -> None:
        """Free the context. Closing twice is harmless."""
        self._packer.close()

    def embed(
        self,
        texts: Sequence[str],
        *,
        normalize: bool = True,
        truncate: bool = False,
        abort: AbortToken | None = None,
    ) -> npt.NDArray[np.float32]:
        """The vectors of ``texts``, float32 of shape (len(texts), d), in their order.

        Args:
            texts: any number of them, none included.
            normalize: scale each vector to Euclidean length 1.
            truncate: cut over-long texts at the context length, their closing special
                token kept.
            abort: ends the call early.

        Raises:
            ContextLengthExceeded: if a text is over-long and ``truncate`` is off.
            ValueError: if a text gives no token at all.
            CallCancelled: if ``abort`` was set.
            ModelError: if llama.cpp can't compute a batch.
        """
        tokens = [self._tokenize(i, text, truncate) for i, text in enumerate(texts)]
        vectors = self._packer.run(Job(tokens, self.dimension, abort))
        if normalize:
            norms = np.linalg.norm(vectors, axis=1, keepdims=True)
            # A zero vector has no direction, and stays as it is.
            np.divide(vectors, norms, out=vectors, where=norms > 0)
        return vectors

    def _tokenize(self, index: int, text: str, truncate: bool) -> npt.NDArray[np.int32]:
        tokens = self._model.tokenize(text, add_special=True, parse_special=False)
        if not tokens.size:
            raise ValueError(f"texts[{index}] gives no token, so it has no vector")
        if len(tokens) <= self.n_ctx:
            return tokens
        if not truncate:
            raise ContextLengthExceeded(
                f"texts[{index}] has {len(tokens)} tokens, the model takes {self.n_ctx}. "
                "hint: split it, or pass truncate=True",
                index=index,
                asked=len(tokens),
                context=self.n_ctx,
            )
        kept = tokens[: self.n_ctx].copy()
        if self._model.adds_suffix:
            kept[-1] = tokens[-1]
        return kept

    def _require_pooling(self) -> None:
        pooling = self._packer.pooling
        if pooling == lib.LLAMA_POOLING_TYPE_NONE:
            raise ModelLoadError(
                f"{self._model.path.name} names no pooling (<architecture>.pooling_type), so it "
                "gives a vector for each token and none for a text: not an embedding model"
            )
        if pooling == lib.LLAMA_POOLING_TYPE_RANK:
            raise ModelLoadError(
                f"{self._model.path.name} is a reranker: it scores pairs and gives no vectors"
            )
