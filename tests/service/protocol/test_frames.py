"""The stream's frames: decoded completely or refused; an error in one entry affects only that entry."""

import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensor_models import arrays, manifests, same

from unroll.bundle import TensorSpec
from unroll.service.core.errors import InvalidRequest, InvalidShape, NonFiniteInput, OutOfRange
from unroll.service.protocol.frames import (
    MAX_ENTRIES,
    NO_POSITION,
    FrameCodec,
    encode,
    encode_single,
    pack_entries,
    with_positions,
)

BRIEF = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])

X = TensorSpec("x", "float32", (3,), True)
TOKEN = TensorSpec("token", "int64", (), True, 11)
FLAG = TensorSpec("flag", "bool", (), True)

POSITIONS = st.one_of(st.none(), st.integers(0, NO_POSITION - 1))
ENTRIES = st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 4), POSITIONS), min_size=1, max_size=5)
TWO = [(7, 2, 0), (9, 2, 5)]  # handle, steps, position


def frame(entries: list[tuple[int, int, int | None]], *values: np.ndarray, kind: int = 1, count: int = -1) -> bytes:
    """Encode a frame from the protocol's description only."""
    head = struct.pack("<BBHI", kind, 0, 0, len(entries) if count < 0 else count)
    table = [struct.pack("<IIQ", h, t, NO_POSITION if p is None else p) for h, t, p in entries]
    return b"".join([head, *table, *[value.tobytes() for value in values]])


@BRIEF
@given(st.data())
def test_frames_of_steps_are_decoded(data: st.DataObject):
    specs = data.draw(manifests()).inputs
    entries = data.draw(ENTRIES)
    chunks = [[data.draw(arrays(spec, steps)) for spec in specs] for _, steps, _ in entries]
    got = FrameCodec(specs, 100).decode(frame(entries, *[chunk[i] for i in range(len(specs)) for chunk in chunks]))
    assert list(zip(got.handles, got.steps, got.positions, strict=True)) == entries
    alike = len({steps for _, steps, _ in entries}) == 1
    assert (got.uniform_inputs is not None) == alike
    for i, chunk in enumerate(chunks):
        assert all(same(a, b) for a, b in zip(got.chunk(i), chunk, strict=True))
        assert all(array.flags.aligned and array.flags.c_contiguous for array in got.chunk(i))
    assert FrameCodec(specs, 100).faults(got) == {}
    alone = FrameCodec(specs, 100).decode_single(frame(entries[:1], *chunks[0]))
    assert alone is not None
    assert alone[:3] == entries[0]
    assert all(same(a, b) for a, b in zip(alone.inputs, chunks[0], strict=True))


@BRIEF
@given(ENTRIES, ENTRIES)
def test_signatures_are_equal_for_the_same_handles_and_steps(entries: list, others: list):
    codec = FrameCodec([X], 100)
    one, other = (
        codec.decode(frame(some, np.zeros((sum(steps for _, steps, _ in some), 3), "<f4")))
        for some in (entries, others)
    )
    assert (one.signature == other.signature) == ([entry[:2] for entry in entries] == [entry[:2] for entry in others])
    moved = [(handle, steps, 7) for handle, steps, _ in entries]
    assert codec.decode(frame(moved, np.zeros((one.entries["steps"].sum(), 3), "<f4"))).signature == one.signature


def test_the_values_are_not_copied():
    content = frame(TWO, np.ones((4, 3), "<f4"))
    assert np.shares_memory(FrameCodec([X], 9).decode(content).uniform_inputs[0], np.frombuffer(content, np.uint8))
    content = frame(TWO[:1], np.ones((2, 3), "<f4"))
    assert np.shares_memory(FrameCodec([X], 9).decode_single(content).inputs[0], np.frombuffer(content, np.uint8))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64) | st.binary(max_size=56).map(lambda rest: struct.pack("<BBHI", 1, 0, 0, 1) + rest))
def test_any_bytes_are_decoded_or_refused(content: bytes):
    codec = FrameCodec([X, FLAG, TOKEN], 100)
    try:
        alone = codec.decode_single(content)
        if alone is not None:
            codec.fault(alone.inputs)
        codec.faults(codec.decode(content))
    except InvalidRequest as error:
        assert error.code == "malformed_request"


@BRIEF
@given(st.data())
def test_a_frame_of_another_length_is_refused(data: st.DataObject):
    entries = data.draw(ENTRIES)
    whole = frame(entries, np.zeros((sum(steps for _, steps, _ in entries), 3), "<f4"))
    for content in (whole[: data.draw(st.integers(0, len(whole) - 1))], whole + data.draw(st.binary(min_size=1))):
        codec = FrameCodec([X], 100)
        with pytest.raises(InvalidRequest):
            codec.decode_single(content) or codec.decode(content)


