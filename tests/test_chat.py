"""The chat role through real workers: tools, formats, completion, and a corpus of bad requests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, get_type_hints

import numpy as np
import pytest

from inferpool import ChatConfig, ContextLengthExceeded, InvalidRequest, ModelError, Pool
from inferpool.host.roles.chat import (
    ChatOptions,
    CompletionOptions,
    Sampling,
    _chat_request,
    _completion_request,
)
from inferpool.host.roles.vision import PdfOptions, _chat, _pdf_request
from inferpool.messages import ChatRequest

USER = {"role": "user", "content": "Why do bees dance?"}
CALL = {"id": "1", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def chat_pool() -> Iterator[Pool]:
    with Pool(chat=ChatConfig("smollm2", n_ctx=512, n_threads=1)) as pool:
        pool.start()
        yield pool


def schema(**fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"schema": fields}}


BAD: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "no messages": ([], {}, ValueError, "messages must not be empty"),
    "no tokens": ("hi", {"max_tokens": 0}, ValueError, "max_tokens"),
    "messages of a number": (5, {}, TypeError, "messages"),
    "message of a text": (["hi"], {}, TypeError, r"messages\[0\]"),
    "wrong role": ([{"role": "robot", "content": "x"}], {}, ValueError, "role"),
    "no role": ([{"content": "x"}], {}, TypeError, "role"),
    "no content": ([{"role": "user"}], {}, ValueError, "content"),
    "content of a number": ([{"role": "user", "content": 5}], {}, TypeError, "content"),
    "part of an image": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
        {}, ValueError, "type",
    ),
    "unknown key": ([{**USER, "mood": "sad"}], {}, TypeError, "mood"),
    "calls of a user": ([{**USER, "tool_calls": [CALL]}], {}, ValueError, "tool_calls"),
    "lone result": (
        [USER, {"role": "tool", "tool_call_id": "1", "content": "x"}], {}, ValueError, "answers no",
    ),
    "result without id": ([USER, {"role": "tool", "content": "x"}], {}, ValueError, "tool_call_id"),
    "second result": (
        [USER, {"role": "assistant", "tool_calls": [CALL]}]
        + [{"role": "tool", "tool_call_id": "1", "content": "x"}] * 2,
        {}, ValueError, r"messages\[3\]",
    ),
    "NUL": ("a\0b", {}, ValueError, "NUL"),
    "lone surrogate": ("a\ud800b", {}, ValueError, "surrogate"),
    "surrogate in a stop": ("hi", {"stop": ["\udfff"]}, ValueError, "surrogate"),
    "a megabyte of one letter": ("a" * (1 << 20), {}, ContextLengthExceeded, "context holds 512"),
    "a megabyte of spaces": (" " * (1 << 20), {}, ContextLengthExceeded, "context holds 512"),
    "a megabyte of emoji": ("🐝" * (1 << 18), {}, ContextLengthExceeded, "context holds 512"),
    "more than there is": ("hi", {"max_tokens": 512}, ContextLengthExceeded, "512 for the answer"),
    "unknown option": ("hi", {"temprature": 1.0}, TypeError, "temprature"),
    "unknown option of None": ("hi", {"temprature": None}, TypeError, "temprature"),
    "stop of a number": ("hi", {"stop": 5}, TypeError, "stop"),
    "too many stops": ("hi", {"stop": ["x"] * 300}, ValueError, "stop must hold at most 256"),
    "wrong type": ("hi", {"top_k": "many"}, TypeError, "top_k"),
    "out of range": ("hi", {"top_p": 2.0}, ValueError, "top_p"),
    "not a number": ("hi", {"temperature": float("nan")}, ValueError, "temperature"),
    "banned nobody": ("hi", {"logit_bias": {1 << 30: 1.0}}, InvalidRequest, "vocabulary"),
    "banned by an array": ("hi", {"logit_bias": np.zeros(3)}, TypeError, "ChatRequest"),
    "broken grammar": ("hi", {"grammar": "root ::= ("}, InvalidRequest, "grammar"),
    "endless grammar": ("hi", {"grammar": "root ::= root"}, InvalidRequest, "recursion"),
    "deep grammar": ("hi", {"grammar": "root ::= " + "(" * 99_999}, InvalidRequest, "deeper"),
    "NUL in a grammar": ("hi", {"grammar": 'root ::= "a\0"'}, InvalidRequest, "NUL"),
    "unknown format": ("hi", {"response_format": {"type": "xml"}}, ValueError, "type"),
    "format without schema": ("hi", {"response_format": {"type": "json_schema"}}, ValueError, "js"),
    "schema nobody meets": (
        "hi", {"response_format": schema(type="integer", minimum=2, maximum=1)}, InvalidRequest,
        "no number between 2 and 1",
    ),
    "schema of a missing part": (
        "hi", {"response_format": schema(**{"$ref": "#/x"})}, InvalidRequest, "leads nowhere",
    ),
    "schema that loops": (
        "hi", {"response_format": schema(**{"$ref": "#"})}, InvalidRequest, "recursion",
    ),
    "schema with more than a grammar can": (
        "hi", {"response_format": schema(multipleOf=3)}, InvalidRequest, "'multipleOf'",
    ),
    "tool without a name": ("hi", {"tools": [{"type": "function"}]}, TypeError, "function"),
    "tool with a strange name": (
        "hi", {"tools": [{"type": "function", "function": {"name": "a b"}}]}, ValueError, "'a b'",
    ),
    "two tools of a name": ("hi", {"tools": [TOOL, TOOL]}, ValueError, "same name"),
    "required nothing": ("hi", {"tool_choice": "required"}, ValueError, "needs tools"),
    "unknown choice": ("hi", {"tools": [TOOL], "tool_choice": "maybe"}, ValueError, "tool_choice"),
    "chosen nobody": (
        "hi", {"tools": [TOOL], "tool_choice": {"function": {"name": "g"}}}, ValueError, "'g'",
    ),
    "two constraints": (
        "hi", {"tools": [TOOL], "tool_choice": "required", "grammar": "root ::= [a]"}, ValueError,
        "excludes",
    ),
    "tool with an impossible schema": (
        "hi",
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {
            "properties": {"x": {"enum": []}}}}}], "tool_choice": "required"},
        InvalidRequest, "enum",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_a_bad_request_is_a_typed_error_and_the_next_call_works(
    chat_pool: Pool, case: tuple[Any, dict[str, Any], type[Exception], str]
) -> None:
    messages, options, error, text = case
    pid = chat_pool.status()["chat"].pid
    with pytest.raises(error, match=text):
        chat_pool.chat(messages, **options)
    assert chat_pool.chat("Hi!", max_tokens=1, temperature=0).usage.completion_tokens == 1
    assert chat_pool.status()["chat"].pid == pid


def test_what_is_none_is_not_given(chat_pool: Pool) -> None:
    names = set(get_type_hints(ChatOptions)) - {"max_tokens", "temperature"}
    given: dict[str, Any] = {"max_tokens": 4, "temperature": 0}
    plain = chat_pool.chat("Hi!", **given)
    assert chat_pool.chat("Hi!", **given, **dict.fromkeys(names)).text == plain.text
    for request, about, options in (
        (_completion_request, ("Hi!",), CompletionOptions),
        (_chat, ("Hi!",), Sampling),
        (lambda *given: _pdf_request(*given)(), (b"%PDF", "Hi!"), PdfOptions),
    ):
        nothing = dict.fromkeys(set(get_type_hints(options)) - {"model"})
        make: Any = request
        assert make(*about, nothing) == make(*about, {})


def test_an_answer_of_openai_s_client_goes_back_into_the_conversation() -> None:
    # As its ``model_dump()`` gives it.
    answer = {"role": "assistant", "content": "Hello!", "refusal": None, "tool_calls": None}
    asked = [{"role": "user", "content": "Hi!"}, answer, {"role": "user", "content": "Bye!"}]
    request = _chat_request(asked, {})
    assert isinstance(request, ChatRequest)
    assert [turn.text for turn in request.messages] == ["Hi!", "Hello!", "Bye!"]
    with pytest.raises(TypeError, match="refusal"):
        _chat_request([{**answer, "refusal": "No."}], {})


def test_what_a_developer_says_is_the_system_s(chat_pool: Pool) -> None:
    user = {"role": "user", "content": "Hi!"}
    answers = [
        chat_pool.chat(
            [{"role": role, "content": "Speak as a pirate."}, user], max_tokens=8, temperature=0
        )
        for role in ("system", "developer")
    ]
    assert answers[0].text == answers[1].text
    assert answers[0].usage == answers[1].usage


def test_one_text_may_stop_an_answer(chat_pool: Pool) -> None:
    options: dict[str, Any] = {"max_tokens": 24, "temperature": 0}
    whole = chat_pool.chat.complete("One, two, three,", **options).text
    stop = whole.split()[1]
    for form in (stop, [stop], (stop,)):
        stopped = chat_pool.chat.complete("One, two, three,", stop=form, **options)
        assert stopped.text == whole[: whole.index(stop)]
        assert stopped.finish_reason == "stop"


HOSTILE = {
    "loops": "{% for a in range(99999) %}" * 4 + "{% endfor %}" * 4,
    "text": "{{ 'x' * 10 ** 10 }}",
    "power": "{{ 10 ** 10000000000 }}",
}


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_worker_survives_a_hostile_template(template: str) -> None:
    with Pool(chat=ChatConfig("smollm2", n_ctx=256, n_threads=1, chat_template=template)) as pool:
        with pytest.raises(ModelError, match="chat template"):
            pool.chat("hi")
        # Its model is still there for whoever needs no template.
        assert pool.chat.complete("Bees", max_tokens=2).usage.completion_tokens <= 2


def test_formats_tools_and_logprobs_cross_the_boundary(chat_pool: Pool) -> None:
    wanted = schema(type="object", properties={"n": {"enum": [1, 2]}}, required=["n"])
    answer = chat_pool.chat("Pick a number.", response_format=wanted, max_tokens=32)
    assert json.loads(answer.text)["n"] in {1, 2}

    chosen = {"type": "function", "function": {"name": "f"}}
    called = chat_pool.chat("Call it.", tools=[TOOL], tool_choice=chosen, max_tokens=96, seed=1)
    assert [call.function.name for call in called.tool_calls] == ["f"]
    with chat_pool.chat.stream(
        "Call it.", tools=[TOOL], tool_choice="required", max_tokens=96, seed=1
    ) as stream:
        pieces = [piece for delta in stream for piece in delta.tool_calls]
    assert pieces[0].function.name == "f"
    assert "".join(piece.function.arguments for piece in pieces) == (
        called.tool_calls[0].function.arguments
    )

    likely = chat_pool.chat("Hi!", max_tokens=3, temperature=0, logprobs=True, top_logprobs=2)
    assert likely.logprobs is not None
    for entry in likely.logprobs.content:
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs)
        assert len(entry.top_logprobs) == 2
    assert "".join(entry.token for entry in likely.logprobs.content) == likely.text


def test_a_long_conversation_goes_on_without_its_beginning(chat_pool: Pool) -> None:
    messages: list[Any] = [{"role": "system", "content": "Be brief."}]
    for turn in range(7):
        messages.append({"role": "user", "content": f"Turn {turn}. " + "Tell me more. " * 20})
        result = chat_pool.chat(messages, max_tokens=16, temperature=0)
        messages.append(result.message)
    assert result.dropped_messages > 2
    assert result.dropped_messages % 2 == 0
    assert result.usage.total_tokens <= 512
    with pytest.raises(ContextLengthExceeded):
        chat_pool.chat(messages[:-1], max_tokens=16, truncation="disabled")


async def complete_asynchronously(pool: Pool) -> tuple[str, str]:
    both = pool.as_async()
    whole = await both.chat.complete("Bees dance", max_tokens=6, temperature=0)
    stream = both.chat.stream_complete("Bees dance", max_tokens=6, temperature=0)
    return whole.text, "".join([delta.text async for delta in stream])


def test_a_text_is_completed_as_it_is(chat_pool: Pool) -> None:
    import asyncio

    whole = chat_pool.chat.complete("Bees dance", max_tokens=6, temperature=0)
    assert whole.usage.prompt_tokens == 3
    with chat_pool.chat.stream_complete("Bees dance", max_tokens=6, temperature=0) as stream:
        assert "".join(delta.text for delta in stream) == whole.text
    assert asyncio.run(complete_asynchronously(chat_pool)) == (whole.text, whole.text)
    with pytest.raises(ValueError, match="prompt must not be empty"):
        chat_pool.chat.complete("")
    with pytest.raises(ValueError, match="takes neither tools"):
        chat_pool.chat.complete("hi", tools=[TOOL])
