"""Texts to vectors: many sequences in one batch, float32 straight into a numpy array."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from inferpool.engine.abort import AbortToken
from inferpool.engine.backend import lib
from inferpool.engine.context import Batch, Context
from inferpool.engine.model import Model
from inferpool.errors import ContextLengthExceeded, ModelError, ModelLoadError

__all__ = ["Embedder", "plan_batches"]

# Tokens that texts are packed up to. Attention runs over every pair of tokens in a batch,
# also of different texts: on MiniLM the rate is flat between 256 and 1024 tokens, and at
# 2048 it is a third lower with twice the memory.
_PACKED_TOKENS = 512


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
        # More than a whole text, and than a packed batch, is never used.
        n_batch = min(n_batch, max(model.n_ctx_train, _PACKED_TOKENS))
        # llama.cpp sizes its pooling graph for equal shares, and aborts on a remainder.
        n_batch += -n_batch % n_seq_max
        self._model = model
        self._context = Context(
            model,
            n_ctx=n_batch,
            n_batch=n_batch,
            n_seq_max=n_seq_max,
            n_threads=n_threads,
            flash_attn=flash_attn,
            embeddings=True,
        )
        try:
            self._require_pooling()
        except ModelLoadError:
            self._context.close()
            raise
        self._n_seq_max = n_seq_max
        self._n_packed = min(_PACKED_TOKENS, n_batch)
        self._batch = Batch(self._context.n_batch)
        self.dimension = model.n_embd
        self.n_ctx = min(model.n_ctx_train, self._context.n_batch)

    def close(self) -> None:
        """Free the context. Closing twice is harmless."""
        self._context.close()

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
        vectors = np.empty((len(texts), self.dimension), np.float32)
        lengths = [len(t) for t in tokens]
        with self._context.interruptible(abort):
            for rows in plan_batches(lengths, self._n_packed, self._n_seq_max):
                self._embed_batch([tokens[row] for row in rows])
                for sequence, row in enumerate(rows):
                    self._read(sequence, vectors[row])
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

    def _embed_batch(self, sequences: Sequence[npt.NDArray[np.int32]]) -> None:
        self._batch.clear()
        for sequence, tokens in enumerate(sequences):
            self._batch.add(tokens, sequence=sequence, output=True)
        self._context.clear()
        self._context.decode(self._batch)

    def _read(self, sequence: int, row: npt.NDArray[np.float32]) -> None:
        source = lib.llama_get_embeddings_seq(self._context.handle, sequence)
        if not source:
            raise ModelError(f"llama.cpp gave no vector for sequence {sequence}")
        ctypes.memmove(row.ctypes.data, source, row.nbytes)

    def _require_pooling(self) -> None:
        pooling = lib.llama_pooling_type(self._context.handle)
        if pooling == lib.LLAMA_POOLING_TYPE_NONE:
            raise ModelLoadError(
                f"{self._model.path.name} names no pooling (<architecture>.pooling_type), so it "
                "gives a vector for each token and none for a text: not an embedding model"
            )
        if pooling == lib.LLAMA_POOLING_TYPE_RANK:
            raise ModelLoadError(
                f"{self._model.path.name} is a reranker: it scores pairs and gives no vectors"
            )


def plan_batches(lengths: Sequence[int], n_tokens: int, n_seq_max: int) -> list[list[int]]:
    """Group texts of ``lengths`` tokens into batches, as lists of indices.

    A batch has at most ``n_seq_max`` texts and ``n_tokens`` tokens; a text longer than that
    goes alone. Texts of like length go together, long ones first.
    """
    batches: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or lengths[index] > room or len(batches[-1]) == n_seq_max:
            batches.append([])
            room = n_tokens
        batches[-1].append(index)
        room -= lengths[index]
    return batches
