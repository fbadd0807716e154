"""What a GGUF says of its model, read before llama.cpp reads it.

The layout is that of ggml's ``docs/gguf.md``, versions 2 and 3.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from inferpool.config import MAX_CONTEXT_LENGTH
from inferpool.errors import ModelLoadError

__all__ = ["Gguf", "Tensor"]

_T = TypeVar("_T")

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
# Tensors begin at multiples of this, where the metadata name no other number.
_ALIGNMENT = 32
# Longer ones are the vocabulary's, of which the length is enough.
_LONGEST_ARRAY = 1024
# LLAMA_MAX_LAYERS, and more than any model has of the others. They become sizes of allocations.
_LIMITS = {
    "context_length": MAX_CONTEXT_LENGTH,
    "embedding_length": 1 << 20,
    "block_count": 512,
}
# What says that layers remember tokens in some other way than by a key and a value for each head.
_UNLIKE_OTHERS = (
    *("attention.kv_lora_rank", "attention.compress_ratios", "attention.shared_kv_layers"),
    *("attention.key_length_swa", "attention.value_length_swa", "ssm.state_size"),
)
# LLAMA_POOLING_TYPE_*: llama.cpp aborts on any other.
_POOLING_TYPES = range(5)


class Tensor(NamedTuple):
    """Where the numbers of a tensor are, and how they lie there.

    Attributes:
        shape: how many there are in a row, rows in a matrix …
        kind: ggml's number for their type.
        begin: the place of the first one in the file, which may be beyond its end.
    """

    shape: tuple[int, ...]
    kind: int
    begin: int


class Gguf:
    """The metadata of one GGUF file, and where its tensors are.

    Attributes:
        path: the file.
        metadata: values by key; of an array of more than 1024 entries, or of strings, its length.
        architecture: llama.cpp's name for it.
        n_ctx_train: context length that the model was trained with, in tokens.
    """

    def __init__(self, path: Path) -> None:
        """Read ``path``.

        Raises:
            ModelLoadError: if it is not a GGUF, or says something that makes no sense.
        """
        self.path = path
        self.metadata: dict[str, Any] = self._read(_Reader.metadata)
        self.architecture = str(self.metadata.get("general.architecture", ""))
        for name, most in _LIMITS.items():
            value = self.get(name, 1)
            if not isinstance(value, int) or not 0 < value <= most:
                key = name.replace("_", " ")
                raise ModelLoadError(f"{path}: a {key} of {value} makes no sense (1 to {most})")
        pooling = self.get("pooling_type", 0)
        if pooling not in _POOLING_TYPES:
            raise ModelLoadError(f"{path}: there is no pooling of type {pooling}")
        self.n_ctx_train: int = self.get("context_length", 1)

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a key of the architecture, such as ``"block_count"``."""
        return self.metadata.get(f"{self.architecture}.{name}", default)

    @property
    def is_split(self) -> bool:
        """Whether other files have a part of the tensors."""
        return _count(self.metadata.get("split.count")) > 1

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of this file by name.

        Raises:
            ModelLoadError: if the file can't be read any more.
        """
        alignment = _count(self.metadata.get("general.alignment")) or _ALIGNMENT
        return self._read(lambda reader: reader.tensors(alignment))

    def _read(self, what: Callable[[_Reader], _T]) -> _T:
        try:
            with (
                self.path.open("rb") as file,
                mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data,
            ):
                return what(_Reader(data))
        # An empty file can't be mapped, which is a ValueError.
        except (OSError, ValueError, struct.error) as error:
            raise ModelLoadError(f"can't load {self.path}: {error}") from error

    @property
    def bytes_per_token(self) -> int:
        """Bytes that a token takes in the context, in float16, at least.

        ``2 * sum(n_head_kv * (key_length + value_length))`` over the layers. Those with a sliding
        window count too: the context has room for all tokens there as well (``swa_full``).
        Where layers are recurrent, or share or compress what they remember, it is nothing.
        """
        # Layers that only predict further tokens are not always used.
        n_layers = self.get("block_count", 0) - _count(self.get("nextn_predict_layers"))
        n_embd = self.get("embedding_length", 0)
        if self._is_encoder or any(self.get(name) for name in _UNLIKE_OTHERS):
            return 0
        n_head = self._per_layer("attention.head_count", n_layers, 0)
        n_head_kv = self._per_layer("attention.head_count_kv", n_layers, n_head)[:n_layers]
        if not any(n_head):
            return 0
        width = n_embd // max(n_head)
        width_k = _count(self.get("attention.key_length", width))
        width_v = _count(self.get("attention.value_length", width))
        return 2 * sum(n_head_kv) * (width_k + width_v)

    @property
    def _is_encoder(self) -> bool:
        # Files of the one architecture that is named don't say that it looks ahead.
        return self.architecture == "gemma-embedding" or self.get("attention.causal") is False

    def _per_layer(self, name: str, n_layers: int, default: Any) -> list[int]:
        value = self.get(name, default)
        return [_count(each) for each in (value if isinstance(value, list) else [value] * n_layers)]


def _count(value: Any) -> int:
    """A size, or 0 if it is not one: llama.cpp will say so."""
    return value if isinstance(value, int) and value > 0 else 0


class _Reader:
    """Reads values one after another; none of them can lie beyond the end of the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0
        self._n_tensors = 0

    def metadata(self) -> dict[str, Any]:
        if self._bytes(4) != b"GGUF":
            raise ValueError("not a GGUF file: it does not begin with GGUF")
        version = self._scalar("<I")
        if version not in {2, 3}:
            raise ValueError(f"GGUF version {version} is not known")
        self._n_tensors = self._scalar("<Q")
        n_values = self._scalar("<Q")
        return dict(self._pair() for _ in range(n_values))

    def tensors(self, alignment: int) -> dict[str, Tensor]:
        self.metadata()  # which they follow
        found = dict(self._tensor() for _ in range(self._n_tensors))
        begin = self._at + -self._at % alignment
        return {name: each._replace(begin=begin + each.begin) for name, each in found.items()}

    def _tensor(self) -> tuple[str, Tensor]:
        name = self._string().decode("utf-8", "replace")
        shape = tuple(self._scalar("<Q") for _ in range(self._scalar("<I")))
        return name, Tensor(shape, kind=self._scalar("<I"), begin=self._scalar("<Q"))

    def _pair(self) -> tuple[str, Any]:
        return self._string().decode("utf-8", "replace"), self._value(self._scalar("<I"))

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string().decode("utf-8", "replace")
        if kind != _ARRAY:
            return self._scalar(_layout(kind))
        kind, length = self._scalar("<I"), self._scalar("<Q")
        if kind == _STRING:
            for _ in range(length):
                self._skip(self._scalar("<Q"))
            return length
        if length <= _LONGEST_ARRAY:
            return [self._scalar(_layout(kind)) for _ in range(length)]
        self._skip(length * struct.calcsize(_layout(kind)))
        return length

    def _string(self) -> bytes:
        return self._bytes(self._scalar("<Q"))

    def _scalar(self, layout: str) -> Any:
        (value,) = struct.unpack(layout, self._bytes(struct.calcsize(layout)))
        return value

    def _bytes(self, count: int) -> bytes:
        begin = self._at
        self._skip(count)
        return self._data[begin : self._at]

    def _skip(self, count: int) -> None:
        self._at += count
        if self._at > len(self._data):
            raise ValueError("the file is truncated, or not a GGUF")


def _layout(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"a metadata value of unknown type {kind}")
    return _SCALARS[kind]
