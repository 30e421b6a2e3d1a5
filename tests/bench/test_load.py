"""The load generator counts correctly and fails on anything that is not a reply."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from bench.http_client import http_client, post
from bench.load import Load
from bench.roaming import roaming_client

REPLY = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Scripted(asyncio.Protocol):
    """A server whose `answer` returns, per request, the seconds to wait and the pieces of the reply."""

    def __init__(self, answer: Callable[[int], tuple[float, list[bytes]]]) -> None:
        self._answer = answer
        self.requests: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self.requests.append(data)
        delay, pieces = self._answer(len(self.requests))
        asyncio.get_running_loop().call_later(delay, self._send, pieces)

    def _send(self, pieces: list[bytes]) -> None:
        if pieces:
            self._transport.write(pieces[0])
            asyncio.get_running_loop().call_later(0.001, self._send, pieces[1:])


@asynccontextmanager
async def scripted(answer: Callable[[int], tuple[float, list[bytes]]]) -> AsyncIterator[tuple[int, list[Scripted]]]:
    made: list[Scripted] = []

    def make() -> Scripted:
        made.append(Scripted(answer))
        return made[-1]

    server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], made


def prompt(number: int) -> tuple[float, list[bytes]]:
    return 0.0, [REPLY]


async def test_opening_is_sent_once_and_requests_cycle_over_all_runs() -> None:
    client = http_client([b"a", b"b"], 3, opening=[b"open"], unstepped=1)
    async with scripted(prompt) as (port, made):
        async with Load(port, [client]) as load:
            await load.run_once()
            await load.run_once()
        async with Load(port, [client]) as load:
            await load.run_once()
            await load.run_once()
        assert [request for each in made for request in each.requests] == [b"open", b"a", b"b", b"a"]
    assert (client.answered, client.steps, client.last) == (4, 3, [b"ok"])


async def test_reply_in_pieces_is_one_reply() -> None:
    async with scripted(lambda number: (0.0, [REPLY[:9], REPLY[9:30], REPLY[30:]])) as (port, _):
        client = http_client([b"x"])
        async with Load(port, [client]) as load:
            for _ in range(3):
                assert (await load.run_once()).errors == 0
        assert client.last == [b"ok"]


async def test_status_other_than_2xx_is_an_error() -> None:
    async with scripted(lambda number: (0.0, [REPLY.replace(b"200", b"503")])) as (port, _):
        async with Load(port, [http_client([b"x"])]) as load:
            measured = await load.run_once()
        assert measured.errors == 1
        assert "503" in measured.first_error


@pytest.mark.parametrize("reply", [REPLY + b"more", b"HTTP/1.1 200 OK\r\n\r\n"])
async def test_malformed_reply_fails_the_run(reply: bytes) -> None:
    async with scripted(lambda number: (0.0, [reply])) as (port, _), Load(port, [http_client([b"x"])]) as load:
        with pytest.raises(ConnectionError, match="not one whole reply"):
            await load.run_once()


async def test_open_loop_latency_counts_from_the_due_time() -> None:
    """The server stalls once for 0.2 s, two fifths of the run, and the requests due in that time count as waiting."""

    def stalls(number: int) -> tuple[float, list[bytes]]:
        return (0.2 if number == 20 else 0.0), [REPLY]

    async with scripted(stalls) as (port, _), Load(port, [http_client([b"x"])]) as load:
        measured = await load.run(0.5, rate=200.0)
    assert measured.rate == pytest.approx(200.0, rel=0.05)
    assert measured.p99 > 150.0
    assert measured.p50 < 100.0


async def test_roaming_client_follows_its_choice_with_one_request_in_flight() -> None:
    elsewhere = iter([False, True, True, False])
    async with scripted(prompt) as (here, at_home), scripted(prompt) as (there, abroad):
        client = roaming_client([b"a", b"b", b"c"], 3, [b"open"], there, lambda: next(elsewhere))
        async with Load(here, [client]) as load:
            for _ in range(4):
                assert (await load.run_once()).errors == 0
        assert [each.requests for each in (*at_home, *abroad)] == [[b"open", b"c"], [b"a", b"b"]]
    assert (client.answered, client.steps, client.last) == (4, 3, [b"ok"])


def test_request_has_length_and_media_type() -> None:
    assert post("/a", b"12") == (
        b"POST /a HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/octet-stream\r\ncontent-length: 2\r\n\r\n12"
    )
    assert post("/a", {"b": 1}).endswith(b'application/json\r\ncontent-length: 8\r\n\r\n{"b": 1}')
