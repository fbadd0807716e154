"""Embedding through a pool, beside ``llama_cpp.Llama`` in this process."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.measure import Row, interleaved, seconds
from inferpool import EmbedConfig, Pool
from inferpool.config import worker_environment
from inferpool.models import resolve

TEXT = (
    "the model of a small town river carries light wood and stone past every old bridge where "
    "people trade bread for news while children count boats and birds on the far bank"
)


def _passages(number: int, words: range) -> list[str]:
    generator = np.random.default_rng(0)
    lengths = generator.integers(words.start, words.stop, number)
    return [" ".join(generator.choice(TEXT.split(), length)) for length in lengths]


def _embedders(peer: Any, pool: Pool, texts: list[str]) -> dict[str, Callable[[], float]]:
    """Seconds for one text, by contender."""

    def one_by_one() -> None:
        for text in texts:
            peer.embed(text)

    return {
        "Llama, one by one": lambda: seconds(one_by_one) / len(texts),
        "inferpool": lambda: seconds(lambda: pool.embed(texts)) / len(texts),
    }


def run(*, quick: bool) -> list[Row]:
    """Embedding; `Llama` is the measure."""
    # The peer gets the environment that our workers get.
    os.environ.update(worker_environment())
    from llama_cpp import Llama

    from inferpool.engine import backend

    # The peer gets past what is broken in the library as our workers do.
    params = backend.model_params()
    backend.lib.llama_model_default_params = lambda: params

    threads = len(os.sched_getaffinity(0))
    common = {"n_threads": threads, "flash_attn": True, "verbose": False}
    rounds = 2 if quick else 7
    number = 32 if quick else 256
    rows: list[Row] = []
    embedder = Llama(str(resolve("minilm")), embedding=True, n_ctx=512, n_batch=512, **common)
    with Pool(embed=EmbedConfig("minilm", n_threads=threads)) as pool:
        pool.start()
        for label, words in (("20 to 120 words", range(20, 121)), ("6 words", range(6, 7))):
            contenders = _embedders(embedder, pool, _passages(number, words))
            name = f"MiniLM f32, a text of {label}"
            rows += interleaved(name, contenders, rounds=rounds, repeats=1, unit="s")
    embedder.close()
    return rows
