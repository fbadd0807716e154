"""Continuous batching: many answers from one context, each as if it were alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from engine_fakes import CountdownAbort, FakeCaller
from hypothesis import given, settings
from hypothesis import strategies as st

from inferpool.engine import scheduler
from inferpool.engine.backend import lib
from inferpool.engine.chat import ChatEngine
from inferpool.engine.context import Context
from inferpool.engine.model import Model
from inferpool.engine.scheduler import common_prefix
from inferpool.errors import CallCancelled, InvalidRequest, ModelError, ModelLoadError
from inferpool.messages import ChatMessage, ChatRequest

LONG = "Consider the honey bee, its dance and its hive. " * 12
"""About 120 tokens."""


@pytest.fixture
def engine(model: Model) -> Iterator[ChatEngine]:
    made = ChatEngine(model, n_ctx=512, n_batch=64, n_parallel=3, n_threads=1)
    yield made
    made.close()


def request(text: str, **options: Any) -> ChatRequest:
    settings: dict[str, Any] = {"temperature": 0.0, "max_tokens": 6, **options}
    return ChatRequest(messages=[ChatMessage("user", text)], **settings)


def submit(engine: ChatEngine, text: str, **options: Any) -> FakeCaller:
    caller = FakeCaller()
    engine.submit(request(text, **options), caller)
    return caller


def finish(engine: ChatEngine) -> None:
    while engine.step() is not None:
        pass


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The sequence of each token of each batch that is decoded."""
    batches: list[list[int]] = []
    decode = Context.decode

    def recording(self: Context, batch: Any) -> None:
        batches.append(batch._sequence[: len(batch)].tolist())
        decode(self, batch)

    monkeypatch.setattr(Context, "decode", recording)
    return batches


def test_answers_are_decoded_together_and_each_is_its_own(
    engine: ChatEngine, decoded: list[list[int]]
) -> None:
    questions = ["Name a colour.", "What is two plus two?", "Say hello."]
    alone = []
    for question in questions:
        caller = submit(engine, question, cache_prompt=False)
        finish(engine)
        alone.append(caller.text)
    decoded.clear()
    together = [submit(engine, question, cache_prompt=False) for question in questions]
    finish(engine)
    assert [caller.text for caller in together] == alone
    assert [caller.outcome for caller in together] == ["end"] * 3
    assert [0, 1, 2] in decoded


@pytest.mark.parametrize("lengths", [(20, 4, 20), (4, 12, 20), (20, 12, 4)], ids=str)
def test_answers_stay_neighbours_when_one_between_them_ends(
    engine: ChatEngine, decoded: list[list[int]], lengths: tuple[int, ...]
) -> None:
    questions = [("Tell me a story.", lengths[0]), ("Hi!", lengths[1]), ("Count.", lengths[2])]
    alone = []
    for question, length in questions:
        caller = submit(engine, question, max_tokens=length, cache_prompt=False)
        finish(engine)
        alone.append(caller.text)
    decoded.clear()
    together = [
        submit(engine, question, max_tokens=length, cache_prompt=False)
        for question, length in questions
    ]
    finish(engine)
    assert [caller.text for caller in together] == alone
    in_twos = [batch for batch in decoded if len(batch) == len(set(batch)) == 2]
    assert in_twos
    assert all(abs(one - other) == 1 for one, other in in_twos)


def test_a_memory_that_was_moved_is_found_again(
    engine: ChatEngine, decoded: list[list[int]]
) -> None:
    submit(engine, "Tell me a story.", max_tokens=20, cache_prompt=False)
    submit(engine, "Hi!", max_tokens=2, cache_prompt=False)
    moved = submit(engine, LONG, max_tokens=12)
    finish(engine)
    assert [batch for batch in decoded if len(batch) == 2][-1] == [0, 1]
    decoded.clear()
    again = submit(engine, LONG, max_tokens=12)
    finish(engine)
    assert again.text == moved.text
    assert len(decoded[0]) == 1


