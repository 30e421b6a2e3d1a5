"""The two example stream clients lose and duplicate no output while their connections break.

tests/client/test_conformance.py covers every other failure.
"""

import asyncio
import json
import random
import re
import shutil
import socket
import subprocess
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from faults.proxy import CUTS, Fault, FaultProxy
from waiting import PATIENCE
from websockets.sync.client import connect

from unroll.examples import demo
from unroll.examples.stream import Session

ROOT = Path(__file__).parents[2]
JAVASCRIPT = ROOT / "examples" / "stream.mjs"
PAGE = ROOT / "docs" / "protocol.md"

_NUMBER = re.compile(r"\d+\.\d+")

#: Steps per chunk.
CHUNKS = [1, 1, 2, 5, 1, 3, 1, 70, 1, 1] * 8

#: Runs the client over the given chunks and prints the outputs in hexadecimal.
DRIVER = """
import { Session } from "%s";
const [url, chunks] = JSON.parse(process.argv[2]);
const session = new Session(url, "co2");
const outputs = [];
for (const chunk of chunks) {
  const values = await session.steps(new Float32Array(chunk), chunk.length);
  outputs.push(Buffer.from(values.buffer, values.byteOffset, values.byteLength));
}
console.log(JSON.stringify([session.id, session.position, Buffer.concat(outputs).toString("hex")]));
process.exit();
"""


@pytest.fixture
async def breaking(server: str) -> AsyncIterator[tuple[str, Counter[Fault]]]:
    """The URL of a proxy that cuts the connection at one in five messages, and a count of its faults so far."""
    chance, faults = random.Random(5), Counter[Fault]()

    def draw() -> Fault:
        fault = chance.choices([Fault.NONE, *CUTS], [12, 1, 1, 1])[0]
        faults[fault] += 1
        return fault

    async with FaultProxy(int(server.rpartition(":")[2]), draw, spares_first=True) as proxy:
        yield f"ws://127.0.0.1:{proxy.port}", faults


@pytest.fixture(scope="module")
def ppm() -> np.ndarray:
    return demo.Example.read(demo.EXAMPLE).series.ppm.astype("<f4")[: sum(CHUNKS)]


@pytest.fixture(scope="module")
def expected(server: str, ppm: np.ndarray) -> bytes:
    """Return the outputs of the whole sequence."""
    url = f"{server}/v1/models/co2/sequences"
    headers = {"Content-Type": "application/octet-stream", "Unroll-Steps": str(len(ppm))}
    request = urllib.request.Request(url, ppm.tobytes(), headers)
    with urllib.request.urlopen(request) as answer:
        return answer.read()


def position(server: str, session_id: str) -> int:
    with urllib.request.urlopen(f"{server}/v1/models/co2/sessions/{session_id}") as answer:
        return json.load(answer)["position"]


def chunks(ppm: np.ndarray) -> list[np.ndarray]:
    return np.split(ppm, np.cumsum(CHUNKS)[:-1])


async def test_python_client_survives_broken_connections(
    server: str, breaking: tuple[str, Counter[Fault]], ppm: np.ndarray, expected: bytes
):
    url, faults = breaking
    session = Session(url, "co2")

    def steps() -> list[np.ndarray]:
        return [session.steps(chunk[:, np.newaxis]) for chunk in chunks(ppm)]

    assert np.concatenate(await asyncio.to_thread(steps)).tobytes() == expected
    assert session.position == position(server, session.id) == len(ppm)
    assert min(faults[cut] for cut in CUTS) >= 2


def test_python_client_reports_a_missing_server():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening
        session = Session(f"ws://127.0.0.1:{unused.getsockname()[1]}", "co2")
        with pytest.raises(OSError, match="refused"):
            session.steps(np.array([[371.0]]))


@pytest.fixture(scope="module")
def node() -> list[str]:
    command = shutil.which("node")
    if command is None:
        pytest.skip("node is not installed")
    version = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    major = int(version.strip().removeprefix("v").partition(".")[0])
    if major < 20:
        pytest.skip(f"node {version.strip()} has no WebSocket")
    return [command] if major >= 22 else [command, "--experimental-websocket"]


def run(node: list[str], script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    script.write_text(DRIVER % JAVASCRIPT.as_uri())
    return subprocess.run([*node, script, json.dumps(arguments)], capture_output=True, text=True, timeout=PATIENCE)


async def test_javascript_client_survives_broken_connections(
    server: str,
    breaking: tuple[str, Counter[Fault]],
    ppm: np.ndarray,
    expected: bytes,
    node: list[str],
    tmp_path: Path,
):
    url, faults = breaking
    given = [chunk.tolist() for chunk in chunks(ppm)]
    ran = await asyncio.to_thread(run, node, tmp_path / "driver.mjs", url, given)
    assert ran.returncode == 0, ran.stderr
    session_id, reached, outputs = json.loads(ran.stdout)
    assert bytes.fromhex(outputs) == expected
    assert reached == position(server, session_id) == len(ppm)
    assert min(faults[cut] for cut in CUTS) >= 2


def test_wscat_conversation_on_the_page(server: str) -> None:
    """Each line must match; only the last digits of numbers may differ, because they depend on the processor."""
    transcript = re.search(r"```text\n\$ wscat -c ws://127.0.0.1:8000(\S+)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert transcript is not None
    path, lines = transcript.groups()
    with connect(f"ws{server.removeprefix('http')}{path}") as connection:
        for line in lines.splitlines():
            if line.startswith("> "):
                connection.send(line[2:])
            else:
                received = connection.recv(PATIENCE)
                assert isinstance(received, str)
                assert _NUMBER.sub("n", received) == _NUMBER.sub("n", line.removeprefix("< "))
                numbers = [[float(number) for number in _NUMBER.findall(text)] for text in (received, line)]
                assert numbers[0] == pytest.approx(numbers[1], abs=0.01)
