"""The cost of decoding a hostile body: time and memory stay a small multiple of its size on every route."""

import json
from collections.abc import Callable
from pathlib import Path
from time import process_time

import httpx
import pytest
from serving import RAW, Running
from websockets.sync.client import connect

#: Approximate bytes per body. Its Python objects take at most 24 times as much memory.
SIZE = 1_000_000
MOST_BYTES = 40 * SIZE
MOST_SECONDS = 3.0

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak of memory")


def many(item: str) -> str:
    return ",".join([item] * (SIZE // (len(item) + 1)))


def many_strings(count: int) -> str:
    return ",".join(['"a"'] * count)


INPUTS = {
    "one long string and many short": f'[["{"a" * SIZE}",{many_strings(1000)}]]',
    "long strings and numbers": f"[{many(chr(34) + 'b' * 1000 + chr(34) + ',1')}]",
    "rows of one long string": f'[{many("[1]")},["{"a" * SIZE}"]]',
    "nulls": f"[[{many('null')}]]",
    "bools": f"[[{many('true')}]]",
    "objects": f"[[{many('{}')}]]",
    "empty lists": f"[{many('[]')}]",
    "pairs": f"[{many('[1,2]')}]",
    "rows that differ in length": f"[{many('[1],[1,2]')}]",
    "a deep list": "[" * 900 + many("1") + "]" * 900,
    "many deep lists": f"[{many('[' * 500 + ']' * 500)}]",
    "wide numbers": f"[[{many('18446744073709551615,-1')}]]",
    "fractions": f"[[{many('0.1')}]]",
    "a string": f'"{"a" * SIZE}"',
    "an object": "{" + ",".join(f'"{i}":0' for i in range(SIZE // 10)) + "}",
}


def v2(data: str, shape: str = "[1,1,3]", more: str = "") -> str:
    return f'{{"inputs":[{{"name":"x","datatype":"FP32","shape":{shape},"data":{data}}}]{more}}}'


V2 = {
    "a long shape": v2("[1,2,3]", f"[{many('1')}]"),
    "a huge shape": v2("[1,2,3]", f"[{9 * 10**18},{9 * 10**18},3]"),
    "a shape of objects": v2("[1,2,3]", f"[{many('{}')}]"),
    "many inputs": f'{{"inputs":[{many("{}")}]}}',
    "many outputs": v2("[1,2,3]", more=f',"outputs":[{many(json.dumps({"name": "y"}))}]'),
    "long names": v2("[1,2,3]", more=f',"outputs":[{{"name":"{"a" * SIZE}"}}]'),
    "a long id": v2("[1,2,3]", more=f',"id":"{"a" * SIZE}","parameters":{{"sequence_id":"{"b" * SIZE}"}}'),
    "a long datatype": v2("[1,2,3]").replace("FP32", "F" * SIZE),
}
OPEN = {
    "a state of strings": f'{{"state":[{many(chr(34) + "a" + chr(34))}]}}',
    "a state of nulls": f'{{"state":[{many("null")}]}}',
    "unknown members": INPUTS["an object"],
    "a snapshot": f'{{"snapshot":"{"A" * SIZE}"}}',
    "static lists": f'{{"static":{{"a":[{many("[]")}]}}}}',
}
CONTROL = {
    "handles of strings": f'{{"op":"close","handles":[{many(chr(34) + "a" + chr(34))}]}}',
    "empty sessions": f'{{"op":"open","sessions":[{many("{}")}]}}',
    "a session of unknown members": f'{{"op":"open","sessions":[{INPUTS["an object"]}]}}',
    "unknown members": INPUTS["an object"],
    "unknown members and spaces": "{" + ",".join(f'"{i}" : 0' for i in range(SIZE // 12)) + "}",
}


@pytest.fixture
def frugal(server: Running, client: httpx.Client) -> Callable[[Callable[[], object]], None]:
    """Run a call and check its cost in this process, which also runs the server."""
    client.get("/livez").raise_for_status()

    def once(call: Callable[[], object]) -> tuple[float, int]:
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        before, started = _memory("VmRSS"), process_time()
        call()
        return process_time() - started, _memory("VmHWM") - before

    def run(call: Callable[[], object]) -> None:
        """Take the minimum of a few runs, as other servers in this process and the garbage collector add noise."""
        costs: list[tuple[float, int]] = []
        while len(costs) < 3 and (not costs or costs[-1][0] >= MOST_SECONDS or costs[-1][1] >= MOST_BYTES):
            costs.append(once(call))
        seconds, peak = map(min, zip(*costs, strict=True))
        assert peak < MOST_BYTES, f"{peak / 1e6:.0f} MB"
        assert seconds < MOST_SECONDS, f"{seconds:.1f} s"

    return run


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _refused(client: httpx.Client, path: str, body: str | bytes, **headers: str) -> None:
    answer = client.post(path, content=body, headers={"Content-Type": "application/json", **headers})
    assert 400 <= answer.status_code < 500, answer.text[:500]
    assert len(answer.content) < 10_000


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
def test_inputs(client: httpx.Client, frugal: Callable, inputs: str) -> None:
    session = client.post("/v1/models/lstm/sessions").json()["session_id"]
    bodies = {
        f"/v1/models/lstm/sessions/{session}/steps": f'{{"inputs":{inputs}}}',
        "/v1/models/lstm/sequences": f'{{"inputs":[{inputs}]}}',
        "/v1/models/tokens/sequences": f'{{"inputs":[{inputs}]}}',
        "/v2/models/lstm/infer": v2(inputs),
    }
    for path, body in bodies.items():
        frugal(lambda path=path, body=body: _refused(client, path, body))


@pytest.mark.parametrize("body", V2.values(), ids=V2)
def test_infer_bodies(client: httpx.Client, frugal: Callable, body: str) -> None:
    frugal(lambda: _refused(client, "/v2/models/lstm/infer", body))


@pytest.mark.parametrize("body", OPEN.values(), ids=OPEN)
def test_bodies_that_open_and_fork(client: httpx.Client, frugal: Callable, body: str) -> None:
    session = client.post("/v1/models/lstm/sessions").json()["session_id"]
    frugal(lambda: _refused(client, "/v1/models/lstm/sessions", body))
    frugal(lambda: _refused(client, f"/v1/models/lstm/sessions/{session}/fork", body))


def test_raw_bodies_and_snapshots(client: httpx.Client, frugal: Callable) -> None:
    path, content = "/v1/models/lstm/sessions", bytes(SIZE)
    frugal(lambda: _refused(client, path, content, **RAW))
    frugal(lambda: _refused(client, "/v1/models/lstm/sequences", content, **RAW, **{"Unroll-Steps": "1" * 18}))
    text = v2("[]").replace('"data":[]', '"parameters":{"binary_data_size":1000000}').encode()
    length = {"Inference-Header-Content-Length": str(len(text))}
    frugal(lambda: _refused(client, "/v2/models/lstm/infer", text + content, **RAW, **length))


@pytest.mark.parametrize("message", [*CONTROL.values(), bytes(SIZE)], ids=[*CONTROL, "a frame"])
def test_messages_of_streams(server: Running, frugal: Callable, message: str | bytes) -> None:
    with connect(f"ws://{server.address}/v1/models/lstm/stream", compression=None) as socket:

        def refused() -> None:
            socket.send(message)
            answer = socket.recv()
            assert json.loads(answer)["code"] in {"malformed_request", "body_too_large"}
            assert len(answer) < 10_000

        frugal(refused)
