"""Payloads survive the trip; what is not a payload is refused on either side."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from conftest import echo_role
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from inferpool import ContextLengthExceeded, Pool, ProtocolError, codec
from inferpool._transport import Call, HostChannel, LoopNotifier
from inferpool.messages import ErrorInfo

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


def as_received(parts: codec.Parts) -> codec.Parts:
    """The parts as they come out of a frame: plain ones, or views of fresh memory."""
    if isinstance(parts, tuple):
        return parts
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


@pytest.mark.parametrize("payload", [[1], {"a": 1}, np.zeros(2), b"x" * 2000], ids=type)
def test_a_kind_that_is_no_text_is_refused(payload: Any) -> None:
    for kind in (None, 5, b"echo"):
        with pytest.raises(TypeError, match="kind"):
            codec.encode(kind, payload)  # type: ignore[arg-type]


def test_values_that_cannot_be_encoded_are_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    for payload in ([1 << 64], ["\ud800"], {"\ud800": 1}, loop):
        with pytest.raises(ValueError, match="payload"):
            codec.encode("", payload)


class Echo:
    """What a worker sends back, down to the bytes of a message."""

    def __init__(self, pool: Pool) -> None:
        incarnation = pool.start()._core.supervisor("echo").at_hand
        assert incarnation is not None
        self.channel: HostChannel = incarnation.channel
        self.notifier = LoopNotifier()

    def call(self, parts: codec.Parts) -> Call:
        return self.channel.open(parts, self.notifier)

    def raw(self, parts: codec.Parts) -> bytes:
        """The answer as msgpack."""
        call = self.call(parts)
        while (array := call.poll_messages()) is None:
            self.channel.look(self.notifier)
        return array.removeprefix(b"\xdd\0\0\0\1")


@pytest.fixture(scope="module")
def echo() -> Iterator[Echo]:
    with Pool(echo=echo_role()) as pool:
        yield Echo(pool)


PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 63), (1 << 64) - 1),
    *(
        st.sampled_from([sign * (1 << bits) + off for off in (-1, 0, 1) for sign in (-1, 1)])
        for bits in (5, 7, 8, 15, 16, 31, 32, 62)
    ),
    st.floats(),
    st.text(max_size=300),
    st.binary(max_size=300),
    st.sampled_from([b"x" * 255, b"x" * 256, "x" * 31, "x" * 32, "x" * 4_000]),
)


@given(payload=PLAIN)
def test_plain_messages_are_those_of_msgspec(echo: Echo, payload: Any) -> None:
    encoded = message(["echo", payload])
    # The worker decodes what it gets, and encodes its answer anew.
    for parts in (("echo", payload), [encoded]):
        assert echo.raw(parts) == encoded
        kind, received = codec.decode(echo.call(parts).next().parts)
        assert (kind, type(received)) == ("echo", type(payload))
        assert same(received, payload)


def test_plain_values_that_cannot_be_encoded_are_refused(echo: Echo) -> None:
    for payload in (1 << 64, -(1 << 63) - 1, "\ud800"):
        with pytest.raises(ValueError, match="payload"):
            echo.call(("echo", payload))
        with pytest.raises(ValueError, match="payload"):
            echo.channel.ask(("echo", payload))
    for parts in ((1, 2), ("echo", []), ("echo", np.float64(1)), ("echo",)):
        with pytest.raises((TypeError, ValueError)):
            echo.call(parts)
    # None of these has left anything behind.
    assert echo.channel.in_flight() == []


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
    for parts in ([data], [data, part]):
        with contextlib.suppress(ProtocolError):
            codec.decode(parts)


@given(data=st.binary(max_size=40), plain=PLAIN, cut=st.integers(0, 40))
def test_a_worker_survives_foreign_bytes(echo: Echo, data: bytes, plain: Any, cut: int) -> None:
    for foreign in (data, b"\x92\xa4echo" + data, message(["echo", plain])[:cut] + data):
        events = echo.call([foreign])
        assert events.next(10).kind in ("data", "error")
    assert echo.raw(("echo", 1)) == message(["echo", 1])


def test_a_message_of_another_type_is_a_protocol_error() -> None:
    class Expected(msgspec.Struct):
        number: int

    assert codec.decode_as(codec.encode("", {"number": 1}), Expected) == Expected(1)
    with pytest.raises(ProtocolError, match="Expected"):
        codec.decode_as(codec.encode("", {"number": "one"}), Expected)


def test_details_of_an_error_may_have_any_name() -> None:
    details = {"message": 1, "self": 2}
    info = ErrorInfo(
        type_name="ContextLengthExceeded", message="too long", traceback="", details=details
    )
    error = info.exception()
    assert isinstance(error, ContextLengthExceeded)
    assert (str(error), error.details) == ("too long", details)
