"""Continuous batching: many answers from one context, a step at a time.

A step decodes the next token of every answer that has begun, then a chunk of the prompts that
have not been read to their end, shared out among them. So nobody's answer stands still for longer
than a chunk takes, and a short prompt does not wait for a long one.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from inferpool.engine.abort import AbortToken
from inferpool.engine.answer import Answer
from inferpool.engine.context import Batch, Context
from inferpool.engine.prompt import Prompt
from inferpool.errors import CallCancelled, InferpoolError
from inferpool.messages import ChatDelta

__all__ = ["Caller", "Scheduler"]

# Tokens of prompts that one step decodes at most while answers wait for their next token.
_SHARED_CHUNK = 128
# A common beginning that is shorter is computed again. On an AMD Zen 4 to copy a memory of 4,096
# tokens of SmolLM2's takes 12 ms, to read 16 tokens 17.
_LEAST_REUSE = 16
# How often a reader that is behind is looked after.
_RETRY_SECONDS = 0.02


class Caller(Protocol):
    """Whoever asked for an answer."""

    @property
    def abort(self) -> AbortToken:
        """Set when the answer should stop."""

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for the answer any more."""

    def tell(self, delta: ChatDelta) -> bool:
        """Take the next piece; false if that must be tried again later with the same one."""

    def end(self) -> None:
        """Take note that the answer is complete, or that nobody wants the rest."""

    def fail(self, error: BaseException) -> None:
        """Take note that there is no answer, or no more of it."""


class _Slot:
    """A sequence of the context's memory.

    Attributes:
        id: its number.
        tokens: what is in it, in order.
        free: whether no answer uses it.
        used: when it was last taken, as a count.
    """

    def __init__(self, id: int) -> None:
        self.id = id
        self.tokens: list[int] = []
        self.free = True
        self.used = 0


class _Request(NamedTuple):
    """An answer that has been asked for, and waits for its turn."""

    prompt: Prompt
    caller: Caller
    since: float


class _Answer(Answer):
    """An answer that has its turn. The last of its tokens is not in memory yet.

    Attributes:
        slot: where its memory is.
    """

    def __init__(self, request: _Request, slot: _Slot) -> None:
        """Begin to answer.

        Raises:
            InferpoolError: an option of the request does not fit the model.
        """
        super().__init__(request.prompt, request.since)
        self.caller = request.caller
        self.slot = slot

    @property
    def n_unread(self) -> int:
        """Tokens, of the prompt and then the answer, that are not in memory yet."""
        return len(self.prompt.tokens) + len(self.tokens) - len(self.slot.tokens)

    def unread(self, n: int) -> list[int]:
        """The next ``n`` of them."""
        begin = len(self.slot.tokens)
        prompt: list[int] = self.prompt.tokens[begin : begin + n].tolist()
        begin = max(0, begin - len(self.prompt.tokens))
        return prompt + self.tokens[begin : begin + n - len(prompt)]

    def tell(self) -> bool:
        """Hand out what is new; false if the caller is behind."""
        while self.untold:
            if not self.caller.tell(self.untold[0]):
                return False
            self.untold.popleft()
        return True


_Chunk = tuple[_Answer, list[int]]
"""An answer, and the tokens of it that are to be decoded next."""


