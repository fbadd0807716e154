"""GBNF read without llama.cpp: which texts a grammar has, and some of them drawn at random."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

_TOKEN = re.compile(
    r"""
    \s*(?: (?P<literal>"(?:[^"\\]|\\.)*")
         | (?P<set>\[(?:[^\]\\]|\\.)*\])
         | (?P<name>[\w-]+)
         | (?P<times>[?*+]|\{\d+(?:,\d*)?\})
         | (?P<mark>[(|)]) )
    """,
    re.VERBOSE,
)
_CHARACTER = re.compile(r"\\x(..)|\\u(....)|\\U(.{8})|\\(.)|(.)", re.DOTALL)
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}
_LAST = 0x10FFFF


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Set:
    """One character out of some ranges."""

    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Rule:
    name: str


@dataclass(frozen=True)
class Choice:
    options: tuple[tuple[Node, ...], ...]


@dataclass(frozen=True)
class Times:
    node: Node
    least: int
    most: int | None


Node = Text | Set | Rule | Choice | Times


def _characters(body: str) -> list[tuple[str, bool]]:
    """The characters of a literal or a set, and whether each was escaped."""
    found = []
    for match in _CHARACTER.finditer(body):
        code = match[1] or match[2] or match[3]
        if code:
            found.append((chr(int(code, 16)), True))
        elif match[4]:
            found.append((_ESCAPES.get(match[4], match[4]), True))
        else:
            found.append((match[5], False))
    return found


def _set(body: str) -> Set:
    inverted = body.startswith("^")
    characters = _characters(body[inverted:])
    ranges = []
    at = 0
    while at < len(characters):
        first = last = ord(characters[at][0])
        if characters[at + 1 : at + 2] == [("-", False)] and at + 2 < len(characters):
            last = ord(characters[at + 2][0])
            at += 2
        ranges.append((first, last))
        at += 1
    if inverted:
        ranges.sort()
        edges = [0, *(edge for first, last in ranges for edge in (first - 1, last + 1)), _LAST]
        ranges = [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a <= b]
    return Set(tuple(ranges))


class Gbnf:
    """A grammar whose every rule is on one line."""

    def __init__(self, text: str) -> None:
        self.rules: dict[str, Node] = {}
        for line in text.splitlines():
            name, _, body = line.partition(" ::= ")
            tokens = list(self._tokens(body))
            self.rules[name] = self._choice(tokens)
            assert not tokens, line
        self._heights: dict[str, float] = dict.fromkeys(self.rules, float("inf"))
        while self._lower():
            pass

    @staticmethod
    def _tokens(body: str) -> Iterator[tuple[str, str]]:
        at = 0
        while body[at:].strip():
            match = _TOKEN.match(body, at)
            assert match, body[at:]
            assert match.lastgroup
            yield match.lastgroup, match[match.lastgroup]
            at = match.end()

    def _choice(self, tokens: list[tuple[str, str]]) -> Choice:
        options: list[list[Node]] = [[]]
        while tokens and tokens[0][1] != ")":
            kind, text = tokens.pop(0)
            if text == "|":
                options.append([])
            elif kind == "times":
                options[-1].append(self._times(options[-1].pop(), text))
            elif text == "(":
                options[-1].append(self._choice(tokens))
                assert tokens.pop(0)[1] == ")"
            elif kind == "literal":
                options[-1].append(Text("".join(c for c, _ in _characters(text[1:-1]))))
            elif kind == "set":
                options[-1].append(_set(text[1:-1]))
            else:
                options[-1].append(Rule(text))
        return Choice(tuple(map(tuple, options)))

    @staticmethod
    def _times(node: Node, text: str) -> Times:
        if text in "?*+":
            return Times(node, int(text == "+"), 1 if text == "?" else None)
        least, comma, most = text[1:-1].partition(",")
        return Times(node, int(least), int(most) if most else None if comma else int(least))

    # How deep rules must be nested at least

    def _lower(self) -> bool:
        lower = {name: 1 + self._height(node) for name, node in self.rules.items()}
        changed = lower != self._heights
        self._heights = lower
        return changed

    def _height(self, node: Node) -> float:
        match node:
            case Rule(name):
                return self._heights[name]
            case Choice(options):
                return min(max(map(self._height, option), default=0) for option in options)
            case Times(inner, least, _):
                return self._height(inner) if least else 0
        return 0

    # Texts

    def derive(self, drawn: random.Random, depth: int = 30) -> str | None:
        """A text of the grammar; None if it has none, as where a rule can't do without itself.

        Beyond ``depth`` nested rules the shortest way out is taken.
        """
        if self._height(Rule("root")) == float("inf"):
            return None
        # Mostly random characters seldom make a number that is as near to a bound as can be.
        self._extreme = drawn.choice([0, -1, None, None])
        return "".join(self._derive(Rule("root"), drawn, depth))

    def _derive(self, node: Node, drawn: random.Random, depth: int) -> Iterator[str]:
        match node:
            case Text(text):
                yield text
            case Set(ranges):
                if self._extreme is not None:
                    yield chr(sorted(ranges)[self._extreme][self._extreme])
                    return
                # Edges are where mistakes are; the first 200 code points are what is read best.
                first, last = drawn.choice(ranges)
                code = drawn.choice([first, last, drawn.randint(first, min(last, first + 200))])
                yield chr(code)
            case Rule(name):
                yield from self._derive(self.rules[name], drawn, depth - 1)
            case Choice(options):
                heights = [max(map(self._height, option), default=0) for option in options]
                possible = [o for o, h in zip(options, heights, strict=True) if h <= depth]
                for each in drawn.choice(possible or [options[heights.index(min(heights))]]):
                    yield from self._derive(each, drawn, depth)
            case Times(inner, least, most):
                times = least
                if self._height(inner) <= depth:
                    at_most = least + 3 if most is None else most
                    near = drawn.randint(least, min(at_most, least + 3))
                    edges = [least, at_most] if self._extreme is None else [at_most]
                    times = drawn.choice([near, *edges])
                for _ in range(times):
                    yield from self._derive(inner, drawn, depth)

    def matches(self, text: str) -> bool:
        """Whether the grammar has a text; it must not begin a rule with the rule itself."""
        self._ends: dict[tuple[int, int], frozenset[int]] = {}
        return len(text) in self._match(Rule("root"), text, 0)

    def _match(self, node: Node, text: str, at: int) -> frozenset[int]:
        """Where what begins at ``at`` may end."""
        match node:
            case Text(wanted):
                return frozenset([at + len(wanted)] if text.startswith(wanted, at) else [])
            case Set(ranges):
                fits = at < len(text) and any(a <= ord(text[at]) <= b for a, b in ranges)
                return frozenset([at + 1] if fits else [])
        key = (id(node), at)
        if key not in self._ends:
            self._ends[key] = frozenset(self._match_parts(node, text, at))
        return self._ends[key]

    def _match_parts(self, node: Node, text: str, at: int) -> set[int]:
        match node:
            case Rule(name):
                return set(self._match(self.rules[name], text, at))
            case Choice(options):
                found = set()
                for option in options:
                    ends = {at}
                    for each in option:
                        ends = {end for start in ends for end in self._match(each, text, start)}
                    found |= ends
                return found
            case Times(inner, least, most):
                found, ends, times = ({at} if least == 0 else set()), {at}, 0
                while ends and (most is None or times < most):
                    ends = {end for start in ends for end in self._match(inner, text, start)}
                    times += 1
                    if times >= least:
                        if ends <= found:
                            break
                        found |= ends
                return found
        raise AssertionError(node)
