"""Which session a handle refers to."""

import json
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

import httpx
import numpy as np
import pytest
from fake_link import Wire
from serving import Oracle, Serve
from streams import Dial, frame

from unroll.service.api.stream import handles
from unroll.service.core.clock import ManualClock

Oracles = Callable[..., Oracle]

_ids = count(1)


def test_modes(dial: Dial, client: httpx.Client, x: np.ndarray):
    ours = dial()
    name, closed = f"mode-{next(_ids)}", f"mode-{next(_ids)}"

    def opened(handle: int, **wanted: object) -> str | int:
        """Return the error code or the position."""
        (item,) = ours.open({"handle": handle, **wanted})
        return item["error"]["code"] if "error" in item else item["position"]

    assert opened(0, session_id=name, mode="resume") == "session_unknown"
    assert opened(0, session_id=name, mode="either") == 0
    ours.step((0, 0, x[:2]))
    assert opened(1, session_id=name) == "session_exists"
    assert opened(1, session_id=name, mode="either") == 2
    assert opened(2, session_id=name, mode="resume") == 2
    assert ours.step((1, 2, x[2:4]))[1].content == ours.step((2, 2, x[2:4]))[2].content

    assert opened(3, session_id=closed) == 0
    ours.step((3, 0, x[:2]))
    client.delete(f"/v1/models/lstm/sessions/{closed}").raise_for_status()
    assert opened(4, session_id=closed, mode="resume") == "session_closed"
    assert opened(4, session_id=closed, mode="either") == "session_closed"
    assert opened(4, session_id=closed, mode="new") == 0  # an explicit reopen may start over

    assert opened(0) == "malformed_request"  # bound
    assert opened(5, mode="resume") == "malformed_request"
    assert opened(5, session_id="a" * 129) == "malformed_request"
    assert opened(5, session_id="a" * 129, mode="resume") == "malformed_request"
    assert opened(5, session_id=None, mode="either") == 0
    assert ours.open({"handle": 6}, {"handle": 6})[1]["error"]["code"] == "malformed_request"


def test_the_reply_to_open(dial: Dial, x: np.ndarray):
    client = dial("gru", model="gru:1")
    name = f"opened-{next(_ids)}"
    assert client.open({"handle": 3, "session_id": name}) == [
        {"handle": 3, "session_id": name, "position": 0, "model_version": "1", "durability": "memory"}
    ]
    client.step((3, 0, x))
    error = client.open({"handle": 4, "session_id": name})[0]["error"]
    assert (error["code"], error["position"]) == ("session_exists", 12)
    made = client.bind(5, 6)
    assert len(set(made)) == 2
    assert all(len(session_id) >= 22 for session_id in made)


def test_close_ends_sessions_and_detach_keeps_them(dial: Dial, client: httpx.Client, x: np.ndarray):
    ours = dial()
    ids = ours.bind(0, 1, 2)
    ours.step(*[(handle, 0, x[:2]) for handle in range(3)])
    assert ours.control("detach", handles=[0, 1]) == {"op": "detached", "handles": [0, 1]}
    assert ours.refused(0, 2, x[:1])[0] == "malformed_request"
    assert client.get(f"/v1/models/lstm/sessions/{ids[0]}").json()["position"] == 2
    assert ours.open({"handle": 0, "session_id": ids[1], "mode": "resume"})[0]["position"] == 2
    answer = ours.control("close", handles=[0, 2, 5, 2])
    assert answer["op"] == "closed"
    assert answer["sessions"][:2] == [{"handle": 0, "position": 2}, {"handle": 2, "position": 2}]
    assert [item["error"]["code"] for item in answer["sessions"][2:]] == ["malformed_request"] * 2
    assert client.get(f"/v1/models/lstm/sessions/{ids[1]}").status_code == 410
    assert client.get(f"/v1/models/lstm/sessions/{ids[0]}").status_code == 200
    error = ours.control("detach", handles=[1, 0])
    assert (error["op"], error["code"], error["handle"]) == ("error", "malformed_request", 1)


