"""JSON schemas to grammars: what they let through, and which are refused."""

from __future__ import annotations

import json
import math
import random
import re
from typing import Any

import pytest
from gbnf import Gbnf
from hypothesis import given
from hypothesis import strategies as st

from inferpool.engine.grammar import Grammar, GrammarState
from inferpool.engine.model import Model
from inferpool.engine.ranges import integers, reals
from inferpool.engine.rules import GrammarBuilder, literal, one_of
from inferpool.engine.schema import add_schema
from inferpool.errors import InvalidRequest


def gbnf(schema: Any) -> str:
    builder = GrammarBuilder()
    return builder.gbnf(add_schema(builder, schema, "schema"))


def accepts(model: Model, grammar: Grammar | str, text: str) -> bool:
    """Whether a grammar lets a text through, by llama.cpp, to its end."""
    state = GrammarState(Grammar(grammar) if isinstance(grammar, str) else grammar, model)
    try:
        for token in model.tokenize(text, add_special=False, parse_special=False).tolist():
            if not state.allows(token):
                return False
            state.accept(token)
        [end] = model.tokenize("<|im_end|>", add_special=False, parse_special=True).tolist()
        return state.allows(end)
    finally:
        state.close()


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", 'b"c', None, 3]}, "maxItems": 2},
        "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
    },
    "required": ["name", "next"],
    "additionalProperties": False,
}

