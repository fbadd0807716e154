"""What computes: a llama.cpp context and the batch of tokens that it decodes."""

from __future__ import annotations

import ctypes
import os
import time

import numpy as np
import numpy.typing as npt

from inferpool.engine.abort import AbortToken
from inferpool.engine.backend import lib, native_errors
from inferpool.engine.model import Model
from inferpool.engine.threads import ThreadCount
from inferpool.engine.token_types import PairEmbedding
from inferpool.errors import CallCancelled, ModelError, ModelLoadError

__all__ = ["Batch", "Context", "context_length"]

_DECODE_ABORTED = 2
_DECODE_NO_SLOT = 1


DEFAULT_CONTEXT_LENGTH = 4096
"""Some models were trained with so much that the memory for it would not fit."""


def context_length(asked: int | None, trained: int) -> int:
    """Tokens of one conversation; 0 is the trained length, None that up to 4096."""
    if asked is None:
        return min(trained, DEFAULT_CONTEXT_LENGTH)
    return asked or trained


class Batch:
    """Tokens to decode together: a ``llama_batch`` over numpy arrays.

    Args:
        capacity: tokens it can hold.
        embedding: what llama.cpp is given in place of their ids, if anything is.
    """

    def __init__(self, capacity: int, embedding: PairEmbedding | None = None) -> None:
        self._embedding = embedding
        self._token = np.zeros(capacity, np.int32)
        self._rows = np.zeros((capacity, embedding.width if embedding else 0), np.float32)
        self._position = np.zeros(capacity, np.int32)
        self._sequence = np.zeros(capacity, np.int32)
        self._output = np.zeros(capacity, np.int8)
        # Every token belongs to exactly one sequence, whose id is read through a pointer.
        self._n_sequences = np.ones(capacity, np.int32)
        self._sequence_pointer = self._sequence.ctypes.data + 4 * np.arange(
            capacity, dtype=np.uintp
        )
        self.native = lib.llama_batch(
            n_tokens=0,
            token=None if embedding else self._token.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            embd=self._rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float)) if embedding else None,
            pos=self._position.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            n_seq_id=self._n_sequences.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            seq_id=self._sequence_pointer.ctypes.data_as(
                ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))
            ),
            logits=self._output.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def __len__(self) -> int:
        return int(self.native.n_tokens)

    def clear(self) -> None:
        """Forget the tokens."""
        self.native.n_tokens = 0

    def add(
        self, tokens: npt.NDArray[np.int32], *, start: int = 0, sequence: int = 0, output: bool
    ) -> None:
        """Append ``tokens`` at positions ``start``, ``start + 1`` … of ``sequence``.

        Args:
            tokens: their ids, shape (n,).
            start: position of the first one in its sequence.
            sequence: id of the sequence.
            output: whether their results will be read.

        Raises:
            ModelError: if there is no embedding of one of them.
        """
        begin = len(self)
        end = begin + len(tokens)
        if self._embedding is None:
            self._token[begin:end] = tokens
        else:
            self._rows[begin:end] = self._embedding.rows(tokens)
        self._position[begin:end] = np.arange(start, start + len(tokens), dtype=np.int32)
        self._sequence[begin:end] = sequence
        self._output[begin:end] = output
        self.native.n_tokens = end

    def want_last(self) -> None:
        """Ask for the result of the last token."""
        self._output[len(self) - 1] = True


