"""Many sequences in one batch, one row of floats out for each."""

from __future__ import annotations

import bisect
import ctypes
import functools
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from inferpool.engine.abort import AbortToken
from inferpool.engine.backend import lib
from inferpool.engine.context import Batch, Context
from inferpool.engine.model import Model
from inferpool.engine.token_types import PairEmbedding
from inferpool.errors import CallCancelled, InferpoolError, ModelError

__all__ = ["Job", "Packer"]

# Tokens that sequences are packed up to. On MiniLM, 256 take 3 percent less time per token than
# 512, and 10 percent less than 1024: attention looks at every pair of tokens in a batch, if only
# to see that they belong to different sequences.
_PACKED_TOKENS = 256
# Flash attention on the CPU computes tiles of this many queries and keys, and skips a tile without
# a pair of one sequence (GGML_FA_TILE_Q and GGML_FA_TILE_KV). Sequences that end where a tile does
# leave more to skip: 3 percent of the time on MiniLM.
_TILE = 64
# What is tokenised in one step, in characters: a few milliseconds, after which others have a turn.
_READ_CHARACTERS = 1 << 15


class Job:
    """The texts of one call, and what came of them.

    Attributes:
        rows: the results so far, float32 of shape (number of texts, width).
        n_finished: how many of them are there.
        error: why there will be no more, or None.
        abort: ends the job early.
        bulk: whether others come first.
    """

    def __init__(
        self,
        texts: Sequence[str],
        tokenize: Callable[[int, str], npt.NDArray[np.int32]],
        width: int,
        abort: AbortToken | None = None,
        *,
        bulk: bool = False,
    ) -> None:
        """Prepare to compute.

        Args:
            texts: what a row is made of, each.
            tokenize: the sequence of a text, given its row: token ids of shape (n,) with n at
                least 1. What it raises is the job's error.
            width: floats in a row.
            abort: ends the job early.
            bulk: whether others come first.
        """
        self.bulk = bulk
        self.rows = np.empty((len(texts), width), np.float32)
        self.error: Exception | None = None
        self.abort = abort
        self.n_finished = 0
        self._texts = texts
        self._tokenize = tokenize
        self._sequences: list[npt.NDArray[np.int32]] = []
        # Rows by length, and the lengths, ascending: the longest that fits is found by bisection.
        self._waiting: dict[int, list[int]] = {}
        self._lengths: list[int] = []

    @property
    def ended(self) -> bool:
        """Whether nothing is left to compute."""
        return self.error is not None or self.n_finished == len(self._texts)

    @property
    def cancelled(self) -> bool:
        """Whether nobody wants the results any more."""
        return self.abort is not None and self.abort.is_set()

    @property
    def unread(self) -> bool:
        """Whether some texts are still to be tokenised."""
        return self.error is None and len(self._sequences) < len(self._texts)

    @property
    def waiting(self) -> bool:
        """Whether some sequences are in no batch yet."""
        return bool(self._lengths)

    def read(self) -> int:
        """Tokenise the next text, and say how long it was: its characters, or tokens if more."""
        row = len(self._sequences)
        text = self._texts[row]
        try:
            tokens = self._tokenize(row, text)
        except Exception as error:  # noqa: BLE001  # its caller's to know, and nobody else's
            self.error = error
            return len(text)
        self._sequences.append(tokens)
        self.put_back(row)
        return max(len(text), len(tokens))

    def take(self, start: int, end: int) -> int | None:
        """Take out the waiting sequence that fits best between two places of a batch.

        That is the one which ends closest before the end of a tile, or the longest if ``start``
        is 0, whether or not it fits.

        Args:
            start: tokens in the batch already.
            end: tokens that the batch may hold.

        Returns:
            Its row, or None if none fits.
        """
        if not start:
            return self._take_out(-1) if self._lengths else None
        found = []
        for tile_end in {end, *range(_TILE, end, _TILE)}:
            # The longest one that ends there or before.
            at = bisect.bisect_right(self._lengths, tile_end - start) - 1
            if at >= 0:
                left_over = (tile_end - start - self._lengths[at]) % _TILE
                found.append((-left_over, at))
        return self._take_out(max(found)[1]) if found else None

    def tokens(self, row: int) -> npt.NDArray[np.int32]:
        """The sequence of a row."""
        return self._sequences[row]

    def put_back(self, row: int) -> None:
        """Undo `take`."""
        length = len(self._sequences[row])
        if length not in self._waiting:
            bisect.insort(self._lengths, length)
        self._waiting.setdefault(length, []).append(row)

    def _take_out(self, at: int) -> int:
        length = self._lengths[at]
        row = self._waiting[length].pop()
        if not self._waiting[length]:
            del self._waiting[length], self._lengths[at]
        return row


