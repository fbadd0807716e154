"""Arguments between tags, strings among them as plain text: forced by a schema, and read by it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from gbnf import Gbnf

from inferpool.engine.answer import AnswerParser
from inferpool.engine.calls import forced_call
from inferpool.engine.formats import ToolFormat, _tool_formats
from inferpool.errors import InvalidRequest
from inferpool.messages import Tool, read

FORMS = [form for form in _tool_formats() if form.shape == "tagged"]
every_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.forced[:20])


def tools_of(schema: Any) -> list[Tool]:
    return read([{"type": "function", "function": {"name": "f", "parameters": schema}}], list[Tool])


def written(form: ToolFormat, arguments: dict[str, str]) -> str:
    """A call as a model writes it."""
    parts = "".join(
        f"{form.key}{name}{form.key_end}{value}{form.value_end}"
        for name, value in arguments.items()
    )
    return form.forced.replace("{name}", "f").replace("{arguments}", parts)


def forced(form: ToolFormat, schema: Any, **arguments: str) -> bool:
    """Whether a call with these arguments may come where a call must."""
    return Gbnf(forced_call(form, tools_of(schema))).matches(written(form, arguments))


def understood(form: ToolFormat, schema: Any, **arguments: str) -> Any:
    parser = AnswerParser(calls=form, tools=tools_of(schema))
    deltas = [parser.push(written(form, arguments).encode()), parser.finish("stop")]
    calls = [call for delta in deltas if delta is not None for call in delta.tool_calls]
    return json.loads("".join(call.function.arguments or "" for call in calls))


def only(schema: Any) -> dict[str, Any]:
    return {"properties": {"x": schema}, "required": ["x"], "$defs": {"s": {"type": "string"}}}


@every_form
@pytest.mark.parametrize(
    ("schema", "instances", "others"),
    [
        ({"enum": ["a", "7"]}, ["a", "7"], ['"a"', "b", ""]),
        ({"type": "string", "enum": ["a", 7]}, ["a"], ["7", '"a"']),
        ({"const": "null"}, ["null"], ['"null"']),
        ({"type": "string", "const": "a"}, ["a"], ["b"]),
        ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "é漢🐝"], ["a", "abcd"]),
        ({"type": "string", "format": "date"}, ["2024-02-28"], ["today"]),
        ({"$ref": "#/$defs/s"}, ["", "a", "a < b << 3 <b> <"], ["</b>"]),
        ({"allOf": [{"$ref": "#/$defs/s"}, {"maxLength": 1}]}, ["", "a"], ["ab", "<"]),
        ({"anyOf": [{"const": "a"}, {"type": "string", "minLength": 3}]}, ["a", "abc"], ["ab"]),
    ],
    ids=str,
)
def test_what_can_only_be_a_string_is_plain_text(
    form: ToolFormat, schema: Any, instances: list[str], others: list[str]
) -> None:
    for text in instances:
        assert forced(form, only(schema), x=text), text
        assert understood(form, only(schema), x=text) == {"x": text}
    for text in others:
        assert not forced(form, only(schema), x=text), text


@every_form
@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": ["string", "null"]}, '"a"', "a"),
        ({"type": ["string", "null"]}, "null", None),
        ({"enum": ["a", 1]}, '"a"', "a"),
        ({"enum": ["a", 1]}, "1", 1),
        (
            {"type": "array", "items": {"type": "string"}},
            r'["<b>1 < 2<\/b>", "<"]',
            ["<b>1 < 2</b>", "<"],
        ),
        ({"type": "array", "items": {"const": "</b>"}}, r'["<\/b>"]', ["</b>"]),
        ({"minLength": 2}, '"ab"', "ab"),
        ({"type": "number"}, "-1.50e2", -150.0),
    ],
    ids=str,
)
def test_all_else_is_json(form: ToolFormat, schema: Any, text: str, value: Any) -> None:
    assert forced(form, only(schema), x=text)
    assert understood(form, only(schema), x=text) == {"x": value}


@every_form
def test_no_string_ends_what_it_stands_in(form: ToolFormat) -> None:
    end = form.value_end.strip()
    strings = {"type": "array", "items": {"type": "string"}}
    for schema in (strings, {"type": "array"}, {"const": [end]}, {"type": "object"}):
        for text in (json.dumps([end]), json.dumps({end: 1}), json.dumps([f"<{end}"])):
            assert not forced(form, only(schema), x=text)
    escaped = json.dumps([end]).replace("/", r"\/")
    assert forced(form, only({"const": [end]}), x=escaped)
    assert understood(form, only({"const": [end]}), x=escaped) == {"x": [end]}
    assert forced(form, only({"enum": ["a", end]}), x="a")
    with pytest.raises(InvalidRequest, match="no value can stand before"):
        forced_call(form, tools_of(only({"const": end})))
    with pytest.raises(InvalidRequest, match="the name can't stand before"):
        forced_call(form, tools_of({"properties": {f"a{form.key_end.strip()}": {}}}))


@every_form
@pytest.mark.parametrize("text", ["\na", "a\n", "\n\n"])
def test_ends_of_lines_at_the_ends_of_a_text_are_part_of_it(form: ToolFormat, text: str) -> None:
    for schema in ({"type": "string", "minLength": 2}, {"const": text}, {"type": "string"}):
        assert forced(form, only(schema), x=text)
        assert understood(form, only(schema), x=text) == {"x": text}


@every_form
def test_the_schema_of_all_arguments_may_be_put_together(form: ToolFormat) -> None:
    schema = {
        "allOf": [{"$ref": "#/$defs/A"}, {"properties": {"y": {"type": "integer"}}}],
        "required": ["y", "z"],
        "anyOf": [{"properties": {"y": {"minimum": 5}}}, {"properties": {"y": {"const": 1}}}],
        "properties": {"z": {"type": "string"}},
        "$defs": {"A": {"type": "object", "properties": {"x": {"type": "string", "maxLength": 1}}}},
    }
    assert forced(form, schema, y="5", z="7", x="a")
    assert understood(form, schema, y="5", z="7", x="1") == {"x": "1", "y": 5, "z": "7"}
    assert forced(form, schema, y="1", z="b")
    for others in ({"y": "5", "z": "b", "x": "ab"}, {"y": "2", "z": "b"}, {"y": "5"}, {"z": "b"}):
        assert not forced(form, schema, **others), others


@every_form
def test_where_options_differ_in_a_type_it_is_written_as_json(form: ToolFormat) -> None:
    schema = {
        "anyOf": [
            {"properties": {"x": {"type": "string"}}},
            {"properties": {"x": {"type": "integer"}}},
        ],
        "required": ["x"],
    }
    assert forced(form, schema, x='"5"')
    assert understood(form, schema, x='"5"') == {"x": "5"}
    assert forced(form, schema, x="5")
    assert understood(form, schema, x="5") == {"x": 5}
    assert not forced(form, schema, x="a")


@every_form
def test_a_text_that_only_looks_like_something_else_is_a_string(form: ToolFormat) -> None:
    assert understood(form, only({"type": ["string", "null"]}), x="5") == {"x": "5"}
    assert understood(form, only({"type": "integer"}), x='"5"') == {"x": "5"}
    assert understood(form, None, x="5", y="NaN", z="-Infinity") == {
        "x": 5,
        "y": "NaN",
        "z": "-Infinity",
    }


@every_form
def test_words_of_python_are_understood_where_they_may_be_no_text(form: ToolFormat) -> None:
    for schema in ({"type": ["boolean", "null"]}, {"type": ["boolean", "null", "string"]}, {}):
        for text, value in (("True", True), ("False", False), ("None", None)):
            assert understood(form, only(schema), x=text) == {"x": value}
    assert understood(form, only({"type": "string"}), x="True") == {"x": "True"}
    assert understood(form, only({"type": ["string", "null"]}), x="True") == {"x": "True"}


@every_form
@pytest.mark.parametrize(
    "schema",
    [
        {"properties": []},
        {"properties": {"x": {"type": 5}}},
        {"properties": {"x": {"allOf": 5}}},
        {"$ref": "elsewhere"},
        {"$ref": "#/nowhere"},
        {"$ref": 5},
        {"$ref": "#"},
    ],
    ids=str,
)
def test_a_schema_that_is_none_is_refused_where_a_call_is_forced_and_read_past(
    form: ToolFormat, schema: Any
) -> None:
    assert understood(form, schema, x="5") == {"x": 5}
    with pytest.raises(InvalidRequest, match=re.escape("parameters of tool 'f'")):
        forced_call(form, tools_of(schema))


@every_form
def test_arguments_that_are_listed_are_refused(form: ToolFormat) -> None:
    with pytest.raises(InvalidRequest, match="enum or const of all arguments"):
        forced_call(form, tools_of({"enum": [{"x": 1}]}))


@pytest.mark.parametrize("form", _tool_formats(), ids=lambda form: form.forced[:20])
def test_arguments_are_an_object_whatever_else_they_may_be(form: ToolFormat) -> None:
    schema = {"type": ["object", "null"], "additionalProperties": False}
    assert forced_call(form, tools_of(schema)) == forced_call(
        form, tools_of({"type": "object", "additionalProperties": False})
    )
    with pytest.raises(InvalidRequest, match="no type is in both"):
        forced_call(form, tools_of({"type": "null"}))