CASES: list[tuple[Any, list[Any], list[Any]]] = [
    (
        PERSON,
        [
            {"name": "Ann", "next": None},
            {"name": "Ann", "age": 130, "tags": ["a", 'b"c'], "next": None},
            {"name": "é漢🐝", "tags": [None, 3], "next": {"name": "Bob", "next": None}},
            {"name": "Ann", "tags": [], "next": None},
        ],
        [
            {"name": "Ann"},
            {"name": "", "next": None},
            {"name": "Annabel", "next": None},
            {"name": "Ann", "age": 131, "next": None},
            {"name": "Ann", "age": -1, "next": None},
            {"name": "Ann", "tags": ["a", "a", "a"], "next": None},
            {"name": "Ann", "tags": ["c"], "next": None},
            {"name": "Ann", "next": {"name": "Bob"}},
            {"name": "Ann", "next": None, "more": 1},
            [],
        ],
    ),
    ({}, [{"a": [1, -2.5e10, "x\n", True, None]}, "é", 0], []),
    ({"type": "object"}, [{}, {"a": {"b": []}}], [[], 1]),
    ({"type": "object", "additionalProperties": {"type": "integer"}}, [{"a": 1}], [{"a": "b"}]),
    ({"type": ["string", "null"]}, ["x", None], [1]),
    ({"const": "a\n\"é"}, ["a\n\"é"], ["a", None]),
    ({"type": "integer", "enum": [1, "x", 2]}, [1, 2], ["x", 3]),
    ({"prefixItems": [{"type": "integer"}, {"type": "string"}]}, [[1, "a"]], [[1], ["a", 1]]),
    ({"items": {"type": "integer"}, "minItems": 2}, [[1, 2], [1, 2, 3]], [[], [1]]),
    ({"oneOf": [{"type": "integer"}, {"const": "x"}]}, [5, "x"], ["y", 1.5]),
    (
        {
            "allOf": [
                {"$ref": "#/$defs/a"},
                {"properties": {"y": {"type": "integer"}}, "required": ["y"]},
            ],
            "$defs": {"a": {"properties": {"x": {"type": "null"}}, "required": ["x"]}},
        },
        [{"x": None, "y": 1}],
        [{"x": None}, {"y": 1}],
    ),
    ({"type": "string", "format": "date"}, ["2024-02-28"], ["2024-13-01", "yesterday"]),
    ({"type": "string", "format": "date-time"}, ["2024-02-28T23:59:59.5Z"], ["2024-02-28"]),
    (
        {"type": "string", "format": "uuid"},
        ["123e4567-e89b-12d3-a456-426614174000"],
        ["123e4567"],
    ),
    ({"type": "string", "format": "email"}, ["whatever"], [1]),
    ({"type": "number", "minimum": 0, "maximum": 1}, [0, 1, 0.5, 0.25], [-0.5, 1.5, 2]),
    ({"type": "number", "exclusiveMinimum": 0}, [1, 0.5, 12.75], [0, -1, -0.5]),
    ({"description": "anything", "title": "t"}, [1, "x", None], []),
    # How pydantic 1 describes a field that is a model.
    (
        {
            "properties": {"n": {"allOf": [{"$ref": "#"}], "description": "the next one"}},
            "type": "object",
        },
        [{}, {"n": {"n": {}}}],
        [{"n": 1}],
    ),
    # A part that refers back to the whole.
    (
        {
            "type": "object",
            "properties": {"n": {"allOf": [{"$ref": "#"}, {"required": ["x"]}]}, "x": {"const": 1}},
        },
        [{}, {"n": {"x": 1}}, {"n": {"n": {"x": 1}, "x": 1}}],
        [{"n": {}}],
    ),
    (
        {
            "allOf": [
                {"properties": {"a": {"type": "integer"}}, "additionalProperties": False},
                {"properties": {"a": {"maximum": 5}, "b": {}}},
            ]
        },
        [{}, {"a": 5}],
        [{"a": 6}, {"b": 1}, {"a": 5, "b": 1}],
    ),
    ({"allOf": [{"additionalProperties": {"type": "null"}}, {"required": ["a"]}]}, [{"a": None}],
     [{"a": 1}]),
    ({"allOf": [{"enum": [1, 2]}, {"enum": [True, 2]}]}, [2], [1, True]),
    ({"const": 1, "enum": [1, 2]}, [1], [2]),
    ({"type": "integer", "minimum": 5, "exclusiveMinimum": 3}, [5], [4]),
    ({"type": "integer", "minimum": 3, "exclusiveMinimum": 3}, [4], [3]),
    ({"type": "integer", "maximum": 3, "exclusiveMaximum": 5}, [3], [4]),
    ({"type": "null", "not": False, "uniqueItems": False, "propertyNames": {}}, [None], [1]),
    # How pydantic describes a union whose tag has a default.
    (
        {
            "oneOf": [
                {"type": "object", "properties": {"kind": {"const": "a"}, "x": {"type": "null"}}},
                {"type": "object", "properties": {"kind": {"const": "b"}, "next": {"$ref": "#"}}},
            ]
        },
        [{"kind": "a", "x": None}, {"kind": "b", "next": {"kind": "a"}}],
        [{"x": None}, {"kind": "a", "next": {"kind": "a"}}, {}],
    ),
    (True, [1, []], []),
    # llama.cpp takes a count above 2,000 as no bound, and 2,000 itself as too much.
    ({"type": "string", "maxLength": 2000}, ["", "a" * 2000], ["a" * 2001]),
    ({"type": "string", "minLength": 2001}, ["a" * 2001, "a" * 2002], ["a" * 2000]),
    ({"minItems": 1004, "maxItems": 2503, "items": {"const": 1}}, [[1] * 1004, [1] * 2503],
     [[1] * 1003, [1] * 2504]),
    ({"prefixItems": [{}], "items": {"const": 1}, "minItems": 2101}, [[1] * 2101],
     [[1] * 2100, [1] * 2102]),
    ({"allOf": [{"type": ["number", "null"]}, {"type": "integer"}]}, [1], [1.5, None]),
    ({"$ref": "#/$defs/a%20b", "$defs": {"a b": {"const": 1}}}, [1], [2]),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: json.dumps(case[0])[:40])
def test_a_grammar_lets_instances_through_and_nothing_else(model: Model, case: Any) -> None:
    schema, instances, others = case
    grammar = gbnf(schema)
    for value in instances:
        for text in (
            json.dumps(value, ensure_ascii=False),
            json.dumps(value, ensure_ascii=False, separators=(",", ":")),
        ):
            assert accepts(model, grammar, text), text
    for value in others:
        assert not accepts(model, grammar, json.dumps(value, ensure_ascii=False)), value


def test_two_escapes_that_are_one_character_do_not_count_as_two(model: Model) -> None:
    grammar = gbnf({"type": "string", "minLength": 2})
    assert accepts(model, grammar, r'"\u00e9\uFFFF"')
    assert not accepts(model, grammar, r'"\ud83d\ude00"')


def test_no_number_is_rounded_to_the_bound_that_it_must_not_reach(model: Model) -> None:
    for bound, text in (({"exclusiveMaximum": 100}, "99."), ({"exclusiveMinimum": -100}, "-99.")):
        grammar = gbnf({"type": "number", **bound})
        assert accepts(model, grammar, text + 12 * "9")
        assert not accepts(model, grammar, text + 15 * "9")


