"""The rerank role: scores against references, pairs, limits, what is not a reranker."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from engine_fakes import CountdownAbort, FakeReply
from tiny_models import END, RERANK_TEMPLATE, write_qwen3

from inferpool.engine.pairs import TemplatePairs
from inferpool.engine.reranker import Reranker
from inferpool.errors import (
    CallCancelled,
    ContextLengthExceeded,
    InvalidRequest,
    ModelLoadError,
)
from inferpool.messages import RerankRequest
from inferpool.models import resolve
from inferpool.roles import rerank as role
from inferpool.roles.packed import PackedSession

DATA = Path(__file__).parent / "data"
# The vocabulary is cut to the pieces of the golden texts and single characters.
TINY = DATA / "tiny-reranker.gguf"
GOLDEN = json.loads((DATA / "tiny-reranker.json").read_text())["items"]
TOLERANCE = 0.02
QUERY = "how do bees communicate"
DOCUMENTS = ["bees dance", "markets fall", "", "a waggle dance tells where flowers are", "honey"]


@pytest.fixture(scope="module")
def session() -> Iterator[PackedSession]:
    made = role.make_session(config(TINY), CountdownAbort())
    yield made
    made.close()
    made.close()


@pytest.fixture(scope="module")
def asking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PackedSession]:
    """A reranker that is asked for yes or no."""
    path = write_qwen3(tmp_path_factory.mktemp("models") / "rerank.gguf", "rerank")
    made = role.make_session(config(path), None)
    yield made
    made.close()


def score(
    session: PackedSession,
    query: str,
    documents: list[str],
    *,
    abort: CountdownAbort | None = None,
    **options: Any,
) -> np.ndarray:
    """Scores in the order of the documents."""
    reply = FakeReply(abort)
    payload = {"query": query, "documents": documents, **options}
    role.HANDLERS["rerank"](reply, payload, SimpleNamespace(session=session))
    while session.step() is not None:
        pass
    if isinstance(reply.outcome, Exception):
        raise reply.outcome
    [(_, results)] = reply.sent
    return np.array([r.relevance_score for r in sorted(results, key=lambda r: r.index)])


def config(model: Path | str, **options: Any) -> Any:
    return SimpleNamespace(options={"model": str(model), "n_threads": 1, **options})


def test_scores_equal_the_reference(session: PackedSession) -> None:
    by_query = defaultdict(list)
    for item in GOLDEN:
        by_query[item["query"]].append(item)
    for query, items in by_query.items():
        scores = score(session, query, [item["document"] for item in items])
        np.testing.assert_allclose(scores, [item["score"] for item in items], atol=TOLERANCE)
        for item in items:
            tokens = session.engine._pairs.tokens(query, item["document"])
            assert len(tokens) == item["n_tokens"]
            [alone] = score(session, query, [item["document"]])
            assert alone == pytest.approx(item["score"], abs=TOLERANCE)


def test_normalize_is_the_sigmoid(session: PackedSession) -> None:
    raw = score(session, QUERY, DOCUMENTS)
    np.testing.assert_allclose(
        score(session, QUERY, DOCUMENTS, normalize=True), 1 / (1 + np.exp(-raw)), rtol=1e-5
    )


def test_yes_or_no_is_the_probability_that_the_model_gives_it(
    asking: PackedSession, tmp_path: Path
) -> None:
    from llama_cpp import Llama

    scores = score(asking, QUERY, DOCUMENTS)
    np.testing.assert_array_equal(score(asking, QUERY, DOCUMENTS, normalize=True), scores)
    peer = Llama(
        str(write_qwen3(tmp_path / "chat.gguf", "chat")),
        n_ctx=256,
        logits_all=True,
        n_threads=1,
        verbose=False,
    )
    yes, no = (peer.tokenize(word, add_bos=False)[0] for word in (b"yes", b"no"))
    for probability, document in zip(scores, DOCUMENTS, strict=True):
        prompt = RERANK_TEMPLATE.format(query=QUERY, document=document)
        peer.reset()
        peer.eval(peer.tokenize(prompt.encode(), add_bos=False, special=True))
        logits = peer.scores[peer.n_tokens - 1]
        assert probability == pytest.approx(1 / (1 + np.exp(logits[no] - logits[yes])), abs=1e-3)
    peer.close()


def test_batches_do_not_change_scores(asking: PackedSession) -> None:
    together = score(asking, QUERY, DOCUMENTS * 30)
    alone = np.concatenate([score(asking, QUERY, [document]) for document in DOCUMENTS])
    np.testing.assert_allclose(together, np.tile(alone, 30), atol=2e-3)


def test_control_tokens_in_a_text_are_text(asking: PackedSession) -> None:
    pairs = asking.engine._pairs
    end = pairs.tokens("x", "y")[-len("\nassistant\n") - 2]
    assert (pairs.tokens("x", "y") == end).sum() == (pairs.tokens("x", END) == end).sum() == 2
    # A placeholder in a text is not filled in.
    assert len(pairs.tokens("{document}", "y")) == len(pairs.tokens("", "y")) + len("{document}")


def test_a_template_without_control_tokens(asking: PackedSession) -> None:
    model = asking.engine._pairs._model
    pairs = TemplatePairs(model, "{query}? {document}!")
    plain = model.tokenize("a? b!", add_special=False, parse_special=False)
    np.testing.assert_array_equal(pairs.tokens("a", "b"), plain)
    with pytest.raises(ModelLoadError, match="lacks"):
        TemplatePairs(model, "{query}?")


@pytest.mark.parametrize("name", ["session", "asking"])
def test_over_long_documents(name: str, request: pytest.FixtureRequest) -> None:
    tested: PackedSession = request.getfixturevalue(name)
    document = "bees " * 600
    with pytest.raises(ContextLengthExceeded, match=r"documents\[1\]") as caught:
        score(tested, "bees", ["a", document])
    assert caught.value.details["index"] == 1
    assert caught.value.details["asked"] > caught.value.details["context"] == tested.engine.n_ctx
    assert np.isfinite(score(tested, "bees", ["a", document], truncate=True)).all()
    cut = tested.engine._pairs.cut("bees", document, tested.engine.n_ctx)
    assert cut is not None
    assert len(cut) == tested.engine.n_ctx
    np.testing.assert_array_equal(cut[-1:], tested.engine._pairs.tokens("bees", "a")[-1:])
    with pytest.raises(ContextLengthExceeded, match="shorten the query"):
        score(tested, document, ["a"], truncate=True)


def test_no_documents(session: PackedSession) -> None:
    assert score(session, QUERY, []).shape == (0,)


def test_abort_leaves_the_reranker_usable(session: PackedSession) -> None:
    expected = score(session, QUERY, DOCUMENTS)
    with pytest.raises(CallCancelled):
        score(session, QUERY, DOCUMENTS, abort=CountdownAbort(polls=5))
    np.testing.assert_array_equal(score(session, QUERY, DOCUMENTS), expected)


@pytest.mark.parametrize("model", ["minilm", "smollm2"])
def test_what_is_no_reranker_is_refused(model: str) -> None:
    with pytest.raises(ModelLoadError, match="is not a reranker"):
        role.make_session(config(resolve(model)), None)


def test_a_classifier_is_refused(asking: PackedSession, monkeypatch: pytest.MonkeyPatch) -> None:
    model = asking.engine._pairs._model
    monkeypatch.setattr(model, "class_labels", lambda: ["spam", "ham", "eggs"])
    with pytest.raises(ModelLoadError, match="3 classes apart"):
        Reranker(model, asking.packer)


def test_a_model_that_gives_all_pairs_one_score_is_refused(
    asking: PackedSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = asking.engine._pairs._model
    monkeypatch.setattr(model, "class_labels", lambda: [""])
    with pytest.raises(ModelLoadError, match="names no labels"):
        Reranker(model, asking.packer)


def test_a_pair_without_a_token_is_refused(
    asking: PackedSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = TemplatePairs(asking.engine._pairs._model, "{query}{document}")
    monkeypatch.setattr(asking.engine, "_pairs", pairs)
    assert score(asking, "", ["a"]).shape == (1,)
    with pytest.raises(InvalidRequest, match=r"documents\[1\] give no token"):
        score(asking, "", ["a", ""])


def test_handler_replies_with_the_best(session: PackedSession) -> None:
    items = [item for item in GOLDEN if item["query"] == QUERY]
    replies = [FakeReply(), FakeReply()]
    payload = {"query": QUERY, "documents": [item["document"] for item in items], "top_n": 2}
    for reply in replies:
        role.HANDLERS["rerank"](reply, payload, SimpleNamespace(session=session))
    while session.step() is not None:
        pass
    best = sorted(range(len(items)), key=lambda i: -items[i]["score"])[:2]
    for reply in replies:
        [(kind, results)] = reply.sent
        assert (kind, reply.outcome) == ("rerank", "ended")
        assert [result.index for result in results] == best
        assert [r.relevance_score for r in results] == pytest.approx(
            [items[i]["score"] for i in best], abs=TOLERANCE
        )


def test_equal_scores_keep_the_order_of_the_documents(session: PackedSession) -> None:
    rows = np.zeros((5, 1), np.float32)
    request = RerankRequest(query=QUERY, documents=[""] * 5, top_n=3)
    assert [result.index for result in session.engine.finish(rows, request)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("payload", "error", "message"),
    [
        ({"query": "q", "documents": ["a"], "topn": 1}, TypeError, "topn"),
        ({"query": "q", "documents": ["a"], "top_n": 0}, ValueError, "top_n"),
        ({"query": "q", "documents": "a"}, TypeError, "documents"),
        ({"query": 3, "documents": []}, TypeError, "query"),
        ({"documents": []}, TypeError, "query"),
    ],
)
def test_handler_names_what_is_wrong(
    session: PackedSession, payload: Any, error: type[Exception], message: str
) -> None:
    reply = FakeReply()
    with pytest.raises(error, match=message):
        role.HANDLERS["rerank"](reply, payload, SimpleNamespace(session=session))
    assert not reply.sent
