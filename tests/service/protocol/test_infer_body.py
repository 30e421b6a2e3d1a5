"""The body of the infer call: round trips in both encodings; invalid bodies raise only UnrollError."""

import json as standard_json

import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensor_models import arrays, manifest, manifests, same

from unroll.bundle import Manifest, TensorSpec
from unroll.service.core.errors import BodyTooLarge, InvalidRequest, OutOfRange, UnrollError
from unroll.service.protocol import json
from unroll.service.protocol.open_inference import DATATYPES, InferRequest, describe, parse, read_inputs

BRIEF = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])

LIMIT = 100_000

MODEL = manifest(
    (TensorSpec("x", "float32", (3,), True), TensorSpec("t", "int64", (), True)),
    (TensorSpec("y", "float32", (2,), True),),
)


def request(tensors: list[tuple[TensorSpec, np.ndarray, bool]], **members: object) -> tuple[bytes, int]:
    """Return a body with these inputs, each binary or JSON, and the length of its JSON part."""
    entries = []
    for spec, array, binary in tensors:
        entry: dict = {"name": spec.name, "shape": list(array.shape), "datatype": DATATYPES[spec.dtype]}
        if binary:
            entry["parameters"] = {"binary_data_size": array.nbytes}
        else:
            entry["data"] = array.ravel().tolist()
        entries.append(entry)
    text = orjson.dumps({"inputs": entries, **members})
    return text + b"".join(array.tobytes() for _, array, binary in tensors if binary), len(text)


def decoded(body: bytes, length: int | None, model: Manifest) -> tuple[InferRequest, list[np.ndarray]]:
    asked = parse(body, length, LIMIT)
    return asked, read_inputs(asked, model.inputs)


@pytest.mark.parametrize("declared", [96, 48])
def test_binary_values_of_float64_are_refused_as_such(declared: int) -> None:
    model = manifest((TensorSpec("x", "float32", (3,), True),), MODEL.outputs)
    item = {"name": "x", "shape": [1, 4, 3], "datatype": "FP32", "parameters": {"binary_data_size": declared}}
    text = orjson.dumps({"inputs": [item]})
    with pytest.raises(InvalidRequest, match="float64" if declared == 96 else "48 bytes follow"):
        decoded(text + np.zeros((4, 3)).tobytes(), len(text), model)


@BRIEF
@given(st.data())
def test_inputs_round_trip(data: st.DataObject) -> None:
    """Inputs come in any order, each as JSON or binary."""
    model = data.draw(manifests())
    batch, time = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    values = {spec.name: data.draw(arrays(spec, batch, time)) for spec in model.inputs}
    order = data.draw(st.permutations(model.inputs))
    tensors = [(spec, values[spec.name], data.draw(st.booleans())) for spec in order]
    body, length = request(tensors)
    binary = any(as_binary for *_, as_binary in tensors)
    _, got = decoded(body, length if binary or data.draw(st.booleans()) else None, model)
    for spec, array in zip(model.inputs, got, strict=True):
        assert array.shape == values[spec.name].shape
        assert array.dtype == spec.numpy
        assert array.tolist() == values[spec.name].tolist()


@BRIEF
@given(st.data())
def test_outputs_round_trip(data: st.DataObject) -> None:
    model = data.draw(manifests())
    outputs = []
    for spec in model.outputs:
        lead = (2, 3) if spec.time else (2,)
        outputs.append((spec, data.draw(arrays(spec, *lead)), data.draw(st.booleans())))
    described, rest = describe({"model_name": "m"}, outputs)
    assert bool(rest) == any(binary for *_, binary in outputs)
    document = standard_json.loads(json.dump(described))
    assert document["model_name"] == "m"
    for entry, (spec, array, binary) in zip(document["outputs"], outputs, strict=True):
        assert (entry["name"], entry["datatype"], entry["shape"]) == (
            spec.name,
            DATATYPES[spec.dtype],
            list(array.shape),
        )
        assert ("data" in entry) != binary
        assert ("parameters" in entry) == binary
        if binary:
            size = entry["parameters"]["binary_data_size"]
            flat, rest = np.frombuffer(rest[:size], spec.numpy), rest[size:]
        else:
            flat = np.array(entry["data"], spec.numpy)
        assert same(flat.reshape(array.shape), array)
    assert rest == b""


def refused_or_read(body: bytes, length: int | None, model: Manifest) -> None:
    try:
        _, arrays = decoded(body, length, model)
    except UnrollError:
        return
    for spec, array in zip(model.inputs, arrays, strict=True):
        assert array.dtype == spec.numpy
        assert array.shape[2:] == spec.shape
        assert min(array.shape) >= 1


@BRIEF
@given(body=st.binary(max_size=300), length=st.none() | st.integers(0, 400))
def test_random_bytes(body: bytes, length: int | None) -> None:
    refused_or_read(body, length, MODEL)


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**65), 2**65)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "x", "t", "y", "FP32", "INT64", "7"]),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "shape", "parameters", "data"]), children, max_size=3)
    ),
    max_leaves=8,
)


