"""The ``chat`` role, worker side: messages in, an answer out, whole or piece by piece."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, closing
from typing import Any, cast

from inferpool.config import ChatConfig
from inferpool.engine.abort import AbortToken
from inferpool.engine.answer import collect
from inferpool.engine.chat import ChatEngine
from inferpool.messages import ChatDelta, ChatRequest, ChatResult, read
from inferpool.roles.load import load_model
from inferpool.worker import KindHandler, Reply, RoleConfig, WorkerLoopState

__all__ = ["HANDLERS", "ChatSession", "make_session"]


class ChatSession:
    """A loaded chat model.

    Attributes:
        engine: makes the answers.
    """

    def __init__(self, config: ChatConfig, abort: AbortToken | None) -> None:
        with ExitStack() as resources:
            model = load_model(config, abort)
            resources.enter_context(closing(model))
            self.engine = ChatEngine(
                model,
                n_ctx=config.n_ctx,
                n_batch=config.n_batch,
                n_parallel=config.n_parallel,
                n_threads=config.n_threads,
                flash_attn=config.flash_attn,
                chat_template=config.chat_template,
                abort=abort,
            )
            resources.enter_context(closing(self.engine))
            self._resources = resources.pop_all()

    def step(self) -> float | None:
        """Work on the answers under way; see `ChatEngine.step`."""
        return self.engine.step()

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


class _Stream:
    """Hands each piece of an answer on as it comes."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self.abort = reply.abort
        self.end = reply.end
        self.fail = reply.fail

    @property
    def cancelled(self) -> bool:
        return self._reply.cancelled

    def tell(self, delta: ChatDelta) -> bool:
        return self._reply.try_send("chat.stream", delta)


class _Whole(_Stream):
    """Hands an answer on when it is complete."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply)
        self._deltas: list[ChatDelta] = []
        self._result: ChatResult | None = None

    def tell(self, delta: ChatDelta) -> bool:
        if self._result is None:
            self._deltas.append(delta)
            if delta.finish_reason is None:
                return True
            self._result = collect(self._deltas)
        return self._reply.try_send("chat", self._result)


def handle_chat(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
    """Answer a `ChatRequest` with one `ChatResult`."""
    _submit(reply, _Whole(reply), payload, state)


def handle_chat_stream(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
    """Answer a `ChatRequest` with a `ChatDelta` for each piece of text, as it is decoded."""
    _submit(reply, _Stream(reply), payload, state)


def _submit(reply: Reply, caller: _Stream, payload: Any, state: WorkerLoopState) -> None:
    cast(ChatSession, state.session).engine.submit(read(payload, ChatRequest), caller)
    reply.defer()


HANDLERS: Mapping[str, KindHandler] = {"chat": handle_chat, "chat.stream": handle_chat_stream}
