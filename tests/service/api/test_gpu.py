"""The whole server on a GPU: answers equal those on the CPU within the bundle's tolerance."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from serving import RAW, Running

from unroll.service.engine.runner import resolve_devices
from unroll.service.settings import Settings

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def servers(repository: Path) -> Iterator[tuple[Running, Running]]:
    """A server on the GPU and one on the CPU."""
    (device, *_), why = resolve_devices("auto")
    if device == "cpu":
        pytest.skip(why)
    running = [Running(Settings(repository=repository, device=on, max_batch=64)) for on in (device, "cpu")]
    yield running[0], running[1]
    for each in running:
        each.stop()


def values(response: httpx.Response) -> np.ndarray:
    assert response.status_code in (200, 201), response.text
    return np.array(response.json()["outputs"])


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_session_gives_the_same_outputs_on_gpu_and_cpu(servers: tuple[Running, Running], name: str):
    x = np.random.default_rng(0).standard_normal((12, 3)).astype(np.float32).tolist()

    def life(server: Running) -> list[np.ndarray]:
        """Steps, a chunk, a retry, a fork, a snapshot restored, and a whole sequence."""
        with httpx.Client(base_url=f"{server.url}/v1/models/{name}") as client:
            client.post("/sessions", json={"session_id": "one"}).raise_for_status()
            found = [values(client.post("/sessions/one/steps", json={"inputs": [row]})) for row in x[:3]]
            chunk = {"inputs": x[3:9], "position": 3}
            found += [values(client.post("/sessions/one/steps", json=chunk)) for _ in range(2)]
            assert np.array_equal(found[-1], found[-2])
            client.post("/sessions/one/fork", json={"session_id": "two"}).raise_for_status()
            snapshot = client.get("/sessions/one/state").content
            found.append(values(client.post("/sessions/two/steps", json={"inputs": x[9:]})))
            client.post("/sessions/one/steps", json={"inputs": [x[0]]}).raise_for_status()
            client.put("/sessions/one/state", content=snapshot, headers=RAW).raise_for_status()
            found.append(values(client.post("/sessions/one/steps", json={"inputs": x[9:]})))
            assert np.array_equal(found[-1], found[-2])
            whole = client.post("/sequences", json={"inputs": [x, x[:5]]})
            found.append(np.array(whole.json()["outputs"][0]))
            np.testing.assert_allclose(found[-1], np.concatenate([*found[:4], found[-2]]), rtol=0, atol=1e-6)
            return found

    for one, other in zip(*map(life, servers), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


def test_the_model_says_where_it_is_served(servers: tuple[Running, Running]):
    told = httpx.get(f"{servers[0].url}/v1/models/lstm").json()
    assert told["device"] == "cuda:0"
    assert told["provider"] == "CUDAExecutionProvider"
    assert told["precision"] == "float32"
    assert 0 < told["parity"]["y"] < 1e-6
    assert told["stability"] < 1e-6
