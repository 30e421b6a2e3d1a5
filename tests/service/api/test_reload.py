"""Bundles are added, changed and removed while sessions run; a session keeps the weights it began with."""

import asyncio
import hashlib
import shutil
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import wire
from damage import describe, vectors
from serving import RAW, Oracle, Running, Serve, raw_steps
from waiting import until

from unroll import bundle
from unroll.service.engine.curve import Curve
from unroll.service.models import loading

Oracles = Callable[..., Oracle]

X = np.random.default_rng(3).standard_normal((400, 3)).astype(np.float32)


@pytest.fixture
def shelf(repository: Path, tmp_path: Path) -> Path:
    """A private repository with `gru` version 1 and `lstm`."""
    for path in ("gru/1", "lstm/1"):
        shutil.copytree(repository / path, tmp_path / path)
    return tmp_path


@pytest.fixture
def running(serve: Serve, shelf: Path) -> Running:
    return serve(repository=shelf)


@pytest.fixture
async def http(running: Running) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=running.url) as http:
        yield http


def add(repository: Path, shelf: Path, version: str) -> None:
    """Add a version by one rename, as export does."""
    shutil.copytree(repository / "gru" / version, shelf / ".coming")
    (shelf / ".coming").rename(shelf / "gru" / version)


def test_versions_of_a_model_are_measured_as_models_built_alike(
    serve: Serve, repository: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[Curve | None, Curve]] = []
    measure = loading.measure

    def spy(*arguments: object, alike: Curve | None) -> Curve:
        measured.append((alike, measure(*arguments, alike=alike)))  # type: ignore[arg-type]
        return measured[-1][1]

    monkeypatch.setattr(loading, "measure", spy)
    add(repository, shelf, "2")
    serve(repository=shelf)
    (of_first, first), (of_second, _), (of_other, _) = measured  # gru:1, gru:2, lstm:1
    assert of_first is None
    assert of_second is first
    assert of_other is None


def versions(running: Running) -> list[tuple[str, bool]]:
    return [(m.version, m.retired) for m in running.server.models if m.name == "gru"]


async def rescanned(running: Running, expected: list[tuple[str, bool]]) -> None:
    await asyncio.to_thread(running.rescan_now)
    assert versions(running) == expected


async def opened(http: httpx.AsyncClient, model: str = "gru", **body: object) -> str:
    answer = await http.post(f"/v1/models/{model}/sessions", json=body)
    assert answer.status_code == 201, answer.text
    return f"/v1/models/gru/sessions/{answer.json()['session_id']}"


async def step(http: httpx.AsyncClient, session: str, x: np.ndarray) -> np.ndarray:
    answer = await http.post(f"{session}/steps", content=x.tobytes(), headers=raw_steps(x))
    assert answer.status_code == 200, answer.text
    return np.frombuffer(answer.content, "<f4").reshape(-1, 2)


async def test_a_new_version_under_load(
    running: Running, http: httpx.AsyncClient, repository: Path, shelf: Path, oracle: Oracles
) -> None:
    stop = asyncio.Event()

    async def stream(version: str) -> int:
        """Step until stopped, then compare all outputs with one run of that version."""
        session, outputs = await opened(http), []
        assert (await http.get(session)).json()["model_version"] == version
        while len(outputs) < len(X) and not (stop.is_set() and len(outputs) >= 20):
            outputs.append(await step(http, session, X[len(outputs) : len(outputs) + 1]))
        assert np.array_equal(np.concatenate(outputs), oracle("gru", version)(X[: len(outputs)]))
        assert (await http.get(session)).json()["model_version"] == version
        return len(outputs)

    async with asyncio.TaskGroup() as group:
        old = [group.create_task(stream("1")) for _ in range(8)]
        await asyncio.to_thread(until, lambda: running.model("gru", "1").scheduler.counters.steps > 20)
        add(repository, shelf, "2")
        await rescanned(running, [("1", False), ("2", False)])
        new = [group.create_task(stream("2")) for _ in range(8)]
        await asyncio.to_thread(until, lambda: running.model("gru", "2").scheduler.counters.steps > 20)
        stop.set()
    assert all(task.result() >= 20 for task in old + new)


