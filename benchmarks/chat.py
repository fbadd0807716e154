"""Chat on the default model, beside `Llama` and llama-server: rates, first tokens, cancelling.

Everybody has the same threads, flash attention, the same context length and as many slots.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import numpy as np

from benchmarks.embed import TEXT
from benchmarks.llama_peers import THREADS, Server, llama, llama_server
from benchmarks.measure import Row, interleaved, seconds, summed
from inferpool import ChatConfig, ChatResult, Pool

SLOTS = 8
N_CTX = 2048
TOKENS = 128
STREAMS = (1, 2, 4, 8)


def run(*, quick: bool) -> list[Row]:
    """All comparisons of chat."""
    rows: list[Row] = []
    with _contenders() as (pool, server, llama):
        rounds = 1 if quick else 5
        for n in STREAMS:
            rows += _streams(pool, server, llama if n == 1 else None, n, rounds)
        rows += _first_token(pool, server, rounds)
        rows += _cancel(pool, 5 if quick else 50)
        rows += _agreement(pool, llama, 3 if quick else 20)
    return rows


@contextmanager
def _contenders() -> Iterator[tuple[Pool, Server | None, Any]]:
    config = ChatConfig("smollm2", n_ctx=N_CTX, n_parallel=SLOTS, n_threads=THREADS)
    options = f"-c {N_CTX * SLOTS} -np {SLOTS} -fa on -b 512 --no-kv-unified"
    with (
        llama("smollm2", n_ctx=N_CTX) as peer,
        llama_server("smollm2", options) as server,
        Pool(chat=config) as pool,
    ):
        pool.start()
        yield pool, server, peer


_serial = iter(range(1 << 30))


def _question() -> str:
    """Another one each time, so that nobody has read its beginning before."""
    return f"Number {next(_serial)}: explain in detail why honeybees dance, and who watches."


def _text(tokens: int) -> str:
    """About so many tokens, another each time."""
    generator = np.random.default_rng(next(_serial))
    return " ".join(generator.choice(TEXT.split(), int(tokens / 1.1)))


def _asked(content: str, **options: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "temperature": 0.0, **options}


def _streams(pool: Pool, server: Server | None, llama: Any, n: int, rounds: int) -> list[Row]:
    """Seconds for one of the tokens of `n` answers at once."""

    def of(answer: Callable[[dict[str, Any]], int]) -> Callable[[], float]:
        def measure() -> float:
            with ThreadPoolExecutor(n) as threads:
                asked = [_asked(_question(), max_tokens=TOKENS) for _ in range(n)]
                began = time.perf_counter()
                tokens = sum(threads.map(answer, asked))
                return (time.perf_counter() - began) / tokens

        return measure

    def of_pool(asked: dict[str, Any]) -> int:
        return pool.chat(**asked).usage.completion_tokens

    def of_server(asked: dict[str, Any]) -> int:
        assert server is not None
        with closing(server.connect()) as connection:
            answer = server.post("/v1/chat/completions", asked, connection)
        return int(answer["usage"]["completion_tokens"])

    def of_llama() -> float:
        # In the thread that loaded it: with the OpenMP team of a second one there are more threads
        # than CPUs, and each waits for the others asleep, which takes half as long again.
        asked = _asked(_question(), max_tokens=TOKENS)
        llama.reset()
        began = time.perf_counter()
        tokens = int(llama.create_chat_completion(**asked)["usage"]["completion_tokens"])
        return (time.perf_counter() - began) / tokens

    contenders: dict[str, Callable[[], float]] = {}
    if server is not None:
        contenders["llama-server"] = of(of_server)
    if llama is not None:
        contenders["Llama"] = of_llama
    contenders["inferpool"] = of(of_pool)
    name = f"SmolLM2 Q4_1, greedy, a token of {n} stream{'s' * (n > 1)}"
    return interleaved(name, contenders, rounds=rounds, repeats=1, unit="s")


def _first_token(pool: Pool, server: Server | None, rounds: int) -> list[Row]:
    """Seconds until the first token, of prompts that are read anew or go on."""

    def of_pool(asked: dict[str, Any]) -> None:
        with pool.chat.stream(**asked) as stream:
            next(stream)

    def during_prefill(first_token: Callable[[dict[str, Any]], None]) -> float:
        long = threading.Thread(target=first_token, args=[_asked(_text(1500), max_tokens=1)])
        long.start()
        time.sleep(0.2)
        spent = seconds(lambda: first_token(_asked(_question(), max_tokens=1)))
        long.join()
        return spent

    def second_turn(first_token: Callable[[dict[str, Any]], None]) -> float:
        first = _asked(_text(1000), max_tokens=1)
        first_token(first)
        turns = [
            *first["messages"],
            {"role": "assistant", "content": "I see."},
            {"role": "user", "content": "Go on."},
        ]
        return seconds(lambda: first_token({**first, "messages": turns}))

    def of(text: Callable[[], str]) -> Callable[[Callable[[dict[str, Any]], None]], float]:
        return lambda first_token: seconds(lambda: first_token(_asked(text(), max_tokens=1)))

    scenes = {
        "1000 tokens": of(lambda: _text(1000)),
        "second turn after 1000 tokens": second_turn,
        "a chunk of 512 tokens": of(lambda: _text(480)),
        "short": of(_question),
        "short, beside a prompt of 1500": during_prefill,
    }
    rows: list[Row] = []
    for what, scene in scenes.items():
        contenders = {} if server is None else {"llama-server": partial(scene, server.first_token)}
        contenders["inferpool"] = partial(scene, of_pool)
        name = f"first token, {what}"
        rows += interleaved(name, contenders, rounds=rounds, repeats=1, unit="s")
    return rows


def _cancel(pool: Pool, repeats: int) -> list[Row]:
    """A prompt of 1,500 tokens is cancelled in its middle while seven others are answered."""
    generator = np.random.default_rng(0)
    ended: list[float] = []
    freed: list[float] = []
    others = [
        pool.chat.stream(**_asked(_question(), max_tokens=N_CTX - 100)) for _ in range(SLOTS - 1)
    ]
    for other in others:
        next(other)
    for _ in range(repeats):
        stream = pool.chat.stream(**_asked(_text(1500), max_tokens=1))
        time.sleep(generator.uniform(0.1, 1.0))
        began = time.perf_counter()
        stream.close()
        ended.append(time.perf_counter() - began)
        freed.append(seconds(lambda: pool.chat(**_asked("Hi!", max_tokens=1))))
    for other in others:
        other.close()
    name = "cancel in a prompt of 1,500 tokens"
    return [
        summed(name, "until the call has ended", ended),
        summed(name, "a short call in its slot", freed),
    ]


def _agreement(pool: Pool, llama: Any, number: int) -> list[Row]:
    """How many greedy answers of 64 tokens are those of `Llama`: alone, and eight at once."""
    questions = [_asked(_question(), max_tokens=64, cache_prompt=False) for _ in range(number)]
    expected = []
    for asked in questions:
        llama.reset()
        llama._ctx.kv_cache_clear()
        answer = llama.create_chat_completion(asked["messages"], temperature=0.0, max_tokens=64)
        expected.append(answer["choices"][0]["message"]["content"])
    measured = [pool.chat(**asked, logprobs=True, top_logprobs=2) for asked in questions]
    with ThreadPoolExecutor(SLOTS) as threads:
        together = list(threads.map(lambda asked: pool.chat(**asked, logprobs=True), questions))
    gaps = []
    for alone, other in zip(measured, together, strict=True):
        assert alone.logprobs is not None
        assert other.logprobs is not None
        for here, there in zip(alone.logprobs.content, other.logprobs.content, strict=False):
            if here.token != there.token:
                likeliest, second = here.top_logprobs
                gaps.append(likeliest.logprob - second.logprob)
                break
    name = f"greedy, {number} answers of 64 tokens"

    def row(what: str, value: float, unit: str) -> Row:
        return Row(name, what, unit, value, value, 1.0, number)

    rows = [
        row("alone, equal to Llama's", sum(map(_equal, measured, expected)), "answers"),
        row("eight at once, equal to Llama's", sum(map(_equal, together, expected)), "answers"),
    ]
    if gaps:
        widest = max(gaps)
        rows.append(row("widest gap between the two likeliest at a difference", widest, "nats"))
    return rows


def _equal(answer: ChatResult, expected: str) -> bool:
    return answer.text == expected
