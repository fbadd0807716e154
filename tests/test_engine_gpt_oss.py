"""gpt-oss: answers that are messages with headers, read, asked for, forced, and rendered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_engine_schema import accepts
from test_engine_tools import CLOCK, OSLO, ROME, TOOLS, WEATHER, calls_of, form_of, parsed
from tiny_models import write_qwen3

from inferpool.engine.answer import Answer, collect
from inferpool.engine.calls import forced_call
from inferpool.engine.formats import reasoning_of
from inferpool.engine.grammar import Grammar
from inferpool.engine.model import Model
from inferpool.engine.prompt import PromptBuilder, begin_answer
from inferpool.errors import InvalidRequest
from inferpool.messages import ChatRequest, read

TEMPLATE = Path(__file__).with_name("data").joinpath("gpt-oss.jinja").read_text("utf-8")
FORM = form_of(TEMPLATE)
REASONING = reasoning_of(TEMPLATE)
ANSWERS = {"calls": FORM, "reasoning": REASONING}
THOUGHT = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
USER = {"role": "user", "content": "How is it?"}
CUTS = st.lists(st.integers(0, 1000))


# Reading


@pytest.mark.parametrize(
    "header",
    [
        "<|channel|>commentary to=functions.get_weather <|constrain|>json",
        "<|channel|>commentary to=functions.get_weather<|constrain|>json",
        "<|channel|>commentary to=functions.get_weather json",
        "<|channel|>commentary to=functions.get_weather",
        "<|channel|>analysis to=functions.get_weather code",
        " to=functions.get_weather<|channel|>commentary json",
        " to=functions.get_weather<|channel|>analysis <|constrain|>json",
        "<|channel|>commentary to=assistant<|channel|>commentary to=functions.get_weather json",
    ],
)
@given(cuts=CUTS)
def test_a_call_is_a_message_to_a_function(header: str, cuts: list[int]) -> None:
    for before, reasoning in (("", ""), (THOUGHT, "Hm.")):
        for end in ("", "<|call|>", "<|end|>"):
            result = parsed(f"{before}{header}<|message|>{ROME}{end}", cuts, **ANSWERS)
            assert calls_of(result) == [("get_weather", json.loads(ROME))]
            assert (result.reasoning, result.text) == (reasoning, "")
            assert result.finish_reason == "tool_calls"


@given(cuts=CUTS)
def test_every_message_of_an_answer_has_its_place(cuts: list[int]) -> None:
    messages = [
        "<|channel|>analysis<|message|>Rome,\nthen.",
        "<|channel|>analysis<|message|> Two. ",
        "<|channel|>commentary<|message|>I look.",
        f" to=functions.get_weather<|channel|>commentary json<|message|>{ROME}",
        f"<|channel|>commentary to=functions.get_weather json<|message|>\n{OSLO}\n",
        "<|channel|>final<|message|>Sunny: <|channel|> to=functions.x, <b>.\n",
    ]
    result = parsed("<|end|><|start|>assistant".join(messages) + "<|return|>", cuts, **ANSWERS)
    assert result.reasoning == "Rome,\nthen.\n\nTwo."
    assert result.text == "I look.\n\nSunny: <|channel|> to=functions.x, <b>."
    assert [arguments["city"] for _, arguments in calls_of(result)] == ['Rome "}', "Oslo"]


@pytest.mark.parametrize(
    ("answer", "reasoning", "text"),
    [
        ("<|channel|>final <|constrain|>json<|message|>{}", "", "{}"),
        ("<|channel|>commentary to=assistant<|channel|>final<|message|>Hi.", "", "Hi."),
        (f"{THOUGHT}<|channel|>commentary to=python code<|message|>1 + 1", "Hm.\n\n1 + 1", ""),
        (f"{THOUGHT} to=container.exec<|channel|>commentary<|message|>ls", "Hm.\n\nls", ""),
        (f"{THOUGHT}<|message|>Hi.", "Hm.", "Hi."),
        (THOUGHT, "Hm.", ""),
        (f"{THOUGHT}<|channel|>fin", "Hm.", ""),
        # Of a model that knows no headers, as a grammar alone or a fine-tuned one may be.
        ('{"a": 1}', "", '{"a": 1}'),
        ("to", "", "to"),
        ("", "", ""),
    ],
)
@given(cuts=CUTS)
def test_what_is_no_call(answer: str, reasoning: str, text: str, cuts: list[int]) -> None:
    result = parsed(answer, cuts, **ANSWERS)
    assert (result.reasoning, result.text, result.tool_calls) == (reasoning, text, [])
    assert parsed(answer, cuts, reasoning=REASONING) == result


def test_without_tools_a_call_is_not_for_the_caller() -> None:
    call = "<|channel|>commentary to=functions.clock json<|message|>{}"
    result = parsed(call, reasoning=REASONING)
    assert (result.reasoning, result.text, result.tool_calls) == ("{}", "", [])


def test_a_call_that_ends_at_its_header_has_no_arguments() -> None:
    result = parsed("<|channel|>commentary to=functions.clock<|message|>", **ANSWERS)
    assert calls_of(result) == [("clock", {})]


@given(
    st.lists(
        st.sampled_from(
            [*FORM.markers, *(REASONING.markers if REASONING else []), "{", " ", "a", '"']
        ),
        max_size=12,
    ),
    CUTS,
)
def test_no_answer_breaks_the_parser(pieces: list[str], cuts: list[int]) -> None:
    parsed("".join(pieces), cuts, **ANSWERS)


# What the answer must be


def constrained(model: Model, grammar: Grammar, text: str, *, is_call: bool = False) -> bool:
    """Whether an answer under a grammar may be ``text``, and end there."""
    _, whole = begin_answer("<|start|>assistant", REASONING, grammar, is_call=is_call)
    assert whole is not None
    return accepts(model, whole, text)


def test_a_forced_call_may_be_thought_about(model: Model) -> None:
    grammar = Grammar(forced_call(FORM, TOOLS))
    header = "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
    for before in (
        "",
        THOUGHT,
        f"{THOUGHT}<|channel|>analysis<|message|>é < <<b<|end|><|start|>assistant",
    ):
        assert constrained(model, grammar, f"{before}{header}{OSLO}", is_call=True)
        assert not constrained(model, grammar, f"{before}{header}{{}}", is_call=True)
        assert not constrained(model, grammar, before, is_call=True)
        assert not constrained(model, grammar, f"{before}<|channel|>final<|message|>", is_call=True)


@pytest.mark.parametrize("gbnf", ['root ::= "yes"', 'root ::= "y" x\nx ::= "es" # a comment'])
def test_any_other_grammar_is_that_of_the_final_message(model: Model, gbnf: str) -> None:
    for before in ("", THOUGHT):
        answer = f"{before}<|channel|>final<|message|>yes"
        assert constrained(model, Grammar(gbnf), answer)
        assert parsed(answer, reasoning=REASONING).text == "yes"
        assert not constrained(model, Grammar(gbnf), f"{before}<|channel|>final<|message|>no")
        assert not constrained(model, Grammar(gbnf), f"{before}yes")
    with pytest.raises(InvalidRequest, match="grammar can't be read"):
        constrained(model, Grammar(gbnf.replace("root", "other")), "")


def test_a_call_as_text_stands_in_the_final_message(model: Model) -> None:
    builder = PromptBuilder(model, n_ctx=4096, chat_template=TEMPLATE.replace("tools", "others"))
    fields = {"messages": [USER], "tools": [CLOCK], "tool_choice": "required"}
    prompt = builder.build(read(fields, ChatRequest))
    text = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    answer = f"{THOUGHT}<|channel|>final<|message|>{text}"
    assert prompt.grammar is not None
    assert accepts(model, prompt.grammar, answer)
    assert not accepts(model, prompt.grammar, text)
    result = parsed(answer, calls=prompt.calls, reasoning=prompt.reasoning)
    assert (result.text, calls_of(result)) == ("", [("clock", {})])


def test_a_prompt_may_have_opened_the_reasoning(model: Model) -> None:
    source = "{{ messages[0].content }}<|start|>assistant<|channel|>analysis<|message|>"
    assert REASONING is not None
    fields = {"messages": [{"role": "user", "content": "Hi"}], "grammar": 'root ::= "yes"'}
    prompt = PromptBuilder(model, n_ctx=1024, chat_template=source).build(read(fields, ChatRequest))
    assert prompt.thinking
    assert prompt.grammar is not None
    assert prompt.grammar.after == REASONING.end
    text = "Hm.<|end|><|start|>assistant<|channel|>final<|message|>yes"
    result = parsed(text, reasoning=REASONING, thinking=True)
    assert (result.reasoning, result.text) == ("Hm.", "yes")


# Rendering, and the tokens of its vocabulary


def rendered(model: Model, messages: list[dict[str, Any]], *tools: Any) -> str:
    builder = PromptBuilder(model, n_ctx=4096, chat_template=TEMPLATE)
    prompt = builder.build(read({"messages": messages, "tools": list(tools)}, ChatRequest))
    return b"".join(model.piece(token, special=True) for token in prompt.tokens.tolist()).decode()


def call(name: str, id: str, arguments: str) -> dict[str, Any]:
    return {"id": id, "function": {"name": name, "arguments": arguments}}


def test_tools_are_declared_as_the_template_does(model: Model) -> None:
    text = rendered(model, [{"role": "system", "content": "Be kind."}, USER], WEATHER, CLOCK)
    assert "Calls: commentary, to functions.<|end|>" in text
    declared = [f"type {tool['function']['name']} = (_: {{" for tool in (WEATHER, CLOCK)]
    developer = text.partition("<|start|>developer<|message|>Be kind.")[2].partition("<|end|>")[0]
    assert all(each in developer for each in declared)
    assert text.endswith("<|end|><|start|>user<|message|>How is it?<|end|><|start|>assistant")


def test_calls_and_results_go_back_one_by_one(model: Model) -> None:
    messages = [
        USER,
        {
            "role": "assistant",
            "reasoning_content": "Hm.",
            "tool_calls": [call("get_weather", "a", OSLO), call("clock", "b", "{}")],
        },
        {"role": "tool", "tool_call_id": "b", "content": "noon"},
        {"role": "tool", "tool_call_id": "a", "content": "It's 3°"},
    ]
    text = rendered(model, messages, WEATHER, CLOCK)
    exchange = (
        f"<|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>{OSLO}"
        "<|call|><|start|>functions.get_weather to=assistant<|channel|>commentary<|message|>"
        '"It\'s 3°"<|end|>'
        "<|start|>assistant to=functions.clock<|channel|>commentary json<|message|>{}"
        "<|call|><|start|>functions.clock to=assistant<|channel|>commentary<|message|>"
        '"noon"<|end|>'
    )
    thought = "<|start|>assistant<|channel|>analysis<|message|>Hm.<|end|>"
    assert text.endswith(f"How is it?<|end|>{thought}{exchange}<|start|>assistant")
    # The template keeps what was thought until there is an answer.
    messages += [{"role": "assistant", "content": "Fine."}, USER]
    text = rendered(model, messages, WEATHER, CLOCK)
    assert f"How is it?<|end|>{exchange}<|start|>assistant<|channel|>final" in text


def test_an_answer_s_message_keeps_what_was_thought_before_its_call(model: Model) -> None:
    header = "<|channel|>commentary to=functions.clock<|message|>"
    answer = parsed(f"{THOUGHT}{header}{{}}", **ANSWERS)
    turn = msgspec.to_builtins(answer.message)
    result = {"role": "tool", "tool_call_id": answer.tool_calls[0].id, "content": "noon"}
    text = rendered(model, [USER, turn, result], CLOCK)
    assert "<|start|>assistant<|channel|>analysis<|message|>Hm.<|end|>" in text
    assert text.count("Hm.") == 1


def test_what_was_said_before_a_call_joins_the_reasoning(model: Model) -> None:
    told = {"role": "assistant", "content": "I look.", "tool_calls": [call("clock", "a", "{}")]}
    result = {"role": "tool", "tool_call_id": "a", "content": "noon"}
    for thought, expected in ((None, "I look."), ("Hm.", "Hm.\n\nI look.")):
        text = rendered(model, [USER, {**told, "reasoning_content": thought}, result], CLOCK)
        assert f"<|channel|>analysis<|message|>{expected}<|end|>" in text
        assert text.count("I look.") == 1


def test_a_call_and_the_final_answer_end_by_tokens_of_their_own(tmp_path: Path) -> None:
    markers = ["<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>"]
    ends = ["<|call|>", "<|return|>"]
    path = write_qwen3(
        tmp_path / "tiny.gguf", "chat", templates={"default": TEMPLATE}, controls=markers + ends
    )
    model = Model(path)
    builder = PromptBuilder(model, n_ctx=8192)
    fields = {"messages": [USER], "tools": [WEATHER], "max_tokens": 500}
    prompt = builder.build(read(fields, ChatRequest))

    def answered(text: str) -> Any:
        answer = Answer(prompt, 0.0)
        tokens = model.tokenize(text, add_special=False, parse_special=True).tolist()
        n_added = next(n for n, token in enumerate(tokens, 1) if not answer.add(token))
        answer.sampler.close()
        assert n_added == len(tokens)
        return collect(answer.untold)

    header = "<|channel|>commentary to=functions.get_weather<|constrain|>json<|message|>"
    result = answered(f"{THOUGHT}{header}{OSLO}<|call|>")
    assert (result.reasoning, result.text, result.finish_reason) == ("Hm.", "", "tool_calls")
    assert calls_of(result) == [("get_weather", json.loads(OSLO))]
    result = answered(f"{THOUGHT}<|channel|>final<|message|>Fine.<|return|>")
    assert (result.reasoning, result.text, result.finish_reason) == ("Hm.", "Fine.", "stop")
    model.close()