async def test_naming_another_version_than_the_sessions_is_refused(
    running: Running, http: httpx.AsyncClient, repository: Path, shelf: Path, oracle: Oracles
) -> None:
    session = await opened(http)
    first = await step(http, session, X[:3])
    add(repository, shelf, "2")
    await rescanned(running, [("1", False), ("2", False)])
    other = session.replace("/gru/", "/gru:2/")
    before = (await http.get(f"{session}/state")).content
    for answer in (
        await http.post(f"{other}/steps", content=X[3:4].tobytes(), headers=RAW),
        await http.get(other),
        await http.get(f"{other}/state"),
        await http.put(f"{other}/state", content=before, headers=RAW),
        await http.post(f"{other}/fork"),
        await http.delete(other),
    ):
        assert (answer.status_code, answer.json()["code"]) == (409, "model_changed")
    assert (await http.get(f"{session}/state")).content == before
    forked = await http.post(f"{session}/fork")
    assert forked.json()["model_version"] == "1"
    rest = await step(http, session, X[3:5])
    assert np.array_equal(np.concatenate([first, rest]), oracle("gru", "1")(X[:5]))


async def test_a_version_is_removed(
    running: Running, http: httpx.AsyncClient, repository: Path, shelf: Path, oracle: Oracles
) -> None:
    session = await opened(http)
    first = await step(http, session, X[:3])
    add(repository, shelf, "2")
    shutil.rmtree(shelf / "gru" / "1")
    await rescanned(running, [("1", True), ("2", False)])
    for answer in (await http.get("/v1/models/gru:1"), await http.post("/v1/models/gru:1/sessions")):
        assert (answer.status_code, answer.json()["code"]) == (404, "model_unknown")
    assert np.array_equal(np.concatenate([first, await step(http, session, X[3:5])]), oracle("gru", "1")(X[:5])), (
        "the session finishes on its version"
    )
    assert np.array_equal(await step(http, await opened(http), X[:5]), oracle("gru", "2")(X[:5]))
    await http.delete(session)
    await rescanned(running, [("2", False)])


async def test_a_removed_version_stays_while_a_session_without_a_row_is_on_it(
    serve: Serve, shelf: Path, repository: Path, oracle: Oracles
) -> None:
    add(repository, shelf, "2")
    running = serve(repository=shelf, session_capacity=1)
    async with httpx.AsyncClient(base_url=running.url) as http:
        session = await opened(http, "gru:1")
        first = await step(http, session, X[:3])
        await http.delete(await opened(http, "gru:1"))  # takes the row
        shutil.rmtree(shelf / "gru" / "1")
        await rescanned(running, [("1", True), ("2", False)])
        assert np.array_equal(np.concatenate([first, await step(http, session, X[3:5])]), oracle("gru", "1")(X[:5]))
        await http.delete(session)
        await rescanned(running, [("2", False)])


async def test_a_whole_model_is_removed(running: Running, http: httpx.AsyncClient, shelf: Path) -> None:
    session = await opened(http)
    shutil.rmtree(shelf / "gru")
    await rescanned(running, [("1", True)])
    await step(http, session, X[:1])
    assert (await http.post("/v1/models/gru/sessions")).status_code == 404
    assert [model["name"] for model in (await http.get("/v1/models")).json()] == ["lstm"]


async def test_a_version_is_replaced_in_place(
    running: Running, http: httpx.AsyncClient, repository: Path, shelf: Path, oracle: Oracles
) -> None:
    session = await opened(http)
    first = await step(http, session, X[:3])
    saved = (await http.get(f"{session}/state")).content
    other = bundle.read(repository / "gru" / "2")
    manifest = replace(other.manifest, version="1")
    bundle.write(shelf, manifest, other.model, other.golden, replace_existing=True)
    await rescanned(running, [("1", True), ("1", False)])
    assert np.array_equal(np.concatenate([first, await step(http, session, X[3:5])]), oracle("gru", "1")(X[:5]))
    assert np.array_equal(await step(http, await opened(http), X[:5]), oracle("gru", "2")(X[:5]))
    refused = await http.post("/v1/models/gru/sessions", content=saved, headers=RAW)
    assert (refused.status_code, refused.json()["code"]) == (409, "model_changed")


