"""Sends requests at a steady rate: `python -m faults.open_loop PORT SECONDS` prints the answers.

The API key is in the variable UNROLL_API_KEY.
"""

import asyncio
import json
import os
import struct
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from time import perf_counter

MODEL, FEATURES = "tiny", 2
#: Enough requests per tick, and connections, for the server to detect an overload.
_TICK_SECONDS, _REQUESTS, _CONNECTIONS = 0.01, 10, 400
_STEP = struct.pack(f"<{FEATURES}f", *[0.5] * FEATURES)


@dataclass(frozen=True)
class Answers:
    """The latencies of the answers.

    Attributes:
        seconds: Latencies in seconds, by status.
        noticed: Seconds from the start to the first refusal.
        refusals: Latencies of later requests that were refused. Earlier ones waited for the overload to be detected.
    """

    seconds: dict[str, list[float]]
    noticed: float | None
    refusals: list[float]


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: str) -> int:
    """Send a sequence of one step; return the status."""
    head = f"POST /v1/models/{MODEL}/sequences HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {key}\r\nUnroll-Steps: 1\r\n"
    writer.write(
        f"{head}Content-Type: application/octet-stream\r\nContent-Length: {len(_STEP)}\r\n\r\n".encode() + _STEP
    )
    answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    await reader.readexactly(int(answer.partition("content-length: ")[2].split()[0]))
    return int(answer.split()[1])


async def flood(port: int, key: str, seconds: float) -> Answers:
    """Send requests at a steady rate on idle connections, without waiting for answers."""
    idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(_CONNECTIONS)]
    found, began = defaultdict[str, list[float]](list), perf_counter()
    noticed, refusals = list[float](), list[float]()
    asking: set[asyncio.Task[None]] = set()

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sent = perf_counter()
        status = await ask(reader, writer, key)
        found[str(status)].append(perf_counter() - sent)
        if status == 503:
            if noticed and sent > began + noticed[0]:
                refusals.append(perf_counter() - sent)
            noticed.append(perf_counter() - began)
        idle.append((reader, writer))

    print("begun", flush=True)
    while perf_counter() < began + seconds:
        for _ in range(min(_REQUESTS, len(idle))):
            asking.add(task := asyncio.create_task(one(*idle.pop())))
            task.add_done_callback(asking.discard)
        await asyncio.sleep(_TICK_SECONDS)
    await asyncio.gather(*asking)
    for _, writer in idle:
        writer.close()
    return Answers(dict(found), min(noticed, default=None), refusals)


async def _main(port: int, seconds: float) -> None:
    print(json.dumps(asdict(await flood(port, os.environ["UNROLL_API_KEY"], seconds))))


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1]), float(sys.argv[2])))