@pytest.mark.parametrize(
    ("n_parallel", "lengths"),
    [(4, (40, 2)), (7, (40, 40, 2, 40))],
    ids=["beside one answer", "between answers"],
)
def test_a_memory_is_kept_while_slots_are_empty(
    model: Model, decoded: list[list[int]], n_parallel: int, lengths: tuple[int, ...]
) -> None:
    engine = ChatEngine(model, n_ctx=512, n_batch=64, n_parallel=n_parallel, n_threads=1)
    callers = [
        submit(engine, LONG if length == 2 else "Tell me a story.", max_tokens=length)
        for length in lengths
    ]
    kept = callers[lengths.index(2)]
    while kept.outcome is None:
        engine.step()
    submit(engine, "Count.", max_tokens=4)
    engine.step()
    slots = [answer.slot.id for answer in engine._scheduler._active]
    assert slots == list(range(slots[0], slots[0] + len(lengths)))
    finish(engine)
    decoded.clear()
    again = submit(engine, LONG, max_tokens=2)
    finish(engine)
    engine.close()
    assert len(decoded[0]) == 1
    assert again.text == kept.text


def test_what_finds_no_room_waits_for_its_turn(engine: ChatEngine) -> None:
    callers = [submit(engine, f"Say {number}.", max_tokens=3) for number in range(8)]
    engine.step()
    assert sum(bool(caller.deltas) for caller in callers) <= 3
    finish(engine)
    assert [caller.outcome for caller in callers] == ["end"] * 8
    assert all(caller.deltas[-1].finish_reason for caller in callers)


def test_a_short_prompt_does_not_wait_for_a_long_one(engine: ChatEngine) -> None:
    long = submit(engine, LONG * 3)
    engine.step()
    short = submit(engine, "Hi!")
    for _ in range(2):  # a chunk that both share, and the rest of its own
        engine.step()
    assert short.deltas
    assert not long.deltas
    finish(engine)
    assert long.outcome == short.outcome == "end"


def test_who_is_read_to_the_end_does_not_wait_for_the_chunk_of_another(
    engine: ChatEngine, decoded: list[list[int]]
) -> None:
    reading = submit(engine, LONG * 3)
    engine.step()
    decoded.clear()
    short = FakeCaller()
    until_end: list[int] = []
    short.end = lambda: until_end.append(len(decoded))  # type: ignore[method-assign]
    engine.submit(request("Hi!", max_tokens=1), short)
    while not until_end:
        engine.step()
    assert until_end == [len(decoded) - 1]
    finishing, rest = decoded[-2:]
    assert len(set(finishing)) == len(set(rest)) == 1
    assert set(finishing) != set(rest)
    finish(engine)
    assert reading.outcome == "end"


def test_a_prompt_that_ends_in_a_chunk_after_a_part_of_another_is_read_once(
    model: Model, engine: ChatEngine
) -> None:
    alone = submit(engine, "Hi!", cache_prompt=False)
    finish(engine)
    length = len(engine._prompts.build(request("Hi!")).tokens)
    # One token less than both have, and the first is left without it.
    narrow = ChatEngine(model, n_ctx=512, n_batch=2 * length - 1, n_parallel=2, n_threads=1)
    callers = [submit(narrow, "Hi!", cache_prompt=False) for _ in range(2)]
    finish(narrow)
    narrow.close()
    assert [caller.text for caller in callers] == [alone.text] * 2


def test_long_prompts_are_cut_into_equal_pieces(
    engine: ChatEngine, decoded: list[list[int]]
) -> None:
    for _ in range(3):
        submit(engine, LONG, cache_prompt=False)
    engine.step()
    assert [sorted(batch) for batch in decoded] == [[0] * 21 + [1] * 21 + [2] * 21]
    finish(engine)


def test_all_prompts_go_on_though_they_are_more_than_the_tokens_of_a_chunk(
    engine: ChatEngine, decoded: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "_SHARED_CHUNK", 1)
    submit(engine, "Tell me a story.", max_tokens=20)
    while len(decoded) < 2:
        engine.step()
    for _ in range(2):
        submit(engine, LONG, cache_prompt=False)
    engine.step()
    assert len(set(decoded[-1])) == 2
    finish(engine)


def test_a_long_prompt_is_read_though_short_ones_come_without_end(model: Model) -> None:
    engine = ChatEngine(model, n_ctx=512, n_batch=64, n_parallel=4, n_threads=2)
    long = submit(engine, LONG, max_tokens=1, cache_prompt=False)
    short: list[FakeCaller] = []
    for _ in range(40):
        while sum(caller.outcome is None for caller in short) < 4:
            short.append(submit(engine, "Say hello.", max_tokens=1, cache_prompt=False))
        engine.step()
    assert long.outcome == "end"
    finish(engine)
    engine.close()
    assert all(caller.outcome == "end" for caller in short)