@pytest.mark.parametrize("count", [1, 2])
def test_a_frame_of_float64_is_refused_as_such(count: int):
    codec, content = FrameCodec([X], 100), frame([(0, 2, 0)] * count, np.zeros((2 * count, 3), "<f8"))
    with pytest.raises(InvalidRequest, match="float64"):
        codec.decode_single(content) or codec.decode(content)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "header of 8 bytes"),
        (frame([], count=0), "0 entries"),
        (frame([], count=2**32 - 1), "4294967295 entries"),
        (frame([], count=2**28), "268435456 entries"),  # times 16 it is 0 in 32 bits
        (frame(TWO, count=3), "3 entries"),
        (frame([(0, 1, 0)] * (MAX_ENTRIES + 1), np.zeros((MAX_ENTRIES + 1, 3), "<f4")), "1 to 4096 are allowed"),
        (frame([(7, 0, 0)]), "each at least 1"),
        (frame([(7, 0, 0), (8, 1, 0)], np.zeros((1, 3), "<f4")), "each at least 1"),
        (frame([(7, 2**32 - 1, 0)] * 2, np.zeros((2, 3), "<f4")), "8589934590 steps"),
        (frame(TWO, np.zeros((4, 3), "<f4"), kind=2), "type 2"),
        (b"\1\1" + frame(TWO, np.zeros((4, 3), "<f4"))[2:], "flags 1"),
        (b"\1\0\1" + frame(TWO, np.zeros((4, 3), "<f4"))[3:], "reserved 1"),
        (b"\1\0\0\1" + frame(TWO[:1], np.zeros((2, 3), "<f4"))[4:], "reserved 256"),
    ],
)
def test_frames_that_are_refused(content: bytes, says: str):
    with pytest.raises(InvalidRequest, match=says) as refusal:
        FrameCodec([X], 2**31).decode_single(content) or FrameCodec([X], 2**31).decode(content)
    assert type(refusal.value) is InvalidRequest


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("steps", [(1, 1, 1), (1, 2, 1)])
def test_non_finite_value_fails_only_its_entry(bad: float, steps: tuple[int, ...]):
    values = np.full((sum(steps), 3), np.finfo(np.float32).max, "<f4")  # large is not infinite
    codec = FrameCodec([X], 100)
    entries = [(i, t, 0) for i, t in enumerate(steps)]
    assert codec.faults(codec.decode(frame(entries, values))) == {}
    values[1, 2] = bad
    faults = codec.faults(codec.decode(frame(entries, values)))
    assert {i: type(fault) for i, fault in faults.items()} == {1: NonFiniteInput}
    alone = codec.decode(frame(entries[1:2], values[1 : 1 + steps[1]]))
    assert isinstance(codec.fault(alone.chunk(0)), NonFiniteInput)


@pytest.mark.parametrize("bad", [-1, 11, 2**63 - 1, -(2**63)])
def test_out_of_range_integer_fails_only_its_entry(bad: int):
    codec = FrameCodec([TOKEN], 100)
    faults = codec.faults(codec.decode(frame(TWO, np.array([0, 10, bad, 3], "<i8"))))
    assert {i: type(fault) for i, fault in faults.items()} == {1: OutOfRange}
    assert "0 … 10" in faults[1].message


def test_invalid_bool_byte_fails_only_its_entry():
    codec = FrameCodec([X, FLAG], 100)
    content = frame(TWO, np.zeros((4, 3), "<f4"), np.array([0, 2, 1, 0], np.uint8))
    assert {i: type(fault) for i, fault in codec.faults(codec.decode(content)).items()} == {0: OutOfRange}


def test_too_many_steps_fail_only_their_entry():
    codec = FrameCodec([X], 2)
    content = frame([(1, 1, 0), (2, 3, 0)], np.zeros((4, 3), "<f4"))
    assert {i: type(fault) for i, fault in codec.faults(codec.decode(content)).items()} == {1: InvalidShape}
    content = frame([(1, 3, 0), (2, 3, 0)], np.zeros((6, 3), "<f4"))
    assert {i: type(fault) for i, fault in codec.faults(codec.decode(content)).items()} == {
        0: InvalidShape,
        1: InvalidShape,
    }


@BRIEF
@given(ENTRIES, st.data())
def test_frames_of_outputs_follow_the_protocol(entries: list[tuple[int, int, int | None]], data: st.DataObject):
    entries = [(h, t, p or 0) for h, t, p in entries]
    y = [data.draw(arrays(X, t)) for _, t, _ in entries]  # an output with time
    last = [data.draw(arrays(TOKEN)) for _ in entries]  # and one without
    handles, steps, positions = zip(*entries, strict=True)
    expected = frame(entries, *y, *last, kind=2)
    expected_entries = pack_entries(handles, steps, positions)
    assert encode(expected_entries, [array.tobytes() for array in (*y, *last)]) == expected
    sent = pack_entries(handles, steps, [0] * len(handles))
    assert (with_positions(sent, np.array(positions, np.uint64)) == expected_entries).all()
    alone = frame(entries[:1], y[0], last[0], kind=2)
    assert encode_single(handles[0], steps[0], positions[0], (y[0], last[0])) == alone
    assert encode(expected_entries[:1], [y[0].data, last[0].data]) == alone
