"""Pixels to what a language model reads in place of tokens: llama.cpp's ``mtmd`` library."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from inferpool.engine.abort import AbortToken
from inferpool.engine.backend import (
    init_backend,
    lib,
    missing_symbols,
    native_bridge,
    native_errors,
)
from inferpool.engine.context import Context
from inferpool.engine.images import Pixels
from inferpool.engine.model import Model
from inferpool.errors import CallCancelled, InvalidRequest, ModelError, ModelLoadError

try:
    from llama_cpp import mtmd_cpp as mtmd
except (AttributeError, OSError, RuntimeError) as error:
    raise ImportError(
        f"llama-cpp-python's bindings and its native library mtmd don't fit together: {error}. "
        "hint: reinstall llama-cpp-python"
    ) from error

__all__ = ["Chunk", "Chunks", "Projector"]

_REQUIRED = {
    "mtmd_bitmap_free": 1,
    "mtmd_bitmap_init": 3,
    "mtmd_context_params_default": 0,
    "mtmd_decode_use_non_causal": 2,
    "mtmd_encode_chunk": 2,
    "mtmd_free": 1,
    "mtmd_get_output_embd": 1,
    "mtmd_helper_decode_image_chunk": 10,
    "mtmd_helper_log_set": 2,
    "mtmd_init_from_file": 3,
    "mtmd_input_chunk_get_n_pos": 1,
    "mtmd_input_chunk_get_n_tokens": 1,
    "mtmd_input_chunk_get_tokens_text": 2,
    "mtmd_input_chunk_get_type": 1,
    "mtmd_input_chunks_free": 1,
    "mtmd_input_chunks_get": 2,
    "mtmd_input_chunks_init": 0,
    "mtmd_input_chunks_size": 1,
    "mtmd_support_vision": 1,
    "mtmd_tokenize_from_parts": 5,
}

# The encoder's graph is computed this many nodes at a time, with a look at the abort token after
# each piece: pieces cost a start of the threads, nodes take up to milliseconds.
_NODES_PER_LOOK = 16

_DECODE_ABORTED = 2


class Projector:
    """The vision encoder of an mmproj GGUF, for one language model. Close it before the model."""

    def __init__(
        self,
        model: Model,
        path: Path,
        *,
        n_threads: int | None = None,
        flash_attn: bool = True,
        use_gpu: bool = False,
        abort: AbortToken | None = None,
    ) -> None:
        """Load ``path``.

        Raises:
            ModelLoadError: if it is not a vision projector that fits ``model``.
            CallCancelled: if ``abort`` was set meanwhile.
        """
        init_backend()
        problems = missing_symbols(mtmd, _REQUIRED)
        if problems:
            raise ModelLoadError(
                f"the installed llama-cpp-python does not fit this version of inferpool: "
                f"{', '.join(problems)}"
            )
        mtmd.mtmd_helper_log_set(native_bridge, ctypes.c_void_p(0))
        self._path = path
        self._abort: AbortToken | None = None
        self._n_nodes = 0
        # The library keeps its address.
        self._look = lib.ggml_backend_sched_eval_callback(self._on_node)
        keep_going = mtmd.mtmd_progress_callback(lambda *_: not (abort and abort.is_set()))
        params = mtmd.mtmd_context_params_default()
        params.use_gpu = use_gpu
        params.print_timings = False
        params.n_threads = n_threads or len(os.sched_getaffinity(0))
        params.flash_attn_type = (
            lib.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash_attn else lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        params.warmup = False
        params.cb_eval = self._look
        params.progress_callback = keep_going
        native_errors()
        self._handle: Any = mtmd.mtmd_init_from_file(os.fsencode(path), model.handle, params)
        if self._handle is None:
            if abort is not None and abort.is_set():
                raise CallCancelled(f"loading {path.name} was cancelled")
            reason = native_errors() or "llama.cpp gives no reason"
            raise ModelLoadError(f"can't load {path} as projector of {model.path.name}: {reason}")
        if not mtmd.mtmd_support_vision(self._handle):
            self.close()
            raise ModelLoadError(f"{path} encodes no images")

    def close(self) -> None:
        """Free the encoder. Closing twice is harmless."""
        if self._handle is not None:
            mtmd.mtmd_free(self._handle)
            self._handle = None

    @property
    def handle(self) -> Any:
        """The native ``mtmd_context *``."""
        if self._handle is None:
            raise RuntimeError("the projector is closed")
        return self._handle

    def tokenize(self, parts: Sequence[str | Pixels]) -> Chunks:
        """What a model reads for texts and images in this order; the caller closes it.

        Control tokens that a text spells out are tokens.

        Raises:
            InvalidRequest: if an image can't be prepared, such as one that is too narrow.
        """
        texts, bitmaps = [], []
        native = (ctypes.POINTER(mtmd.mtmd_input_part) * len(parts))()
        try:
            for i, part in enumerate(parts):
                item = mtmd.mtmd_input_part()
                if isinstance(part, str):
                    data = part.encode()
                    text = mtmd.mtmd_input_text(data, len(data), False, True)
                    texts.append((data, text))
                    item.text = ctypes.pointer(text)
                else:
                    bitmaps.append(_bitmap(part))
                    item.bitmap = bitmaps[-1]
                native[i] = ctypes.pointer(item)
            native_errors()
            handle = mtmd.mtmd_input_chunks_init()
            status = mtmd.mtmd_tokenize_from_parts(self.handle, handle, native, len(parts), False)
        finally:
            for bitmap in bitmaps:
                mtmd.mtmd_bitmap_free(bitmap)
        if status != 0:
            mtmd.mtmd_input_chunks_free(handle)
            raise InvalidRequest(f"can't prepare the images: {native_errors() or status}")
        return Chunks(handle)

    def set_abort(self, abort: AbortToken | None) -> None:
        """Let ``abort`` end every `decode` from now on; None lets nothing do so."""
        self._abort = abort

    def decode(self, context: Context, chunk: Chunk, position: int) -> None:
        """Encode an image chunk, and decode what comes of it into sequence 0 of ``context``.

        Raises:
            CallCancelled: if the abort token was set before or meanwhile.
            ModelError: if llama.cpp can't compute it.
        """
        if mtmd.mtmd_decode_use_non_causal(self.handle, chunk.handle) and (
            chunk.n_tokens > context.n_batch
        ):
            raise ModelError(
                f"an image takes {chunk.n_tokens} tokens, which this model reads at once. "
                f"hint: n_batch must be at least that, not {context.n_batch}"
            )
        native_errors()
        status = mtmd.mtmd_encode_chunk(self.handle, chunk.handle)
        # An encoder that was stopped reports success.
        self._check_abort()
        if status != 0:
            raise ModelError(f"an image can't be encoded: {native_errors() or status}")
        end = ctypes.c_int32()
        status = mtmd.mtmd_helper_decode_image_chunk(
            self.handle,
            context.handle,
            chunk.handle,
            mtmd.mtmd_get_output_embd(self.handle),
            position,
            0,
            context.n_batch,
            ctypes.byref(end),
            mtmd.mtmd_helper_post_decode_callback(),
            ctypes.c_void_p(),
        )
        if status == _DECODE_ABORTED:
            raise CallCancelled("the call was cancelled")
        if status != 0:
            raise ModelError(f"an image can't be decoded: {native_errors() or status}")

    def _check_abort(self) -> None:
        if self._abort is not None and self._abort.is_set():
            raise CallCancelled("the call was cancelled")

    def _on_node(self, _tensor: Any, asking: bool, _data: Any) -> bool:
        """Where to pause, when asked before a node; whether to go on, after a pause."""
        if asking:
            self._n_nodes += 1
            return self._n_nodes % _NODES_PER_LOOK == 0
        return not (self._abort is not None and self._abort.is_set())


@dataclass(frozen=True)
class Chunk:
    """A stretch of a prompt: text or an image."""

    handle: Any
    """The native ``mtmd_input_chunk *``, part of its `Chunks`."""
    n_tokens: int
    """Cells of the context that it takes."""
    n_positions: int
    """Positions in its sequence that it takes."""
    tokens: npt.NDArray[np.int32] | None
    """Token ids of text, shape (n_tokens,); None for an image."""


class Chunks(Sequence[Chunk]):
    """A prompt of texts and images. Close it to free its chunks."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._chunks = [
            _chunk(mtmd.mtmd_input_chunks_get(handle, i))
            for i in range(mtmd.mtmd_input_chunks_size(handle))
        ]

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, index: Any) -> Any:
        return self._chunks[index]

    def close(self) -> None:
        """Free the chunks. Closing twice is harmless."""
        if self._handle is not None:
            mtmd.mtmd_input_chunks_free(self._handle)
            self._handle = None
            self._chunks = []


def _chunk(handle: Any) -> Chunk:
    tokens = None
    if mtmd.mtmd_input_chunk_get_type(handle) == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
        n = ctypes.c_size_t()
        source = mtmd.mtmd_input_chunk_get_tokens_text(handle, ctypes.byref(n))
        tokens = np.array(source[: n.value], np.int32)
    return Chunk(
        handle=handle,
        n_tokens=mtmd.mtmd_input_chunk_get_n_tokens(handle),
        n_positions=mtmd.mtmd_input_chunk_get_n_pos(handle),
        tokens=tokens,
    )


def _bitmap(pixels: Pixels) -> Any:
    height, width, _ = pixels.shape
    source = pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    return mtmd.mtmd_bitmap_init(width, height, source)  # copies the pixels