@BRIEF
@given(
    document=st.fixed_dictionaries(
        {},
        optional={
            "id": ANYTHING,
            "parameters": ANYTHING
            | st.dictionaries(
                st.sampled_from(
                    [
                        "sequence_id",
                        "sequence_start",
                        "sequence_end",
                        "sequence_position",
                        "timeout",
                        "binary_data_output",
                    ]
                ),
                ANYTHING,
                max_size=3,
            ),
            "outputs": ANYTHING
            | st.lists(st.fixed_dictionaries({"name": ANYTHING}, optional={"parameters": ANYTHING}), max_size=2),
            "inputs": ANYTHING
            | st.lists(
                st.fixed_dictionaries(
                    {"name": ANYTHING},
                    optional={
                        "shape": ANYTHING | st.lists(st.integers(-1, 2**63), max_size=4),
                        "datatype": ANYTHING,
                        "data": ANYTHING,
                        "parameters": ANYTHING
                        | st.fixed_dictionaries({"binary_data_size": st.integers(-1, 2**63) | ANYTHING}),
                    },
                ),
                max_size=3,
            ),
        },
    ),
    rest=st.binary(max_size=40),
)
def test_random_documents(document: dict, rest: bytes) -> None:
    text = standard_json.dumps(document).encode()
    refused_or_read(text + rest, len(text), MODEL)


@BRIEF
@given(st.data())
def test_damaged_body_is_decoded_or_refused(data: st.DataObject) -> None:
    x = np.ones((1, 2, 3), np.float32)
    t = np.array([[3, 4]], np.int64)
    body, length = request([(MODEL.inputs[0], x, True), (MODEL.inputs[1], t, True)])
    damaged = bytearray(body)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        if data.draw(st.booleans()):
            damaged[at] = data.draw(st.integers(0, 255))
        else:
            del damaged[at]
    refused_or_read(bytes(damaged), data.draw(st.sampled_from([length, length - 1, length + 1])), MODEL)


def test_limit_applies_to_the_json_but_not_the_tensors() -> None:
    x = np.ones((1, 40, 3), np.float32)
    t = np.ones((1, 40), np.int64)
    body, length = request([(MODEL.inputs[0], x, True), (MODEL.inputs[1], t, True)])
    assert length < 400 < len(body)
    assert len(read_inputs(parse(body, length, 400), MODEL.inputs)) == 2
    body, length = request([(MODEL.inputs[0], x, False), (MODEL.inputs[1], t, False)])
    with pytest.raises(BodyTooLarge):
        parse(body, None, 400)


def test_request_parameters_are_read() -> None:
    body = {
        "id": "r",
        "inputs": [],
        "parameters": {
            "sequence_id": 7,
            "sequence_start": True,
            "sequence_end": False,
            "sequence_position": 0,
            "timeout": 1500,
            "binary_data_output": True,
            "priority": 3,
        },
        "outputs": [{"name": "y"}, {"name": "z", "parameters": {"binary_data": False}}],
    }
    asked = parse(orjson.dumps(body), None, LIMIT)
    assert asked.id == "r"
    assert asked.header.timeout == 0.0015
    assert asked.header.outputs == (("y", True), ("z", False))
    assert asked.sequence is not None
    assert (
        asked.sequence.id,
        asked.sequence.start,
        asked.sequence.end,
        asked.sequence.position,
    ) == (
        "7",
        True,
        False,
        0,
    )


@pytest.mark.parametrize("parameters", [{}, {"sequence_id": 0}, {"sequence_id": ""}, {"sequence_id": 0, "timeout": 0}])
def test_no_sequence(parameters: dict) -> None:
    asked = parse(orjson.dumps({"inputs": [], "parameters": parameters}), None, LIMIT)
    assert asked.sequence is None
    assert asked.header.timeout is None
    assert asked.header.outputs is None


def test_a_header_length_of_nothing() -> None:
    for body, length in ((b"", None), (b"{}", 0), (b"{}", 3), (b"{}", -1)):
        with pytest.raises(InvalidRequest):
            parse(body, length, LIMIT)


def test_binary_bools_are_zero_or_one() -> None:
    model = manifest((TensorSpec("f", "bool", (), True),), MODEL.outputs)
    text = orjson.dumps(
        {"inputs": [{"name": "f", "shape": [1, 2], "datatype": "BOOL", "parameters": {"binary_data_size": 2}}]}
    )
    _, (array,) = decoded(text + b"\x00\x01", len(text), model)
    assert array.tolist() == [[False, True]]
    for byte in (b"\x02", b"\xff"):
        with pytest.raises(OutOfRange):
            decoded(text + b"\x00" + byte, len(text), model)
