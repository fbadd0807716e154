"""The chat role: answers against the reference, sampling, stopping, limits, cancelling."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engine_fakes import SETTINGS, CountdownAbort, FakeReply, stream, tokens
from hypothesis import example, given
from hypothesis import strategies as st
from llama_cpp import Llama

from inferpool.engine.chat import ChatEngine
from inferpool.engine.model import Model
from inferpool.engine.text import TextStream
from inferpool.errors import ContextLengthExceeded, ModelLoadError
from inferpool.messages import ChatDelta, ChatMessage, ChatRequest, ChatResult
from inferpool.models import resolve
from inferpool.roles import chat as role

LONG = "Consider the honey bee, its dance and its hive. " * 8
CONVERSATIONS = [
    [("user", "Why do bees dance?")],
    [("user", "Write a Python function that adds two numbers.")],
    [("system", "Answer in French."), ("user", "What is the capital of Italy?")],
    [("user", "Hi!"), ("assistant", "Hello, how are you?"), ("user", "Tell me a joke.")],
    [("user", LONG + "Summarise that.")],
]


@pytest.fixture(scope="session")
def engine(model: Model) -> Iterator[ChatEngine]:
    made = ChatEngine(model, **SETTINGS)
    yield made
    made.close()


def request(
    turns: list[tuple[str, str]] | str, *, temperature: float = 0.0, **options: Any
) -> ChatRequest:
    if isinstance(turns, str):
        turns = [("user", turns)]
    messages = [ChatMessage(speaker, content) for speaker, content in turns]
    return ChatRequest(messages=messages, temperature=temperature, **options)


def text_of(deltas: Iterator[ChatDelta]) -> str:
    return "".join(delta.text for delta in deltas)


# Against the reference


@pytest.mark.parametrize("turns", CONVERSATIONS, ids=["short", "code", "system", "turns", "long"])
def test_greedy_answer_is_the_reference_token_for_token(
    engine: ChatEngine, reference: Llama, turns: list[tuple[str, str]]
) -> None:
    reference.reset()
    reference._ctx.kv_cache_clear()
    messages = [{"role": speaker, "content": content} for speaker, content in turns]
    expected = reference.create_chat_completion(messages, temperature=0, max_tokens=32)
    *_, last = deltas = list(stream(engine, request(turns, max_tokens=32)))
    assert text_of(iter(deltas)) == expected["choices"][0]["message"]["content"]
    assert last.finish_reason == expected["choices"][0]["finish_reason"]
    assert last.usage is not None
    usage = expected["usage"]
    assert last.usage.prompt_tokens == usage["prompt_tokens"]
    assert last.usage.completion_tokens == usage["completion_tokens"]
    assert last.usage.total_tokens == usage["total_tokens"]


def test_greedy_token_ids_are_those_of_the_reference(engine: ChatEngine, reference: Llama) -> None:
    asked = request("Why do bees dance?")
    prompt = engine._prompts.build(asked)
    reference.reset()
    reference._ctx.kv_cache_clear()
    theirs = islice(reference.generate(prompt.tokens.tolist(), temp=0), 32)
    assert tokens(engine, asked, 32) == list(theirs)


# Sampling


def test_a_seed_reproduces_and_another_differs(engine: ChatEngine) -> None:
    def answer(seed: int) -> str:
        return text_of(
            stream(engine, request("Tell me a story.", temperature=1.0, seed=seed, max_tokens=24))
        )

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in range(4)}) > 1


def test_without_a_seed_answers_differ(engine: ChatEngine) -> None:
    asked = request("Tell me a story.", temperature=1.5, max_tokens=24)
    assert len({text_of(stream(engine, asked)) for _ in range(4)}) > 1


def test_the_likeliest_token_alone_is_greedy(engine: ChatEngine) -> None:
    greedy = text_of(stream(engine, request("Why do bees dance?", max_tokens=12)))
    top_one = request("Why do bees dance?", temperature=1.0, top_k=1, max_tokens=12)
    assert text_of(stream(engine, top_one)) == greedy


def test_repeat_penalty_changes_a_repetitive_answer(engine: ChatEngine) -> None:
    asked = "Repeat the word bee forever: bee bee bee bee bee bee"
    plain = text_of(stream(engine, request(asked, max_tokens=24)))
    assert text_of(stream(engine, request(asked, max_tokens=24, repeat_penalty=1.8))) != plain


# The end of an answer


def test_max_tokens_ends_with_length(engine: ChatEngine) -> None:
    *_, last = stream(engine, request("Why do bees dance?", max_tokens=3))
    assert last.finish_reason == "length"
    assert last.usage is not None
    assert last.usage.completion_tokens == 3


def test_end_of_generation_stops_and_is_not_shown(engine: ChatEngine) -> None:
    *_, last = deltas = list(stream(engine, request("Say OK and nothing else.", max_tokens=200)))
    assert last.finish_reason == "stop"
    assert "<|" not in text_of(iter(deltas))
    assert last.timings is not None
    assert last.timings.prompt_seconds > 0
    assert last.timings.completion_seconds > 0


def test_a_stop_string_ends_the_answer_before_it(engine: ChatEngine) -> None:
    whole = text_of(stream(engine, request("Why do bees dance?", max_tokens=24)))
    stop = whole[20:31]  # across several tokens
    *_, last = deltas = list(
        stream(engine, request("Why do bees dance?", max_tokens=24, stop=["never", stop]))
    )
    assert text_of(iter(deltas)) == whole.partition(stop)[0]
    assert last.finish_reason == "stop"


def test_without_max_tokens_the_context_is_the_end(model: Model) -> None:
    small = ChatEngine(model, n_ctx=64, n_batch=32, n_threads=1)
    *_, last = stream(small, request("Tell me a very long story."))
    assert last.usage is not None
    assert last.finish_reason == "length"
    assert last.usage.total_tokens == 64
    small.close()


def test_a_prompt_as_long_as_the_context_is_an_error_with_the_numbers(model: Model) -> None:
    small = ChatEngine(model, n_ctx=64, n_batch=32, n_threads=1)
    with pytest.raises(ContextLengthExceeded, match="the context holds 64") as caught:
        list(stream(small, request("bee " * 100)))
    assert caught.value.details == {
        "asked": 131,
        "tools": 0,
        "response_budget": 1,
        "context": 64,
        "margin": -68,
    }
    small.close()


# Cancelling


@pytest.mark.parametrize("share", [0.0, 0.25, 0.75], ids=["at once", "first chunk", "second"])
def test_abort_ends_the_call_and_the_next_call_works(engine: ChatEngine, share: float) -> None:
    asked = request(LONG, max_tokens=12, cache_prompt=False)
    never = CountdownAbort()
    expected = text_of(stream(engine, asked, never))
    abort = CountdownAbort(polls=3 + int(share * never.native_polls))
    assert text_of(stream(engine, asked, abort)) == ""
    assert 0 < abort.native_polls < never.native_polls
    assert text_of(stream(engine, asked)) == expected


def test_a_stream_that_is_dropped_leaves_the_engine_usable(engine: ChatEngine) -> None:
    expected = text_of(stream(engine, request("Why do bees dance?", max_tokens=8)))
    dropped = stream(engine, request("Tell me a story.", max_tokens=48), abort=CountdownAbort())
    next(dropped)
    del dropped
    assert text_of(stream(engine, request("Why do bees dance?", max_tokens=8))) == expected


# Text


@given(st.text(), st.text(min_size=1, max_size=4), st.lists(st.integers(0, 40)))
def test_stream_is_the_text_up_to_the_stop_string(text: str, stop: str, cuts: list[int]) -> None:
    stream = TextStream([stop])
    assert fed(stream, text, cuts) == text.partition(stop)[0]
    assert stream.stopped == (stop in text)


@example("abc", ["abc", "b"], [])
@given(
    st.text("abc"),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 40)),
)
def test_no_stop_string_is_ever_shown(text: str, stops: list[str], cuts: list[int]) -> None:
    stream = TextStream(stops)
    shown = fed(stream, text, cuts)
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)
    assert stream.stopped or shown == text
    # A character at a time, the stop string that is complete first ends it.
    assert shown == fed(TextStream(stops), text, [*range(len(text))])


def fed(stream: TextStream, text: str, cuts: list[int]) -> str:
    data = text.encode()
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [stream.push(data[a:b]) for a, b in pairwise(edges)]
    return "".join([*pieces, stream.finish()])


def test_a_character_is_never_split() -> None:
    stream = TextStream()
    assert [stream.push(bytes([byte])) for byte in "é漢🐝".encode()] == [
        "", "é", "", "", "漢", "", "", "", "🐝",
    ]  # fmt: skip


def test_bytes_that_are_no_text_are_replaced() -> None:
    stream = TextStream()
    assert stream.push(b"a\xff") + stream.push(b"\xe6\xbc") + stream.finish() == "a\ufffd\ufffd"


def test_a_template_can_be_given(model: Model) -> None:
    made = ChatEngine(model, **SETTINGS, chat_template="{{ messages[0].content }}")
    prompt = made._prompts.build(request("bees dance"))
    assert b"".join(model.piece(token) for token in prompt.tokens) == b"bees dance"
    with pytest.raises(ValueError, match="empty prompt"):
        made._prompts.build(request(""))
    made.close()


# Loading


@pytest.mark.parametrize("n_ctx_train", [0, 2**31 - 1])
def test_absurd_context_length_is_a_load_error(tmp_path: Path, n_ctx_train: int) -> None:
    path = tmp_path / "absurd.gguf"
    shutil.copyfile(resolve("smollm2"), path)
    key = b"llama.context_length"
    with path.open("r+b") as file:
        head = file.read(1 << 16)
        file.seek(head.index(key) + len(key) + 4)  # the value follows its 4-byte type
        file.write(n_ctx_train.to_bytes(4, "little"))
    with pytest.raises(ModelLoadError, match="context length"):
        Model(path)


def test_a_model_that_only_encodes_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("INFERPOOL_CACHE_DIR", str(tmp_path))
    encoder = Model(resolve("minilm"))
    with pytest.raises(ModelLoadError, match="not a chat model"):
        ChatEngine(encoder)
    with pytest.raises(ModelLoadError, match="not a chat model"):
        ChatEngine(encoder, chat_template="{{ messages[0].content }}")
    encoder.close()


def test_a_context_that_memory_does_not_hold_is_a_load_error() -> None:
    # In a process of its own, because the limit would stay.
    code = """
