"""The JavaScript client in Node, compared with plain onnxruntime; test_conformance.py breaks its connections."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rollouts import sample
from serving import Oracle, Running
from waiting import PATIENCE

ROOT = Path(__file__).parents[2]
MODULE = ROOT / "client" / "unroll.mjs"
STATIC = {"speaker": 3, "gain": [0.25, -0.5]}

Oracles = Callable[[str], Oracle]
#: Runs the named scenarios against a URL and returns their results.
Play = Callable[..., Any]


@pytest.fixture(scope="module")
def given() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    shapes = {"x": (8, 3), "a": (5, 2), "b": (5, 3), "voice": (4, 3)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def play(given: dict[str, np.ndarray], node: list[str]) -> Play:
    values: dict[str, object] = {name: array.tolist() for name, array in given.items()}
    values["voice"] = {"x": values["voice"], "static": STATIC}

    def run(url: str, *only: str) -> Any:
        arguments = json.dumps({**values, "retryFor": 60_000, "only": only})
        ran = subprocess.run(
            [*node, Path(__file__).with_name("scenario.mjs"), MODULE, url, arguments],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout)

    return run


def same(got: list, right: np.ndarray) -> bool:
    return np.array_equal(np.array(got, np.float32), right)


def test_javascript_client_gets_the_oracles_bits(
    server: Running, oracle: Oracles, given: dict[str, np.ndarray], play: Play
) -> None:
    found = play(server.url, "sessions", "copies", "tensors", "stream")
    right = oracle("lstm")(given["x"])
    for durability in ("memory", "stored", "client"):
        outputs, *positions = found["sessions"][durability]
        assert same(outputs, right)
        assert positions == [8, 8]
    for one, fork, restored, position, again in (found["copies"][:5], found["copies"][5:]):
        assert all(same(outputs, right[3:]) for outputs in (one, fork, restored, again))
        assert position == 3
    (level, slope), _ = oracle("two").all(given["a"], given["b"])
    tensors = found["tensors"]
    assert same(tensors["level"], level)
    assert same(tensors["slope"], slope)
    assert same(tensors["whole"], slope)
    row = oracle("voices").manifest.initial_row({"speaker": np.array(3), "gain": np.float32([0.25, -0.5])})
    spoken = oracle("voices").all(given["voice"], state=row)[0][0]
    assert same(tensors["spoken"], spoken)
    assert same(tensors["talked"], spoken)
    assert same(tensors["last"], oracle("last")(given["x"]))
    assert tensors["token"] == 33
    assert tensors["refused"] == "InvalidInput"
    streamed = found["stream"]
    assert all(same(outputs, right) for outputs in streamed["lives"])
    longer = oracle("lstm")(np.concatenate([given["x"], given["x"][:2]]))
    assert all(same(outputs, longer[8]) for outputs in streamed["together"])
    assert set(streamed["positions"]) == {9}
    assert same(streamed["after"], longer[9])


def rolled(lstm: Oracle, x: np.ndarray) -> tuple[list[list], np.ndarray]:
    """Return the four steps of a rollout after x, and the whole sequence with them."""
    right = []
    for position in range(9, 13):
        y = lstm(x)[-1]
        inputs = np.array([y[1], float(y[0]) * -0.7 + 0.1, 0.5]).astype(np.float32)
        x = np.concatenate([x, inputs[np.newaxis]])
        right.append([position, inputs.tolist(), lstm(x)[-1].tolist()])
    return right, x


def test_javascript_client_rolls_sessions_out(
    server: Running, oracle: Oracles, given: dict[str, np.ndarray], play: Play
) -> None:
    found = play(server.url, "rollouts")["rollouts"]
    right, _ = rolled(oracle("lstm"), given["x"])
    assert found["forks"] == [right] * 6
    assert found["applied"] == right
    tokens = [3]
    for position, (token,), logits in found["drawn"]:
        right = oracle("tokens")(np.array(tokens))
        assert token == sample(right[-1], position - 1, seed=6, temperature=1.5)
        tokens.append(token)
        assert same(logits, oracle("tokens")(np.array(tokens))[-1])
    assert found["refused"] == ["map_invalid", "InvalidInput"]


def test_stream_rollouts_survive_broken_connections(
    server: Running, oracle: Oracles, given: dict[str, np.ndarray], play: Play
) -> None:
    found = play(server.url, "streamRollouts")["streamRollouts"]
    right, x = rolled(oracle("lstm"), given["x"])
    assert found["found"] == [right, right, right, 5, right]
    assert same(found["after"], oracle("lstm")(np.concatenate([x, given["x"][:1]]))[-1])
    assert found["position"] == 13
    assert found["refused"] == [
        "map_invalid",
        "InvalidInput",
        "malformed_request",
        "session_closed",
        *["InvalidInput"] * 8,
    ]


def test_javascript_client_reports_error_codes(server: Running, play: Play) -> None:
    assert play(server.url, "refusals")["refusals"] == [
        *("session_closed", 2, "session_closed"),
        *("payload_mismatch", "InvalidInput"),
        *("InvalidInput", "non_finite_input"),
        *("InvalidInput", "session_exists"),
        *("model_unknown", "session_unknown"),
        *("not_streamable", "InvalidInput", "ConnectionFailed"),
    ]
