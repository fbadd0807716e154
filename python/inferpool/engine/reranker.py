"""A query and documents to scores: how well each document answers the query."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from inferpool.engine.abort import AbortToken
from inferpool.engine.backend import lib
from inferpool.engine.model import Model
from inferpool.engine.packing import Job, Packer
from inferpool.engine.pairs import SeparatedPairs, TemplatePairs, Tokens
from inferpool.engine.token_types import pair_embedding
from inferpool.errors import ContextLengthExceeded, InvalidRequest, ModelLoadError
from inferpool.messages import RerankRequest, RerankResult

__all__ = ["Reranker"]

# The label of a reranker that is asked a question, where the GGUF names its labels.
_YES = "yes"
# llama.cpp ends the graphs of these architectures with a softmax over the labels.
_WITH_SOFTMAX = frozenset({"qwen3", "qwen3vl"})


class Reranker:
    """The scores of documents for a query.

    Attributes:
        n_ctx: tokens that query and document may have at most, with all that is around them.
    """

    def __init__(self, model: Model, packer: Packer) -> None:
        """Prepare ``model``, whose rows ``packer`` computes; both stay the caller's to close.

        Args:
            model: a reranker.
            packer: computes the jobs that `job` makes.

        Raises:
            ModelLoadError: if the model is not a reranker, or can't tell pairs apart, or query and
                document.
        """
        if packer.pooling != lib.LLAMA_POOLING_TYPE_RANK:
            raise ModelLoadError(
                f"{model.path.name} is not a reranker: its metadata name no pooling of type rank "
                "(<architecture>.pooling_type = 4), so it has no score for a pair"
            )
        self._with_softmax = model.metadata("general.architecture") in _WITH_SOFTMAX
        self._n_labels = len(model.class_labels())
        if self._with_softmax and self._n_labels == 1:
            raise ModelLoadError(
                f"{model.path.name} names no labels (<architecture>.classifier.output_labels), so "
                "llama.cpp gives every pair the same score. hint: convert it anew, as a reranker"
            )
        self._label = _relevance_label(model)
        template = model.rerank_template
        self._pairs = TemplatePairs(model, template) if template else SeparatedPairs(model)
        embedding = None if template else pair_embedding(model)
        if embedding is not None:
            packer.embed_pairs(embedding)
        self.n_ctx = packer.n_ctx
        self._limit = packer.limit

    def job(self, request: RerankRequest, abort: AbortToken | None) -> Job:
        """What is to be computed for a request; `finish` makes results of the rows of the job.

        The job's error is `ContextLengthExceeded` if a pair is over-long and ``truncate`` is off,
        or the query leaves no room for a document, and `InvalidRequest` if a pair gives no token.
        """

        def tokenize(index: int, document: str) -> Tokens:
            return self._tokenize(request.query, index, document, truncate=request.truncate)

        bulk = request.priority == "bulk"
        return Job(request.documents, tokenize, self._n_labels, abort, bulk=bulk)

    def finish(self, rows: npt.NDArray[np.float32], request: RerankRequest) -> list[RerankResult]:
        """The results that ``request`` asks for, of what the model made of its pairs."""
        scores = rows[:, self._label]
        # Of a yes or no, the model gives the probability itself.
        if request.normalize and not self._with_softmax:
            # 1 / (1 + exp(-score)), without the overflow.
            scores = 0.5 * (1.0 + np.tanh(0.5 * scores))
        best = np.argsort(-scores, kind="stable")[: request.top_n]
        return [RerankResult(index=int(i), relevance_score=float(scores[i])) for i in best]

    def _tokenize(self, query: str, index: int, document: str, *, truncate: bool) -> Tokens:
        tokens = self._pairs.tokens(query, document)
        if not tokens.size:
            raise InvalidRequest(
                f"the query and documents[{index}] give no token, so they have no score"
            )
        if len(tokens) <= self.n_ctx:
            return tokens
        cut = self._pairs.cut(query, document, self.n_ctx) if truncate else None
        if cut is not None:
            return cut
        hint = "shorten the query" if truncate else "split the document, or pass truncate=True"
        raise ContextLengthExceeded(
            f"the query and documents[{index}] have {len(tokens)} tokens together; {self._limit}. "
            f"hint: {hint}",
            index=index,
            asked=len(tokens),
            context=self.n_ctx,
        )


def _relevance_label(model: Model) -> int:
    """Which output of the model's classifier says how relevant a document is."""
    labels = [label.lower() for label in model.class_labels()]
    if len(labels) == 1:
        return 0
    if _YES in labels:
        return labels.index(_YES)
    raise ModelLoadError(
        f"{model.path.name} is not a reranker: it tells {len(labels)} classes apart "
        f"({', '.join(labels)}), and none of them is {_YES!r}"
    )
