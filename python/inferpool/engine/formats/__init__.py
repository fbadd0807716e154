"""How models mark tool calls and reasoning: what the data files beside this say."""

from __future__ import annotations

import functools
import re
import tomllib
from importlib import resources
from typing import Any, Literal

import msgspec

__all__ = ["Header", "Reasoning", "ToolFormat", "reasoning_of", "tool_format_of"]


class Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What precedes each message of an answer that is a series of them."""

    begin: str
    channel: str
    recipient: str
    content_type: str
    end: str
    answer: str
    message_ends: list[str]

    @property
    def beginnings(self) -> tuple[str, ...]:
        """What a header may begin with; that of the first message is partly in the prompt."""
        return self.begin, self.channel, self.recipient, self.end

    def begins(self, text: str) -> bool:
        """Whether a text begins like a header."""
        return text.startswith(self.beginnings)

    def may_begin(self, text: str) -> bool:
        """Whether a text begins like a header, as far as one can see."""
        return self.begins(text) or any(each.startswith(text) for each in self.beginnings)

    def recipient_of(self, text: str) -> str:
        """Whom a header names, with the mark before; empty if that is nobody or the writer."""
        for found in re.finditer(rf"{re.escape(self.recipient)}([\w.-]+)", text):
            if not self.begin.endswith(found[1]):
                return found[0]
        return ""


class Reasoning(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What encloses a model's reasoning."""

    begin: str
    end: str
    key: str = ""
    header: Header | None = None

    @property
    def ends(self) -> list[str]:
        """What ends the reasoning."""
        return [self.end] if self.header is None else self.header.message_ends

    @property
    def markers(self) -> list[str]:
        """Texts that may be control tokens, which show only where they are looked for."""
        marks = [self.begin, self.end]
        if self.header is not None:
            marks += [*self.header.beginnings, self.header.content_type, *self.ends]
        return marks


class ToolFormat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a family of models writes tool calls; see ``README.md`` beside the data files."""

    detect: list[str]
    begin: str
    end: str
    shape: Literal["json", "named", "tagged"]
    forced: str
    bare: bool = False
    one_per_turn: bool = False
    call_id: str = ""
    name: str = ""
    arguments: str = ""
    call: str = ""
    name_end: str = ""
    id: str = ""
    key: str = ""
    key_end: str = ""
    value_end: str = ""
    system: str = ""
    result: str = ""

    @property
    def markers(self) -> list[str]:
        """Texts that may be control tokens, which show only where they are looked for."""
        marks = (self.begin, self.end, self.call, self.name_end, self.id)
        return [text for text in (*marks, self.key, self.key_end, self.value_end) if text]


def tool_format_of(template: str, *, takes_tools: bool) -> ToolFormat:
    """How a model calls tools, by its chat template; the generic way if that says nothing."""
    formats = _tool_formats()
    if takes_tools:
        for each in formats[:-1]:
            if all(text in template for text in each.detect):
                return each
    return formats[-1]


def reasoning_of(template: str) -> Reasoning | None:
    """How a model thinks, by its chat template."""
    for each in _reasonings():
        if each.begin in template or each.end in template:
            return each
    return None


@functools.cache
def _tool_formats() -> list[ToolFormat]:
    files = sorted(file.name for file in resources.files(__name__).iterdir())
    return [msgspec.convert(_read(name), ToolFormat) for name in files if name[0].isdigit()]


@functools.cache
def _reasonings() -> list[Reasoning]:
    return msgspec.convert(_read("reasoning.toml")["reasoning"], list[Reasoning])


def _read(name: str) -> dict[str, Any]:
    return tomllib.loads(resources.files(__name__).joinpath(name).read_text("utf-8"))
