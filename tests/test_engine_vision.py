"""The vision role: images and PDF pages, against mtmd's own helper, limits, cancelling."""

from __future__ import annotations

import ctypes
import io
import re
import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from engine_fakes import CountdownAbort, FakeReply
from PIL import Image, ImageOps
from tiny_models import write_projector, write_qwen3

from inferpool.engine import backend, projector
from inferpool.engine.abort import Deadline
from inferpool.engine.answer import collect
from inferpool.engine.images import Document, Pixels, decode_image
from inferpool.engine.vision import VisionEngine
from inferpool.errors import (
    CallCancelled,
    ContextLengthExceeded,
    InvalidRequest,
    ModelLoadError,
    ModelNotFound,
)
from inferpool.messages import ChatMessage, ChatRequest
from inferpool.roles import vision as role

DATA = Path(__file__).parent / "data"
WIDTH_OF_SMOLLM2 = 576
IMAGE_TOKENS = 16  # 4 by 4 patches


def pixels(seed: int, height: int = 50, width: int = 70) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def encoded(image: Pixels | Image.Image, layout: str, **options: Any) -> bytes:
    file = io.BytesIO()
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image.save(file, layout, **options)
    return file.getvalue()


def pdf(n_pages: int) -> bytes:
    """Each page of its own grey."""
    pages = [Image.new("RGB", (70, 50), (60 * i, 60 * i, 60 * i)) for i in range(n_pages)]
    return encoded(pages[0], "PDF", save_all=True, append_images=pages[1:])


def form(value: str) -> bytes:
    """A page of 200 by 100 points, on which a field holds a text, and nothing else is."""
    field = "/Subtype/Widget/FT/Tx/T(name)/Rect[20 20 180 60]/DA(/F 24 Tf 0 g)"
    objects = [
        "<</Type/Catalog/Pages 2 0 R/AcroForm<</Fields[4 0 R]/DR<</Font<</F 5 0 R>>>>>>>>",
        "<</Type/Pages/Count 1/Kids[3 0 R]>>",
        "<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 100]/Annots[4 0 R]/Resources<<>>>>",
        f"<</Type/Annot{field}/F 4/P 3 0 R/V({value})>>",
        "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    numbered = [f"{i} 0 obj{text}endobj" for i, text in enumerate(objects, 1)]
    return "\n".join(["%PDF-1.7", *numbered, "trailer<</Root 1 0 R>>"]).encode()


def request(text: str = "What is this?", **options: Any) -> ChatRequest:
    options = {"max_tokens": 8, "temperature": 0.0, **options}
    return ChatRequest(messages=[ChatMessage(role="user", content=text)], **options)


@pytest.fixture(scope="module")
def mmproj(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "mmproj.gguf"
    return write_projector(path, width=WIDTH_OF_SMOLLM2)


@pytest.fixture(scope="module")
def session(mmproj: Path) -> Iterator[role.VisionSession]:
    made = make_session(mmproj)
    yield made
    made.close()
    made.close()


@pytest.fixture(scope="module")
def engine(session: role.VisionSession) -> VisionEngine:
    return session.engine


def make_session(
    mmproj: Path | str, model: Path | str = "smollm2", **options: Any
) -> role.VisionSession:
    options |= {"model": str(model), "mmproj": str(mmproj), "n_ctx": 512, "n_threads": 1}
    return role.make_session(SimpleNamespace(options=options), CountdownAbort())


def answer(engine: VisionEngine, images: list[Pixels], **options: Any) -> str:
    return "".join(delta.text for delta in engine.stream(images, request(**options)))


def logits(engine: VisionEngine, images: list[Pixels]) -> np.ndarray:
    """What the model expects after the prompt."""
    stream = engine.stream(images, request(max_tokens=1))
    list(stream)
    source = backend.lib.llama_get_logits_ith(engine._context.handle, -1)
    return np.ctypeslib.as_array(source, (engine._model.n_vocab,)).copy()


# Images


@pytest.mark.parametrize("layout", ["PNG", "JPEG", "WEBP"])
def test_files_are_decoded(layout: str) -> None:
    flat = np.full((40, 30, 3), (200, 30, 90), np.uint8)
    decoded = decode_image(encoded(flat, layout), "image")
    assert decoded.dtype == np.uint8
    assert decoded.shape == flat.shape
    assert np.abs(decoded.astype(int) - flat).max() <= 8  # two of the formats are lossy


def test_png_is_exact_and_arrays_are_taken_as_they_are() -> None:
    image = pixels(1)
    np.testing.assert_array_equal(decode_image(encoded(image, "PNG"), "image"), image)
    turned = image.transpose(1, 0, 2)
    decoded = decode_image(turned, "image")
    np.testing.assert_array_equal(decoded, turned)
    assert decoded.flags.c_contiguous


def test_modes_become_rgb() -> None:
    grey = Image.fromarray(pixels(1)[:, :, 0])
    np.testing.assert_array_equal(
        decode_image(encoded(grey, "PNG"), "image")[:, :, 1], np.asarray(grey)
    )
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    np.testing.assert_array_equal(decode_image(encoded(clear, "PNG"), "image"), 255)
    deep = Image.fromarray(np.array([[40_000, 1_000]], np.uint16))
    np.testing.assert_array_equal(
        decode_image(encoded(deep, "PNG"), "image"), [[[156] * 3, [3] * 3]]
    )


def test_a_turned_photo_is_put_upright() -> None:
    image = Image.fromarray(pixels(1, height=20, width=40))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by 90 degrees
    assert decode_image(encoded(image, "PNG", exif=exif), "image").shape == (40, 20, 3)


def test_each_orientation_is_that_of_the_original() -> None:
    original = np.zeros((16, 32, 3), np.uint8)
    original[:8, :8] = 255
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        # As a camera saves it: turned the other way round, so that to put it upright is to undo it.
        saved = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded(original, "PNG", exif=exif))))
        undo = {6: 8, 8: 6}.get(orientation, orientation)
        exif[0x0112] = undo
        shown = decode_image(encoded(saved, "PNG", exif=exif), "image")
        np.testing.assert_array_equal(shown, original)


