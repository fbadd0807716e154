"""The rerank role: scores against references, pairs, limits, what is not a reranker."""

from __future__ import annotations

import json
import math
import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from engine_fakes import CountdownAbort, FakeReply
from tiny_models import END, RERANK_TEMPLATE, write_qwen3

from inferpool.engine import token_types
from inferpool.engine.context import Batch
from inferpool.engine.gguf import Gguf
from inferpool.engine.pairs import TemplatePairs
from inferpool.engine.reranker import Reranker
from inferpool.errors import (
    CallCancelled,
    ContextLengthExceeded,
    InvalidRequest,
    ModelError,
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


# Types of tokens

F32, F16, Q8_0 = (gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "Q8_0"))
TYPES, EMBEDDINGS = "token_types.weight", "token_embd.weight"


def write_typed(path: Path, kind: gguf.GGMLQuantizationType = F32) -> Path:
    """``TINY``, but that its types of tokens differ, and that its embeddings are of ``kind``."""
    source = gguf.GGUFReader(TINY)
    writer = gguf.GGUFWriter(path, "bert")
    for name, field in source.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1])
    for tensor in source.tensors:
        data = np.array(tensor.data)
        if tensor.name == TYPES:
            data[1] += np.random.default_rng(5).standard_normal(data.shape[1])
        if tensor.name == EMBEDDINGS:
            data = gguf.quantize(data, kind)
        writer.add_tensor(tensor.name, data, raw_dtype=kind if tensor.name == EMBEDDINGS else F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def bert_score(path: Path, tokens: np.ndarray, *, types: bool = True) -> float:
    """What a BERT of two layers, of four heads of eight, gives a pair, computed plainly."""
    weights = {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
        for tensor in gguf.GGUFReader(path).tensors
    }
    n, separator = len(tokens), 3

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-12)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    second = np.arange(n) > list(tokens).index(separator)
    x = weights[EMBEDDINGS][tokens] + weights["position_embd.weight"][:n]
    x = norm(x + weights[TYPES][(second & types).astype(int)], "token_embd_norm")
    for block in ("blk.0.", "blk.1."):
        q, k, v = (
            linear(x, block + name).reshape(n, 4, 8).swapaxes(0, 1)
            for name in ("attn_q", "attn_k", "attn_v")
        )
        attention = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(8))
        attention /= attention.sum(-1, keepdims=True)
        seen = (attention @ v).swapaxes(0, 1).reshape(n, 32)
        x = norm(x + linear(seen, block + "attn_output"), block + "attn_output_norm")
        inner = linear(x, block + "ffn_up")
        inner *= 0.5 * (1 + np.vectorize(math.erf)(inner / np.sqrt(2)))
        x = norm(x + linear(inner, block + "ffn_down"), block + "layer_output_norm")
    return float(linear(np.tanh(linear(x[0], "cls")), "cls.output").item())


@pytest.mark.parametrize("flash_attn", [True, False])
@pytest.mark.parametrize("kind", [F32, F16, Q8_0])
def test_query_and_document_have_types_of_their_own(
    kind: gguf.GGMLQuantizationType, flash_attn: bool, tmp_path: Path
) -> None:
    path = write_typed(tmp_path / "typed.gguf", kind)
    typed = role.make_session(config(path, flash_attn=flash_attn), None)
    pairs, n_ctx = typed.engine._pairs, typed.engine.n_ctx
    documents = [*DOCUMENTS, "bees dance " * 300]
    sequences = [pairs.tokens(QUERY, document) for document in DOCUMENTS]
    sequences.append(pairs.cut(QUERY, documents[-1], n_ctx))
    expected = [bert_score(path, tokens) for tokens in sequences]
    alike = [bert_score(path, tokens, types=False) for tokens in sequences]
    assert np.median(np.abs(np.subtract(alike, expected))) > 20 * TOLERANCE
    assert not np.array_equal(np.argsort(alike), np.argsort(expected))
    packed = score(typed, QUERY, documents * 3, truncate=True)
    np.testing.assert_allclose(packed, expected * 3, atol=TOLERANCE)
    alone = [score(typed, QUERY, [document], truncate=True)[0] for document in documents]
    np.testing.assert_allclose(alone, expected, atol=TOLERANCE)
    typed.close()


@pytest.mark.parametrize("kind", [F32, F16, Q8_0])
def test_embeddings_are_those_that_llama_cpp_takes_for_ids(
    kind: gguf.GGMLQuantizationType, tmp_path: Path
) -> None:
    path = write_typed(tmp_path / "typed.gguf", kind)
    typed = role.make_session(config(path), None)
    typed.packer._batch._embedding._difference[:] = 0
    of_embeddings = score(typed, QUERY, DOCUMENTS)
    typed.packer._batch = Batch(typed.engine.n_ctx)
    np.testing.assert_array_equal(score(typed, QUERY, DOCUMENTS), of_embeddings)
    typed.close()


