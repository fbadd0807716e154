"""The embed role: vectors against the reference, batching, limits, cancelling, loading."""

from __future__ import annotations

import json
import logging
import platform
import re
import shutil
import subprocess
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from engine_fakes import CountdownAbort, FakeReply
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import write_qwen3

from inferpool.engine import backend, packing
from inferpool.engine.context import Batch
from inferpool.engine.model import Model
from inferpool.engine.packing import Job, Packer
from inferpool.engine.prefixes import prefixes_of
from inferpool.errors import (
    CallCancelled,
    ContextLengthExceeded,
    ModelError,
    ModelLoadError,
    ModelNotFound,
)
from inferpool.models import resolve
from inferpool.roles import embed as role
from inferpool.roles.packed import PackedSession

GOLDEN = json.loads((Path(__file__).parent / "data" / "minilm.json").read_text())["items"]
TEXTS = [item["text"] for item in GOLDEN]
ROUNDING = 5e-4  # flash attention computes in float16, in an order that depends on the batch


@pytest.fixture(scope="session")
def minilm_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INFERPOOL_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield resolve("minilm")


@pytest.fixture(scope="session")
def session(minilm_path: Path) -> Iterator[PackedSession]:
    options = {"model": str(minilm_path), "n_threads": 1}
    made = role.make_session(SimpleNamespace(options=options), CountdownAbort())
    yield made
    made.close()


def embed(session: PackedSession, texts: list[str], **options: Any) -> Any:
    """The vectors of a call that has the session to itself."""
    reply = call(session, texts, **options)
    serve(session)
    if isinstance(reply.outcome, Exception):
        raise reply.outcome
    [(_, vectors)] = reply.sent
    return vectors


# Vectors


def test_vectors_agree_with_the_reference(session: PackedSession) -> None:
    vectors = embed(session, TEXTS)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(TEXTS), 384)
    for item, vector in zip(GOLDEN, vectors, strict=True):
        assert float(np.dot(vector, item["vector"])) >= 0.9999, item["text"]