import resource
from inferpool.engine.chat import ChatEngine
from inferpool.engine.model import Model
from inferpool.models import resolve

model = Model(resolve("smollm2"))
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
try:
    ChatEngine(model, n_ctx=1 << 19, n_threads=1)
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout.startswith("ModelLoadError can't make a context for SmolLM2")
    assert "n_ctx=524288, n_batch=512" in done.stdout


# The role


@pytest.fixture(scope="session")
def session() -> Iterator[role.ChatSession]:
    options = {"model": "smollm2", **SETTINGS}
    made = role.make_session(SimpleNamespace(options=options), CountdownAbort())
    yield made
    made.close()
    made.close()


def handle(kind: str, session: role.ChatSession, **payload: Any) -> list[tuple[str, Any]]:
    reply = FakeReply()
    role.HANDLERS[kind](reply, payload, SimpleNamespace(session=session))
    while reply.outcome == "deferred":
        session.step()
    return reply.sent


def test_stream_and_whole_answer_agree(session: role.ChatSession) -> None:
    asked: dict[str, Any] = {
        "messages": [{"role": "user", "content": "Why do bees dance?"}],
        "temperature": 0.0,
        "max_tokens": 8,
    }
    pieces = handle("chat.stream", session, **asked)
    [(kind, result)] = handle("chat", session, **asked)
    assert kind == "chat"
    assert isinstance(result, ChatResult)
    assert {kind for kind, _ in pieces} == {"chat.stream"}
    assert len(pieces) > 4
    assert "".join(delta.text for _, delta in pieces) == result.text
    assert [delta.finish_reason for _, delta in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1][1].usage == result.usage