@pytest.mark.parametrize("changed", ["manifest", "golden vectors"])
async def test_a_bundle_is_loaded_again_if_any_of_its_files_changed(
    running: Running, http: httpx.AsyncClient, shelf: Path, oracle: Oracles, changed: str
) -> None:
    """A session stays on its version, and its snapshots still match the same weights."""
    session = await opened(http)
    first = await step(http, session, X[:3])
    saved = (await http.get(f"{session}/state")).content
    path = shelf / "gru" / "1"
    if changed == "manifest":
        describe(path, tools={"by hand": "1"})
    else:
        vectors("chunking.0", lambda chunks: chunks[::-1])(path)
    await rescanned(running, [("1", True), ("1", False)])
    assert np.array_equal(np.concatenate([first, await step(http, session, X[3:5])]), oracle("gru", "1")(X[:5]))
    other = await http.post("/v1/models/gru/sessions", content=saved, headers=RAW)
    assert other.status_code == 201, other.text
    second = await step(http, f"/v1/models/gru/sessions/{other.json()['session_id']}", X[3:5])
    assert np.array_equal(np.concatenate([first, second]), oracle("gru", "1")(X[:5]))
    await http.delete(session)
    await asyncio.to_thread(running.rescan_now)
    assert versions(running) == [("1", False)]


@pytest.mark.parametrize("signed", [False, True], ids=["damaged", "no model at all"])
async def test_a_bundle_that_is_refused_changes_nothing(
    running: Running, http: httpx.AsyncClient, repository: Path, shelf: Path, signed: bool
) -> None:
    add(repository, shelf, "2")
    graph, manifest = shelf / "gru" / "2" / "model.onnx", shelf / "gru" / "2" / "manifest.json"
    before = hashlib.sha256(graph.read_bytes()).hexdigest()
    graph.write_bytes(graph.read_bytes()[::-1])
    if signed:
        after = hashlib.sha256(graph.read_bytes()).hexdigest()
        manifest.write_text(manifest.read_text().replace(before, after))
    shutil.copytree(repository / "hot", shelf / "hot")
    await rescanned(running, [("1", False)])
    assert "hot" in running.server.models.names()
    await step(http, await opened(http), X[:1])


async def test_tombstones_outlive_the_version(
    running: Running, http: httpx.AsyncClient, repository: Path, shelf: Path
) -> None:
    session = await opened(http)
    await http.delete(session)
    add(repository, shelf, "2")
    shutil.rmtree(shelf / "gru" / "1")
    await asyncio.to_thread(running.rescan_now)
    assert ("2", False) in versions(running)
    await asyncio.to_thread(running.rescan_now)
    answer = await http.get(session)
    assert (answer.status_code, answer.json()["code"]) == (410, "session_closed")


@pytest.mark.parametrize("position", [{}, {"sequence_position": 0}])
async def test_restarted_sequence_gets_the_newest_version(
    running: Running, http: httpx.AsyncClient, repository: Path, shelf: Path, position: dict[str, int]
) -> None:
    def start(end: bool, x: np.ndarray) -> wire.Body:
        return wire.body({"x": x[np.newaxis]}, sequence_id=5, sequence_start=True, sequence_end=end, **position)

    first = start(True, X[:2])
    answer = await http.post("/v2/models/gru/infer", content=first.content, headers=first.headers)
    assert wire.outputs(answer)[0]["model_version"] == "1"
    add(repository, shelf, "2")
    await rescanned(running, [("1", False), ("2", False)])
    second = start(False, X[2:4])
    answer = await http.post("/v2/models/gru/infer", content=second.content, headers=second.headers)
    assert wire.outputs(answer)[0]["model_version"] == "2"


async def test_empty_repository_unloads_nothing(running: Running, http: httpx.AsyncClient, shelf: Path) -> None:
    session = await opened(http)
    away = Path(shutil.move(shelf, shelf.with_name("away")))
    await asyncio.to_thread(running.rescan_now)
    assert versions(running) == [("1", False)]
    await step(http, session, X[:1])
    shutil.move(away, shelf)
