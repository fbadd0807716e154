"""What the subcommands share: how they speak, wait and fail."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from inferpool.errors import InferpoolError, ModelNotFound, WorkerCrashed, WorkerError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "EPILOG",
    "EXIT_FAILED",
    "EXIT_INTERRUPTED",
    "EXIT_USAGE",
    "Commands",
    "Failure",
    "accept_any_text",
    "console",
    "duration",
    "explain",
    "note",
    "printable",
    "report",
    "working",
]

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

EPILOG = """
\b
Exit codes:
  0    all went well
  1    the operation failed
  2    usage error, or no such model
  130  interrupted
"""

_HINT = "hint: "
_LOG_LINES = 5
_NO_CONTROL_CHARACTERS = {
    code: "\N{REPLACEMENT CHARACTER}"
    for code in (*range(0x20), *range(0x7F, 0xA0))
    if chr(code) not in "\n\t"
}


class Failure(click.ClickException):
    """Ends the command with ``error:`` and ``hint:`` lines on stderr."""

    exit_code = EXIT_FAILED

    def __init__(self, message: str, *hints: str) -> None:
        super().__init__(message)
        self.hints = hints

    def show(self, file: Any = None) -> None:
        """Print the lines; they always go to stderr."""
        report(self)


class Commands(click.Group):
    """A group whose commands fail by error and hint lines instead of tracebacks."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; say in the documented exit code how it ended."""
        _open_closed_streams()
        try:
            return super().invoke(ctx)
        except InferpoolError as error:
            code = EXIT_USAGE if isinstance(error, ModelNotFound) else EXIT_FAILED
            report(error)
            ctx.exit(code)
        except KeyboardInterrupt:
            # The terminal shows ^C, and the prompt of the shell belongs on its own line.
            if sys.stderr.isatty():
                print(file=sys.stderr)
            ctx.exit(EXIT_INTERRUPTED)
        except BrokenPipeError:
            raise  # whoever read our output has seen enough: click ends quietly
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            report(Failure(f"{where}{error.strerror or error}"))
            ctx.exit(EXIT_FAILED)


def _open_closed_streams() -> None:
    """Let standard streams that are closed lead nowhere."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115


def console(*, stderr: bool = True) -> Console:
    """A rich console for text that is not to be wrapped, marked up or highlighted."""
    from rich.console import Console

    options: dict[str, Any] = {
        "file": sys.stderr if stderr else sys.stdout,
        "highlight": False,
        "markup": False,
        "emoji": False,
        "soft_wrap": True,
    }
    out = Console(**options)
    # NO_COLOR leaves bold and dim in rich; who sets it wants plain text.
    out = Console(**options, color_system=None) if out.no_color else out
    if not out.width:  # COLUMNS=0, with which rich writes nothing at all
        out.width = 80
    return out


def note(text: str) -> None:
    """Say something aside, on stderr."""
    console().print(text, style="dim")


def report(error: Exception) -> None:
    """Print an error, and what would help, on stderr."""
    from rich.text import Text

    message, hints = explain(error)
    out = console()
    out.print(Text.assemble(("error:", "bold red"), f" {message}"))
    if isinstance(error, WorkerError) and error.exit != "SIGKILL":
        # Of a worker that was killed from outside the log has nothing to say.
        for line in error.log_tail.splitlines()[-_LOG_LINES:]:
            out.print(Text.assemble(("log:", "dim"), f" {printable(line)}"))
    for hint in hints:
        out.print(Text.assemble(("hint:", "bold cyan"), f" {hint}"))


def explain(error: Exception) -> tuple[str, list[str]]:
    """The message of an error in one line, and its hints."""
    if isinstance(error, Failure):
        return printable(error.message), list(error.hints)
    message = str(error).partition("\n--- last log lines ---\n")[0]
    message, _, hint = message.partition(_HINT)
    hints = [hint.strip()] if hint else []
    if isinstance(error, WorkerCrashed):
        message = f"{type(error).__name__}: {message}"
        if error.exit == "SIGKILL":
            hints.append("SIGKILL comes from outside: somebody's kill, or memory ran out")
    return printable(message.strip()), hints


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Say on stderr what is being waited for: a spinner, or a line where that can't turn."""
    out = console()
    if out.is_terminal:
        with out.status(what):
            yield
    else:
        out.print(f"{what} ...")
        yield


def duration(seconds: float) -> str:
    """Seconds for people: ``"3.1 ms"``, ``"0.94 s"``."""
    return f"{seconds * 1000:.1f} ms" if seconds < 0.1 else f"{seconds:.2f} s"


def printable(text: str) -> str:
    """Text of foreign origin without the control characters that a terminal would obey."""
    return text.translate(_NO_CONTROL_CHARACTERS)


def accept_any_text() -> None:
    """Let bytes that are not text, or that the terminal can't show, pass as U+FFFD or "?"."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
