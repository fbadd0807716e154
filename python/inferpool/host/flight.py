"""A call as its worker's supervision sees it."""

from __future__ import annotations

import hashlib
import time

from inferpool._transport import Call
from inferpool.codec import Parts
from inferpool.errors import GivenUp
from inferpool.host.status import CallStatus

__all__ = ["Flight", "digest"]


class Flight:
    """One call from before it is sent until its worker is done with it.

    Attributes:
        cancelled: whether all of its worker's calls were cancelled since it began.
    """

    __slots__ = ("began", "call", "cancelled", "given_up_at", "kind", "ladder", "parts")

    def __init__(self, kind: str, parts: Parts) -> None:
        # Apart, since an exception may keep it for long.
        self.ladder = GivenUp()
        self.kind = kind
        self.parts = parts
        self.began = time.monotonic()
        self.call: Call | None = None
        self.cancelled = False
        self.given_up_at: float | None = None

    def taken(self) -> bool:
        """Whether the worker has begun with it; still known when that worker is dead."""
        return self.call is not None and self.call.taken

    def status(self) -> CallStatus:
        """See `CallStatus`."""
        return CallStatus(
            kind=self.kind,
            age=time.monotonic() - self.began,
            taken=self.taken(),
            given_up=self.given_up_at is not None,
        )

    def describe(self) -> str:
        """Kind and age, for people."""
        given_up = "" if self.given_up_at is None else ", given up"
        return f"{self.kind} ({time.monotonic() - self.began:.1f} s{given_up})"


def digest(parts: Parts) -> bytes:
    """Stands for the content of a request."""
    content = hashlib.blake2b(digest_size=16)
    # Whether a plain payload can travel is the transport's to say.
    buffers = [repr(parts).encode()] if isinstance(parts, tuple) else parts
    for part in buffers:
        view = memoryview(part)
        content.update(view.nbytes.to_bytes(8, "little"))
        content.update(view)
    return content.digest()
