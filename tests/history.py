"""What happened to calls, written down as it happens and checked afterwards."""

from __future__ import annotations

import itertools
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

ANSWER = "answer"


@dataclass(frozen=True)
class Event:
    """One line of the history."""

    tag: int
    what: str
    """``"begin"``, ``"item"`` or ``"outcome"``."""
    detail: Any = None


class History:
    """Events of calls of `echo_role.tagged`, in the order in which threads came to write them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: list[Event] = []
        self._tags = itertools.count(1)
        self._closed_at: int | None = None

    def closed(self) -> None:
        """Note that the pool is closed: calls that begin later get `PoolClosed`."""
        with self._lock:
            if self._closed_at is None:
                self._closed_at = len(self._events)

    def begin(self) -> int:
        """Note a new call, and return its tag."""
        with self._lock:
            tag = next(self._tags)
            self._events.append(Event(tag, "begin"))
        return tag

    def follow(
        self, tag: int, items: Callable[[], Iterable[Any]], errors: tuple[type[Exception], ...]
    ) -> None:
        """Write down what becomes of a call."""
        try:
            for item in items():
                self._add(Event(tag, "item", item))
        except errors as error:
            self._add(Event(tag, "outcome", type(error).__name__))
        else:
            self._add(Event(tag, "outcome", ANSWER))

    def _add(self, event: Event) -> None:
        with self._lock:
            self._events.append(event)

    def check(self, lengths: dict[int, int]) -> None:
        """Check everything written down.

        Args:
            lengths: items that the answer to each call has when it is complete.
        """
        items: dict[int, list[Any]] = defaultdict(list)
        outcomes: dict[int, list[str]] = defaultdict(list)
        begun: dict[int, int] = {}
        for place, event in enumerate(self._events):
            if event.what == "begin":
                begun[event.tag] = place
                continue
            assert event.tag in begun, f"{event} before its call"
            assert not outcomes[event.tag], f"{event} after the outcome {outcomes[event.tag]}"
            if event.what == "item":
                items[event.tag].append(event.detail)
            else:
                outcomes[event.tag].append(event.detail)
        for tag, place in begun.items():
            assert len(outcomes[tag]) == 1, f"call {tag} has the outcomes {outcomes[tag]}"
            got = items[tag]
            assert [index for _, _, index in got] == list(range(len(got))), f"order of {tag}: {got}"
            assert {owner for _, owner, _ in got} <= {tag}, f"call {tag} got another one's: {got}"
            assert len({pid for pid, _, _ in got}) <= 1, f"call {tag} from two workers: {got}"
            if outcomes[tag] == [ANSWER]:
                assert len(got) == lengths[tag], f"call {tag} ended early: {got}"
            if self._closed_at is not None and place >= self._closed_at:
                assert outcomes[tag] == ["PoolClosed"], f"call {tag} after the end: {outcomes[tag]}"
