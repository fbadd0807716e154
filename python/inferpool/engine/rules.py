"""The parts that grammars are made of: GBNF, rule by rule."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

__all__ = ["GrammarBuilder", "literal", "one_of"]

_RULES = {
    # As much white space as reads well, so that a model can't go on with it for ever.
    "ws": r'" " | "\n" [ \t]{0,20} | ""',
    # No surrogates, neither as bytes, which would be no UTF-8, nor as escapes, of which two are
    # one character.
    "char": r"[ !#-\[\]-~\x80-\uD7FF\uE000-\U0010FFFF] | escape",
    "escape": r'"\\" (["\\/bfnrt] | "u" code)',
    "code": "[0-9a-cA-CefEF] [0-9a-fA-F]{3} | [dD] [0-7] [0-9a-fA-F]{2}",
    "string": r'"\"" char* "\""',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "integer": '"-"? ("0" | [1-9] [0-9]{0,15})',
    "number": 'integer ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,2})?',
    "object": '"{" ws (pair ("," ws pair)* ws)? "}"',
    "pair": 'string ":" ws value',
    "array": '"[" ws (value ("," ws value)* ws)? "]"',
    "value": "object | array | string | number | boolean | null",
}
# Between tags, a closing one must not stand within: no "</", in JSON as in plain text.
_TAGGED_RULES = {
    "char": r"[ !#-;=-\[\]-~\x80-\uD7FF\uE000-\U0010FFFF] | escape",
    "string": r'"\"" (char | "<"+ unslashed)* "<"* "\""',
    "unslashed": r"[ !#-.0-;=-\[\]-~\x80-\uD7FF\uE000-\U0010FFFF] | escape",
    "text": r'(letter | "<"+ follower)* "<"*',
    "letter": r"[\x01-;=-\uD7FF\uE000-\U0010FFFF]",
    "follower": r"[\x01-.0-;=-\uD7FF\uE000-\U0010FFFF]",
}
# How often something is repeated in one go. llama.cpp refuses some counts from 2,000 on and takes
# others as no bound at all; it makes as many rules as there may be repetitions.
_MAX_TIMES = 500
# How often texts are told apart by what they go on with; llama.cpp follows nested groups by
# recursion.
_MAX_DEPTH = 50


def literal(text: str) -> str:
    """The GBNF of a fixed text."""
    escaped = "".join(
        character if character.isprintable() and character not in '"\\' else _escape(character)
        for character in text
    )
    return f'"{escaped}"'


def one_of(texts: Iterable[str], depth: int = 0) -> str:
    """The GBNF of any of some texts.

    What several begin with is said once: llama.cpp follows alternatives that begin alike side by
    side, and takes ten times as long for a token as the model where there are a thousand.

    Args:
        texts: what may be written, at least one.
        depth: how often these have been told apart already.
    """
    groups: dict[str, list[str]] = {}
    for text in dict.fromkeys(texts):
        groups.setdefault(text[:1], []).append(text)
    options: list[str] = []
    for members in groups.values():
        if len(members) == 1 or depth == _MAX_DEPTH:
            options += map(literal, members)
            continue
        first, last = min(members), max(members)
        ends = (at for at, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1])
        n_common = next(ends, len(first))
        rests = one_of((text[n_common:] for text in members), depth + 1)
        options.append(f"{literal(first[:n_common])} ({rests})")
    return " | ".join(options)


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\{character}" if character in '"\\' else f"\\U{code:08X}"


class GrammarBuilder:
    """Collects rules; each schema that is added becomes one of them."""

    def __init__(self, *, tagged: bool = False) -> None:
        """Start with the rules of JSON.

        Args:
            tagged: what is written stands between tags, so that it must not hold ``</``. There are
                rules for plain text then too: ``text``, and its character ``letter``.
        """
        self._tagged = tagged
        self._rules = {**_RULES, **_TAGGED_RULES} if tagged else dict(_RULES)
        self._names: dict[str, str] = {}

    def rule(self, body: str) -> str:
        """Add a rule, or find the same one; returns its name."""
        if body not in self._names:
            self._names[body] = f"r{len(self._rules)}"
            self._rules[self._names[body]] = body
        return self._names[body]

    def constant(self, value: Any) -> str:
        """The GBNF of a value's JSON."""
        return literal(self.json(value))

    def json(self, value: Any) -> str:
        """The JSON of a value, as it may stand where this grammar holds."""
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        return text.replace("</", r"<\/") if self._tagged else text

    def repeated(self, name: str, least: int, most: int | None) -> str:
        """What stands for ``least`` to ``most`` of a rule, one after another; None: any number."""
        if max(least, most or 0) <= _MAX_TIMES:
            return f"{name}{{{least},{'' if most is None else most}}}"
        rest = f"{name}*" if most is None else self._at_most(name, most - least)
        return f"{self._exactly(name, least)} {rest}"

    def _exactly(self, name: str, times: int) -> str:
        if times <= _MAX_TIMES:
            return f"{name}{{{times}}}" if times else '""'
        half = self.rule(self._exactly(name, times // 2))
        return f"{half} {half} {name}" if times % 2 else f"{half} {half}"

    def _at_most(self, name: str, times: int) -> str:
        if times <= _MAX_TIMES:
            return f"{name}{{0,{times}}}"
        if times % 2 == 0:
            return self.rule(f'{name} {self._at_most(name, times - 1)} | ""')
        # One more than half of them and up to half, or only the latter.
        half = self.rule(self._at_most(name, times // 2))
        return self.rule(f"{self._exactly(name, times // 2 + 1)} {half} | {half}")

    def reserve(self) -> str:
        """A name for a rule that is to be defined later."""
        name = f"r{len(self._rules)}"
        self._rules[name] = ""
        return name

    def define(self, name: str, body: str) -> None:
        """Define a rule whose name was reserved."""
        self._rules[name] = body

    def gbnf(self, root: str) -> str:
        """The whole grammar, whose answers are what ``root``, a rule's body, describes."""
        rules = [f"{name} ::= {body}" for name, body in self._rules.items()]
        return "\n".join([f"root ::= {root}", *rules])
