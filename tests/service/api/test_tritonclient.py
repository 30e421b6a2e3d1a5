"""The published `tritonclient.http` against the server: the sync and the asyncio client."""

from collections.abc import AsyncIterator, Callable, Iterator
from itertools import count

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from serving import Oracle, Running, Serve, metric

Oracles = Callable[..., Oracle]

_ids = count(5_000_000_000)


@pytest.fixture
def sync(server: Running) -> Iterator[triton.InferenceServerClient]:
    client = triton.InferenceServerClient(server.address)
    yield client
    client.close()


@pytest.fixture
async def aio(server: Running) -> AsyncIterator[triton_aio.InferenceServerClient]:
    async with triton_aio.InferenceServerClient(server.address) as client:
        yield client


def tensor(name: str, array: np.ndarray, *, binary: bool = True) -> triton.InferInput:
    kind = {"float32": "FP32", "int64": "INT64"}[array.dtype.name]
    made = triton.InferInput(name, list(array.shape), kind)
    made.set_data_from_numpy(array, binary_data=binary)
    return made


def test_configuration_and_index(sync: triton.InferenceServerClient) -> None:
    config = sync.get_model_config("gru", "1")
    assert (config["name"], config["platform"]) == ("gru", "onnxruntime_onnx")
    assert config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [-1, 3]}]
    assert "sequence_batching" in config
    assert "sequence_batching" not in sync.get_model_config("whole")
    index = sync.get_model_repository_index()
    assert {"name": "gru", "version": "2", "state": "READY", "reason": ""} in index


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda client: client.register_system_shared_memory("a", "/a", 8), "shared memory is not supported"),
        (lambda client: client.get_cuda_shared_memory_status(), "shared memory is not supported"),
        (lambda client: client.load_model("lstm"), "SIGHUP"),
        (lambda client: client.unload_model("lstm"), "SIGHUP"),
        (lambda client: client.get_trace_settings(), "traces are not supported"),
        (lambda client: client.update_trace_settings("lstm", {}), "traces are not supported"),
        (lambda client: client.get_log_settings(), "--log-level"),
    ],
)
def test_unsupported_calls_report_that(sync: triton.InferenceServerClient, ask: Callable, words: str) -> None:
    with pytest.raises(triton.InferenceServerException, match=words):
        ask(sync)


def test_health_and_metadata(sync: triton.InferenceServerClient) -> None:
    assert sync.is_server_live()
    assert sync.is_server_ready()
    assert sync.is_model_ready("lstm")
    assert sync.is_model_ready("gru", "1")
    assert not sync.is_model_ready("none")
    assert not sync.is_model_ready("gru", "7")
    server = sync.get_server_metadata()
    assert server["name"] == "unroll"
    assert {"sequence", "sequence(string_id)", "binary_tensor_data"} <= set(server["extensions"])
    assert sync.get_model_metadata("gru") == {
        "name": "gru",
        "versions": ["1", "2"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, -1, 3]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, -1, 2]}],
    }
    assert sync.get_model_metadata("last")["outputs"][0]["shape"] == [-1, 2]
    assert sync.get_model_metadata("tokens", "1")["inputs"] == [
        {"name": "token", "datatype": "INT64", "shape": [-1, -1]}
    ]
    with pytest.raises(triton.InferenceServerException, match="no model"):
        sync.get_model_metadata("none")


@pytest.mark.parametrize("binary_out", [None, True, False])
@pytest.mark.parametrize("binary_in", [True, False])
def test_a_stateless_batch(
    sync: triton.InferenceServerClient,
    oracle: Oracles,
    rng: np.random.Generator,
    binary_in: bool,
    binary_out: bool | None,
) -> None:
    x = rng.standard_normal((3, 5, 3)).astype(np.float32)
    wanted = None if binary_out is None else [triton.InferRequestedOutput("y", binary_data=binary_out)]
    result = sync.infer("lstm", [tensor("x", x, binary=binary_in)], outputs=wanted, request_id="281474976710656")
    assert np.array_equal(result.as_numpy("y"), np.stack([oracle("lstm")(row) for row in x]))
    assert result.get_response()["id"] == "281474976710656"
    assert result.get_response()["model_version"] == "1"
    assert ("data" in result.get_output("y")) == (binary_out is False)


