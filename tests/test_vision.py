"""The vision role through a pool: what an image can be, documents, streams, cancelling."""

from __future__ import annotations

import asyncio
import io
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_models import write_projector

from inferpool import (
    AsyncPool,
    CallTimeout,
    ContextLengthExceeded,
    InvalidRequest,
    ModelLoadError,
    Pool,
    VisionConfig,
)
from inferpool.engine.images import decode_image
from inferpool.host.roles.vision import _image

GREEDY: dict[str, Any] = {"max_tokens": 6, "temperature": 0.0}
ARRAY = np.random.default_rng(1).integers(0, 256, (50, 70, 3), np.uint8)
IMAGE = Image.fromarray(ARRAY)


def encoded(layout: str, **options: Any) -> bytes:
    file = io.BytesIO()
    IMAGE.save(file, layout, **options)
    return file.getvalue()


PNG = encoded("PNG")
PDF = encoded("PDF", save_all=True, append_images=[IMAGE, IMAGE])


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> VisionConfig:
    path = write_projector(tmp_path_factory.mktemp("models") / "mmproj.gguf", width=576)
    return VisionConfig("smollm2", str(path), n_ctx=512, n_threads=1)


@pytest.fixture(scope="module")
def pool(config: VisionConfig) -> Iterator[Pool]:
    with Pool(vision=config) as pool:
        yield pool.start()


@pytest.fixture(autouse=True)
def no_worker_outlives_its_test() -> None:
    """The module's pool may: it is shared, and closed at the end."""


def test_an_image_in_any_form(pool: Pool, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(PNG)
    forms: list[Any] = [PNG, bytearray(PNG), path, str(path), IMAGE, ARRAY, [PNG]]
    answers = [pool.vision(form, prompt="What is it?", **GREEDY) for form in forms]
    assert len({answer.text for answer in answers}) == 1
    assert answers[0].finish_reason == "length"
    several = pool.vision([IMAGE, ARRAY, PNG], "What are they?", **GREEDY)
    assert several.usage.prompt_tokens > answers[0].usage.prompt_tokens + 30


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "CMYK", "F"])
def test_a_pil_image_is_what_its_file_is(mode: str) -> None:
    image = IMAGE.convert(mode)
    exif = image.getexif()
    exif[0x0112] = 6  # orientation: turned by 90 degrees
    shown = decode_image(_image(image), "image")
    assert shown.shape == (IMAGE.width, IMAGE.height, 3)
    if mode in {"RGBA", "P", "L"}:
        file = io.BytesIO()
        image.save(file, "PNG", exif=exif)
        np.testing.assert_array_equal(shown, decode_image(file.getvalue(), "image"))


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B", "I;16L"])
def test_16_bits_of_grey_are_not_cut_off(mode: str) -> None:
    dtype = {"I": "<i4", "I;16B": ">u2"}.get(mode, "<u2")
    image = Image.frombytes(mode, (2, 1), np.array([40_000, 255], dtype).tobytes())
    assert decode_image(_image(image), "image")[0, :, 0].tolist() == [156, 0]


@pytest.mark.parametrize("mode", ["La", "PA", "RGBa"])
def test_what_is_transparent_is_white_in_any_mode(mode: str) -> None:
    image = Image.frombytes(mode, (2, 1), bytes(2 * len(Image.new(mode, (1, 1)).tobytes())))
    np.testing.assert_array_equal(decode_image(_image(image), "image"), 255)


@pytest.mark.parametrize(
    ("tag", "kind", "value"),
    [
        (0x0112, 2, b"6\0\0\0"),  # an orientation in words
        (0x0112, 9, b"\xff\xff\xff\xff"),  # or -1
        (0x0112, 11, struct.pack("<f", 6)),  # or with a decimal point
        (0x011A, 7, b"high"),  # a resolution in words
    ],
)
def test_a_pil_image_may_have_exif_data_that_cannot_be_written(
    tag: int, kind: int, value: bytes
) -> None:
    entry = struct.pack("<HHI", tag, kind, len(value) if kind not in {9, 11} else 1) + value
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)
    file = io.BytesIO()
    IMAGE.convert("RGB").save(file, "JPEG", exif=exif)
    with Image.open(file) as image:
        shown = decode_image(_image(image), "image")
    np.testing.assert_array_equal(shown, decode_image(file.getvalue(), "image"))


