"""Roles that do what a script says. The lower half runs in their workers."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np

from inferpool.config import Policy, Role
from inferpool.messages import (
    ChatDelta,
    ChatRequest,
    ChatResult,
    EmbedRequest,
    Timings,
    Usage,
    read,
)
from inferpool.testing.faults import Fault
from inferpool.worker import KindHandler, Reply, RoleConfig, WorkerLoopState

__all__ = ["scripted_chat", "scripted_embed"]

Step = str | float | Fault
"""A token to send, seconds to wait, or what goes wrong."""


def scripted_chat(
    script: Sequence[Step], *, load: Sequence[float | Fault] = (), policy: Policy | None = None
) -> Role:
    """A role for ``Pool(chat=...)`` that answers every conversation with the same tokens.

    Args:
        script: what happens in each call, in order: a str is a token, a float waits so many
            seconds (a cancelled call ends meanwhile), a `Fault` fails.
        load: the same for the time in which the model would be loaded.
        policy: how its worker is treated.

    Raises:
        TypeError: a step is something else.
    """
    return _role("CHAT_HANDLERS", policy, script=_steps(script), load=_steps(load))


def scripted_embed(
    dimension: int,
    script: Sequence[float | Fault] = (),
    *,
    load: Sequence[float | Fault] = (),
    policy: Policy | None = None,
) -> Role:
    """A role for ``Pool(embed=...)`` whose vectors depend on nothing but the text.

    Args:
        dimension: of the vectors, which have length 1 and point in random directions: the same
            one for the same text in every run.
        script: what happens before each answer, as in `scripted_chat`.
        load: as in `scripted_chat`.
        policy: how its worker is treated.

    Raises:
        TypeError: a step is something else.
    """
    options = {"script": _steps(script), "load": _steps(load), "dimension": dimension}
    return _role("EMBED_HANDLERS", policy, **options)


def _role(handlers: str, policy: Policy | None, **options: Any) -> Role:
    # So that calls may name a model; the script is the same for all.
    options["model"] = "script"
    return Role(
        f"{__name__}:make_session", f"{__name__}:{handlers}", options=options, policy=policy
    )


def _steps(script: Sequence[Step]) -> list[Step]:
    for step in script:
        if not isinstance(step, str | float | int | Fault):
            raise TypeError(f"a script has str, float and Fault, not {type(step).__name__}")
    return list(script)


class ScriptedSession:
    """A session that knows its script."""

    def __init__(self, options: Mapping[str, Any], abort: Any) -> None:
        self.dimension = options.get("dimension", 0)
        self._script = [_step(each) for each in options["script"]]
        for _ in _tokens([_step(each) for each in options["load"]], abort):
            raise TypeError("there is nobody to send a token to while a model loads")

    def tokens(self, abort: Any) -> Iterator[str]:
        """The tokens of one call; waits and faults happen between them."""
        return _tokens(self._script, abort)

    def close(self) -> None:
        """Nothing to release."""


def make_session(role_config: RoleConfig, abort: Any) -> ScriptedSession:
    """Load nothing, as slowly as the script says."""
    return ScriptedSession(role_config.options, abort)


def _step(step: Any) -> Step:
    return read(step, Fault) if isinstance(step, Mapping) else cast(Step, step)


def _tokens(script: Sequence[Step], abort: Any) -> Iterator[str]:
    for step in script:
        if isinstance(step, str):
            yield step
        elif isinstance(step, Fault):
            step.happen()
        else:
            until = time.monotonic() + step
            while (left := until - time.monotonic()) > 0 and not abort.is_set():
                time.sleep(min(left, 0.01))


def _deltas(reply: Reply, payload: Any, state: WorkerLoopState) -> Iterator[ChatDelta]:
    request = read(payload, ChatRequest)
    began = time.monotonic()
    first, sent, finish_reason = began, 0, "stop"
    for token in cast(ScriptedSession, state.session).tokens(reply.abort):
        if sent == request.max_tokens:
            finish_reason = "length"
            break
        if not sent:
            first = time.monotonic()
        sent += 1
        yield ChatDelta(text=token)
    prompt = sum(len(str(message.content).split()) for message in request.messages or [])
    yield ChatDelta(
        finish_reason=cast(Any, finish_reason),
        usage=Usage(prompt_tokens=prompt, completion_tokens=sent, total_tokens=prompt + sent),
        timings=Timings(prompt_seconds=first - began, completion_seconds=time.monotonic() - first),
    )


def handle_chat(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
    """Answer a `ChatRequest` with one `ChatResult`."""
    *deltas, last = _deltas(reply, payload, state)
    text = "".join(delta.text for delta in deltas)
    result = ChatResult(
        text=text,
        finish_reason=cast(Any, last.finish_reason),
        usage=cast(Usage, last.usage),
        timings=cast(Timings, last.timings),
    )
    reply.send("chat", result)


def handle_chat_stream(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
    """Answer a `ChatRequest` with a `ChatDelta` for each token."""
    for delta in _deltas(reply, payload, state):
        reply.send("chat.stream", delta)


def handle_embed(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
    """Answer an `EmbedRequest` with float32 of shape (len(texts), dimension)."""
    request = read(payload, EmbedRequest)
    session = cast(ScriptedSession, state.session)
    for _ in session.tokens(reply.abort):
        raise TypeError("a script for embeddings has no tokens")
    vectors = np.zeros((len(request.texts), session.dimension), np.float32)
    for row, text in zip(vectors, request.texts, strict=True):
        seed = hashlib.blake2b(text.encode(), digest_size=8).digest()
        vector = np.random.default_rng(int.from_bytes(seed, "little")).normal(size=row.size)
        row[:] = vector / np.linalg.norm(vector)
    reply.send("embed", vectors)


CHAT_HANDLERS: Mapping[str, KindHandler] = {
    "chat": handle_chat,
    "chat.stream": handle_chat_stream,
}
EMBED_HANDLERS: Mapping[str, KindHandler] = {"embed": handle_embed}
