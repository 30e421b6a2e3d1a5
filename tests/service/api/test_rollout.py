"""Rolling out a version, replica by replica: where sessions begin, and the errors for versions not present."""

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
import wire
from redis_server import RedisServer
from serving import RAW, Oracle, Running, raw_steps
from streams import Client as Stream
from waiting import until

from unroll.service import app
from unroll.service.models import repository as repositories
from unroll.service.models.contents import RepositoryError
from unroll.service.settings import Settings

Background = Callable[..., Future]
Oracles = Callable[..., Oracle]

X = np.random.default_rng(4).standard_normal((20, 3)).astype("<f4")
GRU = "/v1/models/gru/sessions"


@dataclass
class Replica:
    """A server with a private repository."""

    shelf: Path
    running: Running
    http: httpx.Client

    def add(self, source: Path, version: str) -> None:
        """Add a version to the repository by one rename, without a rescan."""
        shutil.copytree(source / "gru" / version, self.shelf / ".coming")
        (self.shelf / ".coming").rename(self.shelf / "gru" / version)

    def point(self, version: str | None) -> None:
        """Write or remove the model's pointer, and rescan."""
        pointer = self.shelf / "gru" / "serve"
        pointer.unlink(missing_ok=True) if version is None else pointer.write_text(version)
        self.running.rescan_now()

    def opened(self, model: str = "gru", **body: object) -> tuple[str, str]:
        """Open a session; return its path and version."""
        answer = self.http.post(f"/v1/models/{model}/sessions", json=body)
        assert answer.status_code == 201, answer.text
        return f"{GRU}/{answer.json()['session_id']}", answer.json()["model_version"]

    def step(self, session: str, x: np.ndarray, position: int) -> httpx.Response:
        headers = {**raw_steps(x), "Unroll-Position": str(position)}
        return self.http.post(f"{session}/steps", content=x.tobytes(), headers=headers)

    def index(self) -> list[tuple[str, str, str]]:
        rows = self.http.post("/v2/repository/index").json()
        return [(row["version"], row["state"], row["reason"]) for row in rows]


def replica(source: Path, shelf: Path, *versions: str, **settings: object) -> Replica:
    for version in versions:
        shutil.copytree(source / "gru" / version, shelf / "gru" / version)
    running = Running(Settings.model_validate({"repository": shelf, "snapshot_keys": ["0123456789abcdef"], **settings}))
    return Replica(shelf, running, httpx.Client(base_url=running.url))


@pytest.fixture(scope="module")
def pair(
    repository: Path, tmp_path_factory: pytest.TempPathFactory, redis_process: RedisServer
) -> Iterator[tuple[Replica, Replica]]:
    """`early` has versions 1 and 2, `late` only version 1. Each opens sessions on its highest version."""
    redis_process.flush()
    store = redis_process.url
    early = replica(repository, tmp_path_factory.mktemp("early"), "1", "2", store=store)
    late = replica(repository, tmp_path_factory.mktemp("late"), "1", store=store)
    yield early, late
    for one in (early, late):
        one.http.close()
        one.running.stop()


@pytest.fixture
def early(pair: tuple[Replica, Replica]) -> Replica:
    return pair[0]


@pytest.fixture
def late(pair: tuple[Replica, Replica], repository: Path) -> Iterator[Replica]:
    """After the test it serves version 1 only, as before."""
    late = pair[1]
    yield late
    for model in late.running.server.models.of("gru"):
        for session in [*model.scheduler.sessions]:
            late.http.delete(f"{GRU}/{session.id}")
    shutil.rmtree(late.shelf / "gru" / "2", ignore_errors=True)
    late.point(None)
    late.running.server.models.retired.clear()


