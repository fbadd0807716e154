"""The ``vision`` role, worker side: images or PDF pages and a prompt in, text out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from typing import Any, cast

from inferpool.config import VisionConfig
from inferpool.engine.abort import AbortToken, Deadline
from inferpool.engine.answer import collect
from inferpool.engine.images import Document, decode_image
from inferpool.engine.projector import Projector
from inferpool.engine.vision import VisionEngine
from inferpool.errors import CallCancelled
from inferpool.messages import ChatDelta, PdfPage, PdfRequest, VisionRequest, read
from inferpool.models import resolve
from inferpool.roles.load import load_model
from inferpool.worker import KindHandler, Reply, RoleConfig, WorkerLoopState

__all__ = ["HANDLERS", "VisionSession", "make_session"]


class VisionSession:
    """A loaded chat model and its projector.

    Attributes:
        engine: makes the answers.
    """

    def __init__(self, config: VisionConfig, abort: AbortToken | None) -> None:
        with ExitStack() as resources:
            model = load_model(config, abort)
            resources.enter_context(closing(model))
            projector = Projector(
                model,
                resolve(config.mmproj),
                n_threads=config.n_threads,
                flash_attn=config.flash_attn,
                use_gpu=config.n_gpu_layers != 0,
                abort=abort,
            )
            resources.enter_context(closing(projector))
            self.engine = VisionEngine(
                model,
                projector,
                n_ctx=config.n_ctx,
                n_batch=config.n_batch,
                n_threads=config.n_threads,
                flash_attn=config.flash_attn,
                chat_template=config.chat_template,
            )
            resources.enter_context(closing(self.engine))
            self._resources = resources.pop_all()

    def close(self) -> None:
        """Free the models and their context. Closing twice is harmless."""
        self._resources.close()


def make_session(role_config: RoleConfig, abort: AbortToken | None) -> VisionSession:
    """Load the models that ``role_config.options`` (a `VisionConfig` as a map) names.

    Raises:
        TypeError, ValueError: for a bad option, by name.
        ModelNotFound: if there is no such model or projector.
        ModelLoadError: if one can't be loaded, or the projector does not fit the model.
        CallCancelled: if ``abort`` was set meanwhile.
    """
    return VisionSession(read(role_config.options, VisionConfig), abort)


def handle_vision(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
    """Answer a `VisionRequest` with one `ChatResult`."""
    reply.send("vision", collect(_deltas(reply, payload, state)))


def handle_vision_stream(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
    """Answer a `VisionRequest` with a `ChatDelta` for each piece of text, as it is decoded."""
    for delta in _deltas(reply, payload, state):
        reply.send("vision.stream", delta)


def _deltas(reply: Reply, payload: Any, state: WorkerLoopState) -> Iterator[ChatDelta]:
    request = read(payload, VisionRequest)
    images = [decode_image(image, f"images[{i}]") for i, image in enumerate(request.images)]
    session = cast(VisionSession, state.session)
    return session.engine.stream(images, request.chat, abort=reply.abort)


def handle_vision_pdf(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
    """Answer a `PdfRequest` with a `PdfPage` for each page, as it is done."""
    request = read(payload, PdfRequest)
    engine = cast(VisionSession, state.session).engine
    with closing(Document(request.document, request.password)) as document:
        every = range(1, document.n_pages + 1)
        pages = every if request.pages is None else request.pages
        document.check(pages)
        for number in pages:
            if reply.abort.is_set():
                raise CallCancelled(f"the call was cancelled before page {number}")
            reply.send("vision.pdf", _read_page(engine, document, number, request, reply.abort))


def _read_page(
    engine: VisionEngine, document: Document, number: int, request: PdfRequest, abort: AbortToken
) -> PdfPage:
    deadline = None
    if request.page_timeout is not None:
        abort = deadline = Deadline(abort, request.page_timeout)
    deltas: list[ChatDelta] = []
    try:
        pixels = document.rasterise(number, request.dpi, abort)
        for delta in engine.stream([pixels], request.chat, abort=abort):
            deltas.append(delta)  # noqa: PERF402  # what there is when it is cut off counts
    except CallCancelled:
        if deadline is None or not deadline.expired:
            raise
        return PdfPage(
            page=number,
            total=document.n_pages,
            text="".join(delta.text for delta in deltas),
            finish_reason="timeout",
            usage=None,
        )
    result = collect(deltas)
    return PdfPage(
        page=number,
        total=document.n_pages,
        text=result.text,
        finish_reason=result.finish_reason,
        usage=result.usage,
    )


HANDLERS: Mapping[str, KindHandler] = {
    "vision": handle_vision,
    "vision.stream": handle_vision_stream,
    "vision.pdf": handle_vision_pdf,
}