def test_a_session_closed_elsewhere(dial: Dial, client: httpx.Client, x: np.ndarray):
    """The handle refers to the session it was bound to, not to a later one of the same id."""
    ours = dial()
    ids = ours.bind(0, 1)
    ours.step((0, 0, x[:1]), (1, 0, x[:1]))
    path = f"/v1/models/lstm/sessions/{ids[0]}"
    client.delete(path).raise_for_status()
    assert ours.refused(0, 1, x[1:2])[0] == "session_closed"
    ours.socket.send(frame((0, None, x[1:2]), (1, 1, x[1:2])))
    good, (error,) = ours.receive(2)
    assert (good[0].handle, error["handle"], error["code"]) == (1, 0, "session_closed")

    client.post("/v1/models/lstm/sessions", json={"session_id": ids[0]}).raise_for_status()
    assert ours.refused(0, None, x[1:2])[0] == "session_closed"
    assert ours.refused(0, 0, x[1:2])[0] == "session_closed"
    assert ours.control("close", handles=[0])["sessions"][0]["error"]["code"] == "session_closed"
    assert client.get(path).json()["position"] == 0
    ours.bind(0)  # the handle is free


def test_expired_and_evicted(serve: Serve, dial: Dial, x: np.ndarray):
    clock = ManualClock()
    running = serve(clock, session_capacity=2, idle_timeout=100.0, spill_bytes=0)
    client = dial(running=running)
    a, _ = client.bind(0, 1)
    clock.advance(1)
    client.step((1, 0, x[:1]))
    client.bind(2)
    assert client.refused(0, 0, x[:1])[0] == "session_evicted"
    clock.advance(100)
    assert client.refused(1, 1, x[:1])[0] == "session_expired"
    assert client.refused(2, None, x[:1])[0] == "session_expired"
    (item,) = client.open({"handle": 9, "session_id": a, "mode": "either"})
    assert item["error"]["code"] == "session_evicted"


def test_versions_on_one_connection(dial: Dial, client: httpx.Client, oracle: Oracles, x: np.ndarray):
    """A session stays on the version it began on; a frame may hold sessions of several."""
    old = client.post("/v1/models/gru:1/sessions").json()["session_id"]
    ours = dial("gru")
    resumed, new = ours.open({"handle": 0, "session_id": old, "mode": "resume"}, {"handle": 1})
    assert (resumed["model_version"], new["model_version"]) == ("1", "2")
    for at in (0, 6):
        answers = ours.step((0, at, x[at : at + 6]), (1, at, x[at : at + 6]))
        for handle, version in ((0, "1"), (1, "2")):
            assert np.array_equal(answers[handle].outputs[0], oracle("gru", version)(x)[at : at + 6])
    second = dial("gru", model="gru:2")
    assert second.open({"handle": 0, "session_id": old, "mode": "either"})[0]["error"]["code"] == "model_changed"


def test_versions_with_other_inputs(serve: Serve, dial: Dial, repository: Path, tmp_path: Path):
    """`gru` version 2 is a different model: its sessions do not fit the frames of version 1."""
    shutil.copytree(repository / "gru" / "1", tmp_path / "gru" / "1")
    running = serve(repository=tmp_path)
    client = dial("gru", running=running)
    (old,) = client.bind(0)
    manifest = json.loads((repository / "tokens" / "1" / "manifest.json").read_bytes())
    shutil.copytree(repository / "tokens" / "1", tmp_path / "gru" / "2")
    (tmp_path / "gru" / "2" / "manifest.json").write_text(json.dumps({**manifest, "name": "gru", "version": "2"}))
    running.rescan_now()
    (item,) = client.open({"handle": 1})
    assert item["error"]["code"] == "model_changed"
    assert "gru:2" in item["error"]["detail"]
    newer = dial("gru", running=running)
    (item,) = newer.open({"handle": 0, "session_id": old, "mode": "resume"})
    assert item["error"]["code"] == "model_changed"
    newer.bind(0)


async def test_the_limit_of_handles(wire: Wire, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(handles, "MAX_HANDLES", 3)
    await wire.bind(3)
    wire.connection.on_text(b'{"op": "open", "sessions": [{"handle": 9}]}')
    (item,) = wire.sent[-1]["sessions"]
    assert item["error"]["code"] == "capacity_exhausted"
    assert item["error"]["retry_after"] > 0
    wire.connection.on_text(b'{"op": "detach", "handles": [1]}')
    wire.connection.on_text(b'{"op": "open", "sessions": [{"handle": 9}]}')
    assert "error" not in wire.sent[-1]["sessions"][0]
