"""The worker side of the transport comparisons."""

from __future__ import annotations

import ctypes
import time
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


def hold_gil(reply: Reply, payload: float, state: WorkerLoopState) -> None:
    ctypes.PyDLL(None).usleep(int(payload * 1e6))


def sleep(reply: Reply, payload: float, state: WorkerLoopState) -> None:
    time.sleep(payload)


HANDLERS = {"echo": echo, "count": count, "hold_gil": hold_gil, "sleep": sleep}