@pytest.mark.parametrize("name", ["n_ctx", "n_parallel", "n_batch", "n_threads", "n_gpu_layers"])
@pytest.mark.parametrize("value", [-2, 1 << 32])
def test_session_options_out_of_range_are_named(name: str, value: int) -> None:
    config = SimpleNamespace(options={"model": "smollm2", name: value})
    with pytest.raises(ValueError, match=f"{name} must be between"):
        role.make_session(config, None)


USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("payload", "error", "message"),
    [
        ({"messages": []}, ValueError, "messages"),
        ({"messages": [USER], "temprature": 0.1}, TypeError, "temprature"),
        ({"messages": [USER], "max_tokens": "many"}, TypeError, "max_tokens"),
        ({"messages": [USER], "max_tokens": 0}, ValueError, "max_tokens"),
        ({"messages": [USER], "temperature": -1.0}, ValueError, "temperature"),
        ({"messages": [USER], "temperature": float("nan")}, ValueError, "temperature"),
        ({"messages": [USER], "top_k": -1}, ValueError, "top_k"),
        ({"messages": [USER], "top_p": 1.5}, ValueError, "top_p"),
        ({"messages": [USER], "min_p": -0.5}, ValueError, "min_p"),
        ({"messages": [USER], "repeat_penalty": 0.0}, ValueError, "repeat_penalty"),
        ({"messages": [USER], "seed": 2**32 - 1}, ValueError, "seed"),
        ({"messages": [USER], "stop": [""]}, ValueError, "stop"),
        ({"messages": [{"role": "tool", "content": "x"}]}, ValueError, "role"),
        ({"messages": [{"role": "user", "text": "x"}]}, TypeError, "text"),
    ],
)
def test_handler_names_what_is_wrong(
    session: role.ChatSession, payload: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        handle("chat", session, **payload)
