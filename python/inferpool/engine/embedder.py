"""Texts to vectors: many sequences in one batch, float32 straight into a numpy array."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from inferpool.engine.abort import AbortToken
from inferpool.engine.backend import lib
from inferpool.engine.model import Model
from inferpool.engine.packing import Job, Packer
from inferpool.engine.prefixes import prefixes_of
from inferpool.errors import ContextLengthExceeded, InvalidRequest, ModelLoadError
from inferpool.messages import EmbedRequest

__all__ = ["Embedder"]


class Embedder:
    """The pooled vectors of a model's texts.

    Attributes:
        dimension: length d of a vector.
        n_ctx: tokens a text may have at most, special tokens included.
    """

    def __init__(self, model: Model, packer: Packer, *, prompts: Mapping[str, str] | None) -> None:
        """Prepare ``model``, whose rows ``packer`` computes; both stay the caller's to close.

        Args:
            model: an embedding model.
            packer: computes the jobs that `job` makes.
            prompts: prefixes by name, besides or in place of those known for the model.

        Raises:
            ModelLoadError: if the model gives no vector for a text.
        """
        _require_pooling(model, packer)
        self._model = model
        self._prefixes = {**prefixes_of(model), **(prompts or {})}
        self.dimension = model.n_embd
        self.n_ctx = packer.n_ctx
        self._limit = packer.limit

    def job(self, request: EmbedRequest, abort: AbortToken | None) -> Job:
        """What is to be computed for a request; `finish` makes vectors of the rows of the job.

        The job's error is `ContextLengthExceeded` if a text is over-long and ``truncate`` is off,
        and `InvalidRequest` if one gives no token at all.

        Raises:
            InvalidRequest: if there is no such prompt name, or vectors have fewer dimensions
                than asked for.
        """
        if request.dimensions is not None and request.dimensions > self.dimension:
            raise InvalidRequest(
                f"dimensions must be at most {self.dimension}, which is what "
                f"{self._model.path.name} has, not {request.dimensions}"
            )
        prefix = self._prefix(request.prompt_name)

        def tokenize(index: int, text: str) -> npt.NDArray[np.int32]:
            return self._tokenize(index, prefix + text, truncate=request.truncate)

        bulk = request.priority == "bulk"
        return Job(request.texts, tokenize, self.dimension, abort, bulk=bulk)

    def finish(
        self, rows: npt.NDArray[np.float32], request: EmbedRequest
    ) -> npt.NDArray[np.float32]:
        """The vectors that ``request`` asks for, of what the model made of its texts."""
        # Matryoshka: the first components of a vector are a vector (https://arxiv.org/abs/2205.13147).
        vectors = rows[:, : request.dimensions]
        if request.normalize:
            norms = np.linalg.norm(vectors, axis=1, keepdims=True)
            # A zero vector has no direction, and stays as it is.
            np.divide(vectors, norms, out=vectors, where=norms > 0)
        return vectors

    def _prefix(self, prompt_name: str | None) -> str:
        if prompt_name is None:
            return ""
        try:
            return self._prefixes[prompt_name]
        except KeyError:
            known = ", ".join(sorted(self._prefixes))
            raise InvalidRequest(
                f"{self._model.path.name} has no prompt named {prompt_name!r}; it has {known}"
            ) from None

    def _tokenize(self, index: int, text: str, *, truncate: bool) -> npt.NDArray[np.int32]:
        tokens = self._model.tokenize(text, add_special=True, parse_special=False)
        if not tokens.size:
            raise InvalidRequest(f"texts[{index}] gives no tokens, so it has no vector")
        if len(tokens) <= self.n_ctx:
            return tokens
        if not truncate:
            raise ContextLengthExceeded(
                f"texts[{index}] has {len(tokens)} tokens; {self._limit}. "
                "hint: split it, or pass truncate=True",
                index=index,
                asked=len(tokens),
                context=self.n_ctx,
            )
        kept = tokens[: self.n_ctx].copy()
        if self._model.adds_suffix:
            kept[-1] = tokens[-1]
        return kept


def _require_pooling(model: Model, packer: Packer) -> None:
    if packer.pooling == lib.LLAMA_POOLING_TYPE_NONE:
        raise ModelLoadError(
            f"{model.path.name} names no pooling (<architecture>.pooling_type), so it "
            "gives a vector for each token and none for a text: not an embedding model"
        )
    if packer.pooling == lib.LLAMA_POOLING_TYPE_RANK:
        raise ModelLoadError(
            f"{model.path.name} is a reranker: it scores pairs and gives no vectors"
        )