def test_vectors_do_not_depend_on_the_batch(session: PackedSession) -> None:
    together = embed(session, TEXTS)
    alone = np.concatenate([embed(session, [text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=ROUNDING)


def test_no_texts_give_an_array_without_rows(session: PackedSession) -> None:
    vectors = embed(session, [])
    assert vectors.shape == (0, 384)
    assert vectors.dtype == np.float32


def test_normalize_scales_to_length_one(session: PackedSession) -> None:
    raw = embed(session, TEXTS[:3], normalize=False)
    unit = embed(session, TEXTS[:3])
    norms = np.linalg.norm(raw, axis=1, keepdims=True)
    assert not np.allclose(norms, 1)
    np.testing.assert_allclose(unit, raw / norms, rtol=1e-5)


def test_more_texts_than_sequences_keep_their_order(
    minilm_path: Path, session: PackedSession
) -> None:
    small = make_session(str(minilm_path), n_batch=512, n_seq_max=3, n_threads=1)
    np.testing.assert_allclose(embed(small, TEXTS), embed(session, TEXTS), atol=ROUNDING)
    small.close()


# Over-long texts


def test_over_long_text_is_an_error_with_the_numbers(session: PackedSession) -> None:
    with pytest.raises(ContextLengthExceeded, match=r"602 tokens; the model takes 512") as caught:
        embed(session, ["short", "bee " * 600])
    assert caught.value.details == {"index": 1, "asked": 602, "context": 512}


def test_a_limit_that_is_not_the_model_s_is_named(minilm_path: Path) -> None:
    with closing(make_session(str(minilm_path), n_batch=128)) as session:
        with pytest.raises(ContextLengthExceeded, match="n_batch allows 128 of the model's 512"):
            embed(session, ["bee " * 130])


def test_truncate_keeps_the_closing_token(session: PackedSession) -> None:
    # [CLS] + 510 words + [SEP] is exactly the context.
    cut, whole = embed(session, ["bee " * 600, "bee " * 510], truncate=True)
    np.testing.assert_allclose(cut, whole, atol=1e-6)


def test_truncate_keeps_a_closing_token_that_the_metadata_deny(
    minilm_path: Path, tmp_path: Path
) -> None:
    path = tmp_path / "no-separator.gguf"
    shutil.copyfile(minilm_path, path)
    patch_metadata(path, "tokenizer.ggml.add_sep_token", bytes(1))
    with closing(make_session(str(path))) as made:
        cut, whole = embed(made, ["bee " * 600, "bee " * 510], truncate=True)
    np.testing.assert_allclose(cut, whole, atol=1e-6)


# What the tokenizer of the original model makes of them.
WORDS = {
    "Crème brûlée": [13675, 21382, 7987, 9307, 2063],
    "서울과": [1461, 30008, 29999, 30014, 30022, 29991, 30012],
    "हिन्दी में": [1339, 29877, 29863, 29861, 29878, 1331],
}


@pytest.mark.parametrize("text", WORDS)
def test_accents_and_nothing_else_are_left_out_of_words(minilm_path: Path, text: str) -> None:
    with closing(Model(minilm_path)) as model:
        tokens = model.tokenize(text, add_special=False, parse_special=False)
    assert tokens.tolist() == WORDS[text]


@pytest.mark.parametrize(
    ("says", "left_out"),
    [
        ({"lowercase": "true"}, True),
        ({"lowercase": "false"}, False),
        ({"lowercase": "false", "strip_accents": "true"}, True),
        ({"lowercase": "true", "strip_accents": "false"}, False),
    ],
)
def test_a_file_says_whether_accents_are_left_out(
    minilm_path: Path, monkeypatch: pytest.MonkeyPatch, says: dict[str, str], left_out: bool
) -> None:
    values = {f"tokenizer.ggml.normalizer.{name}": value for name, value in says.items()}
    monkeypatch.setattr(Model, "metadata", lambda _, key: values.get(key))
    with closing(Model(minilm_path)) as model:
        plain, accented = (
            model.tokenize(text, add_special=False, parse_special=False).tolist()
            for text in ("e", "é")
        )
    assert (plain == accented) is left_out


def test_control_tokens_in_a_text_are_text(session: PackedSession) -> None:
    plain, with_marker = embed(session, ["bees", "bees [SEP]"])
    assert float(np.dot(plain, with_marker)) < 0.99


# Batch planning


def job(lengths: list[int], *, bulk: bool = False) -> Job:
    """A job whose texts have these lengths in tokens, all of them read."""
    made = Job(
        ["x" * n for n in lengths], lambda _, text: np.zeros(len(text), np.int32), 1, bulk=bulk
    )
    while made.unread:
        made.read()
    return made


@given(
    st.lists(st.lists(st.integers(1, 40), max_size=12), max_size=5),
    st.integers(1, 40),
    st.integers(1, 8),
)
def test_plans_cover_every_text_once_within_the_limits(
    calls: list[list[int]], n_tokens: int, n_seq_max: int
) -> None:
    packer = Packer.__new__(Packer)
    packer._n_packed, packer._n_seq_max = n_tokens, n_seq_max
    jobs = [job(lengths) for lengths in calls]
    packer._jobs = deque(jobs)
    planned = []
    while plan := packer._plan():
        assert len(plan) <= n_seq_max
        assert len(plan) == 1 or sum(len(each.tokens(row)) for each, row in plan) <= n_tokens
        planned += [(jobs.index(each), row) for each, row in plan]
    assert sorted(planned) == [(i, row) for i, call in enumerate(calls) for row in range(len(call))]


def test_bulk_gets_the_room_that_others_leave() -> None:
    packer = Packer.__new__(Packer)
    packer._n_packed, packer._n_seq_max = 4, 8
    bulk = job([1] * 4, bulk=True)
    others = [job([1] * 3) for _ in range(2)]
    packer._jobs = deque([bulk, *others])
    plans = [[each.bulk for each, _ in packer._plan()] for _ in range(4)]
    assert plans == [[False] * 4, [False, False, True, True], [True, True], []]


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([100, 92, 28, 20, 60, 36], [[100, 92, 60], [36, 28, 20]]),
        ([9] * 10, [[9] * 10]),
        ([300, 200, 56], [[300], [200, 56]]),
    ],
)
def test_texts_end_where_tiles_of_attention_do(
    lengths: list[int], expected: list[list[int]]
) -> None:
    packer = Packer.__new__(Packer)
    packer._n_packed, packer._n_seq_max = 256, 64
    packer._jobs = deque([job(lengths)])
    plans = iter(packer._plan, [])
    assert [[len(each.tokens(row)) for each, row in plan] for plan in plans] == expected


# Cancelling


def test_abort_ends_a_batch_natively_and_the_next_call_works(session: PackedSession) -> None:
    expected = embed(session, TEXTS)
    abort = CountdownAbort(polls=20)
    with pytest.raises(CallCancelled):
        embed(session, TEXTS, abort=abort)
    assert abort.native_polls > 0
    np.testing.assert_array_equal(embed(session, TEXTS), expected)


def test_abort_that_is_already_set_computes_nothing(session: PackedSession) -> None:
    abort = CountdownAbort(polls=0)
    with pytest.raises(CallCancelled):
        embed(session, TEXTS, abort=abort)
    assert abort.native_polls == 0


def test_loading_can_be_cancelled(minilm_path: Path) -> None:
    with pytest.raises(CallCancelled):
        Model(minilm_path, abort=CountdownAbort(polls=5))


# Loading


def test_a_file_that_is_no_gguf_is_a_load_error(tmp_path: Path) -> None:
    path = tmp_path / "not-a-model.gguf"
    path.write_bytes(b"nothing of the kind" * 100)
    with pytest.raises(ModelLoadError, match=r"not-a-model\.gguf: .*magic"):
        Model(path)


def test_a_truncated_file_is_a_load_error(minilm_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "truncated.gguf"
    path.write_bytes(minilm_path.read_bytes()[:2_000_000])
    with pytest.raises(ModelLoadError, match="truncated"):
        Model(path)


def test_a_model_without_pooling_is_refused(minilm_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "no-pooling.gguf"
    shutil.copyfile(minilm_path, path)
    patch_metadata(path, "bert.pooling_type", bytes(4))
    with pytest.raises(ModelLoadError, match="not an embedding model"):
        make_session(str(path))


def patch_metadata(path: Path, key: str, value: bytes) -> None:
    """Overwrite a value: it follows its key and a 4-byte type."""
    with path.open("r+b") as file:
        head = file.read(1 << 20)
        file.seek(head.index(key.encode()) + len(key) + 4)
        file.write(value)


# The role


def make_session(model: str, **options: Any) -> PackedSession:
    return role.make_session(SimpleNamespace(options={"model": model, **options}), None)


def call(session: PackedSession, texts: list[str], **options: Any) -> FakeReply:
    reply = FakeReply(options.pop("abort", None))
    payload = {"texts": texts, **options}
    role.HANDLERS["embed"](reply, payload, SimpleNamespace(session=session))
    return reply


def serve(session: PackedSession) -> int:
    """Step until nothing is left, and say how many steps that took."""
    steps = 1
    while session.step() is not None:
        steps += 1
    return steps


def test_handler_replies_with_one_array(session: PackedSession) -> None:
    reply = call(session, ["bees dance", "markets fall"])
    assert reply.outcome == "deferred"
    serve(session)
    [(kind, vectors)] = reply.sent
    assert (kind, reply.outcome) == ("embed", "ended")
    assert vectors.shape == (2, 384)
    assert session.step() is None


def test_calls_share_a_batch_and_keep_their_own(session: PackedSession) -> None:
    alone = [embed(session, [text])[0] for text in TEXTS[:6]]
    calls = [call(session, texts) for texts in (TEXTS[:1], TEXTS[1:3], [], TEXTS[3:6])]
    assert serve(session) == 1
    answers = [reply.sent[0][1] for reply in calls]
    assert [len(answer) for answer in answers] == [1, 2, 0, 3]
    np.testing.assert_allclose(np.concatenate(answers), alone, atol=ROUNDING)
    cosines = (np.concatenate(answers) * [item["vector"] for item in GOLDEN[:6]]).sum(1)
    assert cosines.min() >= 0.9999


def test_a_short_call_does_not_wait_for_a_long_one(session: PackedSession) -> None:
    bulk = call(session, ["bee " * 100] * 40)
    assert session.step() == 0.0
    short = call(session, ["bees"])
    session.step()
    assert (bulk.outcome, short.outcome) == ("deferred", "ended")
    serve(session)
    assert bulk.outcome == "ended"


def test_a_bad_text_fails_its_own_call(session: PackedSession) -> None:
    good = call(session, ["bees"])
    bad = call(session, ["bees", "bee " * 600])
    also_good = call(session, ["markets"])
    serve(session)
    assert isinstance(bad.outcome, ContextLengthExceeded)
    assert good.outcome == also_good.outcome == "ended"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that are tokenised, in their order."""
    texts: list[str] = []
    tokenize = Model.tokenize

    def noting(self: Model, text: str, **options: Any) -> Any:
        texts.append(text)
        if text == "unspeakable":
            raise MemoryError
        return tokenize(self, text, **options)

    monkeypatch.setattr(Model, "tokenize", noting)
    return texts


@pytest.mark.parametrize("priority", ["interactive", "bulk"])
def test_a_long_call_is_tokenised_between_the_batches_of_others(
    session: PackedSession, read: list[str], priority: str
) -> None:
    long = call(session, ["bee " * 100] * 500, priority=priority)
    assert not read
    session.step()
    so_far = len(read)
    assert 1 < so_far < 100
    short = call(session, ["bees"])
    session.step()
    assert short.outcome == "ended"
    assert read[so_far] == "bees"
    long.abort._left = 0
    read.clear()
    session.step()
    assert isinstance(long.outcome, CallCancelled)
    assert not read


def test_a_call_that_is_tokenised_bit_by_bit_keeps_its_order(
    session: PackedSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = embed(session, TEXTS)
    monkeypatch.setattr(packing, "_READ_CHARACTERS", 1)
    np.testing.assert_allclose(embed(session, TEXTS), expected, atol=ROUNDING)


@pytest.mark.usefixtures("read")
def test_what_breaks_over_a_text_fails_its_own_call(session: PackedSession) -> None:
    bad, good = call(session, ["bees", "unspeakable"]), call(session, ["markets"])
    serve(session)
    assert isinstance(bad.outcome, MemoryError)
    assert good.outcome == "ended"


def test_cancelling_one_call_leaves_the_others_as_they_are(session: PackedSession) -> None:
    expected = embed(session, TEXTS)
    abort = CountdownAbort(polls=30)
    cancelled = call(session, ["bee " * 200], abort=abort)
    calls = [call(session, [text]) for text in TEXTS]
    serve(session)
    assert isinstance(cancelled.outcome, CallCancelled)
    answers = np.concatenate([reply.sent[0][1] for reply in calls])
    np.testing.assert_allclose(answers, expected, atol=ROUNDING)


def test_what_llama_cpp_refuses_fails_its_own_call(
    session: PackedSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = session.packer._context
    decode = context.decode

    def refuse_long_ones(batch: Batch) -> None:
        if len(batch) > 100:
            raise ModelError("not this one")
        decode(batch)

    monkeypatch.setattr(context, "decode", refuse_long_ones)
    good, bad, also_good = (call(session, [text]) for text in ("bees", "bee " * 200, "markets"))
    serve(session)
    assert isinstance(bad.outcome, ModelError)
    assert good.outcome == also_good.outcome == "ended"


def test_a_full_ring_is_asked_again(session: PackedSession) -> None:
    slow, other = call(session, ["bees"]), call(session, ["markets"])
    slow.full = 2
    assert session.step() == pytest.approx(0.001)
    assert (slow.outcome, other.outcome) == ("deferred", "ended")
    serve(session)
    assert slow.outcome == "ended"
    assert len(slow.sent) == 1


def test_an_answer_that_nobody_takes_fails_its_own_call(
    session: PackedSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, other = call(session, ["bees"]), call(session, ["markets"])
    monkeypatch.setattr(gone, "try_send", lambda *_: (_ for _ in ()).throw(CallCancelled("gone")))
    serve(session)
    assert isinstance(gone.outcome, CallCancelled)
    assert other.outcome == "ended"


def test_after_a_step_that_failed_nothing_is_left(
    session: PackedSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(session.engine, "finish", lambda *_, **__: 1 / 0)
        lost = [call(session, ["bees"]), call(session, ["bee " * 300] * 3)]
        with pytest.raises(ZeroDivisionError):
            serve(session)
    assert all(reply.outcome == "deferred" for reply in lost)  # the loop fails them
    after = call(session, ["bees"])
    serve(session)
    assert after.outcome == "ended"


# Options


def test_dimensions_cut_and_normalise_again(session: PackedSession) -> None:
    whole = embed(session, TEXTS[:3])
    cut = embed(session, TEXTS[:3], dimensions=64)
    assert cut.shape == (3, 64)
    expected = whole[:, :64] / np.linalg.norm(whole[:, :64], axis=1, keepdims=True)
    np.testing.assert_allclose(cut, expected, atol=1e-6)
    raw = embed(session, TEXTS[:3], dimensions=64, normalize=False)
    np.testing.assert_array_equal(raw, embed(session, TEXTS[:3], normalize=False)[:, :64])
    assert embed(session, [], dimensions=64).shape == (0, 64)
    with pytest.raises(ValueError, match=r"dimensions must be at most 384.*not 385"):
        embed(session, TEXTS[:1], dimensions=385)


def test_prompt_names(session: PackedSession) -> None:
    # MiniLM was trained without prefixes.
    plain = embed(session, ["bees"])
    np.testing.assert_array_equal(embed(session, ["bees"], prompt_name="query"), plain)
    with pytest.raises(ValueError, match=r"no prompt named 'title'; it has document, query"):
        embed(session, ["bees"], prompt_name="title")


def test_prompts_of_the_config_come_before_the_text(minilm_path: Path) -> None:
    made = make_session(str(minilm_path), prompts={"query": "search for: "}, n_threads=1)
    asked = embed(made, ["bees"], prompt_name="query")
    np.testing.assert_array_equal(asked, embed(made, ["search for: bees"]))
    np.testing.assert_array_equal(
        embed(made, ["bees"], prompt_name="document"), embed(made, ["bees"])
    )
    made.close()


@pytest.mark.parametrize(
    ("name", "query", "document"),
    [
        ("intfloat/e5-base-v2", "query: ", "passage: "),
        ("Multilingual E5 Large", "query: ", "passage: "),
        ("multilingual-e5-large-instruct", "Instruct: Given a web search query", ""),
        ("bge-small-en-v1.5", "Represent this sentence for", ""),
        ("Bge M3", "", ""),
        ("nomic-embed-text-v1.5.Q8_0", "search_query: ", "search_document: "),
        ("Qwen3 Embedding 0.6B", "Instruct: Given a web search query", ""),
        ("mxbai-embed-large-v1-f16", "Represent this sentence for", ""),
        ("snowflake-arctic-embed-m-v2.0", "query: ", ""),
        ("snowflake-arctic-embed-m-v1.5", "Represent this sentence for", ""),
        ("embeddinggemma-300M", "task: search result | query: ", "title: none | text: "),
        ("all-MiniLM-L6-v2", "", ""),
    ],
)
def test_known_prefixes(name: str, query: str, document: str) -> None:
    model = SimpleNamespace(metadata=lambda _key: name, path=Path("model.gguf"))
    found = prefixes_of(model)  # type: ignore[arg-type]
    assert found["query"].startswith(query)
    assert bool(found["query"]) == bool(query)
    assert found["document"] == document


# Decoders


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PackedSession]:
    path = write_qwen3(tmp_path_factory.mktemp("models") / "embed.gguf", "embed")
    made = make_session(str(path), n_threads=1)
    yield made
    made.close()


def test_a_decoder_pools_its_last_token(decoder: PackedSession) -> None:
    from llama_cpp import Llama

    peer = Llama(
        str(decoder.engine._model.path), embedding=True, n_ctx=256, n_threads=1, verbose=False
    )
    texts = ["bees dance", "markets fall", "a", "flowers " * 20]
    vectors = embed(decoder, texts, normalize=False)
    assert vectors.shape == (4, 32)
    for text, vector in zip(texts, vectors, strict=True):
        np.testing.assert_allclose(vector, peer.embed(text), atol=2e-3)
    together = embed(decoder, texts * 30, normalize=False)
    np.testing.assert_allclose(together, np.tile(vectors, (30, 1)), atol=2e-3)
    peer.close()


def test_a_truncated_text_keeps_the_token_that_a_decoder_pools(
    decoder: PackedSession,
) -> None:
    [cut] = embed(decoder, ["b" * 400], truncate=True)
    [whole] = embed(decoder, ["b" * 255])
    np.testing.assert_allclose(cut, whole, atol=1e-6)


@pytest.mark.parametrize(
    ("payload", "error", "message"),
    [
        ({"texts": ["a"], "normalise": True}, TypeError, "normalise"),
        ({"texts": "not a list"}, TypeError, "texts"),
        ({"texts": ["a", 3]}, TypeError, r"texts\[1\]"),
        ({}, TypeError, "texts"),
        ({"texts": ["a"], "dimensions": 0}, ValueError, "dimensions"),
        (["a"], TypeError, "EmbedRequest"),
    ],
)
def test_handler_names_what_is_wrong(
    session: PackedSession, payload: Any, error: type[Exception], message: str
) -> None:
    reply = FakeReply()
    with pytest.raises(error, match=message):
        role.HANDLERS["embed"](reply, payload, SimpleNamespace(session=session))
    assert not reply.sent


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_btach": 3}, TypeError, "n_btach"),
        ({"n_batch": "many"}, TypeError, "n_batch"),
        ({"n_batch": 0}, ValueError, "n_batch"),
    ],
)
def test_session_options_are_checked_by_name(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_session("minilm", **options)


def test_session_of_a_missing_model() -> None:
    with pytest.raises(ModelNotFound):
        make_session("no-such-model")


def test_close_is_idempotent_and_final(minilm_path: Path) -> None:
    made = make_session(str(minilm_path))
    made.close()
    made.close()
    with pytest.raises(RuntimeError, match="closed"):
        embed(made, ["late"])


# The native library


def test_required_symbols_are_those_that_the_engine_uses() -> None:
    folder = Path(backend.__file__).parent
    used = {
        name
        for source in folder.glob("*.py")
        for name in re.findall(r"\blib\.(llama_\w+)\(", source.read_text())
    }
    structures = {
        *("llama_batch", "llama_log_callback", "llama_progress_callback"),
        *("llama_model_kv_override", "llama_model_kv_override_value", "llama_token_data_array"),
    }
    assert set(backend._REQUIRED) == used - structures


def test_missing_and_changed_symbols_are_named() -> None:
    bindings = SimpleNamespace(llama_free=SimpleNamespace(argtypes=[1, 2]))
    problems = backend.missing_symbols(bindings, backend._REQUIRED)
    assert "llama_free takes 2 arguments instead of 1" in problems
    assert "llama_decode is missing" in problems
    assert not backend.missing_symbols(backend.lib, backend._REQUIRED)


@pytest.mark.parametrize(
    ("comments", "expected"),
    [
        ([b"GCC: (Debian 12.2.0-14+deb12u1) 12.2.0"], False),
        ([b"GCC: (GNU) 12.4.0"], True),
        ([b"GCC: (Ubuntu 13.2.0-23ubuntu4) 13.2.0"], False),
        ([b"GCC: (Ubuntu 13.3.0-6ubuntu2~24.04) 13.3.0"], True),
        ([b"GCC: (GNU) 8.5.0 20210514 (Red Hat 8.5.0-22)\0GCC: (GNU) 14.2.1 20250110"], True),
        ([b"GCC: (Debian 12.2.0-14) 12.2.0\0Debian clang version 14.0.6"], True),
        ([b"GCC: (GNU) 15.1.0", b"GCC: (GNU) 11.4.0"], False),
        ([b"no word of a compiler"], False),
        ([], False),
    ],
)
def test_weights_are_repacked_for_amx_if_the_compiler_was_sound(
    comments: list[bytes], expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, comment in enumerate(comments):
        (tmp_path / f"libggml-cpu-{number}.so").write_bytes(b"\x7fELF" + comment + b"\0.comment")
    monkeypatch.setattr(backend.lib, "llama_print_system_info", lambda: b"AVX = 1 | AMX_INT8 = 1 |")
    assert backend.may_repack(tmp_path) is expected
    monkeypatch.setattr(backend.lib, "llama_print_system_info", lambda: b"AVX = 1 | AVX2 = 1 |")
    assert backend.may_repack(tmp_path)


@pytest.mark.parametrize("sound", [True, False])
def test_whether_amx_is_left_unused_is_logged(
    sound: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backend, "may_repack", lambda _folder: sound)
    assert backend.model_params().use_extra_bufts is sound
    assert ("AMX is not used" in caplog.text) is not sound


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is Intel's")
def test_the_header_of_the_build_makes_the_tile_configuration_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "load.cpp"
    source.write_text(
        "#include <immintrin.h>\n"
        "void load(unsigned char rows) {\n"
        "    alignas(64) unsigned char configuration[64] = {1};\n"
        "    configuration[55] = rows;\n"
        "    _tile_loadconfig(configuration);\n"
        "}\n"
    )
    header = Path(__file__).parents[1] / "requirements" / "llama-cpp.h"
    compiled = tmp_path / "libggml-cpu.so"
    flags = ["-O3", "-mamx-tile", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    command = ["g++", *flags, "-include", str(header), str(source)]
    subprocess.run([*command, "-o", str(compiled)], check=True)
    monkeypatch.setattr(backend.lib, "llama_print_system_info", lambda: b"AMX_INT8 = 1 |")
    assert backend.may_repack(tmp_path)
    assembly = subprocess.run(
        [*command, "-S", "-o", "-"], check=True, capture_output=True, text=True
    ).stdout
    # The argument, which the compiler leaves out where it takes that byte for unread.
    assert re.search(r"mov.*%dil,.*\n(.*\n)*.*ldtilecfg", assembly), assembly


def test_the_library_that_make_builds_has_our_products_of_matrices() -> None:
    folder = Path(backend.lib._lib._name).parent
    assert b"inferpool-matmul" in (folder / "libggml-cpu.so").read_bytes()


def test_native_logs_become_records(caplog: pytest.LogCaptureFixture) -> None:
    bridge = backend._LogBridge()
    with caplog.at_level(logging.DEBUG, logger="llama.cpp"):
        bridge(3, b"half a ", None)
        bridge(5, b"warning\n", None)
        bridge(2, b"loading ", None)
        bridge(5, b"...", None)
        bridge(4, b"broken \xff\n", None)
        bridge(1, b"two\nlines\n", None)
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("WARNING", "half a warning"),
        ("INFO", "loading ..."),
        ("ERROR", "broken \ufffd"),
        ("DEBUG", "two"),
        ("DEBUG", "lines"),
    ]
    assert list(bridge.errors) == ["broken \ufffd"]
