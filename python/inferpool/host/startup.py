"""What a worker says of its start, before it serves calls."""

from __future__ import annotations

from inferpool import codec
from inferpool._transport import Call, Event
from inferpool.errors import CallTimeout, InferpoolError
from inferpool.messages import Ready

__all__ = ["Startup"]


class Startup:
    """The call that builds a worker's session.

    Attributes:
        id: of the call; 0 before it is sent.
        loading: how much of the model is loaded, from 0 to 1.
        ready: what the worker said of its session; None until that stands.
        failure: the event that says why there will be none; None while there may be one.
    """

    def __init__(self) -> None:
        self.id = 0
        self.loading = 0.0
        self.ready: Ready | None = None
        self.failure: Event | None = None
        self._call: Call | None = None

    def begin(self, call: Call) -> None:
        """Send ``call``, which fits into an empty ring."""
        self.id = call.id
        call.send()
        self._call = call  # only now: one that could not be sent has no answers to ask for

    def poll(self) -> None:
        """Note what the worker has said meanwhile.

        Raises:
            ProtocolError: it is nothing that a worker says.
        """
        while self._call is not None:
            try:
                event = self._call.next(timeout=0)
            except CallTimeout:
                return
            except InferpoolError:
                self._call = None  # ended, which says no more than the channel's end
                return
            if event.kind == "data":
                kind, payload = codec.decode(event.parts)
                if kind == "loading" and isinstance(payload, float):
                    self.loading = payload
                    continue
                self.ready = codec.decode_as(event.parts, Ready)
                self.loading = 1.0
                continue  # Given up here, its end would count as dropped late.
            if event.kind == "error":
                self.failure = event
            self._call = None
