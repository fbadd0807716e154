"""Answers that keep to a grammar: GBNF, as llama.cpp reads it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from inferpool.engine.backend import lib, native_errors
from inferpool.engine.model import Model
from inferpool.errors import InvalidRequest

__all__ = ["TOKEN_DATA", "Grammar", "GrammarState"]

TOKEN_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
"""``llama_token_data``"""

# llama.cpp follows nested groups and chains of rules by recursion: 100,000 overflow the stack.
_MAX_NESTING = 200
_MAX_RULES = 10_000
# A text, a set, a comment, or how often something is repeated.
_BOUNDS = re.compile(
    r""""(?:\\.|[^"\\])*"?|\[(?:\\.|[^\]\\])*\]?|#[^\n]*|\{\s*0*(\d{1,20})\s*,\s*0*(\d{1,20})""",
    re.DOTALL,
)


@dataclass(frozen=True)
class Grammar:
    """What an answer must look like."""

    gbnf: str
    """Rules in GBNF."""
    root: str = "root"
    """The rule that the answer is."""
    after: str = ""
    """Text of the answer that the grammar waits for; it holds from the next token on."""


class GrammarState:
    """A grammar, and how far an answer has come in it."""

    def __init__(self, grammar: Grammar, model: Model) -> None:
        """Read the grammar.

        Raises:
            InvalidRequest: if llama.cpp can't read it; with its reason.
        """
        self._model = model
        self._after = grammar.after.encode()  # what is still waited for
        self._seen = b""
        self._handle: lib.llama_sampler_p | None = None
        # To llama.cpp an empty text is not a grammar, and NUL ends a text.
        if not grammar.gbnf or "\0" in grammar.gbnf:
            raise InvalidRequest("grammar is empty, or holds a NUL character")
        if _nesting(grammar.gbnf) > _MAX_NESTING:
            raise InvalidRequest(f"grammar nests groups deeper than {_MAX_NESTING}")
        if grammar.gbnf.count("::=") > _MAX_RULES:
            raise InvalidRequest(f"grammar has more than {_MAX_RULES} rules")
        # llama.cpp would add rules until there is no memory left.
        for bounds in _BOUNDS.finditer(grammar.gbnf):
            if bounds[1] and int(bounds[1]) > int(bounds[2]):
                raise InvalidRequest(f"grammar repeats from {bounds[1]} to {bounds[2]} times")
        vocab = lib.llama_model_get_vocab(model.handle)
        native_errors()
        with _native_stderr() as printed:
            handle = lib.llama_sampler_init_grammar(
                vocab, grammar.gbnf.encode(), grammar.root.encode()
            )
        if not handle:
            # "parse: error parsing grammar: expecting ')' at …", then the grammar itself.
            reason = b"".join(printed).decode("utf-8", "replace").strip().partition("\n")[0]
            reason = reason or native_errors() or "llama.cpp gives no reason"
            raise InvalidRequest(f"grammar can't be read: {reason}")
        self._handle = handle
        # The one token that `allows` asks about.
        self._data = np.zeros(1, TOKEN_DATA)
        self._native = lib.llama_token_data_array(
            data=self._data.ctypes.data_as(lib.llama_token_data_p), size=1, selected=-1
        )

    def close(self) -> None:
        """Free the grammar. Closing twice is harmless."""
        if self._handle is not None:
            lib.llama_sampler_free(self._handle)
            self._handle = None

    @property
    def handle(self) -> lib.llama_sampler_p:
        """The native sampler, which gives a logit of minus infinity to what doesn't fit."""
        if self._handle is None:
            raise RuntimeError("the grammar is closed")
        return self._handle

    def allows(self, token: int) -> bool:
        """Whether the answer may go on with ``token``."""
        if self._after:
            return True
        self._data[0] = (token, 0.0, 0.0)
        lib.llama_sampler_apply(self.handle, ctypes.byref(self._native))
        return bool(self._data["logit"][0] == 0.0)

    def accept(self, token: int) -> None:
        """Go on by a token that is allowed; any other would end the process."""
        if not self._after:
            lib.llama_sampler_accept(self.handle, token)
            return
        seen = self._seen + self._model.piece(token, special=True)
        if self._after in seen:
            self._after = b""
        self._seen = seen[-len(self._after) :]


def _nesting(gbnf: str) -> int:
    """At least how deep groups are nested; parentheses in texts count too, which does no harm."""
    depth = deepest = 0
    for character in gbnf:
        if character == "(":
            depth += 1
            deepest = max(deepest, depth)
        elif character == ")":
            depth -= 1
    return deepest


@contextlib.contextmanager
def _native_stderr() -> Iterator[list[bytes]]:
    """Collect what native code prints on stderr inside the block, and print it afterwards.

    llama.cpp says only there what is wrong with a grammar.
    """
    printed: list[bytes] = []
    original = os.dup(2)
    collected = os.memfd_create("stderr")
    os.dup2(collected, 2)
    try:
        yield printed
    finally:
        os.dup2(original, 2)
        os.close(original)
        printed.append(os.pread(collected, os.fstat(collected).st_size, 0))
        os.close(collected)
        os.write(2, printed[0])
