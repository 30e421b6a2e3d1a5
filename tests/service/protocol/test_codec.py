"""The codec: valid values round-trip bit for bit; invalid ones raise an UnrollError with the reason."""

import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensor_models import arrays, manifest, manifests, same

from unroll.bundle import TensorSpec
from unroll.bundle.manifest import Dtype
from unroll.service.core.errors import InvalidDtype, InvalidShape, NonFiniteInput, OutOfRange, UnrollError
from unroll.service.protocol import json
from unroll.service.protocol.tensors import Codec

BRIEF = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])

X = TensorSpec("x", "float32", (3,), True)
Y = TensorSpec("y", "float32", (2,), True)
TOKEN = TensorSpec("token", "int64", (), True, limit=11)
FLAG = TensorSpec("flag", "bool", (), True)

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=3),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.sampled_from("xyab"), children, max_size=3),
    max_leaves=12,
)


def codec(*inputs: TensorSpec, max_steps: int = 100) -> Codec:
    return Codec(manifest(inputs, (Y,)), max_steps, 1000)


@BRIEF
@given(st.data())
def test_raw_round_trip(data: st.DataObject) -> None:
    """A round trip of one tensor or several, concatenated."""
    model = data.draw(manifests())
    steps = data.draw(st.integers(1, 5))
    inputs = [data.draw(arrays(spec, steps)) for spec in model.inputs]
    made = Codec(model, 100, 1000)
    sent = b"".join(array.tobytes() for array in inputs)
    decoded = made.from_raw(sent, steps if steps > 1 else data.draw(st.sampled_from([1, None])))
    assert all(same(got, array) for got, array in zip(decoded, inputs, strict=True))
    outputs = tuple(data.draw(arrays(spec, *([4] if spec.time else []))) for spec in model.outputs)
    assert made.to_raw(outputs) == b"".join(output.tobytes() for output in outputs)


@BRIEF
@given(st.data())
def test_json_round_trip(data: st.DataObject) -> None:
    """A round trip through JSON text, for one input or several."""
    model = data.draw(manifests())
    steps = data.draw(st.integers(1, 4))
    inputs = [data.draw(arrays(spec, steps)) for spec in model.inputs]
    value = {spec.name: array.tolist() for spec, array in zip(model.inputs, inputs, strict=True)}
    text = orjson.dumps(value if len(inputs) > 1 else value[model.inputs[0].name])
    decoded = Codec(model, 100, 1000).from_json(orjson.loads(text))
    for got, array in zip(decoded, inputs, strict=True):
        assert got.dtype == array.dtype
        assert got.tolist() == array.tolist()


@BRIEF
@given(st.data())
def test_json_output_is_exact_to_the_bit(data: st.DataObject) -> None:
    model = data.draw(manifests())
    batch = [data.draw(arrays(spec, *([1, 3] if spec.time else [1]))) for spec in model.outputs]
    outputs = tuple(array[0].copy() for array in batch)  # sliced as by the engine
    text = json.dump({"outputs": Codec(model, 100, 1000).to_json(outputs)})
    assert b"null" not in text
    assert b"NaN" not in text
    value = orjson.loads(text)["outputs"]
    for spec, array in zip(model.outputs, outputs, strict=True):
        found = value[spec.name] if len(outputs) > 1 else value
        assert same(np.array(found, spec.numpy).reshape(array.shape), array)


@BRIEF
@given(st.data())
def test_sequences_round_trip(data: st.DataObject) -> None:
    model = data.draw(manifests())
    lengths = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    sequences = [tuple(data.draw(arrays(spec, length)) for spec in model.inputs) for length in lengths]
    columns = {spec.name: [row[i].tolist() for row in sequences] for i, spec in enumerate(model.inputs)}
    decoded = Codec(model, 100, 1000).sequences_from_json(columns)
    assert [[a.tolist() for a in row] for row in decoded] == [[a.tolist() for a in row] for row in sequences]