def test_prompts_are_read_together_if_that_changes_nothing(
    model: Model, decoded: list[list[int]]
) -> None:
    questions = ["Name a colour.", "Name a flower.", LONG, "Name a man.", LONG + "Why?"]
    answers = []
    for n_parallel in (1, len(questions)):
        engine = ChatEngine(model, n_ctx=512, n_batch=512, n_parallel=n_parallel, n_threads=1)
        decoded.clear()
        callers = [submit(engine, question, cache_prompt=False) for question in questions]
        finish(engine)
        engine.close()
        # What is cut elsewhere may be rounded otherwise.
        answers.append([callers[index].text for index in (0, 1, 3)])
    assert answers[0] == answers[1]
    prompts = [batch for batch in decoded if len(batch) > len(set(batch))]
    assert max(len(set(batch)) for batch in prompts) >= 2
    for batch in prompts:
        assert len({batch.count(sequence) for sequence in batch}) == 1


def test_answers_go_on_while_a_prompt_is_read(engine: ChatEngine) -> None:
    talking = submit(engine, "Tell me a story.", max_tokens=20)
    while not talking.deltas:
        engine.step()
    reading = submit(engine, LONG * 3)
    said = len(talking.deltas)
    for _ in range(3):
        engine.step()
    assert not reading.deltas
    assert len(talking.deltas) == said + 3
    finish(engine)


def test_bulk_waits_until_nobody_else_does(model: Model) -> None:
    engine = ChatEngine(model, n_ctx=64, n_batch=64, n_parallel=1, n_threads=1)
    order: list[str] = []

    class Noting(FakeCaller):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def tell(self, delta: Any) -> bool:
            if self.name not in order:
                order.append(self.name)
            return True

    for name in ("bulk 1", "first", "bulk 2", "second"):
        priority = "bulk" if "bulk" in name else "interactive"
        engine.submit(request("Say hello.", max_tokens=1, priority=priority), Noting(name))
    finish(engine)
    engine.close()
    assert order == ["first", "second", "bulk 1", "bulk 2"]


# Memory


def test_the_second_turn_computes_only_what_is_new(
    engine: ChatEngine, decoded: list[list[int]]
) -> None:
    turns = [ChatMessage("user", LONG)]
    settings: dict[str, Any] = {"temperature": 0.0, "max_tokens": 6}
    first = FakeCaller()
    engine.submit(ChatRequest(messages=turns, **settings), first)
    finish(engine)
    cold = sum(map(len, decoded))
    decoded.clear()
    turns += [ChatMessage("assistant", first.text), ChatMessage("user", "Go on.")]
    engine.submit(ChatRequest(messages=turns, **settings), FakeCaller())
    finish(engine)
    assert sum(map(len, decoded)) < cold / 2


def test_a_beginning_in_use_elsewhere_is_copied(
    engine: ChatEngine, decoded: list[list[int]]
) -> None:
    expected = submit(engine, LONG + "Summarise that.", cache_prompt=False)
    finish(engine)
    talking = submit(engine, LONG + "Tell me more.", max_tokens=30)
    while not talking.deltas:
        engine.step()
    decoded.clear()
    other = submit(engine, LONG + "Summarise that.")
    finish(engine)
    assert other.outcome == talking.outcome == "end"
    # Nothing but the last words of its prompt, and what is said.
    assert sum(map(len, decoded)) < 100
    assert other.text.split()[:2] == expected.text.split()[:2]


def test_a_seed_computes_everything_anew(engine: ChatEngine, decoded: list[list[int]]) -> None:
    answers = []
    for _ in range(2):
        decoded.clear()
        answers.append(submit(engine, LONG, seed=7, temperature=1.0))
        finish(engine)
    assert answers[0].text == answers[1].text
    assert sum(map(len, decoded)) > 120


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2), min_size=1))
def test_common_prefix_is_the_longest(memory: list[int], prompt: list[int]) -> None:
    n = common_prefix(memory, np.array(prompt, np.int32))
    assert 0 <= n < len(prompt)
    assert memory[:n] == prompt[:n]
    assert n == len(prompt) - 1 or n == len(memory) or memory[n] != prompt[n]


# Those who give up, fall behind, or fail