def test_a_token_without_an_embedding_is_the_error_of_its_call(tmp_path: Path) -> None:
    typed = role.make_session(config(write_typed(tmp_path / "typed.gguf")), None)
    table = typed.packer._batch._embedding._table
    table._data = table._data[: typed.engine._pairs.tokens("a", "b").max() + 1]
    assert np.isfinite(score(typed, "a", ["b"])).all()
    with pytest.raises(ModelError, match="the vocabulary has"):
        score(typed, QUERY, DOCUMENTS)
    assert np.isfinite(score(typed, "a", ["b"])).all()
    typed.close()


def test_abort_of_a_batch_of_embeddings(tmp_path: Path) -> None:
    typed = role.make_session(config(write_typed(tmp_path / "typed.gguf")), CountdownAbort())
    expected = score(typed, QUERY, DOCUMENTS)
    with pytest.raises(CallCancelled):
        score(typed, QUERY, DOCUMENTS, abort=CountdownAbort(polls=5))
    np.testing.assert_array_equal(score(typed, QUERY, DOCUMENTS), expected)
    typed.close()


def test_without_types_tokens_stay_ids(session: PackedSession, asking: PackedSession) -> None:
    assert session.engine._pairs._model.is_wordpiece
    for each in (session, asking):
        assert each.packer._batch.native.token
        assert not each.packer._batch.native.embd


def test_rows_of_every_known_type(tmp_path: Path) -> None:
    path = tmp_path / "rows.gguf"
    writer = gguf.GGUFWriter(path, "bert")
    random = np.random.default_rng(3)
    for kind, (_, block, size) in token_types._FORMATS.items():
        assert gguf.GGML_QUANT_SIZES[kind] == (block, size)
        data = random.integers(0, 64, (5, 256 // block * size), np.uint8)
        writer.add_tensor(str(kind), data, raw_dtype=gguf.GGMLQuantizationType(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = Gguf(path).tensors()
    for tensor in gguf.GGUFReader(path).tensors:
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)[[4, 0, 4]]
        table = token_types._Table(path, ours, tensor.name, 256)
        np.testing.assert_allclose(table.rows(np.array([4, 0, 4])), expected, rtol=1e-6)
        with pytest.raises(ModelError, match="5 tokens"):
            table.rows(np.array([0, 5]))


def test_types_that_cannot_be_read_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_typed(tmp_path / "typed.gguf", Q8_0)
    with monkeypatch.context() as patch:
        patch.delitem(token_types._FORMATS, Q8_0)
        with pytest.raises(ModelLoadError, match=f"{EMBEDDINGS}: its type 8 is not known"):
            role.make_session(config(path), None)
    loaded = role.make_session(config(path), None)
    model = loaded.engine._pairs._model
    whole = path.read_bytes()
    # A tensor's width, number of rows, type and place, after its name and its 2 dimensions.
    for name in (TYPES, EMBEDDINGS):
        at = whole.index(name.encode()) + len(name) + 4
        for offset, layout, value, problem in [
            (0, "<Q", 1 << 63, "does not fit 32 numbers"),
            (8, "<Q", 1 << 63, "beyond the file"),
            (16, "<I", 1 << 31, "not known"),
            (20, "<Q", (1 << 64) - 32, "beyond the file"),
        ]:
            broken = bytearray(whole)
            struct.pack_into(layout, broken, at + offset, value)
            monkeypatch.setattr(model, "path", tmp_path / "broken.gguf")
            model.path.write_bytes(broken)
            with pytest.raises(ModelLoadError, match=f"{name}: .*{problem}"):
                token_types.pair_embedding(model)
    model.path.write_bytes(whole[:at])
    with pytest.raises(ModelLoadError, match="truncated"):
        token_types.pair_embedding(model)
    loaded.close()


def test_types_in_another_file_of_a_split_model(
    session: PackedSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = session.engine._pairs._model
    for n_files in (1, 2):
        path = tmp_path / f"of-{n_files}.gguf"
        writer = gguf.GGUFWriter(path, "bert")
        writer.add_uint16("split.count", n_files)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        monkeypatch.setattr(model, "path", path)
        if n_files == 1:
            assert token_types.pair_embedding(model) is None
        else:
            with pytest.raises(ModelLoadError, match="hint: merge"):
                token_types.pair_embedding(model)


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
