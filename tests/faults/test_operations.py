"""Operator actions in any order: no step fails, and every step runs on the weights of its session's version."""

import asyncio
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from faults.replica import Replica
from oracle import Oracle
from redis_server import free_port
from waiting import reached

from unroll.service.access.keys import new_key

SEEDS = [int(seed) for seed in os.environ.get("UNROLL_TEST_SEEDS", "1").split(",")]
OPERATIONS = ["put 1", "put 2", "take 1", "take 2", "load", "unload", "rescan", "rescan"]
OPERATIONS += ["guest", "no guest", "damaged keys", "log level"]
COUNT, CLIENTS = 12, 4
X = np.random.default_rng(11).standard_normal((200, 3)).astype(np.float32)
RAW = {"Content-Type": "application/octet-stream"}


class Operator:
    """Changes versions, keys, loaded models and the log level of a running server, and tracks the expected state.

    shelf: the server's repository. source: the folder with versions 1 and 2 of `gru`.
    """

    def __init__(self, source: Path, shelf: Path, keys: Path) -> None:
        self.source, self.shelf, self.keys = source, shelf, keys
        self.entries = {name: new_key(name, "acme", ["infer"]) for name in ("client", "guest")}
        self.operator, entry = new_key("operator", "operators", ["models:admin", "server:admin"])
        self.entries["operator"] = self.operator, entry
        shutil.copytree(source / "lstm" / "1", shelf / "lstm" / "1")  # a folder without bundles is not a repository
        self.put_version("1")
        self.write_keys()
        port = free_port()
        flags = ("--keys", str(keys), "--admin", "--admin-port", str(port))
        self.replica = Replica("operated", shelf, keys.parent, *flags)
        self.http = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", headers={"X-API-Key": self.operator}, timeout=120
        )

    def put_version(self, version: str) -> None:
        """Add a version by one rename, as export does."""
        if not (self.shelf / "gru" / version).exists():
            shutil.copytree(self.source / "gru" / version, self.shelf / ".coming")
            (self.shelf / "gru").mkdir(exist_ok=True)
            (self.shelf / ".coming").rename(self.shelf / "gru" / version)

    def take_version(self, version: str) -> None:
        if (self.shelf / "gru" / version).exists():
            (self.shelf / "gru" / version).rename(self.shelf / ".gone")
            shutil.rmtree(self.shelf / ".gone")

    def write_keys(self, *without: str) -> None:
        self.keys.write_text("\n".join(entry for name, (_, entry) in self.entries.items() if name not in without))

    async def act(self, chance: random.Random) -> str:
        """Perform one operation; return its name."""
        done = chance.choice(OPERATIONS)
        match done.split():
            case ["put", version]:
                self.put_version(version)
            case ["take", version]:
                self.take_version(version)
            case ["load" | "unload" as verb]:
                answer = await self.http.post(f"/v2/repository/models/gru/{verb}")
                assert answer.status_code in (200, 400, 404), answer.text
            case ["rescan"]:
                self.replica.rescan()
            case ["guest"]:
                self.write_keys()
            case ["no", "guest"]:
                self.write_keys("guest")
            case ["damaged", "keys"]:
                self.keys.write_text('[[keys]]\nname = "half')
            case ["log", "level"]:
                level = chance.choice(["debug", "info", "warning"])
                assert (await self.http.put("/v1/admin/log-level", json={"level": level})).status_code == 200
        return done


class Stepper:
    """A client that opens a session, steps it for a while and compares it with the version it was opened on."""

    def __init__(self, http: httpx.AsyncClient, oracles: dict[str, Oracle], seed: int, tally: Counter[str]) -> None:
        self._http, self._oracles, self._chance, self._tally = http, oracles, random.Random(seed), tally

    async def live(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            opened = await self._http.post("/v1/models/gru/sessions")
            if opened.status_code != 201:
                assert opened.json()["code"] in ("model_unknown", "model_unavailable", "draining"), opened.text
                self._tally[opened.json()["code"]] += 1
                self._tally["refused"] += 1
                await asyncio.sleep(0.005)
                continue
            version = opened.json()["model_version"]
            self._tally[version] += 1
            await self._step(f"/v1/models/gru/sessions/{opened.json()['session_id']}", version, stop)

    async def _step(self, session: str, version: str, stop: asyncio.Event) -> None:
        outputs: list[np.ndarray] = []
        position, end = 0, self._chance.randint(1, len(X))
        while position < end and not stop.is_set():
            x = X[position : position + self._chance.choice([1, 1, 1, 2, 7])]
            headers = RAW | {"Unroll-Steps": str(len(x)), "Unroll-Position": str(position)}
            answer = await self._http.post(f"{session}/steps", content=x.tobytes(), headers=headers)
            assert answer.status_code == 200, answer.text
            outputs.append(np.frombuffer(answer.content, "<f4").reshape(-1, 2))
            position += len(x)
            self._tally["steps"] += len(x)
            await asyncio.sleep(self._chance.choice([0.0, 0.01, 0.01]))  # most sessions have nothing in flight
        if outputs:
            expected = self._oracles[version](X[:position])
            assert np.array_equal(np.concatenate(outputs), expected), (session, version, position)
        assert (await self._http.delete(session)).status_code == 200


@pytest.fixture
def operator(repository: Path, tmp_path: Path) -> Iterator[Operator]:
    (tmp_path / "shelf").mkdir()
    operator = Operator(repository, tmp_path / "shelf", tmp_path / "keys.toml")
    yield operator
    operator.replica.kill()


@pytest.mark.parametrize("seed", SEEDS)
async def test_operations_in_any_order(seed: int, operator: Operator, repository: Path) -> None:
    oracles = {version: Oracle(repository, "gru", version) for version in ("1", "2")}
    chance, tally, stop = random.Random(seed), Counter[str](), asyncio.Event()
    await operator.replica.start()
    url = f"http://127.0.0.1:{operator.replica.port}"
    client = {"X-API-Key": operator.entries["client"][0]}
    guest = {"X-API-Key": operator.entries["guest"][0]}
    async with (
        httpx.AsyncClient(base_url=url, headers=client, timeout=120) as http,
        operator.http,
        asyncio.TaskGroup() as group,
    ):
        for i in range(CLIENTS):
            group.create_task(Stepper(http, oracles, seed * 1000 + i, tally).live(stop))
        for _ in range(COUNT):
            wanted = tally["steps"] + tally["refused"] + chance.randint(0, 60)
            tally[await operator.act(chance)] += 1
            await reached(lambda wanted=wanted: tally["steps"] + tally["refused"] >= wanted, "answers")

        # The last operations decide the final state.
        operator.put_version("2")
        operator.write_keys("guest")
        operator.replica.rescan()
        await operator.http.post("/v2/repository/models/gru/load")
        before = tally["2"]
        await reached(lambda: tally["2"] > before + CLIENTS, "sessions on the newest version")

        async def refused() -> bool:
            return (await http.get("/v1/models", headers=guest)).status_code == 401

        await reached(refused, "the guest's refusal")
        assert (await operator.http.post("/v1/admin/drain")).json() == {"ready": False}
        await reached(lambda: tally["draining"] > CLIENTS, "the refusal of new sessions")
        stop.set()
    assert await operator.replica.terminate() == 0
    assert min(tally["1"], tally["2"]) > 0
    assert tally["steps"] > 10 * COUNT
    assert "Traceback" not in operator.replica.log.read_text()
