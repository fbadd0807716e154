"""Random schemas: what their grammars derive is valid, by a validator that is not ours."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest
from gbnf import Gbnf
from hypothesis import event, given, reject, settings
from hypothesis import strategies as st
from test_engine_schema import accepts, gbnf

from inferpool.engine.answer import AnswerParser
from inferpool.engine.calls import forced_call
from inferpool.engine.formats import ToolFormat, _tool_formats, reasoning_of
from inferpool.engine.model import Model
from inferpool.engine.overlap import TYPES
from inferpool.errors import InvalidRequest
from inferpool.messages import Tool, read

NAMES = ["a", "b", 'é"', "c d"]
FORMATS = jsonschema.FormatChecker(formats=["date", "uuid"])

constants = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([1.0, -0.0, 0.5, 1e300, 10**17])
    | st.text('ab</"\\\n\x7fé漢🐝', max_size=4),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=2)
    ),
    max_leaves=3,
)
numbers = st.one_of(
    st.integers(-12, 12),
    st.sampled_from([-1000, -100, -99.5, 0.0, 0.25, 99, 100, 1000, 10**15, 1e15 - 1, -1e30]),
    st.floats(-300, 300, allow_nan=False),
)
sizes = st.integers(0, 4)


def maps(**keywords: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Schemas with some of these keywords."""
    return st.fixed_dictionaries({}, optional=keywords)


def with_type(name: str, **keywords: Any) -> st.SearchStrategy[dict[str, Any]]:
    return st.tuples(st.sampled_from([{"type": name}, {}]), maps(**keywords)).map(
        lambda both: both[0] | both[1]
    )


numeric = st.sampled_from(["number", "integer"]).flatmap(
    lambda name: with_type(
        name, minimum=numbers, maximum=numbers, exclusiveMinimum=numbers, exclusiveMaximum=numbers
    )
)
lengths = with_type("string", minLength=sizes, maxLength=sizes)
formats = with_type(
    "string", format=st.sampled_from(["date", "time", "date-time", "uuid", "email"])
)
leaves = st.one_of(
    numeric,
    lengths,
    formats,
    st.sampled_from([True, {}, {"title": "t"}, {"x-unknown": 1}, False]),
    st.sampled_from(TYPES).map(lambda name: {"type": name}),
    st.lists(st.sampled_from(TYPES), min_size=1, max_size=3).map(lambda names: {"type": names}),
    maps(enum=st.lists(constants, min_size=1, max_size=4)),
    maps(const=constants, type=st.sampled_from(TYPES)),
    # The same keywords twice.
    st.lists(numeric, min_size=2, max_size=2).map(lambda parts: {"allOf": parts}),
    st.lists(sizes, min_size=2, max_size=3).map(
        lambda most: {"type": "string", "allOf": [{"maxLength": each} for each in most]}
    ),
    st.sampled_from(["#", "#/$defs/x", "#/$defs/y"]).map(lambda target: {"$ref": target}),
)


def tagged_unions(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """oneOf whose options differ in a property."""
    return st.lists(
        st.tuples(st.dictionaries(st.sampled_from(NAMES), inner, max_size=2), st.booleans()),
        min_size=2,
        max_size=3,
    ).map(
        lambda options: {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {**properties, "kind": {"const": i}},
                    "required": ["kind"] if required else [],
                }
                for i, (properties, required) in enumerate(options)
            ]
        }
    )


