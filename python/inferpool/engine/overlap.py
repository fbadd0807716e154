"""What two JSON schemas have in common."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["TYPES", "both_properties", "disjoint", "is_a", "telling_property", "text_of"]

TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
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
    """Whether a value is of a JSON type; 1.0 is no integer here."""
    if name != "boolean" and isinstance(value, bool):
        return False
    return isinstance(value, _PYTHON_TYPES[name])


def text_of(value: Any) -> str:
    """The JSON of a value; other values, such as 1 and true, which Python calls equal, differ."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


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


def _kinds(schema: Mapping[str, Any]) -> set[str]:
    """The types that its instances may have, an integer being a number."""
    values, types = _values(schema), schema.get("type", TYPES)
    if values is not None:
        types = [name for name in TYPES if any(is_a(value, name) for value in values)]
    types = [types] if isinstance(types, str) else types
    return {"number" if name == "integer" else name for name in types}


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