@BRIEF
@given(model=manifests(), body=st.binary(max_size=200), steps=st.none() | st.integers(0, 6))
def test_random_bytes_as_raw(model, body: bytes, steps: int | None) -> None:  # type: ignore[no-untyped-def]
    made = Codec(model, 5, 1000)
    try:
        decoded = made.from_raw(body, steps)
    except UnrollError:
        return
    assert b"".join(array.tobytes() for array in decoded) == body
    assert {len(array) for array in decoded} == {steps or 1}


@pytest.mark.parametrize("shape", [(), (2,), (3,)])
@pytest.mark.parametrize(
    ("dtype", "sent"),
    [("float32", "f8"), ("float32", "f2"), ("int64", "i4"), ("int32", "i8"), ("int32", "i2"), ("bool", "f4")],
)
def test_raw_bytes_of_another_dtype_never_fit(dtype: Dtype, sent: str, shape: tuple[int, ...]) -> None:
    made = codec(TensorSpec("x", dtype, shape, True))
    for steps in (None, 1, 2, 3, 4, 8):
        content = np.zeros((steps or 1, *shape), sent).tobytes()
        with pytest.raises(InvalidShape, match=rf"if its values are \w.*send them as {dtype}"):
            made.from_raw(content, steps)


@BRIEF
@given(model=manifests(), value=JSON_VALUES)
def test_random_json(model, value: object) -> None:  # type: ignore[no-untyped-def]
    made = Codec(model, 5, 1000)
    for decode in (made.from_json, made.sequences_from_json):
        try:
            decode(value)
        except UnrollError:
            continue


@BRIEF
@given(st.binary(max_size=100) | st.text(max_size=40).map(str.encode))
def test_random_bytes_as_json(body: bytes) -> None:
    try:
        assert isinstance(json.parse_object(body, 80), dict)
    except UnrollError:
        return


@pytest.mark.parametrize("depth", [60, 64, 65, 100, 1000, 1023])
def test_deep_lists(depth: int) -> None:
    value: object = 1.0
    for _ in range(depth):
        value = [value]
    with pytest.raises(InvalidShape):
        codec(X).from_json(value)


@pytest.mark.parametrize(
    ("spec", "value", "error"),
    [
        (X, [[1, 2, True]], InvalidDtype),
        (X, [[True, True, True]], InvalidDtype),
        (X, [[1, 2, "3"]], InvalidDtype),
        (X, [[1, 2, None]], InvalidDtype),
        (X, [[1, 2, 1e39]], NonFiniteInput),
        (X, [[1, 2, 2**64 - 1]], None),
        (X, [], InvalidShape),
        (X, [[]], InvalidShape),
        (TOKEN, [1, True], InvalidDtype),
        (TOKEN, [1.0], InvalidDtype),
        (TOKEN, [2**63], OutOfRange),
        (TOKEN, [11], OutOfRange),
        (TOKEN, [-1], OutOfRange),
        (FLAG, [0, 1], InvalidDtype),
        (FLAG, [True, 1], InvalidDtype),
        (FLAG, ["true"], InvalidDtype),
        (FLAG, [True, False], None),
    ],
)
def test_values(spec: TensorSpec, value: object, error: type[UnrollError] | None) -> None:
    if error is None:
        codec(spec).from_json(value)
    else:
        with pytest.raises(error, match=spec.name):
            codec(spec).from_json(value)


def test_a_number_that_does_not_fit_int32() -> None:
    with pytest.raises(OutOfRange):
        codec(TensorSpec("n", "int32", (), True)).from_json([2**31])


def test_more_steps_than_are_taken() -> None:
    made = codec(X, max_steps=2)
    assert len(made.from_raw(bytes(24), 2)[0]) == 2
    with pytest.raises(InvalidShape, match="at most 2"):
        made.from_raw(bytes(36), 3)


def test_a_raw_bool_is_zero_or_one() -> None:
    """Any other byte would reach the graph as an invalid bool."""
    made = codec(FLAG)
    assert made.from_raw(b"\x00\x01", 2)[0].tolist() == [False, True]
    for byte in (b"\x02", b"\xff"):
        with pytest.raises(OutOfRange, match="flag"):
            made.from_raw(b"\x00\x01" + byte, 3)
