"""The least a server can do: each packet gets the same reply. What the load generator reaches here is its own limit."""

import asyncio
import sys
from typing import cast

import uvloop

_BODY = bytes(64)
_REPLY = b"HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\ncontent-length: %d\r\n\r\n%b" % (
    len(_BODY),
    _BODY,
)


class Canned(asyncio.Protocol):
    """Does not parse: the load generator's requests are small and arrive whole."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._transport.write(_REPLY)


async def serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Canned, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