@pytest.mark.parametrize("polls", [2, 700, 1500])
def test_whoever_is_cancelled_leaves_the_others_alone(engine: ChatEngine, polls: int) -> None:
    """The prompt of one is cancelled in the middle of a batch, again and again."""
    question = "Tell me a story about the sea."
    expected = submit(engine, question, max_tokens=12)
    finish(engine)
    unharmed = submit(engine, question, max_tokens=12)
    while not unharmed.deltas:
        engine.step()
    for _ in range(3):
        doomed = FakeCaller(CountdownAbort(polls))
        engine.submit(request(LONG * 2, cache_prompt=False), doomed)
        for _ in range(3):
            engine.step()
    finish(engine)
    assert unharmed.text == expected.text
    again = submit(engine, LONG, cache_prompt=False)
    finish(engine)
    assert again.outcome == "end"


def test_an_aborted_batch_is_computed_again_for_the_rest(engine: ChatEngine) -> None:
    """Two prompts are read in one batch, which one of them aborts."""
    expected = submit(engine, LONG, cache_prompt=False)
    finish(engine)
    doomed = FakeCaller(CountdownAbort(300))
    engine.submit(request(LONG + "Again.", cache_prompt=False), doomed)
    innocent = submit(engine, LONG, cache_prompt=False)
    finish(engine)
    assert doomed.outcome == "end"
    assert not doomed.deltas
    assert innocent.text.split()[:3] == expected.text.split()[:3]


def test_one_who_waits_may_give_up(engine: ChatEngine) -> None:
    callers = [submit(engine, "Say hello.") for _ in range(4)]
    engine.step()
    callers[3].gone = True
    finish(engine)
    assert [caller.outcome for caller in callers] == ["end"] * 4
    assert not callers[3].deltas


def test_a_caller_that_is_behind_holds_nobody_up(engine: ChatEngine) -> None:
    slow = submit(engine, "Tell me a story.")
    slow.room = 1
    others = [submit(engine, "Tell me a story.") for _ in range(3)]
    while (patience := engine.step()) == 0.0:
        pass
    assert patience is not None
    assert slow.outcome is None
    assert [caller.outcome for caller in others] == ["end"] * 3
    slow.room = None
    assert engine.step() is None
    assert slow.outcome == "end"
    assert slow.text == others[0].text


def test_a_caller_that_is_behind_may_give_up(engine: ChatEngine) -> None:
    slow = submit(engine, "Tell me a story.")
    slow.room = 0
    while engine.step() == 0.0:
        pass
    slow.gone = True
    assert engine.step() is None
    assert slow.outcome == "end"


def test_a_caller_that_takes_no_more_ends_its_own_answer_only(engine: ChatEngine) -> None:
    class Refusing(FakeCaller):
        def tell(self, delta: object) -> bool:
            raise CallCancelled

    refusing = Refusing()
    engine.submit(request("Say hello."), refusing)
    other = submit(engine, "Say hello.")
    finish(engine)
    assert isinstance(refusing.outcome, CallCancelled)
    assert other.outcome == "end"


def fail_where(monkeypatch: pytest.MonkeyPatch, token: int) -> None:
    """Let every batch fail that holds a token."""
    decode = Context.decode

    def failing(self: Context, batch: Any) -> None:
        if token in batch._token[: len(batch)]:
            raise ModelError("llama_decode failed")
        decode(self, batch)

    monkeypatch.setattr(Context, "decode", failing)


