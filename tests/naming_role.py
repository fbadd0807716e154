"""All built-in roles in one, whose every answer is the name of its model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from inferpool.messages import (
    ChatDelta,
    ChatResult,
    PdfPage,
    RerankResult,
    Timings,
    Usage,
)
from inferpool.worker import KindHandler, Reply, RoleConfig, WorkerLoopState

USAGE = Usage(prompt_tokens=1, completion_tokens=1, total_tokens=2)


class Session:
    def __init__(self, model: str) -> None:
        self.model = model

    def close(self) -> None:
        pass


def make_session(role_config: RoleConfig, abort: Any) -> Session:
    return Session(role_config.options["model"])


def _model(state: WorkerLoopState) -> str:
    session = state.session
    assert isinstance(session, Session)
    return session.model


def embed(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
    """Vectors of the model's number. A text that is a path ends the worker, unless it exists."""
    model, text = _model(state), payload["texts"][0]
    if text == f"kill {model}":
        os._exit(3)
    if text.startswith("/") and not Path(text).exists():
        Path(text).touch()
        os._exit(3)
    reply.send("embed", np.full((len(payload["texts"]), 1), int(model), np.float32))


def rerank(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
    reply.send("rerank", [RerankResult(index=0, relevance_score=int(_model(state)))])


def whole(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
    timings = Timings(prompt_seconds=0, completion_seconds=0)
    text = _model(state)
    result = ChatResult(text=text, finish_reason="stop", usage=USAGE, timings=timings)
    reply.send("whole", result)


def pieces(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
    reply.send("piece", ChatDelta(text=_model(state)))


def pages(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
    text = _model(state)
    reply.send("page", PdfPage(page=1, total=1, text=text, finish_reason="stop", usage=USAGE))


HANDLERS: Mapping[str, KindHandler] = {
    "embed": embed,
    "rerank": rerank,
    "chat": whole,
    "chat.stream": pieces,
    "vision": whole,
    "vision.stream": pieces,
    "vision.pdf": pages,
}
