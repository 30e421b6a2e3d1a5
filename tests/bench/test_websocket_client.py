"""The raw WebSocket client against an independent server."""

import asyncio
import json

import numpy as np
import pytest
from websockets.asyncio.server import ServerConnection

from bench.load import Load
from bench.websocket_client import ENTRY, HEADER, NO_POSITION, OUTPUTS, read_outputs, steps_frame, websocket_client

FEATURES = 3


def outputs(entries: np.ndarray, values: np.ndarray) -> bytes:
    return HEADER.pack(OUTPUTS, 0, 0, len(entries)) + entries.tobytes() + values.tobytes()


async def adding_server(connection: ServerConnection) -> None:
    """Adds 1 to the values. Sends a ping, then answers the entries one by one in reverse order."""
    steps = 0
    async for message in connection:
        if isinstance(message, str):
            asked = json.loads(message)
            assert asked["op"] == "open"
            assert {entry["mode"] for entry in asked["sessions"]} == {"either"}
            opened = [{"handle": entry["handle"], "position": 0} for entry in asked["sessions"]]
            await connection.send(json.dumps({"op": "opened", "sessions": opened}))
            continue
        steps += 1
        kind, _, _, count = HEADER.unpack_from(message)
        entries = np.frombuffer(message, ENTRY, count, HEADER.size).copy()
        values = np.frombuffer(message, np.float32, offset=HEADER.size + entries.nbytes).reshape(count, -1)
        assert kind == 1
        assert (entries["position"] == NO_POSITION).all()
        entries["position"] = steps
        await (await connection.ping())
        for i in reversed(range(count)):
            await connection.send(outputs(entries[i : i + 1], values[i : i + 1] + 1))


@pytest.mark.parametrize("entries", [1, 300, 6000])  # payload lengths encoded in 7, 16 and 64 bits
async def test_sessions_open_and_all_entries_return(websocket_server, entries: int) -> None:
    values = np.random.default_rng(0).standard_normal((entries, FEATURES), np.float32)
    frames = [steps_frame(range(entries), values)]
    client = websocket_client("/", frames, range(entries), "s", entries)
    async with websocket_server(adding_server) as port, Load(port, [client]) as load:
        assert (await load.run_once()).errors == 0
        await load.run_once()
    handles, positions, found = (np.concatenate(part) for part in zip(*map(read_outputs, client.last), strict=True))
    assert [*handles] == [*reversed(range(entries))]
    assert (positions == 2).all()
    assert np.array_equal(found[::-1], values + 1)


async def test_server_error_fails_the_run(websocket_server) -> None:
    async def refusing(connection: ServerConnection) -> None:
        await connection.recv()
        await connection.send(json.dumps({"op": "error", "handle": 0, "position": None, "code": "queue_full"}))
        await connection.wait_closed()

    client = websocket_client("/", [steps_frame([0], np.zeros((1, FEATURES), np.float32))], (), None, 1)
    async with websocket_server(refusing) as port, Load(port, [client]) as load:
        with pytest.raises(ConnectionError, match="queue_full"):
            await load.run_once()


async def test_refused_session_fails_the_connection(websocket_server) -> None:
    async def full(connection: ServerConnection) -> None:
        await connection.recv()
        refused = {"handle": 0, "error": {"code": "capacity_exhausted"}}
        await connection.send(json.dumps({"op": "opened", "sessions": [refused]}))
        await connection.wait_closed()

    client = websocket_client("/", [], [0], "s", 1)
    async with websocket_server(full) as port:
        with pytest.raises(ConnectionError, match="capacity_exhausted"):
            async with asyncio.timeout(5), Load(port, [client]):
                pass
