"""A crowd of clients that send every kind of request, valid and invalid, and know the correct answer to each.

Each client has a session and possibly its forks. It keeps all inputs that the server accepted and all outputs that it
received; `Track.check` recomputes the outputs with onnxruntime over the whole input and compares bit for bit.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import numpy as np
import tritonclient.http.aio as triton
from faults import wires
from faults.wires import HTTP_WAYS, Reply
from serving import Oracle
from waiting import PATIENCE

WAYS = (*HTTP_WAYS, "triton")


class Evicted(Exception):
    """The session was evicted for lack of room. This is not a failure; the track records it."""


@dataclass
class Track:
    """The expected state of one session. `gone`: the error code of its end, None while it is live."""

    model: str
    id: str
    oracle: Oracle
    evictable: bool
    accepted: list[np.ndarray] = field(default_factory=list)
    given: list[tuple[int, int, bytes]] = field(default_factory=list)  # start, steps, outputs
    last: tuple[int, np.ndarray, bytes] | None = None  # start, input, outputs
    saved: tuple[bytes, list[np.ndarray]] | None = None
    gone: str | None = None
    applied: int = 0  # steps, summed over reopenings
    doubtful: int = 0  # steps sent but lost to an eviction before any reply

    @property
    def position(self) -> int:
        return sum(map(len, self.accepted))

    def accept(self, x: np.ndarray, reply: Reply) -> None:
        start = self.position
        assert reply.position == start + len(x)
        self.accepted.append(x)
        self.applied += len(x)
        self.given.append((start, len(x), reply.outputs))
        self.last = start, x, reply.outputs

    def check(self) -> None:
        """Check that all outputs received so far equal one run over the whole input."""
        if self.given:
            whole = self.oracle(np.concatenate(self.accepted))
            for start, steps, outputs in self.given:
                assert outputs == whole[start : start + steps].tobytes(), self
        self.given = []

    def begin(self) -> None:
        self.check()
        self.accepted, self.last, self.gone = [], None, None

    def end(self, cause: str) -> None:
        self.check()
        self.gone = cause


class Wires:
    """The four ways to send a chunk. Triton's client does not report error codes."""

    def __init__(self, port: int, triton_client: triton.InferenceServerClient) -> None:
        self.port = port
        self.triton = triton_client
        self._http = {name: wires.Wires(name, ("x", "y"), timeout=PATIENCE) for name in ("hot", "gru")}

    async def send(self, way: str, track: Track, x: np.ndarray, position: int | None, **flags: bool) -> Reply:
        if way != "triton":
            return await self._http[track.model].send(way, self.port, track.id, x, position, **flags)
        tensor = triton.InferInput("x", [1, *x.shape], "FP32")
        tensor.set_data_from_numpy(x[np.newaxis], binary_data=len(x) != 1)
        wanted = [triton.InferRequestedOutput("y", binary_data=len(x) != 3)]
        name = int(track.id) if track.id.isdigit() else track.id
        parameters = None if position is None else {"sequence_position": position}
        try:
            result = await self.triton.infer(
                track.model, [tensor], outputs=wanted, sequence_id=name, parameters=parameters, **flags
            )
        except triton.InferenceServerException as error:
            return Reply(int(error.status()))
        reached = result.get_response()["parameters"]["sequence_position"]
        return Reply(200, result.as_numpy("y")[0].tobytes(), reached)

    async def abandon(self, track: Track, x: np.ndarray, position: int) -> None:
        """Send a chunk and disconnect without reading the reply."""
        head = f"POST /v1/models/{track.model}/sessions/{track.id}/steps HTTP/1.1\r\nHost: localhost\r\n"
        head += f"Content-Type: application/octet-stream\r\nUnroll-Position: {position}\r\n"
        head += f"Unroll-Steps: {len(x)}\r\nContent-Length: {x.nbytes}\r\n\r\n"
        _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(head.encode() + x.tobytes())
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async def call(self, method: str, track: Track, path: str = "", body: object = None) -> Reply:
        """Call another route of the session."""
        return await self._http[track.model].call(method, self.port, f"/sessions/{track.id}{path}", body)

    async def open(self, track: Track) -> Reply:
        return await self._http[track.model].call("POST", self.port, "/sessions", {"session_id": track.id})

    async def metrics(self) -> str:
        _, _, text = await self._http["hot"].ask(self.port, "GET", "/metrics")
        return text.decode()

    def close(self) -> None:
        for each in self._http.values():
            each.close()