@pytest.mark.parametrize("text", ['{"a": 1', '"\n"', "01", "1.", '{"a": 1}}', "nul", '"\\x"'])
def test_what_is_no_json_never_comes(model: Model, text: str) -> None:
    assert not accepts(model, gbnf({}), text)


@given(
    st.lists(st.text('ab"\\é', max_size=4), min_size=1, unique=True),
    st.text('ab"\\é', max_size=4),
)
def test_listed_values_are_told_apart_where_they_differ(texts: list[str], other: str) -> None:
    grammar = Gbnf(f"root ::= {one_of(texts)}")
    assert all(map(grammar.matches, texts))
    assert grammar.matches(other) == (other in texts)


def test_values_that_begin_alike_may_be_many_and_of_any_length(model: Model) -> None:
    grammar = gbnf({"enum": [f"item {i}" for i in range(2000)]})
    assert grammar.count("item") == 1
    assert accepts(model, grammar, '"item 1999"')
    assert not accepts(model, grammar, '"item 2000"')
    deep = gbnf({"enum": ["a" * n for n in range(300)]})
    assert accepts(model, deep, json.dumps("a" * 299))
    assert not accepts(model, deep, json.dumps("a" * 300))


def pattern(body: str) -> re.Pattern[str]:
    """The regular expression that a rule of `inferpool.engine.ranges` is."""
    return re.compile(re.sub(r'"(.*?)"| ', lambda found: re.escape(found[1] or ""), body))


bounds = st.integers(-12_345, 12_345)


@given(bounds, st.integers(0, 3000), st.booleans(), st.booleans())
def test_integers_are_exactly_those_between(low: int, span: int, above: bool, below: bool) -> None:
    high = low + span
    body = integers(low, high, above, below)
    expected = set(range(low + above, high - below + 1))
    assert bool(body) == bool(expected)
    if body:
        matches = pattern(body)
        near = range(low - 50, high + 51)
        assert {n for n in near if matches.fullmatch(str(n))} == expected
        assert not matches.fullmatch("007")


@given(st.floats(-500, 500), st.floats(0, 300), st.booleans(), st.integers(0, 2**32))
def test_reals_are_between_the_bounds(low: float, span: float, strict: bool, seed: int) -> None:
    high = low + span
    body = reals(low, high, strict, strict)
    drawn = random.Random(seed)
    for _ in range(50):
        number = round(drawn.uniform(low - 2, high + 2), drawn.randrange(4))
        if body and pattern(body).fullmatch(f"{number:.6g}"):
            assert (low < number < high) if strict else (low <= number <= high)
    if span > 2:
        assert pattern(body).fullmatch(str(math.floor(low) + 1))


@pytest.mark.parametrize(
    ("bound", "value"), [({"minimum": 7}, 10**14), ({"maximum": -7}, -(10**14))]
)
def test_a_range_may_be_open(model: Model, bound: dict[str, int], value: int) -> None:
    grammar = gbnf({"type": "integer", **bound})
    assert accepts(model, grammar, str(value))
    assert not accepts(model, grammar, "0")


