"""The two texts of a pair, told apart as BERT does it: by the types of their tokens.

BERT adds one vector to the tokens of the first text, and another to those of the second.
llama.cpp's graph adds the first one to all of them (``src/models/bert.cpp``). But it takes
embeddings in place of token ids, and the difference can be part of these.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from inferpool.engine.backend import lib
from inferpool.engine.gguf import Gguf, Tensor
from inferpool.engine.model import Model
from inferpool.errors import ModelError, ModelLoadError

__all__ = ["PairEmbedding", "pair_embedding"]

_TOKENS, _TYPES = "token_embd.weight", "token_types.weight"


class _Format(NamedTuple):
    """How numbers lie in a tensor: blocks of ``block`` numbers in ``size`` bytes.

    ``decoder`` is the function of ggml that makes float32 of them. llama_cpp does not bind it, but
    what it loads exports it.
    """

    decoder: str | None
    block: int
    size: int


# By enum ggml_type of ggml.h.
_FORMATS = {
    0: _Format(None, 1, 4),
    1: _Format("ggml_fp16_to_fp32_row", 1, 2),
    2: _Format("dequantize_row_q4_0", 32, 18),
    3: _Format("dequantize_row_q4_1", 32, 20),
    6: _Format("dequantize_row_q5_0", 32, 22),
    7: _Format("dequantize_row_q5_1", 32, 24),
    8: _Format("dequantize_row_q8_0", 32, 34),
    10: _Format("dequantize_row_q2_K", 256, 84),
    11: _Format("dequantize_row_q3_K", 256, 110),
    12: _Format("dequantize_row_q4_K", 256, 144),
    13: _Format("dequantize_row_q5_K", 256, 176),
    14: _Format("dequantize_row_q6_K", 256, 210),
    20: _Format("dequantize_row_iq4_nl", 32, 18),
    23: _Format("dequantize_row_iq4_xs", 256, 136),
    30: _Format("ggml_bf16_to_fp32_row", 1, 2),
}
# From where, to where, how many numbers.
_DECODER = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class PairEmbedding:
    """What a model reads in place of a pair's token ids.

    Attributes:
        width: numbers for each token.
    """

    def __init__(self, table: _Table, difference: npt.NDArray[np.float32], separator: int) -> None:
        self.width = table.width
        self._table = table
        self._difference = difference
        self._separator = separator

    def rows(self, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Embeddings of the tokens of a pair, shape (len(tokens), width).

        Raises:
            ModelError: if the vocabulary lacks one of them.
        """
        rows = self._table.rows(tokens)
        # No text holds a separator, so the first one is that between the texts.
        second = np.argmax(tokens == self._separator) + 1
        rows[second:] += self._difference
        return rows


def pair_embedding(model: Model) -> PairEmbedding | None:
    """What tells apart the texts of a pair; None if all types of tokens are alike.

    So they are for models without WordPiece, too, whose tokenizers know only the first type.

    Raises:
        ModelLoadError: if the file does not tell what is added for a type, or to what.
    """
    if not model.is_wordpiece:
        return None
    gguf = Gguf(model.path)
    tensors = gguf.tensors()
    if _TYPES not in tensors and not gguf.is_split:
        return None
    types = _Table(model.path, tensors, _TYPES, model.n_embd_in)
    if types.n_rows < 2:
        return None
    first, second = types.rows(np.arange(2, dtype=np.int32))
    difference = second - first
    if not difference.any():
        return None
    table = _Table(model.path, tensors, _TOKENS, model.n_embd_in)
    _, (separator,), _ = model.pair_separators()
    return PairEmbedding(table, difference, separator)


class _Table:
    """A matrix that stays in its file: rows are decoded when they are asked for.

    The file is mapped, as it is by llama.cpp, so that it is in memory once.

    Attributes:
        n_rows: how many there are.
        width: numbers in each.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Tensor], name: str, width: int) -> None:
        """Map the matrix ``name`` of ``tensors``, whose rows must be of ``width`` numbers.

        Raises:
            ModelLoadError: if there is no such matrix, or no way to decode it.
        """
        self.width = width
        try:
            if name not in tensors:
                raise ValueError(
                    "it is not there. hint: merge the files that the model is split in"
                )
            tensor = tensors[name]
            if tensor.kind not in _FORMATS:
                raise ValueError(
                    f"its type {tensor.kind} is not known. hint: take F32, F16 or Q8_0"
                )
            decoder, block, size = _FORMATS[tensor.kind]
            if tensor.shape[:1] != (width,) or width % block:
                raise ValueError(f"its shape {tensor.shape} does not fit {width} numbers in a row")
            self.n_rows = math.prod(tensor.shape[1:])
            shape = (self.n_rows, width // block * size)
            if tensor.begin + math.prod(shape) > path.stat().st_size:
                raise ValueError("it ends beyond the file")
            self._data = np.asarray(np.memmap(path, np.uint8, "r", tensor.begin, shape))
            self._decode = None if decoder is None else _DECODER((decoder, lib._lib))
        except (AttributeError, OSError, ValueError) as error:
            raise ModelLoadError(
                f"can't load {path}, which tells query and document apart, for its {name}: {error}"
            ) from error

    def rows(self, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """The rows ``ids``, in a new array of shape (len(ids), width)."""
        try:
            encoded = np.take(self._data, ids, axis=0)
        except IndexError as error:
            raise ModelError(f"the vocabulary has {self.n_rows} tokens: {error}") from error
        if self._decode is None:
            return encoded.view(np.float32)
        rows = np.empty((len(ids), self.width), np.float32)
        self._decode(encoded.ctypes.data, rows.ctypes.data, rows.size)
        return rows
