"""``inferpool chat``: a conversation, at a terminal or through a pipe."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING

import click

from inferpool.cli.console import (
    EPILOG,
    EXIT_FAILED,
    accept_any_text,
    note,
    printable,
    report,
    working,
)
from inferpool.errors import InferpoolError

if TYPE_CHECKING:
    from inferpool.host.roles import Chat, ChatOptions
    from inferpool.messages import ChatDelta

__all__ = ["chat"]

_PROMPT = "> "
_HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


@click.command(epilog=EPILOG)
@click.option(
    "--model", "-m", default="smollm2", show_default=True, help="Known name, or path of a GGUF."
)
@click.option("--system", "-s", metavar="TEXT", help="What the model should keep to.")
@click.option(
    "--max-tokens",
    default=512,
    show_default=True,
    type=click.IntRange(min=1),
    help="Tokens of an answer at most.",
)
@click.option(
    "--temperature",
    "-t",
    type=click.FloatRange(min=0),
    help="0 always takes the most likely token; more is more surprising.",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**32 - 2), help="The same seed gives the same answers."
)
@click.option(
    "--log-dir", type=click.Path(file_okay=False), help="Folder for the log of the worker."
)
def chat(
    *,
    model: str,
    system: str | None,
    max_tokens: int,
    temperature: float | None,
    seed: int | None,
    log_dir: str | None,
) -> None:
    """Talk with a model.

    At a terminal, Ctrl-C stops an answer, /reset forgets the conversation, and /exit or Ctrl-D
    leaves. Otherwise each line of standard input is a prompt; only answers go to stdout, and
    the exit code is 1 if one of them failed.
    """
    from inferpool.host.pool import Pool

    options: ChatOptions = {"max_tokens": max_tokens, "seed": seed}
    if temperature is not None:
        options["temperature"] = temperature
    accept_any_text()
    with Pool(chat=model, log_dir=log_dir) as pool:
        with working(f"loading {model}"):
            pool.start()
        failed = _converse(Conversation(pool.chat, system, options), sys.stdin.isatty())
    if failed:
        click.get_current_context().exit(EXIT_FAILED)


class Conversation:
    """The turns so far, and the model that answers the next.

    Attributes:
        turns: what is remembered, in pairs of question and answer.
    """

    def __init__(self, chat: Chat, system: str | None, options: ChatOptions) -> None:
        self._chat = chat
        self._options = options
        self._system: list[dict[str, str]] = []
        if system is not None:
            # Arguments that are not UTF-8 come as surrogates, which can't travel.
            text = system.encode(errors="replace").decode()
            self._system.append({"role": "system", "content": text})
        self.turns: list[dict[str, str]] = []

    def reset(self) -> None:
        """Forget all turns."""
        self.turns.clear()

    def ask(self, prompt: str) -> Generator[ChatDelta]:
        """Answer piece by piece.

        The turn is remembered with what was said until the iterator was closed; a turn that
        fails is not remembered.
        """
        question = {"role": "user", "content": prompt}
        messages = [*self._system, *self.turns, question]
        pieces = []
        forgotten = 0
        try:
            with self._chat.stream(messages, **self._options) as stream:
                for delta in stream:
                    pieces.append(delta.text)
                    forgotten = delta.dropped_messages
                    yield delta
        except InferpoolError:
            pieces.clear()
            raise
        finally:
            if answer := "".join(pieces):
                # What the context no longer holds need not be sent again.
                del self.turns[:forgotten]
                self.turns += [question, {"role": "assistant", "content": answer}]


def _oldest(exchanges: int) -> str:
    return "oldest exchange" if exchanges == 1 else f"{exchanges} oldest exchanges"


def _converse(conversation: Conversation, interactive: bool) -> bool:
    """Answer prompt after prompt; whether one of them failed that nobody could see fail."""
    failed = False
    if interactive:
        note(_HELP)
    for line in _prompts(interactive):
        prompt = line.strip()
        if prompt == "/exit":
            break
        if prompt == "/reset":
            conversation.reset()
            note("(forgotten)")
        elif prompt == "/help":
            note(_HELP)
        elif prompt:
            try:
                _answer(conversation, prompt)
            except (InferpoolError, ValueError) as error:  # a value may be out of range
                report(error)
                failed = not interactive
            except KeyboardInterrupt:
                if not interactive:
                    raise
                note("(stopped)")
    return failed


def _answer(conversation: Conversation, prompt: str) -> None:
    """Write an answer to stdout as it comes."""
    show = printable if sys.stdout.isatty() else str
    at_line_start = True
    delta = None
    with contextlib.closing(conversation.ask(prompt)) as deltas:
        try:
            for delta in deltas:
                if delta.text:
                    print(show(delta.text), end="", flush=True)
                    at_line_start = delta.text.endswith("\n")
        finally:
            if not at_line_start:
                print(flush=True)
    if delta is not None and delta.dropped_messages:
        note(f"(the context is full: forgot the {_oldest(delta.dropped_messages // 2)})")
    if delta is not None and delta.finish_reason == "length":
        note("(cut: --max-tokens, or the context, allows no more)")


def _prompts(interactive: bool) -> Iterator[str]:
    if not interactive:
        yield from sys.stdin
        return
    ask = _terminal_input()
    while True:
        try:
            yield ask()
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            note("\n(Ctrl-D or /exit leaves)")


def _terminal_input() -> Callable[[], str]:
    if sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives `input` line editing and a history
        return lambda: input(_PROMPT)

    def ask() -> str:
        # `input` would write its prompt among the answers.
        print(_PROMPT, end="", file=sys.stderr, flush=True)
        if line := sys.stdin.readline():
            return line
        raise EOFError

    return ask
