"""Embedding through a pool, beside ``llama_cpp.Llama`` in this process and llama-server."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any

import numpy as np

from benchmarks.llama_peers import THREADS, Server, llama, llama_server
from benchmarks.measure import Row, interleaved, seconds
from inferpool import EmbedConfig, Pool

TEXT = (
    "the model of a small town river carries light wood and stone past every old bridge where "
    "people trade bread for news while children count boats and birds on the far bank"
)
SERVER_BATCH = 32
"""Texts in one request to llama-server, its best."""
CALLERS = 32
CONNECTIONS = 8


def _passages(number: int, words: range) -> list[str]:
    generator = np.random.default_rng(0)
    lengths = generator.integers(words.start, words.stop, number)
    return [" ".join(generator.choice(TEXT.split(), length)) for length in lengths]


def run(*, quick: bool) -> list[Row]:
    """Embedding; `Llama` is the measure of many texts, llama-server of many callers."""
    rounds = 2 if quick else 7
    number = 32 if quick else 256
    rows: list[Row] = []
    with ExitStack() as stack:
        # The smallest context that holds every passage, for everybody.
        peer = stack.enter_context(llama("minilm", embedding=True, n_ctx=512))
        options = "--embedding -fa on -c 16384 -b 2048 -ub 2048 -np 32"
        server = stack.enter_context(llama_server("minilm", options))
        pool = stack.enter_context(Pool(embed=EmbedConfig("minilm", n_threads=THREADS)))
        pool.start()
        for label, words in (("20 to 120 words", range(20, 121)), ("6 words", range(6, 7))):
            contenders = _many_texts(peer, server, pool, _passages(number, words))
            name = f"MiniLM f32, a text of {label}"
            rows += interleaved(name, contenders, rounds=rounds, repeats=1, unit="s")
        name = f"MiniLM f32, a text of 6 words each of {CALLERS} callers"
        contenders = _many_callers(server, pool, _passages(number, range(6, 7)))
        rows += interleaved(name, contenders, rounds=rounds, repeats=1, unit="s")
    return rows


def _many_texts(
    peer: Any, server: Server | None, pool: Pool, texts: list[str]
) -> dict[str, Callable[[], float]]:
    """Seconds for one text, by contender."""

    def one_by_one() -> None:
        for text in texts:
            peer.embed(text)

    def batches(server: Server) -> None:
        with closing(server.connect()) as connection:
            for at in range(0, len(texts), SERVER_BATCH):
                body = {"input": texts[at : at + SERVER_BATCH]}
                server.post("/v1/embeddings", body, connection)

    contenders = {"Llama, one by one": lambda: seconds(one_by_one) / len(texts)}
    if server is not None:
        contenders["llama-server"] = lambda: seconds(lambda: batches(server)) / len(texts)
    contenders["inferpool"] = lambda: seconds(lambda: pool.embed(texts)) / len(texts)
    return contenders


def _many_callers(
    server: Server | None, pool: Pool, texts: list[str]
) -> dict[str, Callable[[], float]]:
    """Seconds for one text when every call brings one, by contender."""
    kept = threading.local()

    def through_server(text: str) -> None:
        assert server is not None
        if not hasattr(kept, "connection"):
            kept.connection = server.connect()
        server.post("/v1/embeddings", {"input": [text]}, kept.connection)

    def through_pool(text: str) -> None:
        pool.embed([text])

    def of(caller: Callable[[str], None], number: int) -> Callable[[], float]:
        threads = ThreadPoolExecutor(number)
        return lambda: seconds(lambda: list(threads.map(caller, texts))) / len(texts)

    contenders = {}
    if server is not None:
        name = f"llama-server, {CONNECTIONS} connections"
        contenders[name] = of(through_server, CONNECTIONS)
    contenders["inferpool"] = of(through_pool, CALLERS)
    return contenders