def test_a_turned_photo_may_have_exif_data_that_cannot_be_written() -> None:
    entries = [(0x0112, 3, 1, b"\6\0\0\0"), (0x011A, 7, 4, b"high")]  # a resolution in words
    body = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4)
    photo = encoded(pixels(1, height=20, width=40), "JPEG", exif=exif)
    assert decode_image(photo, "image").shape == (40, 20, 3)


@pytest.mark.parametrize("layout", ["PNG", "JPEG", "WEBP"])
def test_broken_exif_data_leave_an_image_what_it_is(layout: str) -> None:
    image = encoded(pixels(1), layout, exif=b"Exif\0\0neither II nor MM")
    np.testing.assert_array_equal(
        decode_image(image, "image"), np.asarray(Image.open(io.BytesIO(image)))
    )


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", r"images\[0\] is not an image of type PNG or JPEG or WEBP"),
        (b"GIF89a" + b"\0" * 100, "is not an image of type PNG"),
        (encoded(pixels(1), "PNG")[:200], "can't be decoded"),
        (encoded(pixels(1), "JPEG")[:400], "can't be decoded"),
        (encoded(pixels(1), "WEBP")[:400], "can't be decoded"),
        (encoded(Image.new("1", (20_000, 20_000)), "PNG"), "20000 by 20000 pixels"),
        (np.zeros((4, 4, 3)), "float64"),
        (np.zeros((4, 4, 4), np.uint8), r"\(4, 4, 4\)"),
        (np.zeros((0, 4, 3), np.uint8), r"\(0, 4, 3\)"),
        (np.broadcast_to(np.uint8(0), (10_000, 10_000, 3)), "10000 by 10000 pixels"),
        ("a.png", "not str"),
    ],
)
def test_what_is_no_image_is_refused_by_name(image: object, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        decode_image(image, "images[0]")


# Answers


def test_the_image_is_read_as_mtmd_reads_it(engine: VisionEngine) -> None:
    images = [pixels(1), pixels(2)]
    ours = logits(engine, images)
    mtmd, context = projector.mtmd, engine._context
    with closing(engine._projector.tokenize(engine._parts(images, request()))) as chunks:
        context.clear()
        end = ctypes.c_int32()
        status = mtmd.mtmd_helper_eval_chunks(
            engine._projector.handle,
            context.handle,
            chunks._handle,
            0,
            0,
            context.n_batch,
            True,
            ctypes.byref(end),
        )
    assert status == 0
    source = backend.lib.llama_get_logits_ith(context.handle, -1)
    reference = np.ctypeslib.as_array(source, (engine._model.n_vocab,))
    np.testing.assert_array_equal(ours, reference)


def test_the_pixels_matter(engine: VisionEngine) -> None:
    one, other = logits(engine, [pixels(1)]), logits(engine, [pixels(2)])
    assert np.abs(one - other).max() > 0.1
    np.testing.assert_array_equal(logits(engine, [pixels(1)]), one)


def test_usage_counts_the_images(engine: VisionEngine) -> None:
    used = [list(engine.stream([pixels(i)] * i, request()))[-1].usage for i in range(4)]
    counts = [usage.prompt_tokens for usage in used if usage is not None]
    assert np.diff(counts).tolist() == [IMAGE_TOKENS] * 3


def test_images_come_before_the_text_and_markers_in_it_are_text(engine: VisionEngine) -> None:
    image = pixels(1)
    parts = engine._parts([image, image], request("see <__media__> and <image 0>"))
    assert [isinstance(part, str) for part in parts] == [True, False, False, True]
    assert isinstance(parts[-1], str)
    assert parts[-1].startswith("see <__media__> and <image 0>")
    answer(engine, [image], text="<__media__>")


def test_stop_strings_and_length(engine: VisionEngine) -> None:
    whole = answer(engine, [pixels(1)])
    last = list(engine.stream([pixels(1)], request()))[-1]
    assert last.finish_reason == "length"
    stopped = list(engine.stream([pixels(1)], request(stop=[whole[2:4]])))
    assert "".join(delta.text for delta in stopped) == whole[: whole.index(whole[2:4])]
    assert stopped[-1].finish_reason == "stop"


def test_too_many_images_are_refused_with_the_numbers(engine: VisionEngine) -> None:
    with pytest.raises(ContextLengthExceeded) as caught:
        answer(engine, [pixels(1)] * 40)
    assert caught.value.details["images"] == 40 * IMAGE_TOKENS
    assert caught.value.details["asked"] > caught.value.details["context"] == 512


def test_a_template_that_only_reads_parts_gets_images_too(mmproj: Path) -> None:
    options = {"model": "smollm2", "mmproj": str(mmproj), "n_ctx": 128, "n_threads": 1}
    options["chat_template"] = (
        "{% for line in messages[0]['content'] %}"
        "{% if line['type'] == 'text' %}{{ line['text'] }}{% endif %}{% endfor %}"
    )
    made = role.make_session(SimpleNamespace(options=options), None)
    parts = made.engine._parts([pixels(1)], request("What?"))
    made.close()
    assert [part if isinstance(part, str) else "image" for part in parts] == ["image", "What?"]


def test_a_template_that_drops_images_is_refused(mmproj: Path) -> None:
    options = {"model": "smollm2", "mmproj": str(mmproj), "n_ctx": 128, "n_threads": 1}
    options["chat_template"] = "{{ messages[0].content[:10] }}"
    made = role.make_session(SimpleNamespace(options=options), None)
    with pytest.raises(InvalidRequest, match="drops the images"):
        answer(made.engine, [pixels(1)])
    made.close()


def test_reasoning_is_kept_apart_and_a_grammar_waits_for_its_end(mmproj: Path) -> None:
    source = "{{ messages[-1].content }}\n<think>{# </think> #}"
    made = make_session(mmproj, chat_template=source)
    asked = request("Say </think> now.", max_tokens=24)
    free = collect(made.engine.stream([pixels(1)], asked))
    asked = request("Say </think> now.", max_tokens=24, grammar='root ::= "yes"')
    kept = collect(made.engine.stream([pixels(1)], asked))
    made.close()
    assert free.reasoning
    # Greedy SmolLM2 may not close it: then all of it is reasoning, and the same without a grammar.
    assert kept.reasoning == free.reasoning
    assert kept.text in {"", "yes"}


# Cancelling


@pytest.mark.parametrize("polls", [1, 2, 3, 5, 8, 40])
def test_cancelling_leaves_the_engine_usable(engine: VisionEngine, polls: int) -> None:
    expected = answer(engine, [pixels(1), pixels(2)])
    with pytest.raises(CallCancelled):
        list(engine.stream([pixels(1), pixels(2)], request(), abort=CountdownAbort(polls=polls)))
    assert answer(engine, [pixels(1), pixels(2)]) == expected


def test_an_encoder_stops_between_its_nodes(
    engine: VisionEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = engine._projector
    monkeypatch.setattr(projector, "_NODES_PER_LOOK", 1)
    encoder._n_nodes = 0
    answer(engine, [pixels(1)], max_tokens=1)
    whole = encoder._n_nodes

    class Encoding(CountdownAbort):
        """Set once the encoder is under way."""

        def is_set(self) -> bool:
            return encoder._n_nodes > 10

    encoder._n_nodes = 0
    with pytest.raises(CallCancelled):
        list(engine.stream([pixels(1)], request(), abort=Encoding()))
    assert 10 < encoder._n_nodes < whole


def test_a_deadline_is_an_abort_token() -> None:
    poll = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)
    far, past = Deadline(None, 60), Deadline(None, 0)
    assert (far.is_set(), past.is_set()) == (False, True)
    assert (poll(far.callback)(far.data), poll(past.callback)(past.data)) == (False, True)
    assert Deadline(CountdownAbort(polls=0), 60).is_set()


# PDF documents


def test_pages_are_rasterised() -> None:
    with closing(Document(pdf(3))) as document:
        assert document.n_pages == 3
        small, large = document.rasterise(2, 72), document.rasterise(2, 144)
        assert small.shape == (50, 70, 3)
        assert large.shape == (100, 140, 3)
        assert np.abs(small.astype(int) - 60).max() < 4
        with pytest.raises(CallCancelled):
            document.rasterise(1, 72, CountdownAbort(polls=0))


def test_a_huge_page_is_made_smaller() -> None:
    image = Image.new("RGB", (2000, 10), "red")
    with closing(Document(encoded(image, "PDF", resolution=10))) as document:
        assert max(document.rasterise(1, 1200).shape) == 4096


def test_what_fields_of_a_form_hold_is_drawn() -> None:
    drawn = []
    for value in ("", "Yes", "Yes, all of it"):
        with closing(Document(form(value))) as document:
            drawn.append((document.rasterise(1, 72) < 128).sum())
    assert 0 == drawn[0] < drawn[1] < drawn[2]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a PDF"),
        (b"%PDF-1.7 and no more", "not a PDF"),
        (pdf(2)[:500], "not a PDF"),
        (encoded(pixels(1), "PNG"), "not a PDF"),
        ((DATA / "encrypted.pdf").read_bytes(), "encrypted. hint: pass password="),
    ],
)
def test_what_is_no_readable_pdf_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Document(data)


