"""The attacks of `make overload`: `python -m faults.attacks NAME PORT SECONDS` prints the answers the attackers got.

An attack is a coroutine function that takes a port and a duration. It is bounded in time and bytes and uses only the
loopback interface.
"""

import asyncio
import json
import struct
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial

from client_frames import BINARY, PING, PONG, TEXT, masked

from unroll.service.api.bodies import MAX_ITEMS
from unroll.service.protocol.json import MAX_VALUES

Attack = Callable[[int, float], Awaitable[str]]

MODEL, FEATURES = "tiny", 2
_BLOCK_BYTES, _BLOCKS_PER_SECOND = 2**16, 40
_UPGRADE = (
    f"GET /v1/models/{MODEL}/stream HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
).encode()


def control(op: str, **members: object) -> bytes:
    return masked(TEXT, json.dumps({"op": op, **members}).encode())


def close_reason(tail: bytes) -> str:
    """Return the close reason at the end of a stream's received bytes, if the server closed it."""
    at = tail.rfind(b"\x88")
    payload = tail[at + 2 :]
    if at < 0 or len(payload) != tail[at + 1]:
        return "nothing"
    return f"{int.from_bytes(payload[:2])} {payload[2:].decode()}"


async def flood(messages: bytes, port: int, end: float, got: Counter[str]) -> None:
    """Send the same messages repeatedly at up to 2.5 MB/s, and reconnect when the server closes the connection."""
    loop, block = asyncio.get_running_loop(), messages * max(1, _BLOCK_BYTES // len(messages))
    while loop.time() < end:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(_UPGRADE)
        await reader.readuntil(b"\r\n\r\n")
        tail = bytearray()

        async def read(reader: asyncio.StreamReader = reader, tail: bytearray = tail) -> None:
            while data := await reader.read(2**18):
                tail[:] = (tail + data)[-256:]

        reading = asyncio.ensure_future(read())
        while loop.time() < end and not reading.done():
            writer.write(block)
            await asyncio.wait([reading], timeout=1 / _BLOCKS_PER_SECOND)
            try:
                await asyncio.wait_for(writer.drain(), max(0.1, end - loop.time()))
            except (OSError, TimeoutError):
                break
        await asyncio.wait([reading], timeout=0.1)
        got[close_reason(bytes(tail))] += 1
        writer.transport.abort()
        await asyncio.wait([reading])
        reading.exception()


async def floods(messages: bytes, connections: int, port: int, seconds: float) -> str:
    got: Counter[str] = Counter()
    end = asyncio.get_running_loop().time() + seconds
    await asyncio.gather(*(flood(messages, port, end, got) for _ in range(connections)))
    return ", ".join(f"{count} × {what}" for what, count in got.most_common(3))


async def half_sent(head: bytes, content: bytes, connections: int, port: int, seconds: float) -> str:
    """Send many requests or messages without their last byte, and wait."""
    got: Counter[str] = Counter()

    async def send() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(head)
            if head == _UPGRADE:
                await reader.readuntil(b"\r\n\r\n")
            writer.write(content)
            answer = await asyncio.wait_for(reader.read(), seconds)
            got[close_reason(answer) if head == _UPGRADE else answer.partition(b"\r\n")[0].decode()] += 1
        except TimeoutError:
            got["nothing"] += 1
        except OSError:
            got["an end"] += 1
        writer.transport.abort()

    await asyncio.gather(*(send() for _ in range(connections)))
    return ", ".join(f"{count} × {what}" for what, count in got.most_common(3))


async def requests(request: bytes, connections: int, port: int, seconds: float) -> str:
    """Repeat a request on some connections, each as soon as it is answered."""
    got: Counter[str] = Counter()
    end = asyncio.get_running_loop().time() + seconds

    async def repeat() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while asyncio.get_running_loop().time() < end:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split()[0]))
            got[head.partition(b"\r\n")[0].decode()] += 1
        writer.close()

    await asyncio.gather(*(repeat() for _ in range(connections)))
    return ", ".join(f"{count} × {what}" for what, count in got.most_common(3))


async def compute(port: int, seconds: float) -> str:
    """Send nothing, and use a core: what the machine costs, to compare the attacks with."""
    end = asyncio.get_running_loop().time() + seconds
    while asyncio.get_running_loop().time() < end:
        sum(range(10_000))
        await asyncio.sleep(0)
    return "nothing"


def _head(fields: str, media_type: str = "application/octet-stream") -> bytes:
    path = f"POST /v1/models/{MODEL}/sequences HTTP/1.1\r\nHost: localhost\r\n"
    return f"{path}Content-Type: {media_type}\r\n{fields}\r\n\r\n".encode()


def _longest_json() -> bytes:
    body = b'{"inputs":{"x":[%b]}}' % b",".join([b"[0]"] * (MAX_VALUES // 2 - 4))
    return _head(f"Content-Length: {len(body)}", "application/json") + body


_PAIRS = b"".join(
    control("open", sessions=[{"handle": handle}]) + control("close", handles=[handle]) for handle in range(256)
)
_BAD_ENTRY = masked(BINARY, struct.pack("<BBHIIIQ", 1, 0, 0, 1, 7, 1, 2**64 - 1) + bytes(4 * FEATURES))
_BAD_ENTRIES = masked(
    BINARY,
    struct.pack("<BBHI", 1, 0, 0, 4096) + struct.pack("<IIQ", 7, 1, 2**64 - 1) * 4096 + bytes(4 * FEATURES * 4096),
)
_FLOODS = {
    "pings": masked(PING, b""),
    "pongs": masked(PONG, b""),
    "bad text": masked(TEXT, b"x"),
    "bad frames": masked(BINARY, b"x"),
    "unbound handles": _BAD_ENTRY,
    "frames of unbound handles": _BAD_ENTRIES,
    "open and close": _PAIRS,
}
_LARGE_OPEN = control("open", sessions=[{"handle": handle} for handle in range(MAX_ITEMS)])
_LARGE_CLOSE = control("close", handles=[*range(MAX_ITEMS)])


def _named() -> Iterable[tuple[str, Attack]]:
    yield "no attack, but a busy process", compute
    for name, messages in _FLOODS.items():
        for connections in (1, 8):
            yield f"{name}, {connections} streams", partial(floods, messages, connections)
    yield "opens of 8192 sessions", partial(floods, _LARGE_OPEN + _LARGE_CLOSE, 1)
    yield "the longest JSON, 8 connections", partial(requests, _longest_json(), 8)
    size = 16 * 2**20
    yield "60 bodies of 16 MiB half sent", partial(half_sent, _head(f"Content-Length: {size}"), bytes(size - 1), 60)
    yield "60 messages of 16 MiB half sent", partial(half_sent, _UPGRADE, masked(BINARY, bytes(size))[:-1], 60)
    chunks = b"2\r\nxx\r\n" * 3_000_000
    yield "a body of 6 MB in chunks of 2 bytes", partial(half_sent, _head("Transfer-Encoding: chunked"), chunks, 1)


ATTACKS: dict[str, Attack] = dict(_named())


async def _attack(attack: Attack, port: int, seconds: float) -> None:
    print("begun", flush=True)
    print(await attack(port, seconds), flush=True)


def main(argv: Sequence[str]) -> int:
    asyncio.run(_attack(ATTACKS[argv[0]], int(argv[1]), float(argv[2])))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