def test_a_batch_that_fails_ends_the_answer_to_blame_and_no_others(
    engine: ChatEngine, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = "Tell me a story."
    expected = submit(engine, question, cache_prompt=False)
    finish(engine)
    with monkeypatch.context() as patch:
        zebra = model.tokenize(" zebra", add_special=False, parse_special=False)[0]
        fail_where(patch, int(zebra))
        talking = submit(engine, question, cache_prompt=False)
        while not talking.deltas:
            engine.step()
        doomed = submit(engine, "Say zebra.")
        reading = submit(engine, question, cache_prompt=False)
        finish(engine)
    assert isinstance(doomed.outcome, ModelError)
    assert talking.text == reading.text == expected.text
    again = submit(engine, "Say zebra.")
    finish(engine)
    assert again.outcome == "end"


def test_a_model_that_can_not_go_back_goes_on(
    engine: ChatEngine, decoded: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    truncate = Context.truncate

    def forward_only(self: Context, sequence: int, length: int) -> bool:
        last = lib.llama_memory_seq_pos_max(lib.llama_get_memory(self.handle), sequence)
        return not 0 < length <= last and truncate(self, sequence, length)

    monkeypatch.setattr(Context, "truncate", forward_only)
    turns: list[ChatMessage] = []
    for question in (LONG, "Go on.", "Why?"):
        turns.append(ChatMessage("user", question))
        decoded.clear()
        caller = FakeCaller()
        engine.submit(ChatRequest(messages=turns, temperature=0.0, max_tokens=6), caller)
        finish(engine)
        turns.append(ChatMessage("assistant", caller.text))
    assert sum(map(len, decoded)) < 40


def test_a_model_that_can_not_go_back_reads_everything_anew(
    engine: ChatEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As recurrent models do, which can only be emptied."""
    question = LONG + "Tell me a story."
    expected = submit(engine, question, max_tokens=12, cache_prompt=False)
    finish(engine)
    truncate = Context.truncate

    def all_or_nothing(self: Context, sequence: int, length: int) -> bool:
        return truncate(self, sequence, 0) if length == 0 else False

    monkeypatch.setattr(Context, "truncate", all_or_nothing)
    answer = submit(engine, question, max_tokens=12, cache_prompt=False)
    while len(answer.deltas) < 4:
        engine.step()
    decode = Context.decode
    failed: list[bool] = []

    def failing_once(self: Context, batch: Any) -> None:
        if len(failed) < 2:  # the batch, and its first answer alone
            failed.append(True)
            raise ModelError("llama_decode failed")
        decode(self, batch)

    with monkeypatch.context() as patch:
        doomed = submit(engine, "Say hello.", max_tokens=12)
        engine.step()
        patch.setattr(Context, "decode", failing_once)
        engine.step()
    finish(engine)
    outcomes = [answer.outcome, doomed.outcome]
    assert sum(isinstance(outcome, ModelError) for outcome in outcomes) == 1
    if answer.outcome == "end":
        assert answer.text.split()[:4] == expected.text.split()[:4]


def test_a_step_that_breaks_leaves_nothing_behind(engine: ChatEngine) -> None:
    class Breaking(FakeCaller):
        def tell(self, delta: Any) -> bool:
            raise MemoryError

    others = [submit(engine, "Tell me a story.") for _ in range(2)]
    while not others[0].deltas:
        engine.step()
    engine.submit(request("Say hello."), Breaking())
    with pytest.raises(MemoryError):
        finish(engine)
    assert engine.step() is None
    expected = others[0].text
    again = submit(engine, "Tell me a story.")
    finish(engine)
    assert again.outcome == "end"
    assert again.text.startswith(expected)


def test_an_option_that_does_not_fit_the_model_ends_its_own_call(engine: ChatEngine) -> None:
    refused = submit(engine, "Say hello.", logit_bias={1 << 30: 1.0})
    other = submit(engine, "Say hello.")
    finish(engine)
    assert isinstance(refused.outcome, InvalidRequest)
    assert other.outcome == "end"


@pytest.mark.parametrize(
    ("n_ctx", "n_batch", "n_parallel"), [(256, 2, 4), (3, 512, 4), (16, 512, 32)]
)
def test_small_numbers_do_not_end_the_process(
    model: Model, n_ctx: int, n_batch: int, n_parallel: int
) -> None:
    small = ChatEngine(model, n_ctx=n_ctx, n_batch=n_batch, n_parallel=n_parallel, n_threads=1)
    small.close()


def test_more_conversations_than_llama_cpp_can_count(model: Model) -> None:
    with pytest.raises(ModelLoadError, match="hint: pass n_ctx= or n_parallel="):
        ChatEngine(model, n_ctx=1 << 24, n_parallel=256)


@settings(max_examples=15)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("submit"), st.integers(1, 3)),
            st.tuples(st.just("cancel"), st.integers(0, 9)),
            st.tuples(st.just("step"), st.integers(1, 4)),
        ),
        max_size=25,
    )
)
def test_every_answer_ends_once_whatever_happens(
    model: Model, events: list[tuple[str, int]]
) -> None:
    engine = ChatEngine(model, n_ctx=128, n_batch=32, n_parallel=2, n_threads=1)
    callers: list[FakeCaller] = []
    for event, number in events:
        if event == "submit":
            callers.append(submit(engine, "bee " * (12 * number), max_tokens=number))
        elif event == "cancel" and callers:
            callers[number % len(callers)].gone = True
        else:
            for _ in range(number):
                engine.step()
    finish(engine)
    assert [caller.outcome for caller in callers] == ["end"] * len(callers)
    whole = [caller for caller in callers if not caller.gone]
    assert all(caller.deltas[-1].finish_reason for caller in whole)
    engine.close()