class Context:
    """A ``llama_context`` of ``model``. Close it before the model.

    Attributes:
        n_batch: tokens per decode at most.
        n_seq_max: sequences in memory at most.
    """

    def __init__(
        self,
        model: Model,
        *,
        n_ctx: int,
        n_batch: int,
        n_seq_max: int = 1,
        kv_unified: bool = True,
        n_threads: int | None = None,
        flash_attn: bool = True,
        embeddings: bool = False,
    ) -> None:
        """Allocate the context.

        Args:
            model: the weights.
            n_ctx: tokens in memory at most, over all sequences.
            n_batch: tokens per decode at most.
            n_seq_max: sequences in memory at most.
            kv_unified: whether the sequences share one memory; otherwise each has its own,
                of an equal part of ``n_ctx``, and attention keeps to that.
            n_threads: how many compute at most (`ThreadCount`); None takes the CPUs this process
                may run on.
            flash_attn: whether to use flash attention.
            embeddings: whether pooled vectors will be read instead of logits.

        Raises:
            ModelLoadError: if llama.cpp can't make such a context, usually for want of memory, or
                logits will be read of a model that does not generate text.
        """
        params = lib.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = n_batch
        # One physical batch per decode: pooling and non-causal attention need the whole
        # sequence in one, and an aborted decode leaves nothing half done.
        params.n_ubatch = n_batch
        params.n_seq_max = n_seq_max
        params.kv_unified = kv_unified
        n_threads = n_threads or len(os.sched_getaffinity(0))
        params.n_threads = params.n_threads_batch = n_threads
        # To wait for an accelerator looks like waiting for a CPU.
        self._threads = None if model.has_accelerator else ThreadCount(n_threads)
        params.flash_attn_type = (
            lib.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash_attn else lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        params.embeddings = embeddings
        native_errors()
        self._handle: lib.llama_context_p | None = lib.llama_init_from_model(model.handle, params)
        if self._handle is None:
            reason = native_errors() or "llama.cpp gives no reason"
            raise ModelLoadError(
                f"can't make a context for {model.path.name} with n_ctx={n_ctx}, "
                f"n_batch={n_batch}, n_seq_max={n_seq_max}: {reason}"
            )
        self._abort: AbortToken | None = None
        self._rows: dict[int, npt.NDArray[np.float32]] = {}
        self.n_batch: int = lib.llama_n_batch(self._handle)
        self._n_vocab = model.n_vocab
        self.n_seq_max = n_seq_max
        if not embeddings and (model.has_encoder or not self.has_memory):
            self.close()
            raise ModelLoadError(f"{model.path.name} does not generate text: not a chat model")

    @property
    def has_memory(self) -> bool:
        """Whether it remembers tokens between batches, which encoders don't."""
        return lib.llama_get_memory(self.handle) is not None

    def close(self) -> None:
        """Free the context. Closing twice is harmless."""
        if self._handle is not None:
            lib.llama_free(self._handle)
            self._handle = None

    @property
    def handle(self) -> lib.llama_context_p:
        """The native ``llama_context *``."""
        if self._handle is None:
            raise RuntimeError("the context is closed")
        return self._handle

    def set_abort(self, abort: AbortToken | None) -> None:
        """Let ``abort`` end every `decode` from now on; None lets nothing do so."""
        if abort is self._abort:
            return  # llama.cpp would write a line of log
        callback, data = (0, None) if abort is None else (abort.callback, abort.data)
        native = lib.ggml_abort_callback(callback)
        lib.llama_set_abort_callback(self.handle, native, ctypes.c_void_p(data))
        # What it points to lives as long as this object.
        self._abort = abort

    def decode(self, batch: Batch) -> None:
        """Compute ``batch``.

        Raises:
            CallCancelled: if the abort token was set before or meanwhile. Tokens of this
                batch are then not in memory.
            ModelError: if llama.cpp can't compute it.
        """
        if self._abort is not None and self._abort.is_set():
            raise CallCancelled("the call was cancelled")
        native_errors()
        status = self._decode(batch)
        if status == 0:
            return
        if status == _DECODE_ABORTED:
            raise CallCancelled("the call was cancelled")
        if status == _DECODE_NO_SLOT:
            raise ModelError(f"no room in the context for {len(batch)} more tokens")
        reason = native_errors() or "no reason given"
        raise ModelError(f"llama_decode failed with {status} on {len(batch)} tokens: {reason}")

    def _decode(self, batch: Batch) -> int:
        began, cpu = time.perf_counter(), time.process_time()
        status: int = lib.llama_decode(self.handle, batch.native)
        ended, cpu = time.perf_counter(), time.process_time() - cpu
        threads = self._threads
        if threads is not None and threads.took(began=began, ended=ended, cpu=cpu):
            lib.llama_set_n_threads(self.handle, threads.now, threads.now)
        return status

    def logits(self, index: int = -1) -> npt.NDArray[np.float32]:
        """Logits of an output of the last batch, shape (n_vocab,); a view until the next one.

        Args:
            index: position of its token in that batch, or -1 for the last output.
        """
        pointer = lib.llama_get_logits_ith(self.handle, index)
        if not pointer:
            raise ModelError(f"the last batch has no output at {index}")
        # To make an array of a pointer takes longer than to look for its largest value, and the
        # rows lie where they lay for the batch before. An array that was kept is only used for an
        # address that llama.cpp has just named.
        address = ctypes.addressof(pointer.contents)
        row = self._rows.get(address)
        if row is None:
            row = self._rows[address] = np.ctypeslib.as_array(pointer, (self._n_vocab,))
        return row

    def clear(self) -> None:
        """Forget every sequence."""
        if self.has_memory:
            # The cells are only marked free: their old contents can't be reached.
            lib.llama_memory_clear(lib.llama_get_memory(self.handle), False)

    def truncate(self, sequence: int, length: int) -> bool:
        """Keep the first ``length`` tokens of a sequence; False if the model can't do that."""
        memory = lib.llama_get_memory(self.handle)
        return bool(lib.llama_memory_seq_rm(memory, sequence, length, -1))

    def copy_sequence(self, source: int, target: int) -> None:
        """Let sequence ``target`` hold what ``source`` does, and nothing else."""
        memory = lib.llama_get_memory(self.handle)
        lib.llama_memory_seq_rm(memory, target, -1, -1)
        # Between separate memories llama.cpp copies whole sequences only.
        lib.llama_memory_seq_cp(memory, source, target, -1, -1)