class Packer:
    """Computes the pooled rows of waiting jobs, as many sequences in a batch as fit.

    Attributes:
        n_ctx: tokens a sequence may have at most.
        limit: what sets it, in words.
        pooling: llama.cpp's ``LLAMA_POOLING_TYPE_*`` that makes a row of a sequence.
    """

    def __init__(
        self,
        model: Model,
        *,
        n_batch: int,
        n_seq_max: int,
        n_threads: int | None,
        flash_attn: bool,
    ) -> None:
        """Prepare ``model``, which stays the caller's to close.

        Args:
            model: a model that pools.
            n_batch: tokens decoded together at most; no sequence can be longer than this.
            n_seq_max: sequences decoded together at most.
            n_threads: None takes the CPUs this process may run on.
            flash_attn: whether to use flash attention.

        Raises:
            ModelLoadError: if memory is short.
        """
        # More than a whole sequence, and than a packed batch, is never used.
        n_batch = min(n_batch, max(model.n_ctx_train, _PACKED_TOKENS))
        # llama.cpp sizes its pooling graph for equal shares, and aborts on a remainder.
        n_batch += -n_batch % n_seq_max
        self._context = Context(
            model,
            n_ctx=n_batch,
            n_batch=n_batch,
            n_seq_max=n_seq_max,
            n_threads=n_threads,
            flash_attn=flash_attn,
            embeddings=True,
        )
        self._n_seq_max = n_seq_max
        self._n_packed = min(_PACKED_TOKENS, n_batch)
        self._batch = Batch(self._context.n_batch)
        self._jobs: deque[Job] = deque()
        self.n_ctx = min(model.n_ctx_train, self._context.n_batch)
        self.limit = f"the model takes {self.n_ctx}"
        if self.n_ctx < model.n_ctx_train:
            self.limit = f"n_batch allows {self.n_ctx} of the model's {model.n_ctx_train}"
        self.pooling: int = lib.llama_pooling_type(self._context.handle)

    def close(self) -> None:
        """Free the context. Closing twice is harmless."""
        self._context.close()

    def embed_pairs(self, embedding: PairEmbedding) -> None:
        """Take all sequences for pairs from now on, and give llama.cpp ``embedding`` of them."""
        self._batch = Batch(self._context.n_batch, embedding)

    def submit(self, job: Job) -> None:
        """Queue ``job``; `step` computes it."""
        self._jobs.append(job)

    def forget(self) -> None:
        """Drop all jobs."""
        self._jobs.clear()

    @property
    def busy(self) -> bool:
        """Whether jobs wait."""
        return bool(self._jobs)

    def step(self) -> list[Job]:
        """Tokenise some texts and compute one batch; return the jobs that ended."""
        for job in self._jobs:
            if job.cancelled:
                job.error = CallCancelled("the call was cancelled")
        self._read_texts()
        batch = self._plan()
        if batch:
            self._compute(batch)
        ended = [job for job in self._jobs if job.ended]
        self._jobs = deque(job for job in self._jobs if not job.ended)
        return ended

    def _read_texts(self) -> None:
        """Tokenise a text of each job in turn, until that is enough for a step.

        Jobs with nothing to compute yet have the first turns, bulk jobs the last.
        """
        left = _READ_CHARACTERS
        for bulk in (False, True):
            unread = (job for job in self._jobs if job.bulk is bulk and job.unread)
            turns = deque(sorted(unread, key=lambda job: job.waiting))
            while turns and left > 0:
                job = turns.popleft()
                left -= job.read()
                if job.unread:
                    turns.append(job)

    def _plan(self) -> list[tuple[Job, int]]:
        """The next batch: a sequence of each job in turn, until the batch is full.

        Bulk jobs have their turns after all others. A sequence that is longer than a packed batch
        goes alone.
        """
        plan: list[tuple[Job, int]] = []
        n_tokens = 0
        for bulk in (False, True):
            turns = deque(job for job in self._jobs if job.bulk is bulk and not job.ended)
            while turns and len(plan) < self._n_seq_max:
                job = turns.popleft()
                row = job.take(n_tokens, self._n_packed)
                if row is not None:
                    plan.append((job, row))
                    n_tokens += len(job.tokens(row))
                    if job.waiting:
                        turns.append(job)
        # Whoever had the first turn now has the last one in the next batch.
        self._jobs.rotate(-1)
        return plan

    def _compute(self, plan: list[tuple[Job, int]]) -> None:
        jobs = list({id(job): job for job, _ in plan}.values())
        self._batch.clear()
        try:
            for sequence, (job, row) in enumerate(plan):
                self._batch.add(job.tokens(row), sequence=sequence, output=True)
            self._context.set_abort(_any_of(jobs))
            self._context.clear()
            self._context.decode(self._batch)
            for sequence, (job, row) in enumerate(plan):
                self._read_row(sequence, job.rows[row])
        except InferpoolError as error:
            self._share_out(error, jobs, plan)
            return
        for job, _ in plan:
            job.n_finished += 1

    def _share_out(
        self, error: InferpoolError, jobs: Sequence[Job], plan: list[tuple[Job, int]]
    ) -> None:
        """End the jobs that a failed batch is to blame on; the others' sequences wait again."""
        if isinstance(error, CallCancelled):
            to_blame = [job for job in jobs if job.cancelled] or jobs
        elif len(jobs) == 1:
            to_blame = jobs
        else:
            # Who knows whose fault it was: each job is tried by itself.
            for job in jobs:
                self._compute([(other, row) for other, row in plan if other is job])
            return
        for job in to_blame:
            job.error = error
        for job, row in plan:
            job.put_back(row)

    def _read_row(self, sequence: int, row: npt.NDArray[np.float32]) -> None:
        source = lib.llama_get_embeddings_seq(self._context.handle, sequence)
        if not source:
            raise ModelError(f"llama.cpp gave no result for sequence {sequence}")
        ctypes.memmove(row.ctypes.data, source, row.nbytes)


def _any_of(jobs: Sequence[Job]) -> AbortToken | None:
    """A token that is set once one of the jobs is cancelled."""
    tokens = [job.abort for job in jobs if job.abort is not None]
    return functools.reduce(lambda one, other: one.union(other), tokens) if tokens else None