def test_every_kind_of_model(sync: triton.InferenceServerClient, oracle: Oracles, rng: np.random.Generator) -> None:
    x = rng.standard_normal((2, 4, 3)).astype(np.float32)
    for name in ("last", "whole"):
        assert np.array_equal(
            sync.infer(name, [tensor("x", x)]).as_numpy("y"), np.stack([oracle(name)(row) for row in x])
        )
    assert np.array_equal(
        sync.infer("gru", [tensor("x", x[:1])], model_version="1").as_numpy("y")[0], oracle("gru", "1")(x[0])
    )
    token = rng.integers(0, 11, (2, 6))
    assert np.array_equal(
        sync.infer("tokens", [tensor("token", token)]).as_numpy("y"), np.stack([oracle("tokens")(row) for row in token])
    )


def test_several_inputs_and_chosen_outputs(
    sync: triton.InferenceServerClient, oracle: Oracles, rng: np.random.Generator
) -> None:
    a, b = (rng.standard_normal((1, 4, width)).astype(np.float32) for width in (2, 3))
    (level, slope), _ = oracle("two").all(a[0], b[0])
    both = sync.infer("two", [tensor("b", b), tensor("a", a, binary=False)])
    assert np.array_equal(both.as_numpy("level")[0], level)
    assert np.array_equal(both.as_numpy("slope")[0], slope)
    wanted = [triton.InferRequestedOutput("slope"), triton.InferRequestedOutput("level", binary_data=False)]
    swapped = sync.infer("two", [tensor("a", a), tensor("b", b)], outputs=wanted)
    assert [entry["name"] for entry in swapped.get_response()["outputs"]] == ["slope", "level"]
    assert np.array_equal(swapped.as_numpy("slope")[0], slope)
    assert np.array_equal(swapped.as_numpy("level")[0], level)
    one = sync.infer("two", [tensor("a", a), tensor("b", b)], outputs=wanted[:1])
    assert one.as_numpy("level") is None
    with pytest.raises(triton.InferenceServerException, match="not among"):
        sync.infer("two", [tensor("a", a), tensor("b", b)], outputs=[triton.InferRequestedOutput("no")])


@pytest.mark.parametrize("kind", [int, str])
def test_a_sequence(
    sync: triton.InferenceServerClient, oracle: Oracles, rng: np.random.Generator, kind: type[int | str]
) -> None:
    x = rng.standard_normal((6, 3)).astype(np.float32)
    name = kind(next(_ids))
    outputs = []
    for i in range(6):
        result = sync.infer(
            "lstm",
            [tensor("x", x[np.newaxis, i : i + 1])],
            sequence_id=name,
            sequence_start=i == 0,
            sequence_end=i == 5,
        )
        assert result.get_response()["parameters"] == {"sequence_position": i + 1}
        outputs.append(result.as_numpy("y")[0])
    assert np.array_equal(np.concatenate(outputs), oracle("lstm")(x))
    with pytest.raises(triton.InferenceServerException, match="was closed") as gone:
        sync.infer("lstm", [tensor("x", x[np.newaxis])], sequence_id=name)
    assert gone.value.status() == "410"


def test_sequences_side_by_side(sync: triton.InferenceServerClient, oracle: Oracles, rng: np.random.Generator) -> None:
    names = [next(_ids) for _ in range(5)]
    x = rng.standard_normal((5, 4, 3)).astype(np.float32)
    outputs: dict[int, list[np.ndarray]] = {name: [] for name in names}
    for i in range(4):
        waiting = [
            sync.async_infer("lstm", [tensor("x", x[k : k + 1, i : i + 1])], sequence_id=name, sequence_start=i == 0)
            for k, name in enumerate(names)
        ]
        for name, request in zip(names, waiting, strict=True):
            outputs[name].append(request.get_result().as_numpy("y")[0])
    for k, name in enumerate(names):
        assert np.array_equal(np.concatenate(outputs[name]), oracle("lstm")(x[k]))


