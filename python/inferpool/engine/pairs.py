"""A query and a document to the tokens that a reranker reads."""

from __future__ import annotations

import bisect
import re

import numpy as np
import numpy.typing as npt

from inferpool.engine.model import Model
from inferpool.errors import ModelLoadError

__all__ = ["SeparatedPairs", "TemplatePairs", "Tokens"]

Tokens = npt.NDArray[np.int32]

_PLACEHOLDER = re.compile(r"\{(query|document)\}")
# No vocabulary has tokens of more characters; it bounds the search for where to cut.
_LONGEST_TOKEN = 1024


class SeparatedPairs:
    """``[CLS] query [SEP] document [SEP]``, with whatever tokens the model has for that."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._before, self._between, self._after = model.pair_separators()

    def tokens(self, query: str, document: str) -> Tokens:
        """Token ids of the pair, shape (n,). Control tokens inside a text are text."""
        texts = (self._tokenize(query), self._tokenize(document))
        return np.concatenate((self._before, texts[0], self._between, texts[1], self._after))

    def cut(self, query: str, document: str, n_max: int) -> Tokens | None:
        """`tokens` with the end of the document cut off; None if the query is too long."""
        head = np.concatenate((self._before, self._tokenize(query), self._between))
        room = n_max - len(head) - len(self._after)
        if room < 1:
            return None
        return np.concatenate((head, self._tokenize(document)[:room], self._after))

    def _tokenize(self, text: str) -> Tokens:
        return self._model.tokenize(text, add_special=False, parse_special=False)


class TemplatePairs:
    """A prompt that asks whether the document answers the query.

    Raises:
        ModelLoadError: if the template has no place for query and document.
    """

    def __init__(self, model: Model, template: str) -> None:
        if set(_PLACEHOLDER.findall(template)) != {"query", "document"}:
            raise ModelLoadError(
                f"{model.path.name}: the rerank template lacks {{query}} or {{document}}"
            )
        self._model = model
        # Control tokens of the template are tokens, those that a text spells out are text. What
        # lies between them is tokenised at once: a space before a text belongs to its first word.
        control = sorted(model.control_tokens(template), key=len, reverse=True)
        self._control = frozenset(control)
        split = "|".join(map(re.escape, control)) or "(?!)"
        self._parts = [part for part in re.split(f"({split})", template) if part]

    def tokens(self, query: str, document: str) -> Tokens:
        """Token ids of the prompt, shape (n,)."""
        texts = {"query": query, "document": document}
        parts = []
        for part in self._parts:
            special = part in self._control
            text = part if special else _PLACEHOLDER.sub(lambda found: texts[found[1]], part)
            parts.append(self._model.tokenize(text, add_special=False, parse_special=special))
        return np.concatenate(parts)

    def cut(self, query: str, document: str, n_max: int) -> Tokens | None:
        """`tokens` with the end of the document cut off; None if the query is too long."""

        def length(n: int) -> int:
            return len(self.tokens(query, document[:n]))

        lengths = range(1, min(len(document), n_max * _LONGEST_TOKEN) + 1)
        kept = bisect.bisect_right(lengths, n_max, key=length)
        return self.tokens(query, document[:kept]) if kept else None
