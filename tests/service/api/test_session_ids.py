"""Any string is a session id and names the same session everywhere: in a path, in JSON, in a v2 request."""

from collections.abc import Callable
from urllib.parse import quote, unquote

import httpx
import numpy as np
import pytest
from serving import RAW, Oracle
from wire import infer

#: FastAPI's route answers such a request.
FRAMEWORK = {"Expect": "100-continue"}
IDS = [
    *(
        "robot/arm 7@site",
        "Zähler-ü",
        "\U0001f600" * 128,
        "%2F",
        "a%2fb",
        "%25",
        "100%",
        "?a=b&c#d",
        "a+b",
        "a//b/",
        "/",
    ),
    *(
        "state",
        "x/state",
        "x/steps",
        "a..b",
        "a\nb",
        "a\rb",
        "a\tb",
        "a\0b",
        "{MODEL}",
        "}:gone",
        "'\"\\",
        "\u202ea",
        " ",
    ),
]


@pytest.mark.parametrize("session_id", IDS)
def test_a_session_of_any_name(client: httpx.Client, oracle: Callable[..., Oracle], session_id: str) -> None:
    x = np.random.default_rng(3).standard_normal((5, 3)).astype("<f4")
    sessions = "/v1/models/lstm/sessions"
    session = f"{sessions}/{quote(session_id, safe='')}"
    assert client.post(sessions, json={"session_id": session_id}).json()["session_id"] == session_id
    assert client.post(sessions, json={"session_id": session_id}).json()["code"] == "session_exists"
    answers = [client.post(f"{session}/steps", content=x[:1].tobytes(), headers=RAW).content]
    answers.append(np.array(client.post(f"{session}/steps", json={"inputs": x[1:2].tolist()}).json()["outputs"], "<f4"))
    assert client.get(session).json()["position"] == 2
    snapshot = client.get(f"{session}/state").content
    answers.append(client.post(f"{session}/steps", content=x[2:3].tobytes(), headers=RAW).content)
    assert client.put(f"{session}/state", content=snapshot, headers=RAW).json()["position"] == 2
    answers[-1] = client.post(f"{session}/steps", content=x[2:3].tobytes(), headers=RAW).content
    answers.append(client.post(f"{session}/steps", content=x[3:4].tobytes(), headers=RAW).content)
    answers.append(client.post(f"{session}/steps", content=x[4:5].tobytes(), headers=RAW | FRAMEWORK).content)
    found = np.concatenate([np.frombuffer(bytes(answer), "<f4") for answer in answers]).reshape(5, 2)
    assert np.array_equal(found, oracle("lstm")(x))
    assert client.post(f"{session}/fork", json={"session_id": (session_id + "'")[-128:]}).status_code == 201
    assert client.delete(session, headers=FRAMEWORK).json()["session_id"] == session_id
    assert client.get(session).status_code == 410
    client.delete(f"{sessions}/{quote((session_id + chr(39))[-128:], safe='')}")


def test_ids_that_look_alike_are_different_sessions(client: httpx.Client) -> None:
    sessions = "/v1/models/lstm/sessions"
    ids = ["a/b c", "a%2Fb c", "a%252Fb c", "a/b%20c", "a/b+c"]
    for number, session_id in enumerate(ids):
        assert client.post(sessions, json={"session_id": session_id}).status_code == 201
        for _ in range(number):
            client.post(f"{sessions}/{quote(session_id, safe='')}/steps", json={"inputs": [[1, 2, 3]]})
    positions = [client.get(f"{sessions}/{quote(session_id, safe='')}").json()["position"] for session_id in ids]
    assert positions == [0, 1, 2, 3, 4]
    for session_id in ids:
        client.delete(f"{sessions}/{quote(session_id, safe='')}")


@pytest.mark.parametrize("segment", ["Z%e4hler", "Z%E5hler", "%ff", "%C0%AF", "%ed%a0%80"])
def test_a_name_that_is_not_utf_8_is_refused_and_no_other_session(client: httpx.Client, segment: str) -> None:
    read_as = unquote(segment)
    session = client.post("/v1/models/lstm/sessions", json={"session_id": read_as}).json()["session_id"]
    for method, path in (("POST", f"{segment}/steps"), ("GET", segment), ("GET", f"{segment}/state")):
        answer = client.request(method, f"/v1/models/lstm/sessions/{path}", content=b"" if method == "GET" else b"{}")
        assert (answer.status_code, answer.json()["code"]) == (400, "malformed_request")
    assert client.delete(f"/v1/models/lstm/sessions/{quote(session, safe='')}").json()["position"] == 0


@pytest.mark.parametrize("headers", [{}, FRAMEWORK], ids=["short way", "framework"])
@pytest.mark.parametrize(("method", "path"), [("DELETE", "lstm/sessions/"), ("POST", "/sessions")])
def test_an_empty_segment_is_no_route(client: httpx.Client, method: str, path: str, headers: dict[str, str]) -> None:
    answer = client.request(method, f"/v1/models/{path}", headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


def test_a_version_that_is_left_empty_is_not_the_current_one(client: httpx.Client) -> None:
    for answer in (client.get("/v1/models/lstm:"), client.post("/v1/models/lstm:/sessions")):
        assert (answer.status_code, answer.json()["code"]) == (404, "model_unknown")


@pytest.mark.parametrize("session_id", IDS[:6])
def test_a_sequence_of_any_name(client: httpx.Client, session_id: str) -> None:
    x = np.ones((1, 1, 3), "<f4")
    name = f"v2 {session_id}"[:128]
    assert infer(client, "lstm", x, sequence_id=name, sequence_start=True).status_code == 200
    assert infer(client, "lstm", x, sequence_id=name, sequence_end=True).status_code == 200
    assert client.get(f"/v1/models/lstm/sessions/{quote(name, safe='')}").status_code == 410
