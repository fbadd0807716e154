"""``inferpool embed``: lines to vectors."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal, Protocol

import click

from inferpool.cli.console import EPILOG, Failure, console, note, working
from inferpool.errors import ContextLengthExceeded, RemoteError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Vectors = npt.NDArray[np.float32]

__all__ = ["embed"]

Format = Literal["npy", "jsonl"]
_STDIO = "-"


@dataclass(frozen=True)
class Line:
    """A text and where it stands."""

    text: str
    file: str
    number: int

    @property
    def place(self) -> str:
        """Where it stands, as compilers write it."""
        return f"{self.file}:{self.number}"


class Writer(Protocol):
    """Writes vectors, some rows at a time."""

    def write(self, texts: Sequence[str], vectors: Vectors) -> None:
        """Write the vectors of ``texts``, shape (len(texts), d)."""


@click.command(epilog=EPILOG)
@click.argument(
    "files", nargs=-1, type=click.Path(exists=True, dir_okay=False, readable=True, allow_dash=True)
)
@click.option(
    "--model", "-m", default="minilm", show_default=True, help="Known name, or path of a GGUF."
)
@click.option(
    "--output",
    "-o",
    default=_STDIO,
    type=click.Path(dir_okay=False, writable=True, allow_dash=True),
    help="Where to write; - is stdout.  [default: -]",
)
@click.option(
    "--format",
    "-f",
    "format_",
    type=click.Choice(["npy", "jsonl"]),
    help="By default what the ending of --output says, and jsonl on stdout.",
)
@click.option(
    "--batch-size",
    default=64,
    show_default=True,
    type=click.IntRange(min=1),
    help="Lines per request.",
)
@click.option("--truncate", is_flag=True, help="Cut lines that are too long for the model.")
@click.option("--no-normalize", is_flag=True, help="Keep the length of the vectors.")
def embed(
    *,
    files: tuple[str, ...],
    model: str,
    output: str,
    format_: Format | None,
    batch_size: int,
    truncate: bool,
    no_normalize: bool,
) -> None:
    """Embed each line of FILES, or of standard input.

    Writes a float32 array of shape (lines, d) as .npy, or a JSON object per line with "text"
    and "embedding". Row i belongs to line i: an empty line has its vector, too.
    """
    from inferpool.host.pool import Pool

    format_ = _format(format_, output)
    lines = [line for name in files or (_STDIO,) for line in _read(name)]
    began = time.monotonic()
    with Pool(embed=model) as pool, _opened(output) as stream:
        with working(f"loading {model}"):
            pool.start()

        def compute(batch: Sequence[Line]) -> Vectors:
            texts = [line.text for line in batch]
            try:
                return pool.embed(texts, truncate=truncate, normalize=not no_normalize)
            except ContextLengthExceeded as error:
                raise _too_long(error, batch) from error
            except RemoteError as error:
                raise Failure(f"{batch[0].place} to {batch[-1].place}: {error}") from error

        writer = _Npy(stream, len(lines)) if format_ == "npy" else _Jsonl(stream)
        # A bar would run through the data, were both on the terminal.
        quiet = stream is sys.stdout.buffer and sys.stdout.isatty()
        _embed_all(lines, batch_size, compute, writer, quiet=quiet)
    note(f"{_count(len(lines))} in {time.monotonic() - began:.1f} s")


def _embed_all(
    lines: Sequence[Line],
    batch_size: int,
    compute: Callable[[Sequence[Line]], Vectors],
    writer: Writer,
    *,
    quiet: bool,
) -> None:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    err = console()
    with Progress(
        TextColumn("embedding"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=quiet or not err.is_terminal,
    ) as progress:
        task = progress.add_task("", total=len(lines))
        # No line at all makes one batch too: an array of shape (0, d) has to know its d.
        for batch in _batches(lines, batch_size) if lines else [lines]:
            writer.write([line.text for line in batch], compute(batch))
            progress.advance(task, len(batch))


def _batches(lines: Sequence[Line], size: int) -> Iterator[Sequence[Line]]:
    for start in range(0, len(lines), size):
        yield lines[start : start + size]


def _count(lines: int) -> str:
    return "1 line" if lines == 1 else f"{lines} lines"


def _format(asked: Format | None, output: str) -> Format:
    if asked is None:
        ending = ".jsonl" if output == _STDIO else Path(output).suffix
        if ending == ".npy":
            asked = "npy"
        elif ending == ".jsonl":
            asked = "jsonl"
        else:
            raise click.UsageError(f"'{output}' names no format; add --format npy or jsonl.")
    if asked == "npy" and output == _STDIO and sys.stdout.isatty():
        raise click.UsageError("npy is not text for a terminal; add --output FILE or redirect.")
    return asked


def _read(name: str) -> Iterator[Line]:
    if name == _STDIO:
        if sys.stdin.isatty():
            note("one text per line; Ctrl-D ends")
        yield from _lines(sys.stdin.buffer, "stdin")
    else:
        with Path(name).open("rb") as stream:
            yield from _lines(stream, name)


def _lines(stream: IO[bytes], name: str) -> Iterator[Line]:
    for number, line in enumerate(stream, 1):
        try:
            # "-sig": some editors begin a file with a byte order mark.
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise Failure(f"{name}:{number}: not UTF-8: {error.reason}") from error
        yield Line(text.removesuffix("\n").removesuffix("\r"), name, number)


def _too_long(error: ContextLengthExceeded, batch: Sequence[Line]) -> Failure:
    numbers = error.details
    return Failure(
        f"{batch[numbers['index']].place}: {numbers['asked']} tokens; "
        f"at most {numbers['context']} are taken",
        "--truncate cuts such lines; splitting them keeps their end",
    )


@contextlib.contextmanager
def _opened(output: str) -> Iterator[IO[bytes]]:
    """The stream to write to. A file appears under its name only once it is whole."""
    if output == _STDIO:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    path = Path(output)
    # A device or a pipe; /dev/stdout and its like can be opened, but what they resolve to can't.
    if path.exists() and not path.is_file():
        with path.open("wb") as stream:
            yield stream
        return
    path = path.resolve()
    partial = path.with_name(f"{path.name}.part")
    try:
        with partial.open("wb") as stream:
            if path.exists():  # who may read it stays the same
                shutil.copymode(path, partial)
            yield stream
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class _Npy:
    """A ``.npy`` file; its header is written with the first rows, which know their width."""

    def __init__(self, stream: IO[bytes], rows: int) -> None:
        self._stream = stream
        self._rows = rows
        self._begun = False

    def write(self, texts: Sequence[str], vectors: Vectors) -> None:
        from numpy.lib import format as npy

        if not self._begun:
            self._begun = True
            header = npy.header_data_from_array_1_0(vectors)
            shape = (self._rows, vectors.shape[1])
            npy.write_array_header_1_0(self._stream, {**header, "shape": shape})
        # Unlike numpy.save, this can write to a pipe.
        self._stream.write(vectors.tobytes())


class _Jsonl:
    """One JSON object per line."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def write(self, texts: Sequence[str], vectors: Vectors) -> None:
        import msgspec

        for text, vector in zip(texts, vectors, strict=True):
            row = {"text": text, "embedding": vector.tolist()}
            self._stream.write(msgspec.json.encode(row) + b"\n")
        self._stream.flush()