def test_passwords() -> None:
    data = (DATA / "encrypted.pdf").read_bytes()
    with pytest.raises(InvalidRequest, match="the password is wrong"):
        Document(data, "guess")
    with closing(Document(data, "open sesame")) as document:
        assert document.rasterise(1, 72).shape == (72, 72, 3)


def serve(session: role.VisionSession, kind: str, payload: Any, **options: Any) -> FakeReply:
    reply = FakeReply(options.get("abort"))
    role.HANDLERS[kind](reply, payload, SimpleNamespace(session=session))
    return reply


def chat(**options: Any) -> dict[str, Any]:
    options = {"max_tokens": 4, "temperature": 0.0, **options}
    return {"messages": [{"role": "user", "content": "What?"}], **options}


def test_handlers_stream_what_they_send_at_once(session: role.VisionSession) -> None:
    payload = {"images": [encoded(pixels(1), "PNG"), pixels(2)], "chat": chat()}
    [(_, whole)] = serve(session, "vision", payload).sent
    streamed = [delta for _, delta in serve(session, "vision.stream", payload).sent]
    assert "".join(delta.text for delta in streamed) == whole.text
    assert whole.usage == streamed[-1].usage


def test_each_page_is_sent_when_it_is_done(session: role.VisionSession) -> None:
    sent = serve(session, "vision.pdf", {"document": pdf(3), "chat": chat()}).sent
    assert [(page.page, page.total) for _, page in sent] == [(1, 3), (2, 3), (3, 3)]
    assert all(page.finish_reason == "length" and page.usage for _, page in sent)
    sent = serve(session, "vision.pdf", {"document": pdf(3), "pages": [3, 1], "chat": chat()}).sent
    assert [page.page for _, page in sent] == [3, 1]
    sent = serve(session, "vision.pdf", {"document": pdf(3), "pages": [], "chat": chat()}).sent
    assert sent == []
    with pytest.raises(InvalidRequest, match="pages 1 to 3, not 4"):
        serve(session, "vision.pdf", {"document": pdf(3), "pages": [1, 4], "chat": chat()})


