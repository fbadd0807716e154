"""Requests to prompts: what fits into the context, what is dropped, texts without a template."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_fakes import SETTINGS, stream
from hypothesis import given
from hypothesis import strategies as st
from llama_cpp import Llama
from tiny_models import write_qwen3

from inferpool.engine.answer import collect
from inferpool.engine.chat import ChatEngine
from inferpool.engine.model import Model
from inferpool.engine.prompt import Prompt, PromptBuilder
from inferpool.engine.turns import Window
from inferpool.errors import ContextLengthExceeded, InvalidRequest
from inferpool.messages import ChatMessage, ChatRequest, read

SYSTEM = {"role": "system", "content": "Be kind."}
CLOCK = {
    "type": "function",
    "function": {"name": "clock", "description": "The time. " * 8, "parameters": {}},
}


def exchange(n: int) -> list[dict[str, Any]]:
    """A question, a tool call and its result, and an answer; some 90 tokens."""
    call = {"id": str(n), "function": {"name": "clock", "arguments": "{}"}}
    return [
        {"role": "user", "content": f"Question {n}. " + "Why do bees dance? " * 4},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": str(n), "content": "It is noon."},
        {"role": "assistant", "content": f"Answer {n}."},
    ]


CONVERSATION = [SYSTEM, *exchange(0), *exchange(1), *exchange(2), exchange(3)[0]]


def build(model: Model, messages: Any, *, n_ctx: int, **options: Any) -> Prompt:
    request = read({"messages": messages, **options}, ChatRequest)
    return PromptBuilder(model, n_ctx=n_ctx).build(request)


def shown(prompt: Prompt) -> str:
    pieces = [prompt.model.piece(token, special=True) for token in prompt.tokens.tolist()]
    return b"".join(pieces).decode()


def test_a_template_knows_what_it_is_given_besides(model: Model) -> None:
    source = "{{ messages[0].content }}:{{ effort | default('none') }}{{ ' ' ~ style if style }}."
    builder = PromptBuilder(model, n_ctx=1024, chat_template=source)
    for others, expected in (
        ({}, "Hi:none."),
        ({"effort": "low"}, "Hi:low."),
        ({"style": {"x": 1}}, "Hi:none {'x': 1}."),
    ):
        fields = {"messages": [{"role": "user", "content": "Hi"}], "chat_template_kwargs": others}
        assert shown(builder.build(read(fields, ChatRequest))) == expected
        with pytest.raises(ValueError, match="chat_template_kwargs can't replace messages"):
            read({**fields, "chat_template_kwargs": {**others, "messages": []}}, ChatRequest)
    with pytest.raises(ValueError, match="neither tools nor chat_template_kwargs"):
        read({"prompt": "Hi", "chat_template_kwargs": {"effort": "low"}}, ChatRequest)


# Windowing


def test_the_oldest_exchanges_go_first_and_whole(model: Model) -> None:
    whole = build(model, CONVERSATION, n_ctx=8192)
    assert whole.dropped_messages == 0
    length = len(whole.tokens)
    kept = []
    for n_ctx in range(length + 100, 120, -20):
        prompt = build(model, CONVERSATION, n_ctx=n_ctx, max_tokens=16)
        text = shown(prompt)
        assert len(prompt.tokens) + 16 <= n_ctx
        assert "Be kind." in text
        assert "Question 3." in text
        present = [f"Question {n}." in text for n in range(4)]
        # A call goes with its question, result and answer, and the rest is what is newest.
        assert present == [f"Answer {n}." in text for n in range(3)] + [True]
        assert present == sorted(present)
        assert text.count("<tool_call>") == text.count("<tool_response>") == sum(present) - 1
        assert prompt.dropped_messages == 4 * (4 - sum(present))
        kept.append(sum(present))
    assert kept == sorted(kept, reverse=True)
    assert set(kept) == {1, 2, 3, 4}


def test_nothing_more_is_dropped_than_must_be(model: Model) -> None:
    length = len(build(model, CONVERSATION, n_ctx=8192).tokens)
    assert build(model, CONVERSATION, n_ctx=length + 16, max_tokens=16).dropped_messages == 0
    assert build(model, CONVERSATION, n_ctx=length + 15, max_tokens=16).dropped_messages == 4


def test_without_max_tokens_a_quarter_of_the_context_is_kept_free(model: Model) -> None:
    length = len(build(model, CONVERSATION, n_ctx=8192).tokens)
    prompt = build(model, CONVERSATION, n_ctx=length + 8)
    assert prompt.dropped_messages > 0
    assert len(prompt.tokens) <= prompt.budget * 3
    # What can't be dropped may have that quarter too.
    lone = [{"role": "user", "content": "bee " * 60}]
    length = len(build(model, lone, n_ctx=8192).tokens)
    assert build(model, lone, n_ctx=length + 1).budget == 1


@pytest.mark.parametrize("options", [{"truncation": "disabled"}, {"max_tokens": 300}])
def test_what_must_stay_and_does_not_fit_is_an_error_with_the_numbers(
    model: Model, options: dict[str, Any]
) -> None:
    with pytest.raises(ContextLengthExceeded) as caught:
        build(model, CONVERSATION, n_ctx=320, tools=[CLOCK], **options)
    numbers = caught.value.details
    assert set(numbers) == {"asked", "tools", "response_budget", "context", "margin"}
    assert numbers["context"] == 320
    assert numbers["response_budget"] == options.get("max_tokens", 1)
    assert numbers["tools"] > 30
    spent = numbers["asked"] + numbers["tools"] + numbers["response_budget"]
    assert numbers["margin"] == 320 - spent < 0
    # The numbers are those of prompts that can be made.
    kept = [SYSTEM, CONVERSATION[-1]] if "max_tokens" in options else CONVERSATION
    plain = build(model, kept, n_ctx=8192)
    with_tools = build(model, kept, n_ctx=8192, tools=[CLOCK])
    assert len(plain.tokens) == numbers["asked"]
    assert len(with_tools.tokens) == numbers["asked"] + numbers["tools"]


@given(
    st.lists(st.sampled_from(["system", "user", "assistant"]), min_size=1), st.integers(0, 1 << 40)
)
def test_any_conversation_keeps_its_end(roles: list[Any], bits: int) -> None:
    messages = [ChatMessage(role, str(n)) for n, role in enumerate(roles)]
    window = Window(messages)
    n_exchanges = roles.count("user")
    needed = bits % (n_exchanges + 1)
    asked = []

    def fits(dropped: int) -> bool:
        asked.append(dropped)
        return dropped >= needed

    dropped = window.fewest_to_drop(fits)
    if n_exchanges < 2:
        assert dropped == 0
        return
    assert dropped == min(max(needed, 1), n_exchanges - 1)
    assert dropped in asked
    left = window.without(dropped)
    last = max(n for n, role in enumerate(roles) if role == "user")
    assert [m for m in left if m.role == "system"] == [m for m in messages if m.role == "system"]
    assert list(left[-len(messages[last:]) :]) == messages[last:]


# The template for tools


def test_a_template_for_tools_is_used_with_tools(tmp_path: Path) -> None:
    templates = {
        "default": "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}",
        "tool_use": "[AVAILABLE_TOOLS]{{ tools | length }}[TOOL_CALLS]{{ messages[-1].content }}",
    }
    path = write_qwen3(tmp_path / "model.gguf", "chat", templates=templates)
    with closing(Model(path)) as model:
        user = [{"role": "user", "content": "Hi."}]
        prompt = build(model, user, n_ctx=256, tools=[CLOCK])
        assert shown(prompt) == "[AVAILABLE_TOOLS]1[TOOL_CALLS]Hi."
        assert prompt.calls is not None
        assert prompt.calls.begin == "[TOOL_CALLS]"
        for options in ({}, {"tools": [CLOCK], "tool_choice": "none"}):
            prompt = build(model, user, n_ctx=256, **options)
            assert (shown(prompt), prompt.calls) == ("<user>Hi.", None)
        with pytest.raises(ContextLengthExceeded) as caught:
            build(model, user, n_ctx=20, tools=[CLOCK])
        assert caught.value.details["asked"] == len("<user>Hi.")
        own = PromptBuilder(model, n_ctx=256, chat_template="{{ tools }}[TOOL_CALLS]")
        fields = {"messages": user, "tools": [CLOCK]}
        assert "AVAILABLE" not in shown(own.build(read(fields, ChatRequest)))


# Without a template


def test_a_completion_is_the_reference_s(model: Model, reference: Llama) -> None:
    reference.reset()
    reference._ctx.kv_cache_clear()
    expected = reference.create_completion("The capital of Italy is", temperature=0, max_tokens=8)
    engine = ChatEngine(model, **SETTINGS)
    asked = ChatRequest(prompt="The capital of Italy is", temperature=0.0, max_tokens=8)
    result = collect(stream(engine, asked))
    engine.close()
    assert result.text == expected["choices"][0]["text"]
    assert result.usage.prompt_tokens == expected["usage"]["prompt_tokens"]


def test_a_completion_that_is_too_long_is_an_error(model: Model) -> None:
    builder = PromptBuilder(model, n_ctx=16)
    with pytest.raises(ContextLengthExceeded, match="the context holds 16"):
        builder.build(ChatRequest(prompt="bee " * 20))


def test_a_completion_of_nothing_is_refused(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    # What vocabularies that drop white space make of it, if the model wants no BOS.
    monkeypatch.setattr(Model, "tokenize", lambda *_, **__: np.empty(0, np.int32))
    with pytest.raises(InvalidRequest, match="no token"):
        PromptBuilder(model, n_ctx=64).build(ChatRequest(prompt=" "))


def test_a_model_without_a_template_only_completes(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "chat_template", None)
    builder = PromptBuilder(model, n_ctx=64)
    assert builder.build(ChatRequest(prompt="bees")).tokens.size == 1
    with pytest.raises(InvalidRequest, match="has no chat template"):
        builder.build(ChatRequest(messages=[ChatMessage("user", "bees")]))


@pytest.mark.parametrize("asked", [{"prompt": "a" * 40_000}, {"messages": [("a" * 40_000)]}])
def test_a_text_that_is_far_too_long_is_not_even_tokenised(
    model: Model, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    if "messages" in asked:
        asked = {"messages": [{"role": "user", "content": text} for text in asked["messages"]]}
    builder = PromptBuilder(model, n_ctx=64)
    monkeypatch.setattr(Model, "tokenize", None)
    with pytest.raises(ContextLengthExceeded) as caught:
        builder.build(read(asked, ChatRequest))
    longest = max(len(model.piece(token, special=True)) for token in range(model.n_vocab))
    assert caught.value.details["asked"] >= 40_000 // longest > 64