def nodes(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    several = st.lists(inner, min_size=1, max_size=3)
    properties = st.dictionaries(st.sampled_from(NAMES), inner, max_size=3)
    single = st.one_of(
        with_type("array", items=inner, minItems=sizes, maxItems=sizes),
        with_type("array", prefixItems=several, items=inner, minItems=sizes, maxItems=sizes),
        with_type(
            "object",
            properties=properties,
            required=st.lists(st.sampled_from(NAMES), max_size=2),
            additionalProperties=inner | st.just(False),
        ),
        maps(anyOf=several),
        maps(oneOf=several),
        maps(allOf=several),
        tagged_unions(inner),
    )
    # What stands beside each other is what converters get wrong.
    return single | st.lists(
        single | inner.filter(lambda each: isinstance(each, dict)), min_size=2, max_size=3
    ).map(lambda parts: {key: value for part in parts for key, value in part.items()})


schemas = st.recursive(leaves, nodes, max_leaves=6)
roots = st.tuples(schemas, schemas, schemas).map(
    lambda three: {
        **(three[0] if isinstance(three[0], dict) else {"allOf": [three[0]]}),
        "$defs": {"x": three[1], "y": three[2]},
    }
)


@given(roots, st.randoms(use_true_random=False))
def test_whatever_a_grammar_derives_is_an_instance(
    model: Model, schema: Any, drawn: random.Random
) -> None:
    try:
        source = gbnf(schema)
    except InvalidRequest:
        event("refused")
        reject()
    grammar = Gbnf(source)
    validator = jsonschema.Draft202012Validator(schema, format_checker=FORMATS)
    for _ in range(10):
        text = grammar.derive(drawn)
        if text is None:
            event("without instances")
            return
        try:
            validator.validate(json.loads(text))
            assert grammar.matches(text), text
        except RecursionError:  # a schema that is only itself
            reject()
    try:
        assert accepts(model, source, text), text
    except InvalidRequest as error:
        assert "recursion" in str(error)  # noqa: PT017
    event("met")


# Arguments of tools

objects = st.fixed_dictionaries(
    {"properties": st.dictionaries(st.sampled_from(NAMES), schemas, max_size=3)},
    optional={
        "type": st.just("object"),
        "required": st.lists(st.sampled_from(NAMES), max_size=2),
        "additionalProperties": schemas,
    },
)
parameters = st.one_of(
    objects,
    objects.map(lambda each: {"$ref": "#/$defs/z", "$defs": {"z": each}}),
    st.lists(objects, min_size=1, max_size=2).map(lambda parts: {"allOf": parts}),
    st.lists(objects, min_size=1, max_size=2).map(lambda options: {"anyOf": options}),
    st.tuples(objects, objects).map(lambda both: {**both[0], "anyOf": [both[1]]}),
)
every_form = pytest.mark.parametrize("form", _tool_formats(), ids=lambda form: form.forced[:20])


@every_form
@settings(max_examples=25)
@given(parameters, schemas, schemas, st.randoms(use_true_random=False))
def test_a_forced_call_is_read_as_one_with_valid_arguments(
    form: ToolFormat, schema: Any, x: Any, y: Any, drawn: random.Random
) -> None:
    schema = {**schema, "$defs": {**schema.get("$defs", {}), "x": x, "y": y}}
    tools = read(
        [{"type": "function", "function": {"name": "f", "parameters": schema}}], list[Tool]
    )
    try:
        grammar = Gbnf(forced_call(form, tools))
    except InvalidRequest:
        reject()
    validator = jsonschema.Draft202012Validator(schema, format_checker=FORMATS)
    # Of gpt-oss, whose calls are messages, this tells what a header is.
    reasoning = reasoning_of("".join(form.detect))
    for _ in range(10):
        text = grammar.derive(drawn)
        if text is None:
            return
        parser = AnswerParser(calls=form, reasoning=reasoning, tools=tools)
        deltas = [parser.push(text.encode()), parser.finish("stop")]
        calls = [call for delta in deltas if delta is not None for call in delta.tool_calls]
        assert [call.function.name for call in calls if call.function.name] == ["f"], text
        written = "".join(call.function.arguments or "" for call in calls)
        arguments = json.loads(written)
        assert isinstance(arguments, dict)
        try:
            validator.validate(arguments)
        except RecursionError:
            reject()


# The other way: of what is plain, a grammar leaves nothing out.

scalars = st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=3)
plain = st.recursive(
    st.one_of(
        st.sampled_from([{"type": name} for name in ("string", "boolean", "null", "integer")]),
        st.tuples(st.integers(-50, 50), st.integers(0, 50), st.sampled_from(["integer", "number"]))
        .map(lambda drawn: {"type": drawn[2], "minimum": drawn[0], "maximum": sum(drawn[:2])}),
        st.tuples(sizes, sizes).map(
            lambda drawn: {"type": "string", "minLength": drawn[0], "maxLength": sum(drawn)}
        ),
        st.lists(scalars, min_size=1, max_size=3).map(lambda values: {"enum": values}),
        scalars.map(lambda value: {"const": value}),
    ),
    lambda inner: st.one_of(
        st.tuples(inner, sizes, sizes).map(
            lambda drawn: {
                "type": "array",
                "items": drawn[0],
                "minItems": drawn[1],
                "maxItems": drawn[1] + drawn[2],
            }
        ),
        st.tuples(
            st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
            st.sets(st.sampled_from(NAMES)),
        ).map(
            lambda drawn: {
                "type": "object",
                "properties": drawn[0],
                "required": sorted(drawn[1] & drawn[0].keys()),
                "additionalProperties": False,
            }
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options}),
    ),
    max_leaves=6,
)  # fmt: skip


def instances(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    match schema:
        case {"enum": values}:
            return st.sampled_from(values)
        case {"const": value}:
            return st.just(value)
        case {"anyOf": options}:
            return st.sampled_from(options).flatmap(instances)
        case {"type": "array", "items": items, "minItems": least, "maxItems": most}:
            return st.lists(instances(items), min_size=least, max_size=most)
        case {"type": "object", "properties": properties, "required": required}:
            pairs = {name: instances(each) for name, each in properties.items()}
            drawn = st.fixed_dictionaries(
                {name: each for name, each in pairs.items() if name in required},
                optional={name: each for name, each in pairs.items() if name not in required},
            )
            return drawn.map(lambda made: {name: made[name] for name in pairs if name in made})
        case {"type": "string"}:
            return st.text(
                st.characters(exclude_categories=["Cs"], exclude_characters="\x7f"),
                min_size=schema.get("minLength", 0),
                max_size=schema.get("maxLength"),
            )
        case {"type": "integer"}:
            return st.integers(schema.get("minimum", -(10**9)), schema.get("maximum", 10**9))
        case {"type": "number", "minimum": low, "maximum": high}:
            return st.integers(8 * low, 8 * high).map(
                lambda eighths: eighths / 8 if eighths % 8 else eighths // 8
            )
        case {"type": "boolean"}:
            return st.booleans()
    return st.none()


@given(st.data())
def test_instances_of_plain_schemas_are_let_through(data: st.DataObject) -> None:
    schema = data.draw(plain)
    value = data.draw(instances(schema))
    jsonschema.validate(value, schema)
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    assert Gbnf(gbnf(schema)).matches(text), text
