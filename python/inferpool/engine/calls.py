"""Tool calls: from what a model writes, and to the grammar of what it must write."""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable, Generator, Sequence
from typing import Any, NoReturn

from inferpool.engine.formats import ToolFormat
from inferpool.engine.overlap import kind_of, kinds
from inferpool.engine.rules import GrammarBuilder, literal
from inferpool.engine.schema import add_schema
from inferpool.engine.tagged import add_arguments
from inferpool.messages import FunctionDelta, Tool, ToolCallDelta

__all__ = ["CallReader", "forced_call"]

_ID_CHARACTERS = string.ascii_letters + string.digits
_NAME = re.compile(r"[\w.-]+")
_ID = re.compile(r"[A-Za-z0-9]{9}")
_SPACE = " \t\r\n"
_FENCE = "```json"
# Templates of Qwen3 Coder and its kin write these words as Python does, and so do their models.
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}

_Wanting = Generator[None, None, Any]
"""Yields where it needs more text."""


class _Broken(Exception):
    """The text is not what the format says."""


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


class CallReader:
    """Reads what follows the opening marker of tool calls, as it comes.

    Attributes:
        deltas: what is certain now; the caller takes it and clears it.
        n_calls: calls so far, those of the same answer before it included.
        complete: whether the last call was read to its end.
        raw: all that was read.
    """

    def __init__(
        self, form: ToolFormat, tools: Sequence[Tool], n_calls: int, *, bare: bool = False
    ) -> None:
        """Start to read.

        Args:
            form: how the model writes calls.
            tools: what it may call.
            n_calls: calls of the same answer before.
            bare: nothing marked what is read as a call, so it is one of ``tools`` or none.
        """
        self.deltas: list[ToolCallDelta] = []
        self.n_calls = n_calls
        self.complete = False
        self.raw = ""
        self._before = n_calls
        self._form = form
        self._tools = {tool.function.name: tool.function for tool in tools}
        self._bare = bare
        self._has_arguments = False  # of the last call
        self._text = ""
        self._at = 0
        self._steps = getattr(self, f"_read_{form.shape}")()

    @property
    def found(self) -> bool:
        """Whether it was a call, as far as one can see."""
        return self.n_calls > self._before

    def feed(self, text: str) -> str | None:
        """Read more; once the calls have ended, returns what follows them.

        If it turns out not to be a call, what is returned follows the text that looked like one.
        """
        self.raw += text
        self._text = self._text[self._at :] + text
        self._at = 0
        try:
            next(self._steps)
        except StopIteration:
            return self._text[self._at :]
        except (_Broken, ValueError, RecursionError):
            return self._text[self._at :]
        return None

    def finish(self) -> None:
        """Take note that the answer is complete: where no arguments came, there are none."""
        if self.found and not self._has_arguments:
            self._add("{}")

    # Families

    def _read_json(self) -> _Wanting:
        form = self._form
        opening = yield from self._opening()
        while opening != form.end:
            if opening == "{":
                yield from self._call()
            else:
                yield from self._list()
            if not form.end:
                return
            opening = yield from self._wait("{", "[", form.end)

    def _opening(self) -> _Wanting:
        """Read what the first call begins with; after any other text there is none."""
        yield from self._peek()
        while _FENCE.startswith(text := self._text[self._at :]) and text != _FENCE:
            yield
        if text.startswith(_FENCE):
            self._at += len(_FENCE)
        return (yield from self._after_space("", "{["))

    def _list(self) -> _Wanting:
        while (yield from self._after_space(",", "{]")) != "]":
            yield from self._call()

    def _call(self) -> _Wanting:
        """A call whose brace was read."""
        self.complete = False
        yield from self._object()
        if not self._has_arguments:
            self._add("{}")
        self.complete = True

    def _object(self) -> _Wanting:
        """A call as an object whose brace was read."""
        known = False
        arguments: list[str] = []
        while (yield from self._after_space(",", '"}')) != "}":
            self._at -= 1
            key = yield from self._json()
            yield from self._after_space("", ":")
            yield from self._peek()
            if not self._form.name:
                self._begin(key)
                known = True
                yield from self._arguments(self._add)
            elif key in {self._form.name, "name"}:
                self._begin((yield from self._json()))
                known = True
            elif key in {self._form.arguments, "arguments", "parameters"}:
                yield from self._arguments(self._add if known else arguments.append)
            elif key == "function" and self._text[self._at] == "{":
                self._at += 1
                yield from self._object()
                known = True
            else:
                yield from self._scan(lambda _: None)
        if not known:
            raise _Broken
        for piece in arguments:
            self._add(piece)

    def _read_named(self) -> _Wanting:
        while (yield from self._next_name()):
            yield from self._arguments(self._add)
            self.complete = True
            if not self._form.call:
                if self._form.end:
                    yield from self._wait(self._form.end)
                return

    def _read_tagged(self) -> _Wanting:
        form = self._form
        key, key_end, value_end = (
            text.strip() for text in (form.key, form.key_end, form.value_end)
        )
        marks = [text for text in (key, form.call, form.end) if text]
        more = yield from self._next_name()
        while more:
            separator = "{"
            while (mark := (yield from self._wait(*marks))) == key:
                name = (yield from self._until(key_end)).strip()
                value = yield from self._until(value_end)
                self._add(f"{separator}{json.dumps(name)}: {self._typed(name, value)}")
                separator = ", "
            self._add("{}" if separator == "{" else "}")
            self.complete = True
            more = mark == form.call and (yield from self._named())

    def _next_name(self) -> _Wanting:
        """Go to the next call and read its name; false if there is none."""
        if self._form.call:
            marks = [text for text in (self._form.call, self._form.end) if text]
            if not self.found:
                yield from self._next(*marks)
            if (yield from self._wait(*marks)) == self._form.end:
                return False
        return (yield from self._named())

    def _named(self) -> _Wanting:
        form = self._form
        yield from self._peek()
        while (found := _NAME.match(self._text, self._at)) and found.end() == len(self._text):
            yield
        if found is None:
            raise _Broken
        self._at = found.end()
        ends = [text for text in (form.id, form.name_end.strip()) if text]
        mark = yield from self._next(*(ends or [form.key.strip(), form.end]))
        if ends:
            self._at += len(mark)
        id = (yield from self._until(form.name_end)) if mark == form.id else ""
        self._begin(found[0], id)
        return True

    def _typed(self, name: str, value: str) -> str:
        """The JSON of an argument: what was written, or of plain text a string."""
        text = value.removeprefix("\n" if self._form.key_end.endswith("\n") else "")
        text = text.removesuffix("\n" if self._form.value_end.startswith("\n") else "")
        function = self._tools.get(self._function)
        schema = function.parameters if function is not None else None
        possible = kinds(schema, schema, name)
        if possible != {"string"}:
            word = text.strip()
            word = _PYTHON_WORDS.get(word, word)
            try:
                kind = kind_of(json.loads(word, parse_constant=_no_constant))
            except ValueError:
                pass
            else:
                # A text may look like a number where there is none.
                if kind in possible or "string" not in possible:
                    return word
        return json.dumps(text, ensure_ascii=False)

    # What is told

    def _begin(self, name: Any, id: str = "") -> None:
        if not isinstance(name, str) or (self._bare and name not in self._tools):
            raise _Broken
        self._function = name
        self._has_arguments = self.complete = False
        self.deltas.append(
            ToolCallDelta(
                index=self.n_calls,
                id=id if _ID.fullmatch(id) else _new_id(),
                type="function",
                function=FunctionDelta(name=name),
            )
        )
        self.n_calls += 1

    def _add(self, arguments: str) -> None:
        delta = ToolCallDelta(index=self.n_calls - 1, function=FunctionDelta(arguments=arguments))
        self.deltas.append(delta)
        self._has_arguments |= bool(arguments)

    # The text

    def _peek(self) -> _Wanting:
        """Go to the next character that is not a space; it is not read."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _SPACE:
                    return
                self._at += 1
            yield

    def _after_space(self, skipped: str, wanted: str) -> _Wanting:
        """Read the next character that is neither space nor in ``skipped``: one of ``wanted``."""
        while True:
            yield from self._peek()
            character = self._text[self._at]
            if character not in skipped + wanted:
                raise _Broken
            self._at += 1
            if character in wanted:
                return character

    def _wait(self, *marks: str) -> _Wanting:
        """Read up to the first of some marks; returns it."""
        while True:
            places = [(at, mark) for mark in marks if (at := self._text.find(mark, self._at)) >= 0]
            if places:
                at, mark = min(places)
                self._at = at + len(mark)
                return mark
            yield

    def _next(self, *marks: str) -> _Wanting:
        """Go to one of some marks, before which there is nothing but white space; returns it."""
        while True:
            yield from self._peek()
            for mark in marks:
                if self._text.startswith(mark, self._at):
                    return mark
            if not any(mark.startswith(self._text[self._at :]) for mark in marks):
                raise _Broken
            yield

    def _until(self, mark: str) -> _Wanting:
        """Read a text and the mark that ends it; returns the text."""
        while (end := self._text.find(mark, self._at)) < 0:
            yield
        text = self._text[self._at : end]
        self._at = end + len(mark)
        return text

    def _json(self) -> _Wanting:
        """Read a JSON value; returns what it stands for."""
        pieces: list[str] = []
        yield from self._scan(pieces.append)
        return json.loads("".join(pieces))

    def _arguments(self, sink: Callable[[str], None]) -> _Wanting:
        """Read the object of arguments, which some models write as a string that holds it."""
        yield from self._peek()
        if self._text[self._at] == '"':
            sink((yield from self._json()))
        elif self._text[self._at] == "n":  # null: there are none
            yield from self._scan(lambda _: None)
        else:
            yield from self._scan(sink)

    def _scan(self, sink: Callable[[str], None]) -> _Wanting:
        """Read the text of a JSON value, piece by piece."""
        depth = 0
        in_string = escaped = False
        while True:
            for at in range(self._at, len(self._text)):
                character = self._text[at]
                if in_string:
                    in_string = escaped or character != '"'
                    escaped = character == "\\" and not escaped
                    ended = depth == 0 and not in_string
                elif character == '"':
                    in_string, ended = True, False
                elif character in "{[":
                    depth, ended = depth + 1, False
                elif depth == 0 and character in ",}]" + _SPACE:  # after a number or a word
                    sink(self._text[self._at : at])
                    self._at = at
                    return
                else:
                    depth -= character in "}]"
                    ended = depth == 0 and character in "}]"
                if ended:
                    sink(self._text[self._at : at + 1])
                    self._at = at + 1
                    return
            if self._at < len(self._text):
                sink(self._text[self._at :])
                self._at = len(self._text)
            yield


def _new_id() -> str:
    # Nine letters and digits: templates of Mistral insist on it.
    return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(9))


def forced_call(form: ToolFormat, tools: Sequence[Tool]) -> str:
    """The grammar of an answer that is one call of one of ``tools``.

    Raises:
        InvalidRequest: a tool's parameters are a schema that can't be kept to.
    """
    builder = GrammarBuilder(tagged=form.shape == "tagged")
    alternatives = []
    for tool in tools:
        name = tool.function.name
        what = f"parameters of tool {name!r}"
        schema = tool.function.parameters or {"type": "object", "additionalProperties": False}
        if form.shape == "tagged":
            arguments = add_arguments(form, builder, schema, what)
        else:
            an_object = {"allOf": [{"type": "object"}, schema]}
            arguments = add_schema(builder, an_object, what, root=schema)
        call = f"{{{json.dumps(name)}: {{arguments}}}}"
        if form.name:
            call = f'{{"{form.name}": {json.dumps(name)}, "{form.arguments}": {{arguments}}}}'
        text = form.forced.replace("{call}", call).replace("{name}", name)
        before, _, after = text.partition("{arguments}")
        alternatives.append(f"{literal(before)} {arguments} {literal(after)}")
    return builder.gbnf(" | ".join(map(builder.rule, alternatives)))