class Scheduler:
    """Shares one context among the answers that have been asked for."""

    def __init__(self, context: Context, *, abort: AbortToken | None = None) -> None:
        """Schedule for ``context``, which stays the caller's to close.

        Args:
            context: memory for as many answers at once as it has sequences.
            abort: ends a step early when the worker shuts down.
        """
        self._context = context
        self._abort = abort
        self._batch = Batch(context.n_batch)
        self._slots = [_Slot(id) for id in range(context.n_seq_max)]
        self._n_admitted = 0
        self._waiting: deque[_Request] = deque()
        self._active: list[_Answer] = []
        self._untold: list[_Answer] = []  # complete, but for callers that are behind

    def submit(self, prompt: Prompt, caller: Caller) -> None:
        """Ask for the answer to ``prompt``; ``caller`` gets it while steps are made."""
        place = len(self._waiting)
        if not prompt.is_bulk:
            place = sum(not other.prompt.is_bulk for other in self._waiting)
        self._waiting.insert(place, _Request(prompt, caller, time.perf_counter()))

    def close(self) -> None:
        """Free what the answers hold. Their callers are told nothing."""
        for answer in self._active:
            answer.sampler.close()
        self._active.clear()
        self._waiting.clear()
        self._untold.clear()

    def step(self) -> float | None:
        """Do a piece of work.

        Returns:
            Seconds until the next step should follow: 0 while there is work, None if there is
            none.
        """
        try:
            self._drop_cancelled()
            self._admit()
            self._close_ranks()
            self._continue_answers()
            self._read_prompts()
            self._untold = [answer for answer in self._untold if not self._end(answer)]
        except BaseException:
            # The loop fails all these calls: none of them must be answered again.
            self.close()
            for slot in self._slots:
                slot.free = True
                self._keep(slot, 0)
            raise
        if self._waiting or self._active:
            return 0.0
        return _RETRY_SECONDS if self._untold else None

    # Who begins, who ends

    def _drop_cancelled(self) -> None:
        for answer in [answer for answer in self._active if answer.caller.cancelled]:
            self._release(answer)
            answer.caller.end()
        for request in [request for request in self._waiting if request.caller.cancelled]:
            self._waiting.remove(request)
            request.caller.end()

    def _admit(self) -> None:
        while self._waiting and len(self._active) < len(self._slots):
            request = self._waiting.popleft()
            slot, source, n_common = self._place(request.prompt)
            try:
                answer = _Answer(request, slot)
            except InferpoolError as error:
                request.caller.fail(error)
                continue
            if source is not slot:
                self._copy(source, slot)
            self._keep(slot, n_common)
            self._n_admitted += 1
            slot.used = self._n_admitted
            slot.free = False
            self._active.append(answer)

    def _place(self, prompt: Prompt) -> tuple[_Slot, _Slot, int]:
        """A free slot for ``prompt``, the slot whose memory begins like it, and how far.

        Without such a beginning it is an empty one, if there is any, and one beside the answers
        under way, see `_close_ranks`.
        """
        n_common, source = max(
            ((common_prefix(slot.tokens, prompt.tokens), slot) for slot in self._slots),
            key=lambda entry: (entry[0], entry[1].free),
        )
        busy = {answer.slot.id for answer in self._active}
        oldest = min(
            (slot for slot in self._slots if slot.free),
            key=lambda slot: (
                # To move an answer takes far less than to read a lost memory again.
                bool(slot.tokens),
                bool(busy) and busy.isdisjoint((slot.id - 1, slot.id + 1)),
                slot.used,
            ),
        )
        if n_common < _LEAST_REUSE or not prompt.may_reuse:
            return oldest, oldest, 0
        if common_prefix(oldest.tokens, prompt.tokens) == n_common:
            return oldest, oldest, n_common
        # A memory that goes on for long after the common beginning may be asked for again.
        if source.free and 2 * n_common >= len(source.tokens):
            return source, source, n_common
        return oldest, source, n_common

    def _close_ranks(self) -> None:
        """Move answers so that their slots are neighbours, the only ones that are decoded together.

        llama.cpp reads all the weights once for each row of neighbours. To move a memory takes far
        less, and is done once.
        """
        self._active.sort(key=lambda answer: answer.slot.id)
        n = len(self._active)
        if not n or self._active[-1].slot.id - self._active[0].slot.id < n:
            return

        def loss(begin: int) -> tuple[int, int, int]:
            """Memories to be overwritten, to be moved, and when the latest lost one was used."""
            free = [slot for slot in self._slots[begin : begin + n] if slot.free]
            lost = [slot.used for slot in free if slot.tokens]
            return len(lost), len(free), max(lost, default=0)

        begin = min(range(len(self._slots) - n + 1), key=loss)
        row = self._slots[begin : begin + n]
        apart = [answer for answer in self._active if answer.slot not in row]
        for answer, slot in zip(apart, [slot for slot in row if slot.free], strict=True):
            left, answer.slot = answer.slot, slot
            self._copy(left, slot)
            slot.free, slot.used = False, left.used
            left.free = True
            self._keep(left, 0)
        self._active.sort(key=lambda answer: answer.slot.id)

    def _copy(self, source: _Slot, target: _Slot) -> None:
        self._context.copy_sequence(source.id, target.id)
        target.tokens = source.tokens[:]

    def _keep(self, slot: _Slot, length: int) -> None:
        """Make sure that memory holds the first ``length`` tokens of a slot and no more."""
        if not self._context.truncate(slot.id, length):
            # A recurrent model can't go back, but begin anew.
            length = 0
            self._context.truncate(slot.id, 0)
        del slot.tokens[length:]

    def _release(self, answer: _Answer) -> None:
        """Free an answer's slot. Its memory stays for the next prompt that begins alike."""
        self._active.remove(answer)
        answer.slot.free = True
        answer.sampler.close()

    def _end(self, answer: _Answer) -> bool:
        """End a complete answer once its caller has all of it or has gone; false until then."""
        try:
            if not answer.caller.cancelled and not answer.tell():
                return False
        except InferpoolError as error:
            answer.caller.fail(error)
        else:
            answer.caller.end()
        return True

    # What is computed

    def _continue_answers(self) -> None:
        """Decode the next token of every answer that has begun."""
        answers = [answer for answer in self._active if answer.tokens and answer.n_unread == 1]
        if answers:
            self._compute([(answer, answer.unread(1)) for answer in answers], self._abort)

    def _read_prompts(self) -> None:
        """Decode a chunk of the prompts, shared out so that short ones are soon read.

        Pieces of equal length are decoded together, all others by themselves: llama.cpp would
        compute them one after the other anyway, and cut the longer ones where a shorter one ends.
        """
        unread = [answer for answer in self._active if not answer.tokens or answer.n_unread > 1]
        if not unread:
            return
        room = self._context.n_batch
        if len(unread) < len(self._active):
            room = min(room, max(_SHARED_CHUNK, len(unread)))
        unread.sort(key=lambda answer: answer.n_unread)
        chunks = []
        for index, answer in enumerate(unread):
            n_left = len(unread) - index
            n = min(answer.n_unread, room // n_left)
            if n < answer.n_unread:
                room = n * n_left  # equal pieces of all that follow
            room -= n
            chunks.append((answer, answer.unread(n)))

        def order(each: _Chunk) -> tuple[bool, int]:
            # Whoever can begin to answer then need not wait for a piece of another's prompt.
            answer, chunk = each
            return len(chunk) < answer.n_unread, len(chunk)

        for _, group in groupby(sorted(chunks, key=order), order):
            together = list(group)
            aborts = (answer.caller.abort for answer, _ in together)
            self._compute(together, functools.reduce(lambda one, other: one.union(other), aborts))

    def _compute(self, chunks: Sequence[_Chunk], abort: AbortToken | None) -> None:
        """Decode the next tokens of answers, and draw one for each that has none left."""
        self._batch.clear()
        rows = []
        for answer, chunk in chunks:
            slot = answer.slot
            tokens = np.array(chunk, np.int32)
            self._batch.add(tokens, start=len(slot.tokens), sequence=slot.id, output=False)
            if len(chunk) == answer.n_unread:
                self._batch.want_last()
            rows.append(len(self._batch) - 1)
        try:
            self._context.set_abort(abort)
            self._context.decode(self._batch)
        except InferpoolError as error:
            self._share_out(error, chunks, abort)
            return
        for answer, chunk in chunks:
            answer.slot.tokens += chunk
        for (answer, _), row in zip(chunks, rows, strict=True):
            if not answer.n_unread:
                self._sample(answer, row)

    def _share_out(
        self, error: InferpoolError, chunks: Sequence[_Chunk], abort: AbortToken | None
    ) -> None:
        """After a batch that was aborted or failed: find out whose fault it was."""
        for answer, _ in chunks:  # parts of the batch may be in memory
            self._keep(answer.slot, len(answer.slot.tokens))
        if isinstance(error, CallCancelled):
            return  # whoever is not cancelled tries again in the next step
        if len(chunks) > 1:
            for answer, chunk in chunks:
                self._compute([(answer, answer.unread(len(chunk)))], abort)
            return
        for answer, _ in chunks:
            self._release(answer)
            self._keep(answer.slot, 0)
            answer.caller.fail(error)

    def _sample(self, answer: _Answer, row: int) -> None:
        """Draw the next token of ``answer`` from row ``row`` of the batch, and tell its caller."""
        try:
            if not answer.tokens:
                answer.sampler.accept_prompt(answer.prompt.tokens)
            goes_on = answer.add(answer.sampler.sample(self._context, row))
            if goes_on:
                answer.tell()
        except InferpoolError as error:
            self._release(answer)
            answer.caller.fail(error)
            return
        if not goes_on:
            self._release(answer)
            if not self._end(answer):
                self._untold.append(answer)


def common_prefix(memory: Sequence[int], prompt: npt.NDArray[np.int32]) -> int:
    """How many tokens both begin with, the prompt's last excepted.

    That one is decoded again in any case, since its result is what the answer starts from.
    """
    n = min(len(memory), len(prompt) - 1)
    differing = np.flatnonzero(np.array(memory[:n], np.int32) != prompt[:n])
    return int(differing[0]) if differing.size else n