@given(st.text())
def test_a_literal_is_readable(text: str) -> None:
    body = literal(text)[1:-1]
    unescaped = re.sub(
        r"\\(?:U([0-9A-F]{8})|(.))", lambda m: chr(int(m[1], 16)) if m[1] else m[2], body
    )
    assert unescaped == text
    assert body.isprintable()


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        (False, "nothing can be an instance"),
        ("object", "a schema is a map"),
        ({"type": "animal"}, "unknown type 'animal'"),
        ({"type": []}, "unknown type"),
        ({"properties": {"a": {"multipleOf": 3}}}, "#/properties/a: a grammar can't keep to 'mul"),
        ({"not": {"type": "null"}}, "'not'"),
        ({"type": "string", "pattern": "^a$"}, "'pattern'"),
        ({"$ref": "http://example.com/x"}, "not within the schema"),
        ({"$ref": "#/$defs/missing"}, "leads nowhere"),
        ({"type": "string", "minLength": 5, "maxLength": 4}, "minLength 5 is above maxLength 4"),
        ({"type": "array", "minItems": 2, "maxItems": 1}, "minItems 2 is above"),
        ({"type": "array", "minItems": 1, "items": False}, "none are allowed"),
        ({"prefixItems": [{}], "items": False, "minItems": 2}, "above the 1 items"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "no number between 5 and 4"),
        ({"type": "integer", "minimum": "5"}, "minimum must be a number"),
        ({"type": "number", "minimum": 0.2, "maximum": 0.3}, "no number between"),
        ({"enum": []}, "enum"),
        ({"type": "string", "enum": [1]}, "no value has the type"),
        ({"type": "string", "const": 1}, "no value has the type"),
        ({"anyOf": []}, "anyOf"),
        ({"allOf": [{"type": "string"}, {"type": "null"}]}, "no type is in both"),
        ({"allOf": [False]}, "no instances"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "'a' is required"),
        ({"type": "object", "properties": []}, "properties must be a map"),
        ({"type": "array", "prefixItems": {"type": "null"}}, "prefixItems must be a list"),
        ({"allOf": [{"minimum": 1}, {"minimum": "x"}]}, "not a JSON schema"),
        (
            {"allOf": [{"exclusiveMaximum": False}, {"exclusiveMaximum": 3}]},
            "'exclusiveMaximum' in several",
        ),
        ({"$ref": "#/anyOf/-1", "anyOf": [{}]}, "leads nowhere"),
        ({"type": "string", "minLength": -1}, "whole numbers"),
        ({"type": "string", "format": "date", "maxLength": 3}, "a format and a length"),
        ({"$defs": {"a": {"$ref": "#/$defs/a"}}, "allOf": [{"$ref": "#/$defs/a"}]}, "to itself"),
        (
            {
                "properties": {"a": {}},
                "additionalProperties": False,
                "anyOf": [{"properties": {"b": {}}, "required": ["b"]}],
            },
            "'b' is required but not allowed",
        ),
        ({"allOf": [{"prefixItems": [{}]}, {"items": {"type": "null"}}]}, "'items' in several"),
        ({"enum": [1, 5], "minimum": 3}, "'minimum' beside enum or const"),
        ({"const": 1, "enum": [2]}, "const is not in enum"),
        ({"const": 1, "enum": [True]}, "const is not in enum"),
        ({"const": float("nan")}, "not a JSON schema"),
        ({"type": "object", "required": [1]}, "a property's name is a string"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "may match both 0 and 1"),
        ({"oneOf": [{"required": ["a"]}, {"required": ["b"]}]}, "may match both 0 and 1"),
        ({"oneOf": [{"const": 1}, {"enum": [True, 1.0]}]}, "may match both 0 and 1"),
        *(
            ({keyword: value}, f"can't keep to '{keyword}'")
            for keyword, value in [
                ("maxProperties", 0),
                ("not", {}),
                ("contains", {}),
                ("propertyNames", False),
                ("unevaluatedProperties", False),
                ("unevaluatedItems", False),
                ("if", {}),
            ]
        ),
    ],
    ids=str,
)
def test_a_schema_that_cannot_be_met_is_refused_with_the_reason(schema: Any, problem: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(problem)):
        gbnf(schema)


def test_what_a_schema_takes_in_again_and_again_is_taken_in_once() -> None:
    levels: Any = {
        f"{i}": {"properties": {name: {"allOf": [{"$ref": f"#/$defs/{i + 1}"}]} for name in "ab"}}
        for i in range(30)
    }
    assert len(gbnf({"$defs": {**levels, "30": {"type": "object"}}, "$ref": "#/$defs/0"})) < 50_000


def test_a_schema_that_unfolds_without_end_is_refused() -> None:
    levels: Any = {
        f"{i}": {"allOf": [{"$ref": f"#/$defs/{i + 1}"}, {"$ref": f"#/$defs/{i + 1}"}]}
        for i in range(30)
    }
    with pytest.raises(InvalidRequest, match="too large"):
        gbnf({"$defs": {**levels, "30": {"type": "object"}}, "$ref": "#/$defs/0"})


def test_depth_and_loops_are_refused(model: Model) -> None:
    deep: Any = {}
    for _ in range(5000):
        deep = {"type": "array", "items": deep}
    with pytest.raises(InvalidRequest, match="nested too deeply"):
        gbnf(deep)
    for loop in ({"$ref": "#"}, {"anyOf": [{"$ref": "#"}]}):
        with pytest.raises(InvalidRequest, match="recursion"):
            GrammarState(Grammar(gbnf(loop)), model)
