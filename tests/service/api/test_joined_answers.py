"""Steps of all protocols that are read together, with repeated heads, are answered as each would be separately."""

import json
import re
from collections.abc import Callable
from contextlib import ExitStack, closing
from random import Random

import httpx
import numpy as np
import pytest
from raw_http import Answer, Wire
from serving import Running

from unroll.bundle import TensorSpec
from unroll.service.scheduler.joined_steps import JoinedSteps
from unroll.service.scheduler.lanes import Lanes

ROUNDS, EACH = 20, 1


def post(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", *headers, f"Content-Length: {len(body)}", "\r\n"]
    return "\r\n".join(lines).encode() + body


class Conversation:
    """The requests of one client: mostly its next step, sometimes a retry or an invalid request."""

    def __init__(self, chance: Random, session: str, model: str, specs: tuple[TensorSpec, ...]) -> None:
        self.chance = chance
        self.session = session
        self.model = model
        self.specs = specs
        self.position = 0
        self.last = b""
        self.starts = False  # the sequence has ended

    def values(self) -> list[np.ndarray]:
        numbers = np.random.default_rng(self.chance.getrandbits(32))
        return [
            numbers.integers(0, 12, spec.shape) if spec.limit else numbers.standard_normal(spec.shape).astype("<f4")
            for spec in self.specs
        ]

    def next(self) -> bytes:
        if self.last and self.chance.random() < 0.1:
            return self.last
        named = self.chance.choice(
            [None, None, None, *[self.position] * 3, max(0, self.position - 1), self.position + 1]
        )
        self.last = self.step(self.values(), named, self.chance.random() < 0.2)
        return self.last

    def learn(self, answer: Answer) -> None:
        status, headers, body = answer
        if status == 200:
            told = re.search(rb'"sequence_position":(\d+)', body)
            self.position = int(told[1] if told else headers["unroll-position"])
        self.starts = status == 410

    def step(self, values: list[np.ndarray], position: int | None, is_odd: bool) -> bytes:
        raise NotImplementedError


class Native(Conversation):
    @property
    def path(self) -> str:
        return f"/v1/models/{self.model}/sessions/{self.session}/steps"


class Raw(Native):
    media_type = "application/octet-stream"

    def step(self, values: list[np.ndarray], position: int | None, is_odd: bool) -> bytes:
        if is_odd:
            values[0] = self.chance.choice([np.full_like(values[0], -1), np.full(values[0].shape, 3e38, "<f4")])
        named = [] if position is None else [f"Unroll-Position: {position}"]
        body = b"".join(x.tobytes() for x in values)
        if is_odd:
            body = self.chance.choice([body, body, body[:-4], 2 * body])
        return post(self.path, body, f"Content-Type: {self.media_type}", *named)


class RawWithParameter(Raw):
    media_type = "application/octet-stream; of=floats"


class Json(Native):
    def step(self, values: list[np.ndarray], position: int | None, is_odd: bool) -> bytes:
        rows: list = [x.tolist() for x in values]
        document: dict = {"inputs": rows[:1]}
        if len(rows) > 1:
            document["inputs"] = {spec.name: [row] for spec, row in zip(self.specs, rows, strict=True)}
        if position is not None:
            document["position"] = position
        text = json.dumps(document, indent=self.chance.choice([None, None, 1]))
        if is_odd:
            text = self.chance.choice(ODDITIES)(text)
        return post(self.path, text.encode(), "Content-Type: application/json")


class Infer(Conversation):
    binary = False

    def step(self, values: list[np.ndarray], position: int | None, is_odd: bool) -> bytes:
        chance = self.chance
        inputs, tensors = [], b""
        for spec, x in zip(self.specs, values, strict=True):
            entry: dict = {"name": spec.name, "shape": [1, 1, *spec.shape]}
            entry["datatype"] = "INT64" if spec.limit else "FP32"
            if self.binary:
                entry["parameters"] = {"binary_data_size": x.nbytes}
                tensors += x.tobytes()
            else:
                entry["data"] = x.ravel().tolist()
            inputs.append(entry)
        document: dict = {
            "id": chance.choice(["", "a b", f"{chance.random()}", '"', "é", "7", ":", "%b", 2000 * "x"]),
            "inputs": inputs,
        }
        document["parameters"] = {
            "sequence_id": self.session, "sequence_start": self.starts, "sequence_end": chance.random() < 0.1
        }  # fmt: skip
        if position is not None and chance.random() < 0.5:
            document["parameters"]["sequence_position"] = position
        if chance.random() < 0.7:
            document["parameters"]["binary_data_output"] = chance.choice([True, True, False])
        if chance.random() < 0.1:
            del document["id"]
        if chance.random() < 0.1:
            document["parameters"] = dict(reversed(document["parameters"].items()))
        text = json.dumps(document, ensure_ascii=chance.random() < 0.5)
        if is_odd:
            text = chance.choice([*ODDITIES, *MORE_ODDITIES])(text)
        content = text.encode()
        length = [f"Inference-Header-Content-Length: {len(content) + chance.choice([0, 0, 0, 0, 0, 0, 1])}"]
        return post(f"/v2/models/{self.model}/infer", content + tensors, *(length if tensors else []))


class InferBinary(Infer):
    binary = True


#: Changes to the text of a request, in either protocol.
ODDITIES: list[Callable[[str], str]] = [
    lambda text: text.replace("0.", "1e60", 1),
    lambda text: text.replace("0.", "1e999", 1),
    lambda text: text.replace("0.", "-0.0, 0.", 1),
    lambda text: text.replace("0.", "1, 0.", 1),
    lambda text: text.replace("0.", "x", 1).replace("[", "[true, ", 1),
    lambda text: text.replace("[", "[[", 1).replace("]", "]]", 1),
    lambda text: text.replace("[", "[null, ", 1),
    lambda text: text.replace("{", '{"unknown": 1, ', 1),
    lambda text: text.replace("{", '{"position": 0, "position": 1, ', 1),
    lambda text: text[:-1],
    lambda text: text + " ",
    lambda text: text + "{}",
    lambda text: text.replace(": ", ":", 1),
]
MORE_ODDITIES: list[Callable[[str], str]] = [
    lambda text: text.replace('"sequence_start": false', '"sequence_start": true'),
    lambda text: text.replace('"sequence_end": false', '"sequence_end": true'),
    lambda text: text.replace('"sequence_end": false', '"sequence_end": true').replace(
        '"sequence_start": false', '"sequence_start": true'
    ),
    lambda text: text.replace("{", '{"id": "first", ', 1),
    lambda text: text.replace("{", '{"outputs": [{"name": "unknown"}], ', 1),
    lambda text: text.replace('"parameters": {"sequence', '"parameters": {"timeout": 5000000, "sequence'),
    lambda text: text.replace('"parameters": {"sequence', '"parameters": {"binary_data_output": 1, "sequence'),
    lambda text: text.replace('"shape": [1, 1', '"shape": [1, 2'),
    lambda text: text.replace('"shape": [1, 1', '"shape": [2, 1'),
    lambda text: text.replace('"data"', '"data": null, "data"', 1),
    lambda text: text.replace('"name"', '"id": "a b", "name"', 1),
    lambda text: text.replace('"sequence_id"', '"sequence_id": 1, "sequence_id"'),
]


@pytest.mark.parametrize(("model", "rows"), [("gru", 256), ("two", 2), ("tokens", 256), ("hot", 2)])
def test_requests_read_together_get_the_same_answers_as_separately(
    server: Running, client: httpx.Client, monkeypatch: pytest.MonkeyPatch, model: str, rows: int
) -> None:
    """rows: of a batch."""
    specs, chance, joined = server.model(model).manifest.inputs, Random(model), []
    join = JoinedSteps.join

    def counted(*args: object, **named: bool) -> bool:
        joined.append(join(*args, **named))  # type: ignore[arg-type]
        return joined[-1]

    conversations = [
        kind(chance, f"{kind.__name__}-{i}", model, specs)
        for i, kind in enumerate((Raw, RawWithParameter, Json, Infer, InferBinary) * EACH)
    ]
    with ExitStack() as stack:
        opened(client, conversations)
        monkeypatch.setattr(JoinedSteps, "join", lambda *args, **named: False)
        alone = [[answer_alone(server, each) for each in conversations] for _ in range(ROUNDS)]
        opened(client, conversations)
        monkeypatch.setattr(JoinedSteps, "join", counted)
        monkeypatch.setattr(Lanes, "most_rows", lambda *args: rows)
        wires = [Wire(server.port) for _ in conversations]
        for wire in wires:
            stack.enter_context(closing(wire.socket))
        for sent in alone:
            with server.in_one_turn():
                for wire, (request, _) in zip(wires, sent, strict=True):
                    wire.send(request)
            for wire, (request, answer) in zip(wires, sent, strict=True):
                assert wire.answer() == answer, request
    assert sum(joined) > len(conversations) * ROUNDS * 9 // 20


def opened(client: httpx.Client, conversations: list[Conversation]) -> None:
    for each in conversations:
        client.delete(f"/v1/models/{each.model}/sessions/{each.session}")
        client.post(f"/v1/models/{each.model}/sessions", json={"session_id": each.session}).raise_for_status()


def answer_alone(server: Running, conversation: Conversation) -> tuple[bytes, Answer]:
    """Return the next request and its answer on a separate connection."""
    request, wire = conversation.next(), Wire(server.port)
    with closing(wire.socket):
        wire.send(request)
        answer = wire.answer()
    conversation.learn(answer)
    return request, answer
