"""Tool calls and reasoning: read from the marks of every family, asked for, and forced."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from engine_fakes import SETTINGS, stream
from hypothesis import given
from hypothesis import strategies as st
from test_engine_schema import accepts

from inferpool.engine.answer import AnswerParser, collect
from inferpool.engine.calls import forced_call
from inferpool.engine.chat import ChatEngine
from inferpool.engine.formats import (
    Reasoning,
    ToolFormat,
    reasoning_of,
    tool_format_of,
)
from inferpool.engine.grammar import Grammar, GrammarState
from inferpool.engine.model import Model
from inferpool.engine.prompt import PromptBuilder
from inferpool.engine.sampler import Candidates
from inferpool.engine.turns import as_text, turns
from inferpool.errors import InvalidRequest
from inferpool.messages import (
    ChatDelta,
    ChatMessage,
    ChatRequest,
    ChatResult,
    Timings,
    Tool,
    Usage,
    read,
)

THINK = Reasoning("<think>", "</think>")
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 30},
                "days": {"type": "integer", "minimum": 1, "maximum": 7},
            },
            "required": ["city", "days"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
TOOLS = read([WEATHER, CLOCK], list[Tool])

ROME, OSLO = '{"city": "Rome \\"}", "days": 3}', '{"city": "Oslo", "days": 1}'
# Of each family: a piece of its template, and two calls as its models write them.
FAMILIES: dict[str, tuple[str, str]] = {
    family: (each["template"], each["answer"])
    for family, each in json.loads(
        Path(__file__).with_name("data").joinpath("tool_calls.json").read_text("utf-8")
    ).items()
}


def form_of(template: str) -> ToolFormat:
    return tool_format_of(template, takes_tools=True)


HERMES = form_of(FAMILIES["hermes"][0])


def parsed(text: str, cuts: list[int] | None = None, **options: Any) -> ChatResult:
    """What an answer becomes whose tokens end at ``cuts``."""
    parser = AnswerParser(tools=TOOLS, **options)
    data = text.encode()
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts or [])})
    deltas = [parser.push(data[a:b]) for a, b in pairwise(edges)]
    last = parser.finish("stop")
    told = [delta for delta in deltas if delta is not None]
    return whole([*told, last])


def whole(deltas: list[ChatDelta]) -> ChatResult:
    usage = Usage(prompt_tokens=1, completion_tokens=1, total_tokens=2)
    timings = Timings(prompt_seconds=0.0, completion_seconds=0.0)
    return collect(
        [*deltas[:-1], msgspec.structs.replace(deltas[-1], usage=usage, timings=timings)]
    )


def calls_of(result: ChatResult) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in result.tool_calls]


# Families


@pytest.mark.parametrize("family", FAMILIES)
@given(cuts=st.lists(st.integers(0, 1000)))
def test_the_calls_of_every_family_are_read_however_they_are_cut(
    family: str, cuts: list[int]
) -> None:
    template, text = FAMILIES[family]
    result = parsed(text, cuts, calls=form_of(template), reasoning=reasoning_of(template))
    assert calls_of(result) == [
        ("get_weather", {"city": 'Rome "}', "days": 3}),
        ("get_weather", {"city": "Oslo", "days": 1}),
    ]
    assert result.text == ""
    assert result.finish_reason == "tool_calls"
    ids = [call.id for call in result.tool_calls]
    assert len(set(ids)) == 2
    assert all(len(id) == 9 and id.isalnum() for id in ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_arguments_arrive_while_they_are_written(family: str) -> None:
    template, text = FAMILIES[family]
    parser = AnswerParser(calls=form_of(template), reasoning=reasoning_of(template), tools=TOOLS)
    pieces = []
    for byte in text.encode():
        delta = parser.push(bytes([byte]))
        pieces += delta.tool_calls if delta is not None else []
    assert [piece.index for piece in pieces] == sorted(piece.index for piece in pieces)
    for index in range(2):
        first, *rest = [piece for piece in pieces if piece.index == index]
        assert (first.type, first.function.name) == ("function", "get_weather")
        assert first.id is not None
        assert all(piece.id is piece.type is piece.function.name is None for piece in rest)
        if family != "command-r":  # whose arguments may come before the name
            assert len(rest) > 2


@pytest.mark.parametrize("family", ["generic", *FAMILIES])
def test_a_forced_call_is_one_that_can_be_read(model: Model, family: str) -> None:
    template = FAMILIES[family][0] if family in FAMILIES else ""
    form = tool_format_of(template, takes_tools=family in FAMILIES)
    state = GrammarState(Grammar(forced_call(form, TOOLS)), model)
    # Walk through the grammar by the first token that it allows, the longest ones first.
    pieces = [model.piece(token) for token in range(model.n_vocab)]
    [end] = model.tokenize("<|im_end|>", add_special=False, parse_special=True).tolist()
    favoured = [token for token in range(model.n_vocab) if pieces[token]]
    favoured.sort(
        key=lambda t: (not pieces[t].isascii(), not pieces[t].strip(), -len(pieces[t]), t)
    )
    candidates = Candidates(model.n_vocab)
    text = b""
    for _ in range(200):
        if state.allows(end):
            break
        candidates.fill(np.zeros(model.n_vocab, np.float32))
        candidates.apply(state.handle)
        allowed = candidates._data["logit"] == 0.0
        token = next(t for t in favoured if allowed[t])
        state.accept(token)
        text += pieces[token]
    state.close()
    result = parsed(text.decode(), calls=form, reasoning=reasoning_of(template))
    assert [call.function.name for call in result.tool_calls] in (["get_weather"], ["clock"])
    [(name, arguments)] = calls_of(result)
    assert set(arguments) == ({"city", "days"} if name == "get_weather" else set())


def test_every_forced_call_keeps_to_its_schema(model: Model) -> None:
    grammar = forced_call(HERMES, TOOLS)
    call = '<tool_call>\n{{"name": "{}", "arguments": {}}}\n</tool_call>'
    assert accepts(model, grammar, call.format("get_weather", OSLO))
    assert accepts(model, grammar, call.format("clock", "{}"))
    assert not accepts(model, grammar, call.format("clock", OSLO))
    assert not accepts(model, grammar, call.format("get_weather", "{}"))
    assert not accepts(model, grammar, call.format("get_time", "{}"))
    assert not accepts(model, grammar, "Hello")


def test_a_tool_whose_schema_cannot_be_kept_to_is_named() -> None:
    function = {"name": "f", "parameters": {"properties": {"x": {"type": "string", "not": False}}}}
    tools = read([{"type": "function", "function": function}], list[Tool])
    assert forced_call(HERMES, tools)
    function["parameters"]["properties"]["x"]["not"] = {"const": "a"}  # type: ignore[index]
    tools = read([{"type": "function", "function": function}], list[Tool])
    with pytest.raises(InvalidRequest, match=r"tool 'f' at #/properties/x: .*'not'"):
        forced_call(HERMES, tools)


@given(cuts=st.lists(st.integers(0, 100)))
def test_a_call_between_tags_may_have_no_arguments(cuts: list[int]) -> None:
    for family in ("glm", "glm-4.7"):
        text = "<tool_call>clock</tool_call>\n<tool_call>clock\n</tool_call>"
        result = parsed(text, cuts, calls=form_of(FAMILIES[family][0]))
        assert calls_of(result) == [("clock", {})] * 2


@given(cuts=st.lists(st.integers(0, 100)))
def test_a_model_s_own_id_is_the_call_s(cuts: list[int]) -> None:
    form = form_of(FAMILIES["mistral-args"][0])
    tokens = ["[TOOL_CALLS]", "clock", "[CALL_ID]", "bzKv7f0JM", "[ARGS]", "{}"]
    # Those in brackets are control tokens, which show only where a format knows them.
    text = "".join(token for token in tokens if token[0] != "[" or token in form.markers)
    result = parsed(text, cuts, calls=form)
    assert calls_of(result) == [("clock", {})]
    assert result.tool_calls[0].id == "bzKv7f0JM"


# What is not a call


@given(cuts=st.lists(st.integers(0, 1000)))
def test_text_before_and_after_calls_is_text(cuts: list[int]) -> None:
    _, text = FAMILIES["hermes"]
    result = parsed(f"Let me see.\n\n{text}\n\nThat was it.  ", cuts, calls=HERMES)
    assert len(result.tool_calls) == 2
    assert result.text == "Let me see.That was it."


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\nhello\n</tool_call> and more",
        "<tool_call>\n{'name': 1}",
        '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        "<tool_call>",
        "a <tool_c",
        "Models write `<tool_call>` before a call.",
        "Use\n<tool_call> or <tool_call>.",
        '<tool_call>```js\n{"name": "clock"}',
        "[" * 100,
    ],
)
@given(cuts=st.lists(st.integers(0, 1000)))
def test_what_only_looks_like_a_call_stays_text(text: str, cuts: list[int]) -> None:
    result = parsed(text, cuts, calls=HERMES)
    assert result.tool_calls == []
    assert result.finish_reason == "stop"
    assert result.text == text


@given(cuts=st.lists(st.integers(0, 1000)))
def test_a_call_is_found_after_what_only_looked_like_one(cuts: list[int]) -> None:
    for before in ("Use `<tool_call>` so:", "<tool_call>[", '<tool_call>{"a"', "<tool_call>```js"):
        result = parsed(f"{before} {FAMILIES['hermes'][1]}", cuts, calls=HERMES)
        assert (result.text, len(result.tool_calls)) == (before, 2)
    for family, before in (
        ("functionary", "Write <function= and a name."),
        ("functionary", "Write <function=f and a name."),
        ("qwen3-coder", "Write <tool_call> around it."),
        ("glm-4.7", "Write <tool_call> before a call"),
        ("mistral-args", "Write [TOOL_CALLS]clock first,"),
        ("deepseek-r1", "Write {0} or {0}, that is".format(FAMILIES["deepseek-r1"][0])),
    ):
        result = parsed(f"{before} {FAMILIES[family][1]}", cuts, calls=form_of(FAMILIES[family][0]))
        assert (result.text, len(result.tool_calls)) == (before, 2)
    command_r = form_of(FAMILIES["command-r"][0])
    result = parsed(f"Plan of Action: do.\n{FAMILIES['command-r'][1]}", cuts, calls=command_r)
    assert (result.text, len(result.tool_calls)) == ("Plan of Action: do.", 2)
    llama = form_of(FAMILIES["llama"][0])
    text = '\n{"a": 1} {"name": "clock", "parameters": {}}'
    assert parsed(text, cuts, calls=llama).text == text


@given(
    st.lists(
        st.text('{}[]",:nae<tolcm_>/ \n\\é', max_size=20)
        | st.sampled_from(["<think>", "</think>", '{"name": "clock"}']),
        max_size=6,
    ).map("".join),
    st.lists(st.integers(0, 100)),
    st.booleans(),
)
def test_no_answer_breaks_the_parser(text: str, cuts: list[int], thinking: bool) -> None:
    for template, _ in FAMILIES.values():
        for prefix in ("", "<tool_call>", "{", "<function=", "[TOOL_CALLS]"):
            options = {"calls": form_of(template), "reasoning": THINK, "thinking": thinking}
            at_once, cut = (parsed(prefix + text, at, **options) for at in ([], cuts))
            assert (cut.text, cut.reasoning) == (at_once.text, at_once.reasoning)
            assert [each.function for each in cut.tool_calls] == [
                each.function for each in at_once.tool_calls
            ]


def test_arguments_as_a_string_and_openai_s_nesting_are_understood() -> None:
    nested = '{"type": "function", "function": {"name": "clock", "arguments": "{\\"a\\": 1}"}}'
    assert calls_of(parsed(f"<tool_call>{nested}</tool_call>", calls=HERMES)) == [
        ("clock", {"a": 1})
    ]


def test_without_tools_nothing_is_looked_for() -> None:
    _, text = FAMILIES["hermes"]
    assert parsed(text).text == text
    assert parsed("  {x} <think> \n").text == "  {x} <think> \n"


def test_a_bare_object_is_a_call_only_at_the_start() -> None:
    llama = form_of(FAMILIES["llama"][0])
    call = f'{{"name": "get_weather", "parameters": {ROME}}}'
    assert len(parsed("\n" + call, calls=llama).tool_calls) == 1
    assert parsed("As JSON: " + call, calls=llama).text == "As JSON: " + call
    assert parsed('{"answer": 42}', calls=llama).text == '{"answer": 42}'


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "Alice", "age": 30}',
        '{"parameters": {"a": 1}, "name": "Alice"}',
        '{"function": {"name": "Alice"}}',
    ],
)
@given(cuts=st.lists(st.integers(0, 100)))
def test_a_bare_object_that_names_no_tool_is_text(text: str, cuts: list[int]) -> None:
    result = parsed(text, cuts, calls=form_of(FAMILIES["llama"][0]))
    assert (result.text, result.tool_calls, result.finish_reason) == (text, [], "stop")
    # A model that marks its calls may get a name wrong, which its caller can tell it.
    marked = parsed(f"<tool_call>{text}</tool_call>", cuts, calls=HERMES)
    assert [call.function.name for call in marked.tool_calls] == ["Alice"]


@pytest.mark.parametrize("arguments", ["", ', "arguments": null', ', "arguments": ""'])
@given(cuts=st.lists(st.integers(0, 100)))
def test_a_call_without_arguments_has_an_empty_object_of_them(
    arguments: str, cuts: list[int]
) -> None:
    for call in ('{"name": "clock"%s}', '{"function": {"name": "clock"%s}}'):
        text = f"<tool_call>[{call % arguments}, {call % arguments}]</tool_call>"
        assert calls_of(parsed(text, cuts, calls=HERMES)) == [("clock", {})] * 2


def test_a_call_that_is_cut_ends_with_length() -> None:
    parser = AnswerParser(calls=HERMES, tools=TOOLS)
    told = parser.push(b'<tool_call>{"name": "clock", "arguments": {"a')
    assert told is not None
    assert told.tool_calls[-1].function.arguments == '{"a'
    assert parser.finish("length").finish_reason == "length"


@pytest.mark.parametrize("family", FAMILIES)
@given(cuts=st.lists(st.integers(0, 1000)))
def test_a_call_that_a_stop_string_cuts_is_not_said_to_be_made(
    family: str, cuts: list[int]
) -> None:
    template, answer = FAMILIES[family]
    options = {"calls": form_of(template), "reasoning": reasoning_of(template)}
    for stop, reason in (("Rome", "stop"), ("Oslo", "stop"), ("never", "tool_calls")):
        assert parsed(answer, cuts, stop=[stop], **options).finish_reason == reason


@given(cuts=st.lists(st.integers(0, 1000)))
def test_a_stop_string_after_a_call_leaves_it_made(cuts: list[int]) -> None:
    text = '<tool_call>{"name": "clock"}\n</tool_call>'
    result = parsed(text, cuts, calls=HERMES, stop=["</tool_call>"])
    assert (result.finish_reason, calls_of(result)) == ("tool_calls", [("clock", {})])
    result = parsed(text, cuts, calls=HERMES, stop=["}"])
    assert (result.finish_reason, result.tool_calls[0].function.arguments) == ("stop", "")


# Reasoning


@given(cuts=st.lists(st.integers(0, 1000)))
def test_reasoning_is_kept_apart(cuts: list[int]) -> None:
    text = "<think>\nBees <b> dance.\n</think>\n\nThey dance </think>."
    result = parsed(text, cuts, reasoning=THINK)
    assert (result.reasoning, result.text) == ("Bees <b> dance.", "They dance </think>.")


@given(cuts=st.lists(st.integers(0, 1000)))
def test_a_prompt_may_have_opened_the_reasoning(cuts: list[int]) -> None:
    result = parsed("\nHm.</think>Yes.", cuts, reasoning=THINK, thinking=True)
    assert (result.reasoning, result.text) == ("Hm.", "Yes.")
    unfinished = parsed("Hm. </thi", cuts, reasoning=THINK, thinking=True)
    assert (unfinished.reasoning, unfinished.text) == ("Hm. </thi", "")


@given(cuts=st.lists(st.integers(0, 1000)))
def test_an_answer_may_be_marked_as_well(cuts: list[int]) -> None:
    harmony = reasoning_of("{{ '<|channel|>analysis<|message|>' }}")
    assert harmony is not None
    thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    text = f"{thought}<|channel|>final<|message|>Yes <|channel|>."
    result = parsed(text, cuts, reasoning=harmony)
    assert (result.reasoning, result.text) == ("Hm.", "Yes <|channel|>.")
    result = parsed("<|channel|>final<|message|>Yes.", cuts, reasoning=harmony)
    assert (result.reasoning, result.text) == ("", "Yes.")
    assert {"<|channel|>", "<|message|>"} <= set(harmony.markers)


def test_a_mark_in_the_midst_opens_nothing() -> None:
    text = "The mark <think> opens it."
    assert parsed(text, reasoning=THINK).text == text


def test_reasoning_then_calls() -> None:
    _, calls = FAMILIES["hermes"]
    result = parsed(f"<think>Hm.</think>\n{calls}", reasoning=THINK, calls=HERMES)
    assert (result.reasoning, result.text, len(result.tool_calls)) == ("Hm.", "", 2)
    llama = form_of(FAMILIES["llama"][0])
    text = '<think>Hm.</think>\n{"name": "clock"}'
    for cuts in ([], range(len(text))):
        result = parsed(text, [*cuts], reasoning=THINK, calls=llama)
        assert (result.reasoning, result.text, len(result.tool_calls)) == ("Hm.", "", 1)


def test_templates_tell_how_a_model_reasons() -> None:
    assert reasoning_of("{{ content.split('</think>')[-1] }}") == THINK
    assert reasoning_of("[THINK]") == Reasoning("[THINK]", "[/THINK]")
    assert reasoning_of("'Here are my reasoning steps:\\n'") is not None  # Apriel
    gemma = reasoning_of("'<|channel>thought\\n' + thinking_text + '\\n<channel|>'")
    result = parsed("<|channel>thought\nHm.\n<channel|>Yes.", reasoning=gemma)
    assert (result.reasoning, result.text) == ("Hm.", "Yes.")
    assert reasoning_of("{{ messages }}") is None


def test_much_white_space_is_read_as_fast_as_other_text() -> None:
    text = "a" + " " * 1_000_000 + "b"  # took hours
    assert parsed(text, [9], calls=HERMES).text == text


# Conversations with tools

CALL = {"id": "abcdefghi", "function": {"name": "clock", "arguments": '{"a": "é"}'}}
CONVERSATION = [
    {"role": "user", "content": "What time is it?"},
    {"role": "assistant", "tool_calls": [CALL, {**CALL, "id": "2"}]},
    {"role": "tool", "tool_call_id": "2", "content": "noon"},
    {"role": "tool", "tool_call_id": "abcdefghi", "content": [{"type": "text", "text": "12:00"}]},
]


def test_calls_and_results_reach_the_template_in_its_shape() -> None:
    messages = read(CONVERSATION, list[ChatMessage])
    _, call, second, first = turns(messages)
    function = call["tool_calls"][0]["function"]
    assert function == {"name": "clock", "arguments": {"a": "é"}}
    # Some templates want a map and others JSON text.
    assert "x" + function["arguments"] + "y" == f"x{function['arguments']}y" == 'x{"a": "é"}y'
    assert call["content"] == ""
    assert second == {"role": "tool", "content": "noon", "tool_call_id": "2"}
    assert first["content"] == "12:00"
    # What a model wrote need not be what it should be.
    for text in ('{"a": ', "[]", '{"a": %s}' % ("[" * 5000 + "]" * 5000)):
        function = {"name": "clock", "arguments": text}
        call = {**CALL, "function": function}
        [turn] = turns(read([{"role": "assistant", "tool_calls": [call]}], list[ChatMessage]))
        assert turn["tool_calls"][0]["function"] == function


def test_calls_are_shown_one_by_one_where_the_template_takes_one_in_a_turn() -> None:
    messages = read([*CONVERSATION, CONVERSATION[0], *CONVERSATION[1:]], list[ChatMessage])
    told = turns(messages, form_of(FAMILIES["llama"][0]))
    exchange = ["user", *["assistant", "tool"] * 2]
    assert [turn["role"] for turn in told] == exchange * 2
    for call, result in ((told[1], told[2]), (told[3], told[4]), (told[8], told[9])):
        [only] = call["tool_calls"]
        assert result["tool_call_id"] == only["id"]
    assert turns(messages, HERMES) == turns(messages)


def test_calls_have_the_ids_that_the_model_knows() -> None:
    messages = read([*CONVERSATION, *CONVERSATION], list[ChatMessage])
    told = turns(messages, form_of(FAMILIES["kimi-k2"][0]))
    ids = [[call["id"] for call in turn.get("tool_calls", ())] for turn in told]
    first, second = (
        ["functions.clock:0", "functions.clock:1"],
        ["functions.clock:2", "functions.clock:3"],
    )
    assert [each for each in ids if each] == [first, second]
    results = [turn["tool_call_id"] for turn in told if turn["role"] == "tool"]
    assert results == [*reversed(first), *reversed(second)]


def test_a_template_without_tools_gets_them_as_text() -> None:
    form = tool_format_of("", takes_tools=False)
    messages = read([{"role": "system", "content": "Be kind."}, *CONVERSATION], list[ChatMessage])
    clock = {"type": "function", "function": {"name": "clock", "description": "Où et quand"}}
    tools = read([WEATHER, clock], list[Tool])
    system, user, call, results = as_text(messages, tools, form)
    assert system.text.startswith("Be kind.\n\nYou may call functions")
    assert '"name": "get_weather"' in system.text
    assert "Où et quand" in system.text
    assert user.text == "What time is it?"
    assert call.text.count('<tool_call>\n{"name": "clock", "arguments": {"a": "é"}}') == 2
    assert results.role == "user"
    assert results.text.count("<tool_response>") == 2
    assert as_text(messages[:2], [], form) == messages[:2]


def test_a_template_without_system_messages_gets_tools_with_the_user_s_first_turn(
    model: Model,
) -> None:
    refusing = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    messages: list[dict[str, Any]] = [
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Hi."},
    ]
    for source in (
        refusing,
        refusing.replace("{{ raise_exception('no system') }}", "{% continue %}"),
    ):
        builder = PromptBuilder(model, n_ctx=1024, chat_template=source)

        def shown(asked: list[dict[str, Any]], builder: PromptBuilder = builder) -> str:
            fields = {"messages": asked, "tools": [CLOCK]}
            tokens = builder.build(read(fields, ChatRequest)).tokens.tolist()
            return b"".join(model.piece(token, special=True) for token in tokens).decode()

        text = shown(messages)
        assert text.startswith("<assistant>Hello.<user>You may call functions")
        assert text.endswith("</tool_call>\n\nHi.")
        assert shown(messages[:1]).startswith("<assistant>Hello.<user>You may call functions")
        text = shown([{"role": "system", "content": "Be kind."}, *messages])
        assert text.startswith("<assistant>Hello.<user>Be kind.\n\nYou may call functions")


# Through the engine


@pytest.fixture(scope="module")
def engine(model: Model) -> Any:
    made = ChatEngine(model, **SETTINGS)
    yield made
    made.close()


def ask(engine: ChatEngine, messages: Any, **options: Any) -> ChatResult:
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    fields = {"messages": messages, "temperature": 0.0, "max_tokens": 96, **options}
    return collect(stream(engine, read(fields, ChatRequest)))


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_required_call_is_made_by_any_model(engine: ChatEngine, temperature: float) -> None:
    result = ask(
        engine,
        "Write a poem about the sea.",
        tools=[WEATHER],
        tool_choice="required",
        temperature=temperature,
        seed=7,
    )
    [(name, arguments)] = calls_of(result)
    assert name == "get_weather"
    assert isinstance(arguments["city"], str)
    assert 1 <= arguments["days"] <= 7
    assert (result.text, result.finish_reason) == ("", "tool_calls")


def test_a_named_function_is_called_and_no_other(engine: ChatEngine) -> None:
    named = {"type": "function", "function": {"name": "clock"}}
    result = ask(engine, "How is the weather?", tools=[WEATHER, CLOCK], tool_choice=named)
    assert calls_of(result) == [("clock", {})]


def test_an_answer_s_message_goes_back_into_the_conversation(engine: ChatEngine) -> None:
    messages: list[Any] = [{"role": "user", "content": "What time is it?"}]
    result = ask(engine, messages, tools=[CLOCK], tool_choice="required")
    messages.append(result.message)
    messages.append(
        {"role": "tool", "tool_call_id": result.tool_calls[0].id, "content": "It is noon."}
    )
    final = ask(engine, messages, tools=[CLOCK])
    assert final.finish_reason in {"stop", "tool_calls", "length"}
    assert final.usage.prompt_tokens > result.usage.prompt_tokens


def test_tool_choice_none_hides_the_tools(engine: ChatEngine) -> None:
    plain = ask(engine, "Why do bees dance?", max_tokens=8)
    none = ask(engine, "Why do bees dance?", max_tokens=8, tools=[CLOCK], tool_choice="none")
    assert none.text == plain.text
    assert none.usage == plain.usage


def test_what_a_grammar_asks_for_is_text_even_where_it_looks_like_a_call(
    engine: ChatEngine,
) -> None:
    text = '<tool_call>{"name": "clock"}</tool_call>'
    result = ask(engine, "Hi.", tools=[CLOCK], grammar=f"root ::= {json.dumps(text)}")
    assert (result.text, result.tool_calls, result.finish_reason) == (text, [], "stop")


def test_a_grammar_waits_for_the_end_of_reasoning(model: Model) -> None:
    source = "{{ messages[-1].content }}\n<think>{# </think> #}"
    engine = ChatEngine(model, **SETTINGS, chat_template=source)
    result = ask(engine, "Say </think> now.", grammar='root ::= "yes"', max_tokens=24, stop=["yes"])
    engine.close()
    # Greedy SmolLM2 does not close it by itself: all of it is reasoning, and free.
    assert result.text in {"", "yes"}
    assert result.reasoning