class Client:
    """One client: a session, its forks, and a random sequence of actions."""

    def __init__(self, track: Track, wires: Wires, chance: random.Random, outcomes: Counter[str]) -> None:
        self.tracks = [track]
        self.wires = wires
        self.chance = chance
        self.numbers = np.random.default_rng(chance.getrandbits(32))
        self.outcomes = outcomes
        self.forks = 0
        self._doing = "open"

    async def act(self) -> None:
        track = self.chance.choice([self.tracks[0], *self.tracks])
        does: list[tuple[int, Callable[[Track], Awaitable[None]]]]
        if track.gone is not None:
            does = [(3, self.use_what_is_gone), (5, self.open), (2, self.start)]
        else:
            does = [
                (50, self.step),
                (8, self.retry),
                (6, self.twins),
                (4, self.leave_and_retry),
                (4, self.gap),
                (4, self.another_payload),
                (3, self.too_old),
                (5, self.not_finite),
                (4, self.overflow),
                (2, self.unknown),
                (3, self.fork),
                (2, self.close),
                (2, self.finish),
                (2, self.restart),
                (3, self.look),
                (3, self.save),
                (5, self.restore),
            ]
        weights, choices = zip(*does, strict=True)
        do = self.chance.choices(choices, weights)[0]
        self._doing = do.__name__
        try:
            await do(track)
        except Evicted:
            self.outcomes["evicted"] += 1

    # ── requests and their expected answers ──────────────────────────────────────────────────────

    def chunk(self, length: int | None = None) -> np.ndarray:
        length = length or self.chance.randint(1, 5)
        return self.numbers.standard_normal((length, 3)).astype(np.float32)

    def way(self, ways: tuple[str, ...] = WAYS) -> str:
        return self.chance.choice(ways)

    def gone_or(self, track: Track, reply: Reply) -> Reply:
        if reply.status == 410 and track.gone is None:
            assert track.evictable, f"{track.id} was lost: {reply}"
            assert reply.code in ("", "session_evicted"), reply
            track.end("session_evicted")
            raise Evicted
        return reply

    def is_refused(self, track: Track, reply: Reply, status: int, code: str, expected: int | None = None) -> None:
        self.gone_or(track, reply)
        assert reply.status == status, (self._doing, reply)
        if reply.code:
            assert (reply.code, reply.expected) == (code, expected), (self._doing, reply)
        self.outcomes[code] += 1

    def is_good(self, track: Track, reply: Reply) -> Reply:
        self.gone_or(track, reply)
        assert reply.status in (200, 201), (self._doing, reply)
        self.outcomes[self._doing] += 1
        return reply

    async def send(self, track: Track, x: np.ndarray, position: int | None, way: str | None = None) -> Reply:
        return await self.wires.send(way or self.way(), track, x, position)

    # ── actions on a live session ────────────────────────────────────────────────────────────────

    async def step(self, track: Track) -> None:
        x = self.chunk()
        position = track.position if self.chance.random() < 0.7 else None
        track.accept(x, self.is_good(track, await self.send(track, x, position)))

    async def retry(self, track: Track) -> None:
        if track.last is None:
            return
        start, x, outputs = track.last
        reply = self.is_good(track, await self.send(track, x, start))
        assert (reply.outputs, reply.position) == (outputs, start + len(x))

    async def twins(self, track: Track) -> None:
        """Send the same chunk several times at once, possibly in different ways."""
        x, position = self.chunk(), track.position
        replies = await asyncio.gather(*(self.send(track, x, position) for _ in range(self.chance.randint(2, 3))))
        good = [reply for reply in replies if reply.status == 200]
        if good:
            track.accept(x, good[0])
        for reply in replies:
            self.is_good(track, reply)
            assert reply.outputs == good[0].outputs

    async def leave_and_retry(self, track: Track) -> None:
        x, position = self.chunk(), track.position
        await self.wires.abandon(track, x, position)
        track.doubtful += len(x)
        track.accept(x, self.is_good(track, await self.send(track, x, position)))
        track.doubtful -= len(x)

    async def gap(self, track: Track) -> None:
        ahead = track.position + self.chance.randint(1, 9)
        reply = await self.send(track, self.chunk(), ahead)
        self.is_refused(track, reply, 409, "position_gap", track.position)

    async def another_payload(self, track: Track) -> None:
        if track.last is not None:
            reply = await self.send(track, self.chunk(), track.last[0])
            self.is_refused(track, reply, 409, "payload_mismatch", track.position)

    async def too_old(self, track: Track) -> None:
        if track.last is not None and track.last[0] > 0:
            position = self.chance.randrange(track.last[0])
            reply = await self.send(track, self.chunk(), position)
            self.is_refused(track, reply, 409, "position_too_old", track.position)

    async def not_finite(self, track: Track) -> None:
        x = self.chunk()
        x[self.chance.randrange(len(x)), 1] = self.chance.choice([np.nan, np.inf, -np.inf])
        way = self.way()
        if way in ("json", "v2"):
            self.is_refused(track, await self.send(track, x, None, way), 400, "malformed_request")
        elif way == "raw" or len(x) > 1:
            self.is_refused(track, await self.send(track, x, None, way), 422, "non_finite_input")

    async def overflow(self, track: Track) -> None:
        """Send finite inputs that give `hot` a non-finite output, in batches shared with other clients."""
        if track.model == "hot":
            x = self.chunk()
            x[self.chance.randrange(len(x)), 0] = 3e38
            self.is_refused(track, await self.send(track, x, None), 422, "non_finite_output")

    async def unknown(self, track: Track) -> None:
        stranger = Track(track.model, f"never-{self.chance.getrandbits(40)}", track.oracle, False)
        way = self.way()
        status = 404 if way in ("json", "raw") else 400
        self.is_refused(stranger, await self.send(stranger, self.chunk(), 0, way), status, "session_unknown")

    async def fork(self, track: Track) -> None:
        self.forks += 1
        name = f"{track.id}-fork-{self.forks}"
        reply = self.is_good(track, await self.wires.call("POST", track, "/fork", {"session_id": name}))
        assert reply.position == track.position
        forked = Track(track.model, name, track.oracle, track.evictable, accepted=list(track.accepted))
        self.outcomes["opened"] += 1
        self.tracks.append(forked)

    async def close(self, track: Track) -> None:
        self.is_good(track, await self.wires.call("DELETE", track))
        track.end("session_closed")

    async def finish(self, track: Track) -> None:
        """End the sequence, then retry the end."""
        x, position, way = self.chunk(), track.position, self.way(("v2", "triton"))
        reply = self.is_good(track, await self.wires.send(way, track, x, position, sequence_end=True))
        track.accept(x, reply)
        track.end("session_closed")
        again = await self.wires.send(way, track, x, position, sequence_end=True)
        assert again.outputs == reply.outputs

    async def restart(self, track: Track) -> None:
        """Start a sequence on a session that cannot have been evicted."""
        if not track.evictable:
            await self.start(track)

    async def look(self, track: Track) -> None:
        reply = self.is_good(track, await self.wires.call("GET", track))
        assert reply.position == track.position

    async def save(self, track: Track) -> None:
        reply = self.is_good(track, await self.wires.call("GET", track, "/state"))
        track.saved = reply.outputs, list(track.accepted)
        check_snapshot(track, reply.outputs)

    async def restore(self, track: Track) -> None:
        if track.saved is not None:
            content, accepted = track.saved
            reply = self.is_good(track, await self.wires.call("PUT", track, "/state", content))
            track.begin()
            track.accepted = list(accepted)
            assert reply.position == track.position

    # ── actions on an ended session ──────────────────────────────────────────────────────────────

    async def use_what_is_gone(self, track: Track) -> None:
        assert track.gone is not None
        self.is_refused(track, await self.send(track, self.chunk(), None), 410, track.gone)

    async def open(self, track: Track) -> None:
        self.is_good(track, await self.wires.open(track))
        self.outcomes["opened"] += 1
        track.begin()

    async def start(self, track: Track) -> None:
        x = self.chunk()
        place = 0 if track.gone is not None and self.chance.random() < 0.5 else None
        reply = await self.wires.send(self.way(("v2", "triton")), track, x, place, sequence_start=True)
        self.outcomes["opened"] += 1
        track.begin()
        track.accept(x, self.is_good(track, reply))


def check_snapshot(track: Track, content: bytes) -> None:
    """Check that the row in the snapshot is the state after all accepted input."""
    row = np.frombuffer(content[52:-16], "<f4")
    if track.accepted:
        expected = track.oracle.all(np.concatenate(track.accepted))[1]
    else:
        expected = track.oracle.manifest.initial_row()
    assert np.array_equal(row, expected), track
