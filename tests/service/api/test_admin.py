"""`/v1/admin/sessions`: an operator sees all sessions, in memory and in the store."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from serving import Oracle, Running, Serve, raw_steps
from streams import Client

from unroll.service.core.clock import ManualClock

STEP = np.ones((1, 3), "<f4")


def listed(url: str, **query: object) -> dict[str, Any]:
    answer = httpx.get(f"{url}/v1/admin/sessions", params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


def positions(url: str, **query: object) -> dict[str, int]:
    return {session["session_id"]: session["position"] for session in listed(url, **query)["sessions"]}


def opened(url: str, session: str, steps: int = 0, model: str = "gru") -> None:
    path = f"{url}/v1/models/{model}/sessions"
    assert httpx.post(path, json={"session_id": session}).status_code == 201
    for _ in range(steps):
        assert httpx.post(f"{path}/{session}/steps", content=STEP.tobytes(), headers=raw_steps(STEP)).is_success


def test_it_is_off_by_default(server: Running) -> None:
    assert httpx.get(f"{server.url}/v1/admin/sessions").status_code == 404


def test_memory_sessions_are_listed_wherever_they_are(serve: Serve, oracle: Callable[..., Oracle]) -> None:
    clock = ManualClock()
    running = serve(clock, admin=True, session_capacity=4, idle_timeout=100.0)
    opened(running.url, "spilled", 2)
    opened(running.url, "with others", 1, "lstm")
    clock.advance(30.0)
    client = Client(running, oracle("gru").manifest)
    client.open(*({"handle": handle, "session_id": f"s{handle}"} for handle in range(4)))
    for _ in range(6):  # they become a cohort
        client.step(*((handle, None, STEP) for handle in range(4)))
    cohorts = list(running.model("gru").scheduler.sessions.cohorts)
    assert positions(running.url) == {"spilled": 2, "with others": 1, "s0": 6, "s1": 6, "s2": 6, "s3": 6}
    assert list(running.model("gru").scheduler.sessions.cohorts) == cohorts != [], "it was left alone"
    assert positions(running.url, min_idle=20) == {"spilled": 2, "with others": 1}
    assert positions(running.url, model="gru", max_position=5) == {"spilled": 2}

    found: list[str] = []
    page = listed(running.url, limit=4)
    while True:
        found += [session["session_id"] for session in page["sessions"]]
        if page["after"] is None:
            break
        page = listed(running.url, limit=4, after=page["after"])
    assert found == ["s0", "s1", "s2", "s3", "spilled", "with others"]
    assert "state" not in str(page)
    client.socket.close()


def test_stored_sessions_are_listed_from_the_store(serve: Serve, tmp_path: Path) -> None:
    url = serve(admin=True, store=f"file://{tmp_path}/store").url
    opened(url, "a", 3)
    (session,) = listed(url)["sessions"]
    assert (session["session_id"], session["position"], session["durability"]) == ("a", 3, "stored")
    assert listed(url, durability="memory")["sessions"] == []


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("limit=0", "malformed_request"),
        ("limit=x", "malformed_request"),
        ("state=1", "malformed_request"),
        ("durability=stored", "durability_unavailable"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused(serve: Serve, query: str, code: str) -> None:
    answer = httpx.get(f"{serve(admin=True).url}/v1/admin/sessions?{query}")
    assert answer.json()["code"] == code
