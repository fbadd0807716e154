"""The ``chat`` role, worker side: messages in, an answer out, whole or piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from typing import Any, cast

from inferpool.config import ChatConfig
from inferpool.engine.abort import AbortToken
from inferpool.engine.answer import collect
from inferpool.engine.chat import ChatEngine
from inferpool.engine.model import Model
from inferpool.messages import ChatDelta, ChatRequest, read
from inferpool.models import resolve
from inferpool.worker import KindHandler, Reply, RoleConfig, WorkerLoopState

__all__ = ["HANDLERS", "ChatSession", "make_session"]


class ChatSession:
    """A loaded chat model.

    Attributes:
        engine: makes the answers.
    """

    def __init__(self, config: ChatConfig, abort: AbortToken | None) -> None:
        with ExitStack() as resources:
            model = Model(resolve(config.model), n_gpu_layers=config.n_gpu_layers, abort=abort)
            resources.enter_context(closing(model))
            self.engine = ChatEngine(
                model,
                n_ctx=config.n_ctx,
                n_batch=config.n_batch,
                n_threads=config.n_threads,
                flash_attn=config.flash_attn,
                chat_template=config.chat_template,
            )
            resources.enter_context(closing(self.engine))
            self._resources = resources.pop_all()

    def close(self) -> None:
        """Free the model and its context. Closing twice is harmless."""
        self._resources.close()


def make_session(role_config: RoleConfig, abort: AbortToken | None) -> ChatSession:
    """Load the model that ``role_config.options`` (a `ChatConfig` as a map) names.

    Raises:
        TypeError, ValueError: for a bad option, by name.
        ModelNotFound: if there is no such model.
        ModelLoadError: if it can't be loaded, or has no chat template.
        CallCancelled: if ``abort`` was set meanwhile.
    """
    return ChatSession(read(role_config.options, ChatConfig), abort)


def handle_chat(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
    """Answer a `ChatRequest` with one `ChatResult`."""
    reply.send("chat", collect(_deltas(reply, payload, state)))


def handle_chat_stream(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
    """Answer a `ChatRequest` with a `ChatDelta` for each piece of text, as it is decoded."""
    for delta in _deltas(reply, payload, state):
        reply.send("chat.stream", delta)


def _deltas(reply: Reply, payload: Any, state: WorkerLoopState) -> Iterator[ChatDelta]:
    session = cast(ChatSession, state.session)
    return session.engine.stream(read(payload, ChatRequest), abort=reply.abort)


HANDLERS: Mapping[str, KindHandler] = {"chat": handle_chat, "chat.stream": handle_chat_stream}