def test_start_and_end_in_one(sync: triton.InferenceServerClient, oracle: Oracles, rng: np.random.Generator) -> None:
    x = rng.standard_normal((1, 4, 3)).astype(np.float32)
    name = next(_ids)
    for _ in range(2):
        result = sync.infer("lstm", [tensor("x", x)], sequence_id=name, sequence_start=True, sequence_end=True)
        assert np.array_equal(result.as_numpy("y")[0], oracle("lstm")(x[0]))


def test_start_on_a_living_id_restarts(serve: Serve, oracle: Oracles, rng: np.random.Generator) -> None:
    running = serve()
    x = rng.standard_normal((1, 4, 3)).astype(np.float32)
    client = triton.InferenceServerClient(running.address)
    for i in range(3):
        result = client.infer("lstm", [tensor("x", x)], sequence_id=9, sequence_start=True)
        assert np.array_equal(result.as_numpy("y")[0], oracle("lstm")(x[0]))
        text = httpx.get(f"{running.url}/metrics").text
        assert metric(text, "unroll_sessions_restarted_total", model="lstm") == i
        assert metric(text, "unroll_sessions", model="lstm") == 1
    client.close()


def test_a_sequence_that_was_not_started(sync: triton.InferenceServerClient) -> None:
    for flags in ({}, {"sequence_end": True}):
        words = "must specify the START flag on the first request of the sequence"
        with pytest.raises(triton.InferenceServerException, match=words) as error:
            sync.infer("lstm", [tensor("x", np.ones((1, 1, 3), np.float32))], sequence_id=next(_ids), **flags)
        assert error.value.status() == "400"


def test_invalid_sequence_requests_are_refused(sync: triton.InferenceServerClient, server: Running) -> None:
    name = next(_ids)

    def start(array: np.ndarray, input: str = "x", model: str = "lstm") -> str:
        with pytest.raises(triton.InferenceServerException) as error:
            sync.infer(model, [tensor(input, array)], sequence_id=name, sequence_start=True)
        assert error.value.status() in ("400", "422")
        return error.value.message()

    ones = np.ones((1, 1, 3), np.float32)
    assert "batch size 1" in start(np.ones((2, 1, 3), np.float32))
    assert "FP32" in start(np.ones((1, 1, 3), np.int64))
    assert "shape" in start(np.ones((1, 1, 4), np.float32))
    assert "shape" in start(np.ones((1, 3), np.float32))
    assert "'x'" in start(ones, "y")
    assert "NaN" in start(ones * np.nan)
    assert "whole sequences only" in start(ones, model="whole")
    assert str(name) not in server.model("lstm").scheduler.sessions, "a refused request starts nothing"


async def test_the_client_for_asyncio(
    aio: triton_aio.InferenceServerClient, oracle: Oracles, rng: np.random.Generator
) -> None:
    assert await aio.is_server_live()
    assert await aio.is_server_ready()
    assert await aio.is_model_ready("lstm")
    assert (await aio.get_model_metadata("lstm"))["versions"] == ["1"]
    x = rng.standard_normal((3, 5, 3)).astype(np.float32)
    result = await aio.infer("lstm", [tensor("x", x)], request_id="r")
    assert np.array_equal(result.as_numpy("y"), np.stack([oracle("lstm")(row) for row in x]))
    assert result.get_response()["id"] == "r"
    name = f"aio-{next(_ids)}"
    outputs = []
    for i in range(5):
        step = await aio.infer(
            "lstm",
            [tensor("x", x[:1, i : i + 1], binary=i % 2 == 0)],
            outputs=[triton_aio.InferRequestedOutput("y", binary_data=i % 3 == 0)],
            sequence_id=name,
            sequence_start=i == 0,
            sequence_end=i == 4,
            parameters={"sequence_position": i},
        )
        outputs.append(step.as_numpy("y")[0])
    assert np.array_equal(np.concatenate(outputs), oracle("lstm")(x[0]))
    with pytest.raises(triton.InferenceServerException, match="was closed"):
        await aio.infer("lstm", [tensor("x", x[:1])], sequence_id=name)
