"""Payloads to frames and back: one msgpack message, and raw buffers beside it.

Arrays and long bytes do not pass through msgpack. They travel as parts of their own, copied
once into the ring and once out of it; the message refers to them by index. Nothing here can
run code or import a type that the other side names.

A payload is any mix of None, bool, int (64 bits), float, str, bytes, list, tuple, dict with
plain keys, dataclass, `msgspec.Struct` and `numpy.ndarray`. Dataclasses and Structs arrive as
dicts of their fields; everything else arrives as what it was.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import msgspec

from inferpool.errors import ProtocolError

__all__ = ["Buffer", "Parts", "decode", "decode_as", "decode_messages", "encode"]

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")

Buffer: TypeAlias = "bytes | memoryview | np.ndarray"

Parts = tuple[str, Any] | list[Any]
"""What a frame holds: kind and a plain payload, which the transport encodes and decodes by itself,
or a message and the buffers beside it."""

# Codes of msgpack's extension type.
_BYTES = 1
_ARRAY = 2
_TUPLE = 3

_PLAIN = frozenset({type(None), bool, int, float, str})
# Shorter bytes cost less inside the message than as a part.
_INLINE_BYTES = 1024
# More than an array's kind, dtype and shape take, but for the strangest.
_HEAD_BYTES = 256
_DTYPE_KINDS = frozenset("biufcSUmM")
_DTYPE = re.compile(r"[<>|=][biufcSUmM]\d{1,9}(\[\d{0,9}[a-zA-Z]{1,7}\])?")

_encode_message = msgspec.msgpack.Encoder().encode


def encode(kind: str, payload: Any) -> Parts:
    """Encode a payload of the given kind into the parts of a frame.

    Raises:
        TypeError: the payload holds something that is not in the list above, or the kind is no str.
        ValueError: an int above 64 bits, a lone surrogate in a str, or nesting too deep.
    """
    cls = type(payload)
    if (len(payload) < _INLINE_BYTES) if cls is bytes else (cls in _PLAIN):
        return kind, payload
    if not isinstance(kind, str):
        raise TypeError(f"the kind of a payload must be a str, not {type(kind).__name__}")
    if _is_array(cls):
        return [_array_message(kind, payload.dtype, payload.shape), _flat(payload)]
    try:
        parts: list[Buffer] = [b""]
        parts[0] = _encode_message((kind, _pack(payload, parts)))
    except (OverflowError, UnicodeEncodeError) as error:
        raise ValueError(f"payload cannot be encoded: {error}") from error
    except RecursionError:
        raise ValueError("payload is nested too deeply, or contains itself") from None
    return parts


def decode(parts: Parts) -> tuple[str, Any]:
    """Decode the parts of a frame into kind and payload. Arrays are views of their part.

    Raises:
        ProtocolError: the parts are not what `encode` makes.
    """
    if isinstance(parts, tuple):
        return parts
    try:
        if len(parts) == 1:
            return _decode_lone(parts[0])
        if len(parts) == 2 and len(parts[0]) <= _HEAD_BYTES:
            head = _array_head(bytes(parts[0]))
            if head is not None:
                return head[0], _view(parts[1], *head[1:])
        unpack = partial(_unpack, parts)
        message: _Message = msgspec.msgpack.decode(parts[0], type=_Message, ext_hook=unpack)
    except _UNDECODABLE as error:
        raise ProtocolError(f"undecodable payload: {error}") from error
    return message


def decode_messages(array: bytes) -> list[tuple[str, Any]]:
    """Decode messages that refer to no buffers and came together, as one msgpack array.

    Raises:
        ProtocolError: they are not what `encode` makes.
    """
    try:
        return _decode_several(array)
    except _UNDECODABLE as error:
        raise ProtocolError(f"undecodable payload: {error}") from error


def decode_as(parts: Parts, message: type[T]) -> T:
    """Decode the parts of a frame whose payload is a message of the given type.

    Raises:
        ProtocolError: the parts are not what `encode` makes of such a message.
    """
    try:
        return msgspec.convert(decode(parts)[1], message)
    except msgspec.ValidationError as error:
        raise ProtocolError(f"not a {message.__name__}: {error}") from error


def _pack(value: Any, parts: list[Buffer]) -> Any:
    """Replace what msgpack can't carry as it is, and refuse what it would change silently."""
    cls = type(value)
    if cls in _PLAIN:
        return value
    if cls is dict:
        if not _PLAIN.issuperset(map(type, value)):
            raise TypeError("payload keys must be None, bool, int, float or str")
        return {key: _pack(item, parts) for key, item in value.items()}
    if cls is list:
        return _pack_items(value, parts)
    if cls is tuple:
        return msgspec.msgpack.Ext(_TUPLE, _encode_message(_pack_items(value, parts)))
    if cls is bytes:
        return value if len(value) < _INLINE_BYTES else _pack_bytes(value, parts)
    if _is_array(cls):
        return _pack_array(value, parts)
    if isinstance(value, msgspec.Struct):
        return {name: _pack(getattr(value, name), parts) for name in value.__struct_fields__}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: _pack(getattr(value, field.name), parts) for field in fields}
    raise TypeError(
        f"a payload cannot hold {cls.__module__}.{cls.__qualname__}; it takes None, bool, int, "
        "float, str, bytes, list, tuple, dict, dataclass, msgspec.Struct and numpy.ndarray"
    )


