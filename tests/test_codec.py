"""Payloads survive the trip; what is not a payload is refused on either side."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from inferpool import ProtocolError, codec

ARRAYS = npst.arrays(
    dtype=st.one_of(
        npst.boolean_dtypes(),
        npst.integer_dtypes(endianness="?"),
        npst.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
        npst.complex_number_dtypes(),
        npst.datetime64_dtypes(),
        npst.unicode_string_dtypes(max_len=5),
        npst.byte_string_dtypes(max_len=5),
    ),
    shape=npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6),
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.floats(),
    st.text(),
    st.binary(),
    st.binary(min_size=1000, max_size=3000),
    ARRAYS,
)
KEYS = st.one_of(st.none(), st.booleans(), st.integers(0, 9), st.text())
PAYLOADS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(inner).map(tuple),
        st.dictionaries(KEYS, inner),
    ),
    max_leaves=20,
)


def same(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, np.ndarray):
        return (
            left.dtype == right.dtype
            and left.shape == right.shape
            and left.tobytes() == right.tobytes()
        )
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, float) and math.isnan(left):
        return math.isnan(right)
    return bool(left == right)


def as_received(parts: list[codec.Buffer]) -> list[codec.Buffer]:
    """The parts as they come out of a frame: views of fresh memory."""
    return [memoryview(bytearray(memoryview(part))) for part in parts]


@given(payload=PAYLOADS, kind=st.text())
def test_what_is_sent_is_what_arrives(payload: Any, kind: str) -> None:
    received_kind, received = codec.decode(as_received(codec.encode(kind, payload)))
    assert received_kind == kind
    assert same(received, payload)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24).reshape(4, 6).T,
        np.arange(24)[::-2],
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array(3.5),
        np.zeros((0, 384), np.float32),
    ],
    ids=["transposed", "strided", "fortran", "scalar", "empty"],
)
def test_arrays_of_any_layout_keep_their_values(array: np.ndarray) -> None:
    _, received = codec.decode(as_received(codec.encode("", array)))
    assert received.shape == array.shape
    np.testing.assert_array_equal(received, array)
    assert received.flags.writeable


def test_large_buffers_are_not_copied_by_either_side() -> None:
    array = np.arange(1000, dtype=np.float32)
    parts = codec.encode("", array)
    assert np.shares_memory(np.asarray(parts[1]), array)
    received = as_received(parts)
    _, decoded = codec.decode(received)
    assert np.shares_memory(decoded, np.asarray(received[1]))


class Subclass(np.ndarray):
    pass


@pytest.mark.parametrize(
    "payload",
    [
        {1},
        object(),
        bytearray(b"x"),
        np.float64(1),
        np.zeros(2).view(Subclass),
        np.zeros(2, dtype=[("a", "f4")]),
        np.array(["x", None], dtype=object),
        [[{"deep": {"deeper": 1j}}]],
        {b"bytes": 1},
        int,
    ],
    ids=lambda payload: type(payload).__name__,
)
def test_other_types_are_refused_by_name(payload: Any) -> None:
    with pytest.raises(TypeError, match="payload"):
        codec.encode("", payload)


def test_values_that_cannot_be_encoded_are_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    for payload in (1 << 64, "\ud800", {"\ud800": 1}, loop):
        with pytest.raises(ValueError, match="payload"):
            codec.encode("", payload)


def message(value: Any) -> bytes:
    return msgspec.msgpack.encode(value)


def ext(code: int, value: Any) -> msgspec.msgpack.Ext:
    return msgspec.msgpack.Ext(code, message(value))


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [b""],
        [b"\xc1"],
        [message("no pair")],
        [message([1, 2])],
        [message(["kind"])],
        [message(["kind", ext(9, [])])],
        [message(["kind", ext(1, [0])]), b""],
        [message(["kind", ext(1, [2])]), b""],
        [message(["kind", ext(1, [True])]), b""],
        [message(["kind", ext(1, "12")]), b""],
        [message(["kind", ext(2, [1, "|O", [1]])]), b"12345678"],
        [message(["kind", ext(2, [1, "O", [1]])]), b"12345678"],
        [message(["kind", ext(2, [1, "<f4,<f4", [1]])]), b"12345678"],
        [message(["kind", ext(2, [1, "<f4", [3]])]), b"12345678"],
        [message(["kind", ext(2, [1, "<f4", [-1, -2]])]), b"12345678"],
        [message(["kind", ext(2, [1, "<f4", ["2"]])]), b"12345678"],
        [message(["kind", ext(2, [1, "<f4", 2])]), b"12345678"],
        [message(["kind", ext(2, [1, "<f3", [1]])]), b"123"],
        [message(["kind", ext(2, [1, 7, [1]])]), b"1"],
        [b"\x91" * 100_000],
    ],
    ids=range(21),
)
def test_malformed_frames_are_a_protocol_error(parts: list[codec.Buffer]) -> None:
    with pytest.raises(ProtocolError):
        codec.decode(parts)


@given(data=st.binary(max_size=200), part=st.binary(max_size=64))
def test_foreign_bytes_decode_or_are_a_protocol_error(data: bytes, part: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        codec.decode([data, part])


def test_a_message_of_another_type_is_a_protocol_error() -> None:
    class Expected(msgspec.Struct):
        number: int

    assert codec.decode_as(codec.encode("", {"number": 1}), Expected) == Expected(1)
    with pytest.raises(ProtocolError, match="Expected"):
        codec.decode_as(codec.encode("", {"number": "one"}), Expected)
