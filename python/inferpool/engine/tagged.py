"""Arguments one by one, each between tags, strings among them as plain text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from inferpool.engine.formats import ToolFormat
from inferpool.engine.overlap import kinds
from inferpool.engine.rules import GrammarBuilder, literal
from inferpool.engine.schema import SchemaConverter

__all__ = ["add_arguments", "is_text"]


def is_text(schema: Any, name: str) -> bool:
    """Whether an argument is written as plain text: whether it can be nothing but a string.

    Args:
        schema: that of all arguments; it may be malformed.
        name: of the argument.
    """
    return kinds(schema, schema, name) == {"string"}


def add_arguments(
    form: ToolFormat, builder: GrammarBuilder, schema: Mapping[str, Any], what: str
) -> str:
    """Add the arguments of a call as a model writes them that puts each between tags.

    Args:
        form: the tags.
        builder: the grammar, made for what stands between tags.
        schema: that of the arguments.
        what: the schema's name in messages.

    Returns:
        The name of the rule.

    Raises:
        InvalidRequest: as of `add_schema`.
    """
    converter = _Arguments(form, builder, schema, what)
    return converter.convert({"allOf": [{"type": "object"}, schema]})


class _Text(SchemaConverter):
    """Writes strings as plain text."""

    character = "letter"
    string = "text"

    def __init__(self, form: ToolFormat, builder: GrammarBuilder, root: Any, what: str) -> None:
        super().__init__(builder, root, what)
        self._form = form

    def _quoted(self, body: str) -> str:
        return body

    def _constants(self, values: Sequence[Any], path: str) -> Iterable[str]:
        end = self._form.value_end.strip()
        kept = [value for value in values if end not in value]
        if not kept:
            raise self._refuse(path, f"no value can stand before {end!r}")
        return kept


class _Arguments(SchemaConverter):
    """Writes the properties of one object, each between tags."""

    def __init__(self, form: ToolFormat, builder: GrammarBuilder, root: Any, what: str) -> None:
        super().__init__(builder, root, what)
        self._form = form
        self._text = _Text(form, builder, root, what)
        self._json = SchemaConverter(builder, root, what)

    def _choice(self, _schema: Mapping[str, Any], path: str) -> str:
        raise self._refuse(path, "enum or const of all arguments is not supported")

    def _object(self, schema: Mapping[str, Any], path: str) -> str:
        form, parts = self._form, []
        for name, each, is_required in self._members(schema, path):
            place = f"{path}/properties/{name}"
            if name != name.strip() or form.key_end.strip() in name:
                raise self._refuse(place, f"the name can't stand before {form.key_end!r}")
            converter = self._text if is_text(self._root, name) else self._json
            value = converter.convert(each, place)
            opening, closing = literal(f"{form.key}{name}{form.key_end}"), literal(form.value_end)
            part = self._builder.rule(f"{opening} {value} {closing}")
            parts.append(part if is_required else f"{part}?")
        return " ".join(parts) or '""'
