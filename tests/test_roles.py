"""The built-in roles through a pool, on the default models."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from inferpool import (
    AsyncPool,
    ChatConfig,
    ContextLengthExceeded,
    EmbedConfig,
    ModelLoadError,
    Pool,
    RerankConfig,
    WorkerCrashed,
)

DATA = Path(__file__).parent / "data"
GOLDEN = json.loads((DATA / "minilm.json").read_text())
RERANK_GOLDEN = json.loads((DATA / "tiny-reranker.json").read_text())["items"]
# One thread: the tests share the machine, and idle OpenMP threads would fight over it.
CHAT = ChatConfig("smollm2", n_threads=1)
EMBED = EmbedConfig("minilm", n_threads=1)
RERANK = RerankConfig(str(DATA / "tiny-reranker.gguf"), n_threads=1)
QUESTION = "Why is the sky blue? Answer in one sentence."


@pytest.fixture(scope="module")
def models() -> Iterator[Pool]:
    with Pool(chat=CHAT, embed=EMBED) as pool:
        yield pool.start()


@pytest.fixture(scope="module")
def rerank() -> Iterator[Pool]:
    with Pool(rerank=RERANK) as pool:
        yield pool


@pytest.fixture(autouse=True)
def no_worker_outlives_its_test() -> None:
    """The module's pool may: it is shared, and closed at the end."""


def test_embeddings_equal_the_reference(models: Pool) -> None:
    vectors = models.embed([item["text"] for item in GOLDEN["items"]])
    assert vectors.dtype == np.float32
    expected = np.array([item["vector"] for item in GOLDEN["items"]])
    cosines = (vectors * expected).sum(1) / np.linalg.norm(expected, axis=1)
    assert cosines.min() >= 0.9999
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_embed_options(models: Pool) -> None:
    assert models.embed([]).shape == (0, 384)
    raw = models.embed(["bees"], normalize=False)
    assert not np.isclose(np.linalg.norm(raw), 1)
    long = "word " * 2000
    with pytest.raises(ContextLengthExceeded) as caught:
        models.embed(["short", long])
    assert caught.value.details["context"] == 512
    assert models.embed([long], truncate=True).shape == (1, 384)
    assert models.embed(["bees"], dimensions=100).shape == (1, 100)
    with pytest.raises(ValueError, match="dimensions"):
        models.embed(["bees"], dimensions=385)
    with pytest.raises(ValueError, match="no prompt named 'title'"):
        models.embed(["bees"], prompt_name="title")
    with pytest.raises(TypeError, match="normalise"):
        models.embed(["bees"], normalise=True)  # type: ignore[call-arg]


def test_queries_and_documents(models: Pool) -> None:
    [bees, markets] = models.embed.embed_documents(["bees dance", "markets fall"])
    query = models.embed.embed_query("what do bees do?")
    assert query.shape == (384,)
    assert query @ bees > query @ markets


def test_callers_at_once_each_get_their_own_vectors(models: Pool) -> None:
    texts = [item["text"] for item in GOLDEN["items"]]
    expected = models.embed(texts)
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda text: models.embed([text])[0], texts * 4))
    np.testing.assert_allclose(answers, np.tile(expected, (4, 1)), atol=5e-4)


def test_texts_of_a_numpy_array_are_texts(models: Pool, rerank: Pool) -> None:
    texts = np.array(["bees", "honey"])
    np.testing.assert_array_equal(models.embed(texts), models.embed(texts.tolist()))
    assert models.embed.embed_query(texts[0]).shape == (384,)
    assert rerank.rerank(texts[0], texts) == rerank.rerank("bees", ["bees", "honey"])


def test_texts_of_a_subclass_of_str_make_a_conversation(models: Pool) -> None:
    text = np.array(["bees"])[0]
    answer = models.chat(str(text), max_tokens=1, temperature=0).text
    parts = [{"type": "text", "text": text, "cache_control": None}]
    for messages in (
        text,
        [{"role": "user", "content": text}],
        [{"role": "user", "content": parts}],
    ):
        assert models.chat(messages, max_tokens=1, temperature=0, stop=text).text == answer
    assert models.chat.complete(text, max_tokens=1).text
    assert models.embed(["bees"], prompt_name=np.array(["query"])[0]).shape == (1, 384)


@pytest.mark.parametrize("texts", ["a str", [1], None, [b"bytes"]])
def test_texts_of_the_wrong_type_are_refused(models: Pool, texts: object) -> None:
    with pytest.raises(TypeError):
        models.embed(texts)  # type: ignore[arg-type]


