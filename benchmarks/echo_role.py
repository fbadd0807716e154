"""The worker side of the transport comparisons."""

from __future__ import annotations

from typing import Any

from inferpool.worker import Reply, RoleConfig, WorkerLoopState


class Session:
    def close(self) -> None:
        """Nothing is kept."""


def make_session(role_config: RoleConfig, abort: Any) -> Session:
    return Session()


def echo(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
    reply.send("echo", payload)


def count(reply: Reply, payload: tuple[int, bytes], state: WorkerLoopState) -> None:
    number, item = payload
    for _ in range(number):
        reply.send("item", item)


HANDLERS = {"echo": echo, "count": count}
