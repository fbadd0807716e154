"""The embed role: vectors against the reference, batching, limits, cancelling, loading."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from engine_fakes import CountdownAbort, FakeReply
from hypothesis import given
from hypothesis import strategies as st

from inferpool.engine import backend
from inferpool.engine.embedder import Embedder
from inferpool.engine.model import Model
from inferpool.engine.packing import Job, Packer
from inferpool.errors import CallCancelled, ContextLengthExceeded, ModelLoadError, ModelNotFound
from inferpool.models import resolve
from inferpool.roles import embed as role

GOLDEN = json.loads((Path(__file__).parent / "data" / "minilm.json").read_text())["items"]
TEXTS = [item["text"] for item in GOLDEN]
ROUNDING = 5e-4  # flash attention computes in float16, in an order that depends on the batch


@pytest.fixture(scope="session")
def minilm_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INFERPOOL_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield resolve("minilm")


@pytest.fixture(scope="session")
def session(minilm_path: Path) -> Iterator[role.EmbedSession]:
    options = {"model": str(minilm_path), "n_threads": 1}
    made = role.make_session(SimpleNamespace(options=options), CountdownAbort())
    yield made
    made.close()


@pytest.fixture(scope="session")
def embedder(session: role.EmbedSession) -> Embedder:
    return session.embedder


# Vectors


def test_vectors_agree_with_the_reference(embedder: Embedder) -> None:
    vectors = embedder.embed(TEXTS)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(TEXTS), 384)
    for item, vector in zip(GOLDEN, vectors, strict=True):
        assert float(np.dot(vector, item["vector"])) >= 0.9999, item["text"]


def test_vectors_do_not_depend_on_the_batch(embedder: Embedder) -> None:
    together = embedder.embed(TEXTS)
    alone = np.concatenate([embedder.embed([text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=ROUNDING)


def test_no_texts_give_an_array_without_rows(embedder: Embedder) -> None:
    vectors = embedder.embed([])
    assert vectors.shape == (0, 384)
    assert vectors.dtype == np.float32


def test_normalize_scales_to_length_one(embedder: Embedder) -> None:
    raw = embedder.embed(TEXTS[:3], normalize=False)
    unit = embedder.embed(TEXTS[:3])
    norms = np.linalg.norm(raw, axis=1, keepdims=True)
    assert not np.allclose(norms, 1)
    np.testing.assert_allclose(unit, raw / norms, rtol=1e-5)


def test_more_texts_than_sequences_keep_their_order(minilm_path: Path, embedder: Embedder) -> None:
    model = Model(minilm_path)
    small = Embedder(model, n_batch=512, n_seq_max=3, n_threads=1)
    np.testing.assert_allclose(small.embed(TEXTS), embedder.embed(TEXTS), atol=ROUNDING)
    small.close()
    model.close()


# Over-long texts


def test_over_long_text_is_an_error_with_the_numbers(embedder: Embedder) -> None:
    with pytest.raises(ContextLengthExceeded, match=r"texts\[1\] has 602 tokens") as caught:
        embedder.embed(["short", "bee " * 600])
    assert caught.value.details == {"index": 1, "asked": 602, "context": 512}


def test_truncate_keeps_the_closing_token(embedder: Embedder) -> None:
    # [CLS] + 510 words + [SEP] is exactly the context.
    cut, whole = embedder.embed(["bee " * 600, "bee " * 510], truncate=True)
    np.testing.assert_allclose(cut, whole, atol=1e-6)


def test_control_tokens_in_a_text_are_text(embedder: Embedder) -> None:
    plain, with_marker = embedder.embed(["bees", "bees [SEP]"])
    assert float(np.dot(plain, with_marker)) < 0.99


# Batch planning


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
    jobs = [Job([np.zeros(n, np.int32) for n in lengths], 1) for lengths in calls]
    packer._jobs = deque(jobs)
    planned = []
    while plan := packer._plan():
        assert len(plan) <= n_seq_max
        assert len(plan) == 1 or sum(len(job.tokens(row)) for job, row in plan) <= n_tokens
        planned += [(jobs.index(job), row) for job, row in plan]
    assert sorted(planned) == [(i, row) for i, call in enumerate(calls) for row in range(len(call))]


# Cancelling


def test_abort_ends_a_batch_natively_and_the_next_call_works(embedder: Embedder) -> None:
    expected = embedder.embed(TEXTS)
    abort = CountdownAbort(polls=20)
    with pytest.raises(CallCancelled):
        embedder.embed(TEXTS, abort=abort)
    assert abort.native_polls > 0
    np.testing.assert_array_equal(embedder.embed(TEXTS), expected)


def test_abort_that_is_already_set_computes_nothing(embedder: Embedder) -> None:
    abort = CountdownAbort(polls=0)
    with pytest.raises(CallCancelled):
        embedder.embed(TEXTS, abort=abort)
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
    patch_metadata(path, "bert.pooling_type", 0)
    with pytest.raises(ModelLoadError, match="not an embedding model"):
        make_session(str(path))


def patch_metadata(path: Path, key: str, value: int) -> None:
    """Overwrite an unsigned 32-bit value: it follows its key and a 4-byte type."""
    with path.open("r+b") as file:
        head = file.read(1 << 20)
        file.seek(head.index(key.encode()) + len(key) + 4)
        file.write(value.to_bytes(4, "little"))


# The role


def make_session(model: str, **options: Any) -> role.EmbedSession:
    return role.make_session(SimpleNamespace(options={"model": model, **options}), None)


def test_handler_replies_with_one_array(session: role.EmbedSession) -> None:
    reply = FakeReply()
    payload = {"texts": ["bees dance", "markets fall"]}
    role.HANDLERS["embed"](reply, payload, SimpleNamespace(session=session))
    [(kind, vectors)] = reply.sent
    assert kind == "embed"
    assert vectors.shape == (2, 384)


@pytest.mark.parametrize(
    ("payload", "error", "message"),
    [
        ({"texts": ["a"], "normalise": True}, TypeError, "normalise"),
        ({"texts": "not a list"}, TypeError, "texts"),
        ({"texts": ["a", 3]}, TypeError, r"texts\[1\]"),
        ({}, TypeError, "texts"),
        (["a"], TypeError, "EmbedRequest"),
    ],
)
def test_handler_names_what_is_wrong(
    session: role.EmbedSession, payload: Any, error: type[Exception], message: str
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
        made.embedder.embed(["late"])


# The native library


def test_required_symbols_are_those_that_the_engine_uses() -> None:
    folder = Path(backend.__file__).parent
    used = {
        name
        for source in folder.glob("*.py")
        for name in re.findall(r"\blib\.(llama_\w+)\(", source.read_text())
    }
    structures = {"llama_batch", "llama_log_callback", "llama_progress_callback"}
    assert set(backend._REQUIRED) == used - structures


def test_missing_and_changed_symbols_are_named() -> None:
    bindings = SimpleNamespace(llama_free=SimpleNamespace(argtypes=[1, 2]))
    problems = backend.missing_symbols(bindings)
    assert "llama_free takes 2 arguments instead of 1" in problems
    assert "llama_decode is missing" in problems
    assert not backend.missing_symbols(backend.lib)


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