def test_a_pil_image_may_have_exif_data_that_cannot_be_read() -> None:
    file = io.BytesIO()
    IMAGE.save(file, "PNG", exif=b"Exif\0\0neither II nor MM")
    with Image.open(file) as image:
        np.testing.assert_array_equal(decode_image(_image(image), "image"), ARRAY)


def test_a_pil_image_may_have_a_large_colour_profile() -> None:
    image = IMAGE.copy()
    image.info["icc_profile"] = bytes(2 << 20)
    np.testing.assert_array_equal(
        decode_image(_image(image), "image"), decode_image(_image(IMAGE), "image")
    )


def test_a_streamed_answer_is_the_whole_answer(pool: Pool) -> None:
    whole = pool.vision(PNG, "What is it?", **GREEDY)
    deltas = list(pool.vision.stream(PNG, "What is it?", **GREEDY))
    assert "".join(delta.text for delta in deltas) == whole.text
    assert deltas[-1].usage == whole.usage


def test_a_conversation_about_an_image(pool: Pool) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}]
    assert pool.vision(PNG, turns, **GREEDY).usage.completion_tokens == 6


@pytest.mark.parametrize("layout", ["PNG", "JPEG", "WEBP"])
def test_layouts(pool: Pool, layout: str) -> None:
    assert pool.vision(encoded(layout), "What is it?", **GREEDY).text


@pytest.mark.parametrize(
    ("image", "error"),
    [
        (b"no image", InvalidRequest),
        (b"", InvalidRequest),
        (PNG[:100], InvalidRequest),
        ([PNG, b"\0" * 1000], InvalidRequest),
        (np.zeros((2, 2)), TypeError),
        (3, TypeError),
        (None, TypeError),
        ([PNG] * 40, ContextLengthExceeded),
        ("no-such-file.png", FileNotFoundError),
    ],
)
def test_what_is_no_image_leaves_the_worker_alone(
    pool: Pool, image: Any, error: type[Exception]
) -> None:
    pid = pool.status()["vision"].pid
    with pytest.raises(error):
        pool.vision(image, "What is it?", **GREEDY)
    assert pool.vision(PNG, "What is it?", **GREEDY).text
    assert pool.status()["vision"].pid == pid


def test_options_are_refused_by_name(pool: Pool) -> None:
    with pytest.raises(TypeError, match="temprature"):
        pool.vision(PNG, "What?", temprature=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="page_tmeout"):
        pool.vision.pdf(PDF, "What?", page_tmeout=1)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="dpi"):
        pool.vision.pdf(PDF, "What?", dpi=0)


def test_a_document_page_by_page(pool: Pool, tmp_path: Path) -> None:
    path = tmp_path / "pages.pdf"
    path.write_bytes(PDF)
    pages = list(pool.vision.pdf(path, "What is it?", **GREEDY))
    assert [(page.page, page.total) for page in pages] == [(1, 3), (2, 3), (3, 3)]
    assert all(page.text for page in pages)
    some = list(pool.vision.pdf(PDF, "What is it?", pages=range(2, 4), **GREEDY))
    assert [page.page for page in some] == [2, 3]
    assert [page.text for page in some] == [page.text for page in pages[1:]]


def test_a_page_may_run_out_of_time(pool: Pool) -> None:
    pages = list(pool.vision.pdf(PDF, "Tell a story.", page_timeout=1e-6, **GREEDY))
    assert [page.finish_reason for page in pages] == ["timeout"] * 3


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"%PDF-1.7 broken",
        PDF[: len(PDF) // 2],
        (Path(__file__).parent / "data" / "encrypted.pdf").read_bytes(),
    ],
)
def test_what_is_no_document(pool: Pool, document: bytes) -> None:
    with pytest.raises(InvalidRequest):
        list(pool.vision.pdf(document, "What?", **GREEDY))
    with pytest.raises(InvalidRequest, match=", not 9"):
        list(pool.vision.pdf(PDF, "What?", pages=[9], **GREEDY))
    assert pool.vision(PNG, "What is it?", **GREEDY).text