@pytest.fixture(scope="module")
def both(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    """Versions 1 and 2, without a store."""
    both = replica(repository, tmp_path_factory.mktemp("both"), "1", "2")
    yield both
    both.http.close()
    both.running.stop()


@pytest.fixture
def alone(both: Replica) -> Replica:
    """The same server without a pointer."""
    both.point(None)
    return both


def outputs(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.frombuffer(answer.content, "<f4").reshape(-1, 2)


def problem(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


NOT_HERE = 503, "version_unavailable"


def test_session_of_a_version_not_yet_present_is_retryable(early: Replica, late: Replica, oracle: Oracles) -> None:
    session, version = early.opened()
    assert version == "2"
    first = outputs(early.step(session, X[:3], 0))
    made = wire.body({"x": X[np.newaxis, :1]}, sequence_id=session.rpartition("/")[2])
    named = session.replace("/gru/", "/gru:2/")
    for answer in (
        late.step(session, X[3:4], 3),
        late.step(named, X[3:4], 3),
        late.http.post(f"{session}/steps", json={"inputs": X[:1].tolist()}),
        late.http.get(session),
        late.http.get(f"{session}/state"),
        late.http.post(f"{session}/fork"),
        late.http.post("/v2/models/gru/infer", content=made.content, headers=made.headers),
    ):
        assert problem(answer) == NOT_HERE, answer.text
        assert int(answer.headers["Retry-After"]) >= 1
        assert "another replica" in answer.text
    assert np.array_equal(np.concatenate([first, outputs(early.step(session, X[3:5], 3))]), oracle("gru", "2")(X[:5]))


def test_stream_of_a_version_not_yet_present_is_retryable(early: Replica, late: Replica, oracle: Oracles) -> None:
    session, _ = early.opened()
    stream = Stream(late.running, oracle("gru").manifest)
    name = session.rpartition("/")[2]
    for mode in ("resume", "either"):
        (item,) = stream.open({"handle": 0, "session_id": name, "mode": mode})
        assert (item["error"]["code"], item["error"]["retry_after"]) == (NOT_HERE[1], 1.0)
    (item,) = stream.open({"handle": 0, "session_id": name, "mode": "new"})
    assert item["error"]["code"] == "session_exists"
    stream.socket.close()


def test_frame_of_a_session_reopened_on_an_absent_version(early: Replica, late: Replica, oracle: Oracles) -> None:
    """The handle refers to the earlier session, which ended; closing the handle reports that as well."""
    stream = Stream(late.running, oracle("gru").manifest)
    stream.bind(0, session_id="again-on-a-stream")
    stream.step((0, 0, X[:1]))
    path = f"{GRU}/again-on-a-stream"
    assert early.http.delete(path).status_code == 200
    assert early.opened(session_id="again-on-a-stream") == (path, "2")
    assert stream.refused(0, 1, X[1:2])[0] == "session_closed"
    assert problem(late.http.get(path)) == NOT_HERE
    (item,) = stream.control("close", handles=[0])["sessions"]
    assert item["error"]["code"] == "session_closed"
    stream.socket.close()


def test_stream_closes_a_session_of_a_removed_version(
    repository: Path, tmp_path: Path, redis_process: RedisServer, oracle: Oracles
) -> None:
    one = replica(repository, tmp_path, "1", "2", store=redis_process.url, session_capacity=1)
    stream = Stream(one.running, oracle("gru", "2").manifest)
    (name,) = stream.bind(0)
    stream.step((0, 0, X[:3]))
    other, _ = one.opened()  # takes the row
    one.http.delete(other)
    shutil.rmtree(tmp_path / "gru" / "2")
    one.running.rescan_now()
    assert [model.version for model in one.running.server.models] == ["1"]
    assert stream.refused(0, 3, X[3:4])[0] == "model_changed"
    assert stream.control("close", handles=[0])["sessions"] == [{"handle": 0, "position": 3}]
    assert problem(one.http.get(f"{GRU}/{name}")) == (410, "session_closed")
    stream.socket.close()
    one.http.close()
    one.running.stop()


def test_snapshots_of_a_version_that_is_not_here_yet(early: Replica, late: Replica, oracle: Oracles) -> None:
    session, _ = early.opened()
    first = outputs(early.step(session, X[:3], 0))
    saved = early.http.get(f"{session}/state").content
    for model in ("gru", "gru:2"):
        answer = late.http.post(f"/v1/models/{model}/sessions", content=saved, headers=RAW)
        assert problem(answer) == NOT_HERE, answer.text
    held = early.http.post(GRU, json={"durability": "client", "session_id": "held"}).json()
    body = {"inputs": X[:1].tolist(), "snapshot": held["snapshot"]}
    assert problem(late.http.post(f"{GRU}/held/steps", json=body)) == NOT_HERE
    late.add(early.shelf, "2")
    late.point("1")
    assert late.opened()[1] == "1"
    answer = late.http.post(GRU, content=saved, headers=RAW)
    assert answer.json()["model_version"] == "2", "a session that begins from a snapshot stays on its version"
    rest = late.step(f"{GRU}/{answer.json()['session_id']}", X[3:5], 3)
    assert np.array_equal(np.concatenate([first, outputs(rest)]), oracle("gru", "2")(X[:5]))
    assert late.http.post(f"{GRU}/held/steps", json=body).status_code == 200


def test_close_and_reopen_need_no_weights(early: Replica, late: Replica, oracle: Oracles) -> None:
    session, _ = early.opened(session_id="anew")
    early.step(session, X[:3], 0)
    exists = late.http.post(GRU, json={"session_id": "anew"})
    assert (*problem(exists), exists.json()["position"]) == (409, "session_exists", 3)
    assert problem(late.http.delete(session.replace("/gru/", "/gru:1/"))) == (409, "model_changed")
    closed = late.http.delete(session)
    assert closed.status_code == 200, closed.text
    assert (closed.json()["position"], closed.json()["model_version"]) == (3, None)
    assert closed.json()["model_digest"] == oracle("gru", "2").manifest.digest
    for one in (early, late):
        assert problem(one.step(session, X[3:4], 3)) == (410, "session_closed")
    assert late.opened(session_id="anew") == (session, "1")
    assert np.array_equal(outputs(early.step(session, X[:5], 0)), oracle("gru", "1")(X[:5]))


def test_sequence_restarts_on_a_server_without_its_version(early: Replica, late: Replica, oracle: Oracles) -> None:
    def infer(one: Replica, x: np.ndarray, **parameters: object) -> httpx.Response:
        return wire.infer(one.http, "gru", x, sequence_id="restarted", **parameters)

    assert wire.outputs(infer(early, X[:2], sequence_start=True))[0]["model_version"] == "2"
    assert problem(infer(late, X[:2], sequence_start=True, sequence_position=0)) == NOT_HERE, "it may be a retry"
    document, arrays = wire.outputs(infer(late, X[:2], sequence_start=True))
    assert document["model_version"] == "1"
    document, rest = wire.outputs(infer(early, X[2:5]))
    assert document["model_version"] == "1"
    got = np.concatenate([arrays["y"][0], rest["y"][0]])
    assert np.array_equal(got, oracle("gru", "1")(X[:5]))


def test_the_retry_of_a_closing_chunk_is_answered_by_its_own_version(early: Replica, late: Replica) -> None:
    def infer(one: Replica) -> httpx.Response:
        flags = {"sequence_start": True, "sequence_end": True, "sequence_position": 0}
        return wire.infer(one.http, "gru", X[:2], sequence_id="one-request", **flags)

    first = infer(early)
    assert wire.outputs(first)[0]["model_version"] == "2"
    assert problem(infer(late)) == NOT_HERE
    assert infer(early).content == first.content


def test_spilled_memory_session_survives_a_missing_version_and_a_missing_row(
    late: Replica, repository: Path, tmp_path: Path, redis_process: RedisServer, oracle: Oracles, background: Background
) -> None:
    small = {"store": redis_process.url, "durability": "memory", "session_capacity": 1, "spill_bytes": 0}
    first, full = (replica(repository, tmp_path / name, "2", **small) for name in ("first", "full"))
    session, _ = first.opened()
    got = [outputs(first.step(session, X[:3], 0))]
    first.opened()  # takes the row
    until(lambda: problem(late.http.get(session)) == NOT_HERE, "the session in the store")
    other, _ = full.opened()
    with full.running.holding("gru") as held:
        step = background(full.step, other, X[:1], 0)
        held.wait()
        assert problem(full.http.get(session)) == (503, "capacity_exhausted")
        held.release()
        assert step.result().status_code == 200
    got.append(outputs(full.step(session, X[3:5], 3)))
    assert np.array_equal(np.concatenate(got), oracle("gru", "2")(X[:5]))
    for one in (first, full):
        one.http.close()
        one.running.stop()


def test_memory_session_of_an_absent_version_is_kept_until_closed(repository: Path, tmp_path: Path) -> None:
    state_file = tmp_path / "sessions"
    before = replica(repository, tmp_path / "before", "2", state_file=state_file)
    sessions = [before.opened()[0] for _ in range(2)]
    for session in sessions:
        before.step(session, X[:2], 0)
    before.http.close()
    before.running.stop()
    after = replica(repository, tmp_path / "after", "1", state_file=state_file)
    closed, kept = sessions
    for session in sessions:
        assert problem(after.step(session, X[2:3], 2)) == NOT_HERE
        exists = after.http.post(GRU, json={"session_id": session.rpartition("/")[2]})
        assert (*problem(exists), exists.json()["position"]) == (409, "session_exists", 2)
    assert after.http.delete(closed).json()["position"] == 2
    assert problem(after.http.get(closed)) == (410, "session_closed")
    after.add(repository, "2")
    until(lambda: after.step(kept, X[2:3], 2).status_code == 200, "version 2")
    after.http.close()
    after.running.stop()


def test_new_version_is_loaded_on_a_sessions_request(
    early: Replica, late: Replica, oracle: Oracles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The repository is scanned at most once a second, however many sessions ask."""
    session, _ = early.opened()
    looks: list[Path] = []
    read = repositories.read_contents

    def counted(path: Path) -> object:
        if path == late.shelf:
            looks.append(path)
        return read(path)

    monkeypatch.setattr(repositories, "read_contents", counted)
    answers = 0

    def asked() -> int:
        nonlocal answers
        answers += 1
        assert problem(late.step(session, X[:1], 0)) == NOT_HERE
        return len(looks)

    until(lambda: asked() == 2, "two looks")
    assert answers > 20
    late.add(early.shelf, "2")
    until(lambda: late.step(session, X[:1], 0).status_code == 200, "version 2")
    assert np.array_equal(outputs(late.step(session, X[1:5], 1)), oracle("gru", "2")(X[:5])[1:])


def test_announced_version_is_retryable_and_loaded_on_request(early: Replica, late: Replica, oracle: Oracles) -> None:
    """An empty folder or a pointer announces the version."""

    def asked(version: str) -> list[httpx.Response]:
        return [
            late.http.get(f"/v1/models/gru:{version}"),
            late.http.post(f"/v1/models/gru:{version}/sessions"),
            late.http.post(f"/v1/models/gru:{version}/sequences", content=X.tobytes(), headers=raw_steps(X)),
            wire.infer(late.http, f"gru/versions/{version}", X),
        ]

    (late.shelf / "gru" / "2").mkdir()
    late.point("3")
    for answer in (*asked("2"), *asked("3")):
        assert problem(answer) == NOT_HERE
        assert answer.headers["retry-after"] == "1"
    assert {problem(answer) for answer in asked("4")} == {(404, "model_unknown")}
    late.add(early.shelf, "2")
    until(lambda: asked("2")[1].status_code == 201, "version 2")
    assert late.opened("gru:2")[1] == "2"
    late.point(None)
    assert {problem(answer) for answer in asked("3")} == {(404, "model_unknown")}


def test_session_of_a_retired_version_gets_that_reason(early: Replica, late: Replica) -> None:
    """A version is retired if its folder was removed or is marked as retired."""
    session, _ = early.opened()
    late.add(early.shelf, "2")
    late.running.rescan_now()
    assert late.step(session, X[:1], 0).status_code == 200
    other, _ = early.opened()
    late.http.delete(session)
    shutil.rmtree(late.shelf / "gru" / "2")
    late.running.rescan_now()
    assert problem(late.step(other, X[:1], 0)) == (409, "model_changed")
    late.running.server.models.retired.clear()  # as after a restart
    assert problem(late.step(other, X[:1], 0)) == NOT_HERE
    marked = late.shelf / "gru" / "2"
    marked.mkdir()
    shutil.copy(early.shelf / "gru" / "2" / "manifest.json", marked)
    (marked / "retired").touch()
    late.running.rescan_now()
    answer = late.step(other, X[:1], 0)
    assert problem(answer) == (409, "model_changed")
    assert "retired" in answer.json()["detail"]
    assert late.index() == [("1", "READY", "")]
    assert late.http.delete(other).status_code == 200


def test_pointer_selects_the_version_of_new_sessions(alone: Replica, oracle: Oracles) -> None:
    old, version = alone.opened()
    assert version == "2", "the highest, without a pointer"
    alone.point("1\n")
    assert alone.opened()[1] == "1"
    assert alone.opened("gru:2")[1] == "2"
    assert [model["version"] for model in alone.http.get("/v1/models").json()] == ["1"]
    whole = alone.http.post("/v1/models/gru/sequences", content=X.tobytes(), headers=raw_steps(X))
    assert np.array_equal(outputs(whole), oracle("gru", "1")(X))
    assert wire.outputs(wire.infer(alone.http, "gru", X))[0]["model_version"] == "1"
    assert wire.outputs(wire.infer(alone.http, "gru", X, sequence_id=3, sequence_start=True))[0]["model_version"] == "1"
    stream = Stream(alone.running, oracle("gru").manifest)
    assert stream.open({"handle": 0})[0]["model_version"] == "1"
    stream.socket.close()
    assert np.array_equal(outputs(alone.step(old, X[:4], 0)), oracle("gru", "2")(X[:4])), "it stays where it began"
    alone.point("2")
    assert alone.opened()[1] == "2"


@pytest.mark.parametrize("said", ["3", "two", "", "1 2", "01"])
def test_a_pointer_that_cannot_be_followed_changes_nothing_and_is_reported(alone: Replica, said: str) -> None:
    alone.point("1")
    alone.point(said)
    assert alone.opened()[1] == "1"
    (_, _, (version, state, reason)) = alone.index()
    assert (version, state) == ("", "UNAVAILABLE")
    assert f"gru/serve says {said!r}" in reason
    assert "unroll_bundle_refused{" in alone.http.get("/metrics").text
    alone.point("2")
    assert alone.opened()[1] == "2"
    assert len(alone.index()) == 2


def test_a_start_with_a_pointer_that_cannot_be_followed(repository: Path, tmp_path: Path) -> None:
    """Requests that name a version are served; `--strict` refuses to start, and so does a wrong flag."""
    (tmp_path / "gru").mkdir()
    (tmp_path / "gru" / "serve").write_text("2")
    one = replica(repository, tmp_path, "1")
    for answer in (one.http.post(GRU), one.http.get("/v1/models/gru"), one.http.get("/v2/models/gru/ready")):
        assert problem(answer) == (503, "model_unavailable")
        assert "gru/serve says '2'" in answer.text
    assert one.opened("gru:1")[1] == "1"
    assert one.http.get("/v1/models").json() == []
    assert one.http.get("/readyz").status_code == 200
    one.http.close()
    one.running.stop()
    for settings, said in (
        ({"strict": True}, "gru/serve says '2'"),
        ({"serve": {"gru": 3}}, "--serve says '3'"),
        ({"serve": {"gur": 1}}, r"'gur': --serve says '1', but the served versions are \[\]"),
    ):
        with pytest.raises(RepositoryError, match=said):
            app.build(Settings.model_validate({"repository": tmp_path, **settings}))


def test_flag_overrides_the_pointer(repository: Path, tmp_path: Path) -> None:
    flagged = replica(repository, tmp_path, "1", "2", serve={"gru": 1})
    flagged.point("2")
    assert flagged.opened()[1] == "1"
    flagged.http.close()
    flagged.running.stop()
