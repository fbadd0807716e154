"""The ``vision`` role as `Pool` and `AsyncPool` offer it."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Unpack

import numpy as np

from inferpool.host.calls import Deadline, Naming, open_call
from inferpool.host.drive import LoopDriver, ThreadDriver
from inferpool.host.roles.chat import Messages, Sampling, as_deltas, as_turns, ask, read_given
from inferpool.host.roles.naming import naming
from inferpool.host.stream import AsyncStream, Stream, read_beside
from inferpool.host.supervisor import Supervisor
from inferpool.messages import (
    ChatDelta,
    ChatResult,
    Conversation,
    PdfPage,
    PdfRequest,
    VisionRequest,
    read,
)

if TYPE_CHECKING:
    from PIL import Image

    AnImage: TypeAlias = bytes | str | os.PathLike[str] | np.ndarray | Image.Image

__all__ = ["AsyncVision", "PdfOptions", "Vision"]


class PdfOptions(Sampling, total=False):
    """How to read a PDF document, and sampling options as for chat."""

    pages: Iterable[int] | None
    """Numbers of the pages to read, counted from 1, such as ``range(3, 6)``; default: all."""
    page_timeout: float | None
    """Seconds that a page may take. What there is of its text by then is its result, with
    ``finish_reason="timeout"``, and the next page follows."""
    password: str | None
    """What opens an encrypted document."""
    dpi: int | None
    """Default 144: pixels per inch of the rasterised page."""


_PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA"})
# What becomes of other modes that have transparency; those without become RGB.
_PNG_MODE_OF = {"La": "LA", "PA": "RGBA", "RGBa": "RGBA"}
_ORIENTATION = 0x0112  # of EXIF
_PDF_OPTIONS = frozenset(PdfOptions.__annotations__) - frozenset(Sampling.__annotations__)


class Vision:
    """The ``vision`` role of a `Pool`."""

    def __init__(self, supervisor: Supervisor, driver: ThreadDriver) -> None:
        self._supervisor = supervisor
        self._driver = driver

    def __call__(
        self,
        image: AnImage | Sequence[AnImage],
        prompt: Messages,
        *,
        timeout: float | None = None,
        **options: Unpack[Sampling],
    ) -> ChatResult:
        """Answer a prompt about an image, or several.

        Args:
            image: the bytes of a PNG, JPEG or WebP file, its path, a PIL image, or a uint8 array
                of shape (height, width, 3); or a sequence of these, which come before the text
                of the prompt, in their order. The files are read here, and parsed in the worker.
            prompt: what to ask, or turns with ``role`` and ``content``; the images belong to the
                last one.
            timeout: seconds until `CallTimeout`.
            **options: sampling options and ``model``, as for chat.

        Raises:
            InvalidRequest: an image can't be decoded, or has over 2**26 pixels.
            ContextLengthExceeded: prompt and images do not fit into the model's context.
            TypeError: an image of another type, or an unknown option.
            OSError: a file can't be read.
        """
        request = _request(image, prompt, options)()
        return self._driver.run(ask(self._supervisor, self._driver, "vision", request, timeout))

    def stream(
        self,
        image: AnImage | Sequence[AnImage],
        prompt: Messages,
        *,
        timeout: float | None = None,
        **options: Unpack[Sampling],
    ) -> Stream[ChatDelta]:
        """As a plain call, piece by piece. Closing the stream, or dropping it, stops the model."""
        request = _request(image, prompt, options)()
        opening = partial(open_call, self._supervisor, self._driver, "vision.stream", request)
        return Stream(self._driver, opening, timeout, as_deltas)

    def pdf(
        self,
        document: bytes | str | os.PathLike[str],
        prompt: Messages,
        *,
        timeout: float | None = None,
        **options: Unpack[PdfOptions],
    ) -> Stream[PdfPage]:
        """Ask the same about each page of a PDF document, and get each answer once it is there.

        Args:
            document: the bytes of the file, or its path.
            prompt: what to ask, as for a plain call.
            timeout: seconds until `CallTimeout`, for all pages together.
            **options: see `PdfOptions`, and `ModelOption` for ``model``.

        Returns:
            A stream of `PdfPage`: ``page``, ``total``, ``text``. Closing it, or dropping it, stops
            the model, also within a page.

        Raises:
            InvalidRequest: the document is broken or encrypted, or has no such page.
            TypeError, ValueError: an unknown option, or one out of range.
            OSError: the file can't be read.
        """
        request = _pdf_request(document, prompt, options)()
        opening = partial(open_call, self._supervisor, self._driver, "vision.pdf", request)
        return Stream(self._driver, opening, timeout, _pages)


class AsyncVision:
    """The ``vision`` role of an `AsyncPool`. Images and documents are read in a thread."""

    def __init__(self, supervisor: Supervisor, driver: LoopDriver) -> None:
        self._supervisor = supervisor
        self._driver = driver

    async def __call__(
        self,
        image: AnImage | Sequence[AnImage],
        prompt: Messages,
        *,
        timeout: float | None = None,
        **options: Unpack[Sampling],
    ) -> ChatResult:
        """As `Vision.__call__`."""
        deadline = Deadline(timeout)
        request = await read_beside(_request(image, prompt, options), deadline)
        return await self._driver.run(
            ask(self._supervisor, self._driver, "vision", request, deadline)
        )

    def stream(
        self,
        image: AnImage | Sequence[AnImage],
        prompt: Messages,
        *,
        timeout: float | None = None,
        **options: Unpack[Sampling],
    ) -> AsyncStream[ChatDelta]:
        """As `Vision.stream`, for ``async for``. Images are read, and sent, with the first item."""
        reading = _request(image, prompt, options)
        opening = partial(open_call, self._supervisor, self._driver, "vision.stream")
        return AsyncStream(self._driver, opening, timeout, as_deltas, reading)

    def pdf(
        self,
        document: bytes | str | os.PathLike[str],
        prompt: Messages,
        *,
        timeout: float | None = None,
        **options: Unpack[PdfOptions],
    ) -> AsyncStream[PdfPage]:
        """As `Vision.pdf`, for ``async for``. The file is read, and sent, with the first item."""
        reading = _pdf_request(document, prompt, options)
        opening = partial(open_call, self._supervisor, self._driver, "vision.pdf")
        return AsyncStream(self._driver, opening, timeout, _pages, reading)


def _request(
    image: AnImage | Sequence[AnImage], prompt: Messages, options: Sampling
) -> Callable[[], VisionRequest | Naming]:
    """Check the options; what is returned reads the images, which may take long."""
    model = options.pop("model", None)
    chat = _chat(prompt, options)

    def reading() -> VisionRequest | Naming:
        several = image if isinstance(image, list | tuple) else [image]
        return naming(model, VisionRequest(images=[_image(each) for each in several], chat=chat))

    return reading


def _pdf_request(
    document: bytes | str | os.PathLike[str], prompt: Messages, options: PdfOptions
) -> Callable[[], PdfRequest | Naming]:
    """Check the sampling options; what is returned reads the document."""
    model = options.pop("model", None)
    sampling: dict[str, Any] = dict(options)
    own = {name: sampling.pop(name) for name in _PDF_OPTIONS if name in sampling}
    if own.get("pages") is not None:
        own["pages"] = list(own["pages"])
    chat = _chat(prompt, sampling)

    def reading() -> PdfRequest | Naming:
        data = document if isinstance(document, bytes) else Path(document).read_bytes()
        return naming(model, read_given({"document": data, "chat": chat, **own}, PdfRequest))

    return reading


def _chat(prompt: Messages, options: Any) -> Conversation:
    return read_given({"messages": as_turns(prompt), **options}, Conversation)


def _image(image: Any) -> bytes | np.ndarray:
    if isinstance(image, bytes):
        return image
    if isinstance(image, bytearray | memoryview):
        return bytes(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise TypeError(
                "an image array must be uint8 of shape (height, width, 3), not "
                f"{image.dtype} of shape {image.shape}"
            )
        return image
    if isinstance(image, str | os.PathLike):
        return Path(image).read_bytes()
    pillow = sys.modules.get("PIL.Image")  # whoever has an image of it has imported it
    if pillow is not None and isinstance(image, pillow.Image):
        return _file(image, pillow.Exif())
    raise TypeError(
        "an image must be bytes, a path, a PIL image or an array, not " + type(image).__name__
    )


def _file(image: Image.Image, exif: Image.Exif) -> bytes:
    """A PIL image as PNG, in its own colours and the way it was taken."""
    # What else is known of it matters to nobody, and what was read can't always be written.
    try:
        orientation = image.getexif().get(_ORIENTATION, 0)
    except Exception:  # noqa: BLE001  # as in the worker
        orientation = 0
    if orientation in range(1, 9):
        exif[_ORIENTATION] = int(orientation)  # it may be a fraction
    if image.mode.startswith("I"):  # grey, of which a PNG takes 16 bits
        image = image.convert("I").convert("I;16")
    elif image.mode not in _PNG_MODES:
        image = image.convert(_PNG_MODE_OF.get(image.mode, "RGB"))
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif, icc_profile=None)
    return file.getvalue()


def _pages(items: Sequence[Any]) -> Sequence[PdfPage]:
    return [read(item, PdfPage) for item in items]
