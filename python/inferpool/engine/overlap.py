"""What two JSON schemas have in common."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

__all__ = [
    "TYPES",
    "both_properties",
    "disjoint",
    "is_a",
    "kind_of",
    "kinds",
    "referred",
    "telling_property",
    "text_of",
]

TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_KINDS = frozenset(TYPES) - {"integer"}
_PYTHON_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}


def is_a(value: Any, name: str) -> bool:
    """Whether a value is of a JSON type; 1.0 is not an integer here."""
    if name != "boolean" and isinstance(value, bool):
        return False
    return isinstance(value, _PYTHON_TYPES[name])


def kind_of(value: Any) -> str:
    """The JSON type of a value, that of a whole number being number too."""
    return next(name for name in TYPES if is_a(value, name))


def text_of(value: Any) -> str:
    """The JSON of a value; other values, such as 1 and true, which Python calls equal, differ."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def referred(root: Any, target: Any) -> Any:
    """What a reference within a schema leads to.

    Raises:
        LookupError: it leads nowhere, or out of the schema.
    """
    if not isinstance(target, str) or not (target == "#" or target.startswith("#/")):
        raise LookupError(f"$ref {target!r} is not within the schema")
    found = root
    for part in unquote(target).split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        try:
            found = found[int(key) if isinstance(found, list) and key.isdecimal() else key]
        except (LookupError, TypeError):
            raise LookupError(f"$ref {target!r} leads nowhere") from None
    return found


def both_properties(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """``properties`` and ``additionalProperties`` for two schemas to hold together."""
    ones, others = one.get("properties", {}), other.get("properties", {})
    rest, other_rest = (each.get("additionalProperties", True) for each in (one, other))
    both: dict[str, Any] = {}
    if ones or others:
        both["properties"] = {
            name: _intersection(ones.get(name, rest), others.get(name, other_rest))
            for name in {**ones, **others}
        }
    if rest is not True or other_rest is not True:
        both["additionalProperties"] = _intersection(rest, other_rest)
    return both


def _intersection(one: Any, other: Any) -> Any:
    if one is False or other is False:
        return False
    if one is True or text_of(one) == text_of(other):
        return other
    return one if other is True else {"allOf": [one, other]}


def _values(schema: Any) -> list[Any] | None:
    """The values that a schema lists, if it does."""
    if not isinstance(schema, Mapping):
        return None
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    return values if isinstance(values, list) else None


def _kinds(schema: Mapping[str, Any]) -> frozenset[str]:
    """The types that its instances may have, an integer being a number."""
    values, types = _values(schema), schema.get("type", TYPES)
    types = [types] if isinstance(types, str) else types
    found = _KINDS.intersection("number" if name == "integer" else name for name in types)
    if values is not None:
        found &= {name for name in _KINDS if any(is_a(value, name) for value in values)}
    return found


def kinds(schema: Any, root: Any, name: str | None = None) -> frozenset[str]:
    """The types that instances of a schema may have, and maybe more; an integer is a number.

    Args:
        schema: a JSON schema, which may be malformed.
        root: the schema to which its references refer.
        name: if given, it is this property of the instances that is asked about.
    """
    return _possible(schema, root, name, {})


def _possible(
    schema: Any, root: Any, name: str | None, seen: dict[tuple[int, str | None], frozenset[str]]
) -> frozenset[str]:
    if not isinstance(schema, Mapping):
        return frozenset() if schema is False else _KINDS
    place = (id(schema), name)
    if place in seen:
        return seen[place]
    seen[place] = _KINDS  # while it is not known, as where a schema leads to itself
    try:
        found = _of_its_own(schema, root, name, seen)
        parts = list(schema.get("allOf", []))
        if "$ref" in schema:
            parts.append(referred(root, schema["$ref"]))
        for part in parts:
            found &= _possible(part, root, name, seen)
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                options = [_possible(option, root, name, seen) for option in schema[keyword]]
                found &= frozenset().union(*options)
    except (AttributeError, LookupError, TypeError):  # no schema
        found = _KINDS
    seen[place] = found
    return found


def _of_its_own(
    schema: Mapping[str, Any],
    root: Any,
    name: str | None,
    seen: dict[tuple[int, str | None], frozenset[str]],
) -> frozenset[str]:
    """What the keywords that hold no options and no parts say."""
    if name is None:
        return _kinds(schema)
    rest = schema.get("additionalProperties", True)
    return _possible(schema.get("properties", {}).get(name, rest), root, None, seen)


def disjoint(one: Any, other: Any) -> bool:
    """Whether two schemas certainly have no instance in common."""
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return one is False or other is False
    ones, others = _values(one), _values(other)
    if ones is not None and others is not None:
        return all(value not in others for value in ones)
    return not _kinds(one) & _kinds(other)


def telling_property(one: Any, other: Any) -> str | None:
    """A property whose values, if it is there, tell the instances of two schemas apart."""
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return None
    if not _kinds(one) == _kinds(other) == {"object"}:
        return None
    ones, others = one.get("properties", {}), other.get("properties", {})
    for name in ones:
        values, other_values = _values(ones[name]), _values(others.get(name))
        if values is not None and other_values is not None and disjoint(ones[name], others[name]):
            return str(name)
    return None