def test_a_page_that_takes_too_long_has_what_there_was(
    session: role.VisionSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = {"document": pdf(2), "chat": chat(max_tokens=50), "page_timeout": 60.0}
    whole = [page for _, page in serve(session, "vision.pdf", payload).sent]
    piece = session.engine._model.piece
    clock = SimpleNamespace(now=0.0)

    def slow(*arguments: Any, **options: Any) -> bytes:
        clock.now += 10.0
        return piece(*arguments, **options)

    monkeypatch.setattr(session.engine._model, "piece", slow)
    monkeypatch.setattr("inferpool.engine.abort.time", SimpleNamespace(monotonic=lambda: clock.now))
    cut = [page for _, page in serve(session, "vision.pdf", payload).sent]
    assert [page.finish_reason for page in cut] == ["timeout"] * 2
    for page, full in zip(cut, whole, strict=True):
        assert page.text
        assert full.text.startswith(page.text)
        assert len(page.text) < len(full.text)


@pytest.mark.parametrize("polls", [1, 2, 30])
def test_cancelling_a_document(session: role.VisionSession, polls: int) -> None:
    payload = {"document": pdf(3), "chat": chat(), "page_timeout": 60.0}
    reply = FakeReply(CountdownAbort(polls=polls))
    with pytest.raises(CallCancelled):
        role.HANDLERS["vision.pdf"](reply, payload, SimpleNamespace(session=session))
    assert len(reply.sent) < 3


@pytest.mark.parametrize(
    ("kind", "payload", "error", "message"),
    [
        ("vision", {"images": [b"x"], "chat": chat()}, InvalidRequest, r"images\[0\]"),
        ("vision", {"images": []}, TypeError, "chat"),
        ("vision", {"images": [], "chat": chat(), "size": 3}, TypeError, "size"),
        ("vision.pdf", {"document": b"x", "chat": chat(), "dpi": 0}, ValueError, "dpi"),
        ("vision.pdf", {"document": b"x", "chat": chat(), "page_timeout": 0.0}, ValueError, "page"),
        ("vision.pdf", {"document": "x.pdf", "chat": chat()}, TypeError, "document"),
    ],
)
def test_handlers_name_what_is_wrong(
    session: role.VisionSession,
    kind: str,
    payload: Any,
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        serve(session, kind, payload)


# Loading


@pytest.mark.parametrize("width", [WIDTH_OF_SMOLLM2 - 1, 64])
def test_a_projector_of_another_width_is_refused(tmp_path: Path, width: int) -> None:
    path = write_projector(tmp_path / "narrow.gguf", width=width)
    with pytest.raises(ModelLoadError, match=rf"n_embd = 576\) and mmproj \(n_embd = {width}"):
        make_session(path)


def test_a_language_model_is_no_projector(tmp_path: Path) -> None:
    path = write_qwen3(tmp_path / "chat.gguf", "chat")
    with pytest.raises(ModelLoadError, match=r"can't load .*chat\.gguf as projector"):
        make_session(path)
    with pytest.raises(ModelNotFound):
        make_session(tmp_path / "none.gguf")


def test_a_projector_is_no_language_model(mmproj: Path) -> None:
    with pytest.raises(ModelLoadError):
        make_session(mmproj, model=mmproj)


@pytest.mark.parametrize("eighths", range(8))
def test_a_truncated_projector_is_refused(mmproj: Path, tmp_path: Path, eighths: int) -> None:
    data = mmproj.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(data[: len(data) * eighths // 8])
    with pytest.raises(ModelLoadError, match=r"cut\.gguf"):
        make_session(path)


def test_loading_can_be_cancelled(mmproj: Path, session: role.VisionSession) -> None:
    with pytest.raises(CallCancelled):
        projector.Projector(session.engine._model, mmproj, abort=CountdownAbort(polls=2))


def test_closed_things_say_so(mmproj: Path) -> None:
    made = make_session(mmproj)
    made.close()
    with pytest.raises(RuntimeError, match="closed"):
        answer(made.engine, [pixels(1)])


def test_required_symbols_are_those_that_the_engine_uses() -> None:
    source = Path(projector.__file__).read_text()
    used = set(re.findall(r"\bmtmd\.(mtmd_\w+)\(", source))
    structures = {
        "mtmd_helper_post_decode_callback",
        "mtmd_input_part",
        "mtmd_input_text",
        "mtmd_progress_callback",
    }
    assert set(projector._REQUIRED) == used - structures
    assert not backend.missing_symbols(projector.mtmd, projector._REQUIRED)
