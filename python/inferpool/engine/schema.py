"""JSON schemas to GBNF: whatever the grammar lets through is an instance of the schema.

The converter of llama-cpp-python was no help: it drops the bounds of numbers, lets raw control
characters into strings, and meets what it does not know with an assertion. Here a keyword that
a grammar can't keep to is refused by name, and so is a schema without instances, and a
``oneOf`` whose options can't be told apart. Of the instances some are left out: properties come
in the order of the schema, properties that it does not name never come beside those it does, and
numbers have at most 16 digits.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from inferpool.engine.overlap import (
    TYPES,
    both_properties,
    disjoint,
    is_a,
    referred,
    telling_property,
    text_of,
)
from inferpool.engine.ranges import integers, reals
from inferpool.engine.rules import GrammarBuilder, one_of
from inferpool.errors import InvalidRequest

__all__ = ["SchemaConverter", "add_schema"]

# Years from 100 on: Python knows no year 0.
_YEAR = '("0" [1-9] | [1-9] [0-9]) [0-9]{2}'
_DATE = f'{_YEAR} "-" ("0" [1-9] | "1" [0-2]) "-" ("0" [1-9] | "1" [0-9] | "2" [0-8])'
_TIME = '([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9] ("." [0-9]{1,6})? "Z"'
# Every other format is an annotation, as the specification has it. Days stop where every month has
# them.
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f'{_DATE} "T" {_TIME}',
    "uuid": ' "-" '.join(f"[0-9a-fA-F]{{{n}}}" for n in (8, 4, 4, 4, 12)),
}
# What a grammar can't keep to, and the values that ask for nothing. `then` and `else` mean nothing
# without `if`.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "not": (False,), "if": (), "pattern": ("",), "patternProperties": ({},),
    "propertyNames": (True, {}), "contains": (), "uniqueItems": (False,), "multipleOf": (),
    "minProperties": (0,), "maxProperties": (), "dependentRequired": ({},),
    "dependentSchemas": ({},), "dependencies": ({},), "unevaluatedProperties": (True, {}),
    "unevaluatedItems": (True, {}), "$dynamicRef": (), "$recursiveRef": (),
}  # fmt: skip
# Which type a schema means that names none.
_TELLING = {
    "properties": "object", "required": "object", "additionalProperties": "object",
    "items": "array", "prefixItems": "array", "minItems": "array", "maxItems": "array",
    "minLength": "string", "maxLength": "string", "format": "string",
    "minimum": "number", "maximum": "number",
    "exclusiveMinimum": "number", "exclusiveMaximum": "number",
}  # fmt: skip
_ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "$comment", "$defs", "definitions", "$schema"}
)
_PROPERTIES = ("properties", "additionalProperties")
_ITEMS = ("items", "prefixItems", "additionalItems")
# Schemas looked at, those that `allOf` takes in again and again included: more than the rules that
# a grammar may have.
_MAX_STEPS = 20_000


def add_schema(builder: GrammarBuilder, schema: Any, what: str, root: Any = None) -> str:
    """Add the JSON texts that are instances of a schema; returns the name of their rule.

    Args:
        builder: the grammar.
        schema: a JSON schema, as a map or a boolean.
        what: the schema's name in messages.
        root: the schema that it is a part of, to which its references refer; None: itself.

    Raises:
        InvalidRequest: it is not a JSON schema, asks for what a grammar can't express, or has no
            instances; with the keyword and its place.
    """
    return SchemaConverter(builder, schema if root is None else root, what).convert(schema)


class SchemaConverter:
    """One schema on its way into a grammar; its subclasses write some types in another way."""

    character = "char"
    """The rule of a character of a string."""
    string = "string"
    """The rule of any string."""

    def __init__(self, builder: GrammarBuilder, root: Any, what: str) -> None:
        self._builder = builder
        self._root = root
        self._what = what
        self._names: dict[str, str] = {}
        self._n_steps = 0

    def convert(self, schema: Any, path: str = "#") -> str:
        """Add the rule of a schema; see `add_schema`."""
        try:
            return self._builder.rule(self._visit(schema, path))
        except InvalidRequest:
            raise
        except RecursionError:
            problem = f"{self._what} is nested too deeply, or refers to itself"
            raise InvalidRequest(problem) from None
        except (AttributeError, TypeError, ValueError) as error:
            raise InvalidRequest(f"{self._what} is not a JSON schema: {error}") from error

    def _step(self, path: str) -> None:
        self._n_steps += 1
        if self._n_steps > _MAX_STEPS:
            raise self._refuse(path, f"a schema of more than {_MAX_STEPS} parts is too large")

    def _refuse(self, path: str, problem: str) -> InvalidRequest:
        return InvalidRequest(f"{self._what} at {path}: {problem}")

    def _visit(self, schema: Any, path: str) -> str:
        """The body of a rule for the instances of ``schema``."""
        self._step(path)
        if schema is True or (isinstance(schema, Mapping) and schema.keys() <= _ANNOTATIONS):
            return "value"
        if not isinstance(schema, Mapping):
            problem = "nothing can be an instance" if schema is False else "a schema is a map"
            raise self._refuse(path, problem)
        for keyword, harmless in _UNSUPPORTED.items():
            if keyword in schema and schema[keyword] not in harmless:
                raise self._refuse(path, f"a grammar can't keep to {keyword!r}")
        for keyword in ("$ref", "allOf", "anyOf", "oneOf", "const", "enum"):
            if keyword in schema:
                body: str = getattr(self, f"_{keyword.lstrip('$').lower()}")(schema, path)
                return body
        types = self._types(schema, path)
        bodies = [getattr(self, f"_{name}")(schema, path) for name in types]
        return bodies[0] if len(bodies) == 1 else self._any(bodies)

    def _any(self, bodies: Iterable[str]) -> str:
        return " | ".join(self._builder.rule(body) for body in bodies)

    def _types(self, schema: Mapping[str, Any], path: str) -> Sequence[str]:
        given = schema.get("type")
        if given is None:
            told = [kind for keyword, kind in _TELLING.items() if keyword in schema]
            return told[:1] or TYPES
        types = [given] if isinstance(given, str) else given
        if not isinstance(types, list) or not types or not set(map(str, types)) <= set(TYPES):
            raise self._refuse(path, f"unknown type {given!r}")
        return types

    # One method per keyword that decides alone, named after it.

    def _ref(self, schema: Mapping[str, Any], path: str) -> str:
        others = schema.keys() - _ANNOTATIONS - {"$ref"}
        if others:
            merged = {key: value for key, value in schema.items() if key != "$ref"}
            return self._visit({"allOf": [{"$ref": schema["$ref"]}, merged]}, path)
        target = schema["$ref"]
        if target not in self._names:
            resolved = self._resolve(target, path)
            name = self._names[target] = self._builder.reserve()
            self._builder.define(name, self._visit(resolved, str(target)))
        return self._names[target]

    def _allof(self, schema: Mapping[str, Any], path: str) -> str:
        # A rule of its own, as for a reference: it may take in what it is a part of.
        key = json.dumps({k: v for k, v in schema.items() if k not in _ANNOTATIONS})
        if key not in self._names:
            name = self._names[key] = self._builder.reserve()
            self._builder.define(name, self._visit(self._merged(schema, path), path))
        return self._names[key]

    def _anyof(self, schema: Mapping[str, Any], path: str) -> str:
        return self._union(schema, "anyOf", path)

    def _oneof(self, schema: Mapping[str, Any], path: str) -> str:
        options = [self._target(option, path) for option in self._list(schema, "oneOf", path)]
        tags: list[set[str]] = [set() for _ in options]
        for (i, one), (j, other) in itertools.combinations(enumerate(options), 2):
            self._step(path)
            if not disjoint(one, other):
                tag = telling_property(one, other)
                if tag is None:
                    raise self._refuse(path, f"an instance may match both {i} and {j} of oneOf")
                tags[i].add(tag)
                tags[j].add(tag)
        # What tells options apart has to be there, even where the schema lets it be left out.
        told = [
            {"allOf": [option, {"required": missing}]} if missing else option
            for option, resolved, names in zip(schema["oneOf"], options, tags, strict=True)
            for missing in [sorted(names.difference(resolved.get("required", [])) if names else [])]
        ]
        return self._union({**schema, "oneOf": told}, "oneOf", path)

    def _const(self, schema: Mapping[str, Any], path: str) -> str:
        return self._choice(schema, path)

    def _enum(self, schema: Mapping[str, Any], path: str) -> str:
        return self._choice(schema, path)

    def _resolve(self, target: Any, path: str) -> Any:
        try:
            return referred(self._root, target)
        except LookupError as error:
            raise self._refuse(path, str(error.args[0])) from None

    def _target(self, schema: Any, path: str) -> Any:
        """What a schema that only refers to another refers to in the end; or itself."""
        seen = set()
        while isinstance(schema, Mapping) and schema.keys() - _ANNOTATIONS == {"$ref"}:
            target = schema["$ref"]
            schema = self._resolve(target, path)
            if target in seen:
                raise self._refuse(path, f"$ref {target!r} refers to itself")
            seen.add(target)
        return schema

    def _union(self, schema: Mapping[str, Any], keyword: str, path: str) -> str:
        others = {k: v for k, v in schema.items() if k != keyword and k not in _ANNOTATIONS}
        options = self._list(schema, keyword, path)
        return self._any(
            self._visit({"allOf": [option, others]} if others else option, f"{path}/{keyword}/{i}")
            for i, option in enumerate(options)
        )

    def _list(self, schema: Mapping[str, Any], keyword: str, path: str) -> list[Any]:
        items = schema[keyword]
        if not isinstance(items, list) or not items:
            raise self._refuse(path, f"{keyword} must be a list with something in it")
        return items

    def _merged(self, schema: Mapping[str, Any], path: str) -> dict[str, Any]:
        """The one schema that stands for all of ``allOf``."""
        merged = {k: v for k, v in schema.items() if k != "allOf"}
        for each in self._list(schema, "allOf", path):
            self._step(path)
            part = self._target(each, path)
            if part is True:
                continue
            if not isinstance(part, Mapping):
                raise self._refuse(path, "allOf holds what is not a schema, or has no instances")
            if "allOf" in part:
                part = self._merged(part, path)
            # What one part says of properties or items depends on which of them it names.
            properties = both_properties(merged, part)
            items = [{k: v for k, v in each.items() if k in _ITEMS} for each in (merged, part)]
            if all(items) and text_of(items[0]) != text_of(items[1]):
                raise self._refuse(path, "'items' in several parts of allOf is not supported")
            for key, value in part.items():
                if key in merged and key not in _ANNOTATIONS and key not in _PROPERTIES:
                    merged[key] = self._both(key, merged[key], value, path)
                else:
                    merged[key] = value
            merged.update(properties)
        return merged

    def _both(self, key: str, one: Any, other: Any, path: str) -> Any:
        """What a keyword must be for two schemas to hold together."""
        if text_of(one) == text_of(other):
            return one
        if key == "required":
            return [*one, *other]
        # A bound that is a boolean, as before draft 6, compares with numbers in Python.
        bounds = not isinstance(one, bool) and not isinstance(other, bool)
        if bounds and key in {"minimum", "exclusiveMinimum", "minLength", "minItems"}:
            return max(one, other)
        if bounds and key in {"maximum", "exclusiveMaximum", "maxLength", "maxItems"}:
            return min(one, other)
        if key in {"type", "enum"}:
            ones, others = ([x] if isinstance(x, str) else x for x in (one, other))
            if key == "type":  # every integer is a number
                ones, others = ([*x, "integer"] if "number" in x else x for x in (ones, others))
            allowed = set(map(text_of, others))
            both = [item for item in ones if text_of(item) in allowed]
            if not both:
                raise self._refuse(path, f"no {key} is in both {one} and {other}")
            return both
        raise self._refuse(path, f"{key!r} in several parts of allOf is not supported")

    def _choice(self, schema: Mapping[str, Any], path: str) -> str:
        for keyword in _TELLING:
            if keyword in schema and keyword != "format":
                raise self._refuse(path, f"{keyword!r} beside enum or const is not supported")
        values = self._list(schema, "enum", path) if "enum" in schema else [schema["const"]]
        if "const" in schema:
            values = [value for value in values if text_of(value) == text_of(schema["const"])]
            if not values:
                raise self._refuse(path, "const is not in enum")
        if "type" in schema:
            types = self._types(schema, path)
            values = [value for value in values if any(is_a(value, name) for name in types)]
            if not values:
                raise self._refuse(path, f"no value has the type {schema['type']!r}")
        return one_of(self._constants(values, path))

    def _constants(self, values: Sequence[Any], _path: str) -> Iterable[str]:
        return map(self._builder.json, values)

    # One method per type, named after it.

    def _object(self, schema: Mapping[str, Any], path: str) -> str:
        members = self._members(schema, path)
        if not members:
            additional = schema.get("additionalProperties", True)
            # Beside properties that are forbidden by name there are only others.
            if additional is False or schema.get("properties"):
                return '"{" ws "}"'
            value = self._builder.rule(self._visit(additional, f"{path}/additionalProperties"))
            pair = self._builder.rule(f'string ":" ws {value}')
            return f'"{{" ws ({pair} ("," ws {pair})* ws)? "}}"'
        pairs = []
        for name, each, is_required in members:
            value = self._builder.rule(self._visit(each, f"{path}/properties/{name}"))
            pair = self._builder.rule(f'{self._builder.constant(name)} ":" ws {value}')
            pairs.append((pair, is_required))
        return f'"{{" ws {self._pairs(pairs)} ws "}}"'

    def _members(self, schema: Mapping[str, Any], path: str) -> list[tuple[str, Any, bool]]:
        """Of each property that a schema names: name, schema, and whether it is required."""
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        if not isinstance(properties, Mapping) or not isinstance(required, list):
            raise self._refuse(path, "properties must be a map and required a list")
        undeclared = [name for name in required if name not in properties]
        additional = schema.get("additionalProperties", True)
        everything = {**properties, **dict.fromkeys(undeclared, additional)}
        for name, each in everything.items():
            if not isinstance(name, str):
                raise self._refuse(path, f"a property's name is a string, not {name!r}")
            if each is False and name in required:
                raise self._refuse(path, f"{name!r} is required but not allowed")
        return [
            (name, each, name in required) for name, each in everything.items() if each is not False
        ]

    def _pairs(self, pairs: Sequence[tuple[str, bool]]) -> str:
        """Pairs in order, the optional ones there or not, with commas between them."""
        first = later = '""'  # what may follow, if nothing, or something, came before
        for pair, is_required in reversed(pairs):
            with_comma = self._builder.rule(f'"," ws {pair} {later}')
            without = self._builder.rule(f"{pair} {later}")
            if is_required:
                first, later = without, with_comma
            else:
                first = self._builder.rule(f"{without} | {first}")
                later = self._builder.rule(f"{with_comma} | {later}")
        return first

    def _array(self, schema: Mapping[str, Any], path: str) -> str:
        prefix = schema.get("prefixItems", [])
        items = schema.get("items", True)
        if isinstance(items, list):  # how prefixItems was written before 2020
            prefix, items = items, schema.get("additionalItems", True)
        if not isinstance(prefix, list):
            raise self._refuse(path, "prefixItems must be a list")
        least, most = self._bounds(schema, "Items", path)
        if prefix:
            least = max(least, len(prefix) if most is None else min(most, len(prefix)))
            if items is False and least > len(prefix):
                raise self._refuse(path, f"minItems is above the {len(prefix)} items allowed")
            fixed = [
                self._builder.rule(self._visit(item, f"{path}/prefixItems/{i}"))
                for i, item in enumerate(prefix[:least])
            ]
            extra = least - len(fixed)
            if extra:
                item = self._builder.rule(self._visit(items, f"{path}/items"))
                more = self._builder.rule(f'"," ws {item}')
                fixed[-1] += f" {self._builder.repeated(more, extra, extra)}"
            return '"[" ws ' + ' "," ws '.join(fixed) + ' ws "]"'
        if items is False or most == 0:
            if least:
                raise self._refuse(path, "minItems asks for items, but none are allowed")
            return '"[" ws "]"'
        item = self._builder.rule(self._visit(items, f"{path}/items"))
        more = self._builder.rule(f'"," ws {item}')
        at_most = None if most is None else most - 1
        body = f"{item} {self._builder.repeated(more, max(least - 1, 0), at_most)} ws"
        return f'"[" ws {body} "]"' if least else f'"[" ws ({body})? "]"'

    def _string(self, schema: Mapping[str, Any], path: str) -> str:
        least, most = self._bounds(schema, "Length", path)
        if (form := _FORMATS.get(schema.get("format", ""))) is not None:
            if least or most is not None:
                raise self._refuse(path, "a grammar can't keep to a format and a length")
            return self._quoted(form)
        if not least and most is None:
            return self.string
        return self._quoted(self._builder.repeated(self.character, least, most))

    def _quoted(self, body: str) -> str:
        return rf'"\"" {body} "\""'

    def _bounds(self, schema: Mapping[str, Any], of: str, path: str) -> tuple[int, int | None]:
        least, most = schema.get(f"min{of}", 0), schema.get(f"max{of}")
        for value in (least, most):
            if value is not None and (not is_a(value, "integer") or value < 0):
                raise self._refuse(path, f"min{of} and max{of} must be whole numbers")
        if most is not None and least > most:
            raise self._refuse(path, f"min{of} {least} is above max{of} {most}")
        return least, most

    def _integer(self, schema: Mapping[str, Any], path: str) -> str:
        return self._number(schema, path, whole=True)

    def _number(self, schema: Mapping[str, Any], path: str, *, whole: bool = False) -> str:
        low, high = -math.inf, math.inf
        strict = [False, False]
        for place, keyword in enumerate(("minimum", "maximum")):
            for name in (keyword, f"exclusive{keyword.capitalize()}"):
                bound = schema.get(name)
                if bound is None or bound is False:
                    continue
                if not is_a(bound, "number") or not math.isfinite(bound):
                    raise self._refuse(path, f"{name} must be a number, not {bound!r}")
                tighter = bound > low if place == 0 else bound < high
                # Where both bounds are the same, the exclusive one, which comes second, holds.
                if tighter or bound == (low, high)[place]:
                    low, high = (bound, high) if place == 0 else (low, bound)
                    strict[place] = name != keyword
        if (low, high) == (-math.inf, math.inf):
            return "integer" if whole else "number"
        body = integers(low, high, *strict) if whole else reals(low, high, *strict)
        if not body:
            raise self._refuse(path, f"a grammar finds no number between {low} and {high}")
        return body

    def _boolean(self, _schema: Mapping[str, Any], _path: str) -> str:
        return "boolean"

    def _null(self, _schema: Mapping[str, Any], _path: str) -> str:
        return "null"
