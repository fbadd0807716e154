"""Encoded images, and pages of PDF documents, to pixels.

Whatever comes in is foreign: only the parsers that are needed are let near it, and sizes are
looked at before memory is taken for them.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from inferpool.engine.abort import AbortToken
from inferpool.errors import CallCancelled, InvalidRequest, ModelLoadError

try:
    import pypdfium2 as pdfium
    from PIL import Image, UnidentifiedImageError
except ModuleNotFoundError as error:
    raise ModelLoadError(
        f'the vision role needs {error.name}. hint: pip install "inferpool[vision]"'
    ) from error

__all__ = ["Document", "Pixels", "decode_image"]

Pixels = npt.NDArray[np.uint8]
"""Rows of red, green and blue: shape (height, width, 3), C-contiguous."""

_FORMATS = ("PNG", "JPEG", "WEBP")
_ORIENTATION = 0x0112
# How to put an image upright, by what EXIF says of its orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MAX_PIXELS = 1 << 26
Image.MAX_IMAGE_PIXELS = None  # its own limit warns, or raises without the numbers
# Longest side of a rasterised page; a PDF may declare pages of 5 m.
_MAX_PAGE_SIDE = 4096
_POINTS_PER_INCH = 72
_FLAGS = pdfium.raw.FPDF_ANNOT | pdfium.raw.FPDF_REVERSE_BYTE_ORDER


def decode_image(image: object, name: str) -> Pixels:
    """The pixels of a PNG, JPEG or WebP file, or of an array.

    Rotated as its EXIF data say; what is transparent becomes white.

    Args:
        image: the bytes of a file, or uint8 of shape (height, width, 3).
        name: what to call it in an error.

    Raises:
        InvalidRequest: if it is neither, is broken, or has more than 2**26 pixels.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise InvalidRequest(
                f"{name} must be uint8 of shape (height, width, 3), not {image.dtype} of shape "
                f"{image.shape}"
            )
        _check_size(image.shape[1], image.shape[0], name)
        return np.ascontiguousarray(image)
    if not isinstance(image, bytes):
        raise InvalidRequest(f"{name} must be bytes or an array, not {type(image).__name__}")
    try:
        with Image.open(io.BytesIO(image), formats=_FORMATS) as opened:
            _check_size(opened.width, opened.height, name)
            return _to_rgb(opened)
    except InvalidRequest:
        raise
    except UnidentifiedImageError as error:
        raise InvalidRequest(f"{name} is not an image of type {' or '.join(_FORMATS)}") from error
    # Pillow's decoders raise whatever broken data make them stumble over.
    except Exception as error:
        raise InvalidRequest(f"{name} can't be decoded: {error}") from error


def _check_size(width: int, height: int, name: str) -> None:
    if width * height > _MAX_PIXELS:
        raise InvalidRequest(
            f"{name} has {width} by {height} pixels; at most {_MAX_PIXELS} in all are allowed"
        )


def _to_rgb(opened: Image.Image) -> Pixels:
    # Pillow's own function writes the EXIF data anew, which fails for some that it reads.
    try:
        turn = _TURNS.get(opened.getexif().get(_ORIENTATION, 1))
    except Exception:  # noqa: BLE001  # broken data of this kind leave the pixels whole
        turn = None
    upright = opened if turn is None else opened.transpose(turn)
    if upright.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    if upright.has_transparency_data:
        layers = upright.convert("RGBA")
        white = Image.new("RGBA", layers.size, "white")
        upright = Image.alpha_composite(white, layers)
    return np.array(upright.convert("RGB"))


class Document:
    """A PDF document, whose pages become pixels one at a time.

    Attributes:
        n_pages: how many it has.
    """

    def __init__(self, data: bytes, password: str | None = None) -> None:
        """Read the document's structure.

        Raises:
            InvalidRequest: if it is broken or no PDF, or the password is missing or wrong.
        """
        try:
            self._pdf = pdfium.PdfDocument(data, password=password)
            # What fields of a form hold is drawn only where this comes before the first page.
            self._pdf.init_forms()
        except pdfium.PdfiumError as error:
            if error.err_code == pdfium.raw.FPDF_ERR_PASSWORD:
                hint = "pass password=" if password is None else "the password is wrong"
                raise InvalidRequest(f"the PDF is encrypted. hint: {hint}") from error
            raise InvalidRequest(f"not a PDF that can be read: {error}") from error
        self.n_pages = len(self._pdf)

    def close(self) -> None:
        """Free the document."""
        self._pdf.close()

    def check(self, pages: Sequence[int]) -> None:
        """Raise `InvalidRequest` if one of these page numbers, counted from 1, is not there."""
        for number in pages:
            if not 1 <= number <= self.n_pages:
                raise InvalidRequest(f"the PDF has pages 1 to {self.n_pages}, not {number}")

    def rasterise(self, number: int, dpi: int, abort: AbortToken | None = None) -> Pixels:
        """The pixels of a page.

        Args:
            number: of the page, counted from 1.
            dpi: pixels per inch; less for pages that would have a side of over 4096 pixels.
            abort: ends it early.

        Raises:
            InvalidRequest: if the page is broken.
            CallCancelled: if ``abort`` was set.
        """
        try:
            page = self._pdf[number - 1]
        except pdfium.PdfiumError as error:
            raise InvalidRequest(f"page {number} of the PDF can't be read: {error}") from error
        try:
            width, height = page.get_size()
            scale = min(dpi / _POINTS_PER_INCH, _MAX_PAGE_SIDE / max(width, height, 1.0))
            size = (max(1, round(width * scale)), max(1, round(height * scale)))
            bitmap = pdfium.PdfBitmap.new_native(
                *size, pdfium.raw.FPDFBitmap_BGR, rev_byteorder=True
            )
            bitmap.fill_rect((255, 255, 255, 255), 0, 0, *size)
            _render(page, bitmap, size, abort)
            if self._pdf.formenv is not None:
                pdfium.raw.FPDF_FFLDraw(self._pdf.formenv, bitmap, page, 0, 0, *size, 0, _FLAGS)
            return np.array(bitmap.to_numpy(), order="C")
        finally:
            page.close()


def _render(
    page: pdfium.PdfPage, bitmap: pdfium.PdfBitmap, size: tuple[int, int], abort: AbortToken | None
) -> None:
    """Draw a page piece by piece, with a look at the abort token in between."""
    raw = pdfium.raw
    pausing = dict(raw.IFSDK_PAUSE._fields_)["NeedToPauseNow"]
    look = pausing(lambda _pause: abort is not None and abort.is_set())
    pause = raw.IFSDK_PAUSE(version=1, NeedToPauseNow=look, user=None)
    status = raw.FPDF_RenderPageBitmap_Start(bitmap, page, 0, 0, *size, 0, _FLAGS, pause)
    try:
        while status == raw.FPDF_RENDER_TOBECONTINUED:
            if abort is not None and abort.is_set():
                raise CallCancelled("the call was cancelled")
            status = raw.FPDF_RenderPage_Continue(page, pause)
        if status != raw.FPDF_RENDER_DONE:
            raise InvalidRequest("a page of the PDF can't be drawn")
    finally:
        raw.FPDF_RenderPage_Close(page)