def _pack_items(items: Sequence[Any], parts: list[Buffer]) -> Sequence[Any]:
    # One pass in C settles long lists of numbers or texts.
    if _PLAIN.issuperset(map(type, items)):
        return items
    return [_pack(item, parts) for item in items]


def _pack_bytes(value: bytes, parts: list[Buffer]) -> msgspec.msgpack.Ext:
    parts.append(value)
    return msgspec.msgpack.Ext(_BYTES, _encode_message([len(parts) - 1]))


def _pack_array(array: np.ndarray, parts: list[Buffer]) -> msgspec.msgpack.Ext:
    reference = _array_reference(len(parts), array.dtype, array.shape)
    parts.append(_flat(array))
    return reference


# A role without arrays has no numpy, with which a worker takes half as long again to start and to
# die.


@cache
def _numpy() -> Any:
    import numpy as np

    return np


def _is_array(cls: type) -> bool:
    # Nobody has an array who has not imported numpy.
    numpy = sys.modules.get("numpy")
    return numpy is not None and cls is getattr(numpy, "ndarray", None)


def _flat(array: np.ndarray) -> Buffer:
    np = _numpy()
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(np.uint8) if flat.size else b""


def _array_reference(
    index: int, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> msgspec.msgpack.Ext:
    if dtype.kind not in _DTYPE_KINDS:
        raise TypeError(f"a payload cannot hold an array of dtype {dtype}")
    return msgspec.msgpack.Ext(_ARRAY, _encode_message([index, dtype.str, shape]))


# A payload that is an array and nothing else is common, and mostly as the one before: to take its
# message apart and to put it together takes longer than to copy 100 kB.


@lru_cache(maxsize=256)
def _array_message(kind: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """The message beside an array that is the whole payload."""
    return _encode_message((kind, _array_reference(1, dtype, shape)))


@lru_cache(maxsize=256)
def _array_head(message: bytes) -> tuple[str, np.dtype[Any], tuple[int, ...]] | None:
    """Kind, dtype and shape, if this is such a message."""
    kind, payload = _decode_pair(message)
    if not isinstance(payload, msgspec.msgpack.Ext) or payload.code != _ARRAY:
        return None
    index, dtype, shape = msgspec.msgpack.decode(payload.data)
    _part(index, [message, b""])
    return kind, _dtype(dtype), tuple(shape)


def _unpack(parts: Sequence[Buffer], code: int, data: memoryview) -> Any:
    items = msgspec.msgpack.decode(data, ext_hook=partial(_unpack, parts))
    if code == _TUPLE:
        return tuple(items)
    if code == _BYTES:
        (index,) = items
        return bytes(parts[_part(index, parts)])
    if code == _ARRAY:
        index, dtype, shape = items
        return _view(parts[_part(index, parts)], _dtype(dtype), shape)
    raise ValueError(f"unknown extension {code}")


def _part(index: Any, parts: Sequence[Buffer]) -> int:
    if type(index) is not int or not 1 <= index < len(parts):
        raise ValueError("reference to a part that does not exist")
    return index


def _dtype(text: Any) -> np.dtype[Any]:
    # `numpy.dtype` accepts far more than the dtypes that may travel.
    if not isinstance(text, str) or not _DTYPE.fullmatch(text):
        raise ValueError(f"dtype {text!r} may not travel")
    dtype: np.dtype[Any] = _numpy().dtype(text)
    return dtype


def _view(part: Buffer, dtype: np.dtype[Any], shape: Sequence[int]) -> np.ndarray:
    if math.prod(shape) * dtype.itemsize != len(part):
        raise ValueError("array and buffer differ in size")
    array: np.ndarray = _numpy().ndarray(tuple(shape), dtype, part)
    return array


_Message = tuple[str, Any]
_UNDECODABLE = (msgspec.MsgspecError, ValueError, TypeError, LookupError, RecursionError)
_unpack_lone = partial(_unpack, ())
_decode_lone: Callable[[Buffer], _Message] = msgspec.msgpack.Decoder(
    _Message, ext_hook=_unpack_lone
).decode
_decode_pair: Callable[[Buffer], _Message] = msgspec.msgpack.Decoder(_Message).decode
_decode_several: Callable[[bytes], list[_Message]] = msgspec.msgpack.Decoder(
    list[_Message], ext_hook=_unpack_lone
).decode