def test_giving_a_document_up_frees_the_worker(pool: Pool) -> None:
    with pool.vision.pdf(PDF, "Tell a story.", temperature=0.0, max_tokens=4) as pages:
        assert next(pages).page == 1
    with pool.vision.stream(PNG, "Tell a long story.", temperature=0.0) as stream:
        next(stream)
    with pytest.raises(CallTimeout):
        pool.vision(PNG, "Tell a long story.", temperature=0.0, timeout=0.05)
    assert pool.vision(PNG, "What is it?", timeout=30, **GREEDY).text


def test_on_an_event_loop(config: VisionConfig) -> None:
    async def main() -> None:
        async with AsyncPool(vision=config) as pool:
            answer = await pool.vision(PNG, prompt="What is it?", **GREEDY)
            texts = [d.text async for d in pool.vision.stream(PNG, "What is it?", **GREEDY)]
            assert "".join(texts) == answer.text
            pages = [page async for page in pool.vision.pdf(PDF, "What?", pages=[2], **GREEDY)]
            assert [page.page for page in pages] == [2]

    asyncio.run(main())


def test_files_are_read_beside_the_loop(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, document = tmp_path / "image.png", tmp_path / "pages.pdf"
    path.write_bytes(PNG)
    document.write_bytes(PDF)
    threads: list[threading.Thread] = []
    read_bytes, save = Path.read_bytes, Image.Image.save

    def noting(original: Any, *arguments: Any, **options: Any) -> Any:
        threads.append(threading.current_thread())
        return original(*arguments, **options)

    monkeypatch.setattr(Path, "read_bytes", lambda *a: noting(read_bytes, *a))
    monkeypatch.setattr(Image.Image, "save", lambda *a, **o: noting(save, *a, **o))

    async def main() -> None:
        vision = pool.as_async().vision
        assert (await vision([path, IMAGE], "What?", **GREEDY)).text
        assert [delta async for delta in vision.stream(path, "What?", **GREEDY)]
        assert [page async for page in vision.pdf(document, "What?", pages=[1], **GREEDY)]
        with pytest.raises(FileNotFoundError):
            await anext(vision.stream("no-such-file.png", "What?"))
        with pytest.raises(TypeError, match="temprature"):  # before anything is read
            vision.stream("no-such-file.png", "What?", temprature=1)  # type: ignore[call-arg]

    asyncio.run(main())
    assert len(threads) == 5
    assert threading.current_thread() not in threads


def test_a_stream_may_be_closed_while_its_files_are_read(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, go_on = threading.Event(), threading.Event()

    def slow(path: Path) -> bytes:
        reading.set()
        go_on.wait()
        return PNG

    monkeypatch.setattr(Path, "read_bytes", slow)

    async def main() -> None:
        stream = pool.as_async().vision.stream("image.png", "What?", **GREEDY)
        first = asyncio.create_task(anext(stream, None))
        while not reading.is_set():
            await asyncio.sleep(0.001)
        stream.close()
        go_on.set()
        assert await first is None

    asyncio.run(main())
    assert pool.status()["vision"].in_flight == 0


def test_a_timeout_is_for_reading_the_files_too(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(Path, "read_bytes", lambda _path: go_on.wait(10) and PNG)

    async def main() -> None:
        vision = pool.as_async().vision
        try:
            for call in (
                vision("image.png", "What?", timeout=0.1),
                anext(vision.stream("image.png", "What?", timeout=0.1)),
                anext(vision.pdf("pages.pdf", "What?", timeout=0.1)),
            ):
                began = time.monotonic()
                with pytest.raises(CallTimeout, match=r"within 0\.1 s"):
                    await call
                assert time.monotonic() - began < 5
        finally:
            go_on.set()

    asyncio.run(main())


def test_a_projector_of_another_width(tmp_path: Path) -> None:
    path = write_projector(tmp_path / "narrow.gguf", width=64)
    with Pool(vision=VisionConfig("smollm2", str(path))) as pool:
        for _ in range(2):
            with pytest.raises(ModelLoadError, match="n_embd"):
                pool.vision(PNG, "What is it?")


def test_the_role_needs_a_config() -> None:
    with pytest.raises(TypeError, match="VisionConfig"):
        Pool(vision="smollm2")
