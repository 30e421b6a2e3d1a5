"""`unroll sessions` on the store of a running server."""

import json
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from processes import StartProcess
from redis_server import RedisServer
from serving import Oracle, raw_steps

from unroll import cli

Capture = pytest.CaptureFixture[str]


@pytest.fixture(params=["folder", "redis"])
def served(request: pytest.FixtureRequest, start_process: StartProcess, tmp_path: Path) -> tuple[str, str]:
    """The URLs of a server and of its store."""
    folder = request.param == "folder"
    store = f"file://{tmp_path}/store" if folder else request.getfixturevalue("redis_server").url
    return start_process("--store", store).url, store


def run(capsys: Capture, *words: str) -> tuple[int, str]:
    status = cli.main(["sessions", *words])
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def step(client: httpx.Client, session: str, x: np.ndarray, position: int) -> httpx.Response:
    headers = {**raw_steps(x), "Unroll-Position": str(position)}
    return client.post(f"/v1/models/gru/sessions/{session}/steps", content=x.tobytes(), headers=headers)


def test_sessions_are_listed_closed_and_carried_on_from_a_file(
    served: tuple[str, str],
    tmp_path: Path,
    capsys: Capture,
    oracle: Callable[..., Oracle],
    rng: np.random.Generator,
) -> None:
    url, store = served
    x = rng.standard_normal((8, 3)).astype("<f4")
    file, named = str(tmp_path / "sessions"), ("--store", store)
    with httpx.Client(base_url=url) as client:
        for session in ("a", "b"):
            client.post("/v1/models/gru/sessions", json={"session_id": session})
        assert step(client, "a", x[:5], 0).status_code == 200

        status, out = run(capsys, "list", *named, "--min-position", "1", "--json")
        (listed,) = json.loads(out)["sessions"]
        assert status == 0
        assert (listed["model"], listed["session_id"], listed["position"]) == ("gru", "a", 5)
        assert 0 <= listed["idle_seconds"] < 900
        assert run(capsys, "list", *named, "--min-idle", "800")[1] == "sessions: 0\n"
        assert "state" not in json.loads(run(capsys, "show", "gru", "a", *named, "--json")[1])
        assert len(json.loads(run(capsys, "show", "gru", "a", *named, "--json", "--state")[1])["state"]) > 0

        assert run(capsys, "export", file, *named) == (0, f"sessions written to {file}: 2\n")
        assert run(capsys, "export", file, *named)[0] == 2, "no file is written over"
        assert run(capsys, "close", "gru", "a", "c", *named) == (1, "a: closed at position 5\nc: not open\n")
        assert step(client, "a", x[5:6], 5).json()["code"] == "session_closed"

        assert run(capsys, "import", file, *named) == (
            1,
            "ended, not imported: gru a\nopen, not imported: gru b\n1 ended, not imported, 1 open, not imported\n",
        )
        assert step(client, "a", x[5:6], 5).json()["code"] == "session_closed", "nobody opens it by mistake"
        assert run(capsys, "import", file, *named, "--replace") == (0, "1 imported, 1 replaced\n")
        answer = step(client, "a", x[5:], 5)
        assert np.array_equal(np.frombuffer(answer.content, "<f4").reshape(-1, 2), oracle("gru", "1")(x)[5:])
        assert run(capsys, "import", file, *named, "--replace") == (0, "2 replaced\n")

        left = json.loads(run(capsys, "import", file, *named, "--json")[1])
        assert left["outcomes"] == {"open, not imported": 2}
        assert [one["session_id"] for one in left["left"]] == ["a", "b"]
        assert json.loads(run(capsys, "export", f"{file}-2", *named, "--json")[1])["written"] == 2
        assert json.loads(run(capsys, "close", "gru", "b", *named, "--json")[1]) == {"closed": {"b": 0}}
        assert step(client, "a", x[5:], 8).json()["code"] == "position_gap"
        assert step(client, "a", x[5:], 5).content == answer.content


def test_a_damaged_file_imports_nothing(redis_server: RedisServer, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").write_bytes(b"UNRS and something else")
    status, out = run(capsys, "import", str(tmp_path / "file"), "--store", redis_server.url)
    assert (status, "not a state file" in out or "damaged" in out or "reads format" in out) == (2, True)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["list"], "set UNROLL_STORE"),
        (["list", "--store", "file:///does/not/exist"], "there is no store in /does/not/exist"),
        (["list", "--store", "http://x"], "--store"),
        (["list", "--store", "redis://127.0.0.1:1/0"], "unavailable"),
        (["list", "--store", "redis://x", "--idle-timeout", "0", "--min-idle", "3"], "remove --min-idle"),
    ],
)
def test_impossible_operations_are_reported(words: list[str], why: str, capsys: Capture) -> None:
    status, out = run(capsys, *words)
    assert status == 2
    assert why in out
    assert not Path("/does").exists()
