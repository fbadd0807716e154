"""What no model was made for: a typed error or an answer, and the next call works."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import write_projector, write_qwen3

from inferpool import (
    EmbedConfig,
    InferpoolError,
    InvalidRequest,
    ModelLoadError,
    Pool,
    RerankConfig,
    RerankResult,
)

TINY_RERANKER = Path(__file__).parent / "data" / "tiny-reranker.gguf"
MEGABYTE = 1 << 20
TEXTS = {
    "empty": "",
    "blank": " \t\n",
    "NUL": "\0",
    "NUL inside": "bees\0dance",
    "control characters": "".join(map(chr, range(32))),
    "noncharacter": "\uffff",
    "special tokens": "[CLS] [SEP] [MASK] <s> </s> <|im_end|> <|endoftext|>",
    "1 MB of a letter": "a" * MEGABYTE,
    "1 MB of spaces": " " * MEGABYTE,
    "1 MB of marks": "\u0301" * MEGABYTE,
    "1 MB of ideographs": "\u4e2d" * MEGABYTE,
    "1 MB of emoji": "\N{HONEYBEE}" * (MEGABYTE // 4),
}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    embed = EmbedConfig("minilm", n_threads=1)
    rerank = RerankConfig(str(TINY_RERANKER), n_threads=1)
    with Pool(embed=embed, rerank=rerank) as pool:
        yield pool.start()


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    folder = tmp_path_factory.mktemp("models")
    embed = EmbedConfig(str(write_qwen3(folder / "embed.gguf", "embed")), n_threads=1)
    rerank = RerankConfig(str(write_qwen3(folder / "rerank.gguf", "rerank")), n_threads=1)
    with Pool(embed=embed, rerank=rerank) as pool:
        yield pool.start()


@pytest.fixture(autouse=True)
def no_worker_outlives_its_test() -> None:
    """The module's pools may: they are shared, and closed at the end."""


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("name", ["pool", "decoders"])
def test_texts(name: str, text: str, request: pytest.FixtureRequest) -> None:
    tested: Pool = request.getfixturevalue(name)
    before = tested.status()
    for truncate in (False, True):
        for call in (
            lambda t=truncate: tested.embed([text, "bees"], truncate=t),
            lambda t=truncate: tested.embed.embed_documents([text], truncate=t),
            lambda t=truncate: tested.rerank(text, ["bees"], truncate=t),
            lambda t=truncate: tested.rerank("bees", [text, "honey"], truncate=t),
        ):
            _check(_outcome(call))
    assert np.isfinite(tested.embed(["bees"])).all()
    assert len(tested.rerank("bees", ["honey"])) == 1
    after = tested.status()
    assert [after[role].pid for role in after] == [before[role].pid for role in before]


def _outcome(call: Any) -> Any:
    try:
        return call()
    except InferpoolError as error:
        return error


def _check(outcome: Any) -> None:
    if isinstance(outcome, InferpoolError):
        assert type(outcome).__name__ in {"ContextLengthExceeded", "InvalidRequest"}, outcome
    elif isinstance(outcome, np.ndarray):
        assert np.isfinite(outcome).all()
    else:
        assert all(isinstance(item, RerankResult) for item in outcome)
        assert np.isfinite([item.relevance_score for item in outcome]).all()


@pytest.mark.parametrize("text", ["\ud800", "bees \udfff"])
def test_lone_surrogates_are_refused_where_they_are(pool: Pool, text: str) -> None:
    for call in (
        lambda: pool.embed(["bees", text]),
        lambda: pool.rerank(text, ["bees"]),
        lambda: pool.rerank("bees", [text]),
    ):
        with pytest.raises(ValueError, match="surrogates"):
            call()
    assert len(pool.rerank("bees", ["honey"])) == 1


@pytest.mark.parametrize("size", [0, 3, 4, 11, 100, 900, 4_000, 7_000, 8_000, 60_000, 168_000])
def test_a_truncated_model_is_a_load_error(tmp_path: Path, size: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(TINY_RERANKER.read_bytes()[:size])
    with Pool(rerank=path) as pool:
        with pytest.raises(ModelLoadError, match=r"cut\.gguf"):
            pool.rerank("bees", ["honey"])
        # Mended, it is loaded by a new worker.
        path.write_bytes(TINY_RERANKER.read_bytes())
        assert len(pool.rerank("bees", ["honey"])) == 1


@pytest.mark.parametrize("kind", ["chat", "projector"])
@pytest.mark.parametrize("role", ["embed", "rerank", "chat"])
def test_a_model_for_something_else(tmp_path: Path, role: str, kind: str) -> None:
    path = tmp_path / "other.gguf"
    if kind == "chat":
        write_qwen3(path, "chat")  # it has no chat template, so it completes texts only
    else:
        write_projector(path, width=64)
    roles: Any = {role: path}
    calls = {
        "embed": lambda pool: pool.embed(["bees"]),
        "rerank": lambda pool: pool.rerank("bees", ["honey"]),
        "chat": lambda pool: pool.chat("bees"),
    }
    error = InvalidRequest if role == kind else ModelLoadError
    with Pool(**roles) as pool, pytest.raises(error, match=r"other\.gguf"):
        calls[role](pool)