def test_rerank_orders_by_the_reference_scores(rerank: Pool) -> None:
    items = [item for item in RERANK_GOLDEN if item["query"] == RERANK_GOLDEN[0]["query"]]
    documents = [item["document"] for item in items]
    results = rerank.rerank(items[0]["query"], documents)
    assert [r.index for r in results] == sorted(range(len(items)), key=lambda i: -items[i]["score"])
    for result in results:
        assert abs(result.relevance_score - items[result.index]["score"]) <= 0.02
    best = rerank.rerank(items[0]["query"], documents, top_n=1, normalize=True)
    assert [r.index for r in best] == [results[0].index]
    assert 0 < best[0].relevance_score < 1
    assert rerank.rerank("bees", []) == []


@pytest.mark.parametrize(
    ("documents", "options", "error"),
    [("a str", {}, TypeError), ([1], {}, TypeError), (["a"], {"top_n": 0}, ValueError)],
)
def test_rerank_refuses_by_name(
    rerank: Pool, documents: object, options: dict[str, int], error: type[Exception]
) -> None:
    with pytest.raises(error, match=r"documents|top_n"):
        rerank.rerank("bees", documents, **options)  # type: ignore[arg-type]


def test_a_model_that_is_no_reranker() -> None:
    with Pool(rerank="minilm") as pool, pytest.raises(ModelLoadError, match="not a reranker"):
        pool.rerank("bees", ["honey"])


def test_a_streamed_answer_is_the_whole_answer(models: Pool) -> None:
    options = {"max_tokens": 24, "temperature": 0.0}
    whole = models.chat(QUESTION, **options)  # type: ignore[arg-type]
    deltas = list(models.chat.stream(QUESTION, **options))  # type: ignore[arg-type]
    assert "".join(delta.text for delta in deltas) == whole.text != ""
    last = deltas[-1]
    assert last.finish_reason == whole.finish_reason
    assert last.usage == whole.usage
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert whole.usage.completion_tokens <= 24


def test_conversations_and_options(models: Pool) -> None:
    conversation = [
        {"role": "system", "content": "You answer with one word."},
        {"role": "user", "content": "Name a colour."},
    ]
    one, two = (
        models.chat(conversation, max_tokens=8, seed=7, temperature=1.5).text for _ in range(2)
    )
    assert one == two
    stopped = models.chat("Count from one to ten.", max_tokens=30, temperature=0, stop=["2", "two"])
    assert "2" not in stopped.text
    assert "two" not in stopped.text


def test_a_prompt_beyond_the_context_is_refused_with_the_numbers(models: Pool) -> None:
    with pytest.raises(ContextLengthExceeded) as caught:
        models.chat("word " * 10_000)
    assert caught.value.details["asked"] > caught.value.details["context"]


def test_closing_a_stream_stops_the_model(models: Pool) -> None:
    with models.chat.stream("Count to a thousand.", temperature=0) as stream:
        next(stream)
    assert models.chat("Hi", max_tokens=2, timeout=30).usage.completion_tokens <= 2


def test_a_killed_chat_worker_leaves_its_tokens_and_is_replaced(models: Pool) -> None:
    before = models.embed(["other role"])
    stream = models.chat.stream("Count to a thousand.", temperature=0)
    received = [next(stream).text for _ in range(3)]
    pid = models.status()["chat"].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerCrashed) as caught:
        received += [delta.text for delta in stream]
    assert "".join(received)
    assert caught.value.exit == "SIGKILL"
    assert models.chat("Hi", max_tokens=2).usage.completion_tokens <= 2
    np.testing.assert_array_equal(models.embed(["other role"]), before)


def test_roles_on_an_event_loop() -> None:
    async def main() -> None:
        async with AsyncPool(chat=CHAT, embed=EMBED, rerank=RERANK) as pool:
            assert len(await pool.rerank("bees", ["honey", "stocks"], top_n=1)) == 1
            vectors, answer = await asyncio.gather(
                pool.embed(["one", "two"]), pool.chat(QUESTION, max_tokens=4)
            )
            assert vectors.shape == (2, 384)
            assert answer.finish_reason == "length"
            texts = [delta.text async for delta in pool.chat.stream(QUESTION, max_tokens=4)]
            assert "".join(texts)

    asyncio.run(main())


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 100)
    with Pool(embed=broken) as pool, pytest.raises(ModelLoadError):
        pool.embed(["text"])
