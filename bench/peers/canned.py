"""A server that gives each packet the same reply. The rate against it is the load generator's own limit.

`POST /BYTES` is answered with a body of that many bytes; after an upgrade at `/BYTES`, each packet with a binary
frame of outputs with one entry. It does not parse: the load generator's small requests arrive whole.
"""

import asyncio
import base64
import hashlib
import struct
import sys
from typing import cast

import uvloop

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


class Canned(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._reply = b""

    def data_received(self, data: bytes) -> None:
        if self._reply:
            self._transport.write(self._reply)
            return
        size = int(data.partition(b" /")[2].partition(b" ")[0])
        key = data.partition(b"sec-websocket-key: ")[2].partition(b"\r\n")[0]
        if key:
            accept = base64.b64encode(hashlib.sha1(key + _GUID).digest())
            head = b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
            self._transport.write(head + b"sec-websocket-accept: %b\r\n\r\n" % accept)
            outputs = struct.pack("<BBHIIIQ", 2, 0, 0, 1, 0, 1, 1).ljust(size, b"\0")
            self._reply = struct.pack("!BBH", 0x82, 126, size) + outputs
        else:
            head = b"HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\ncontent-length: %d\r\n\r\n" % size
            self._reply = head + bytes(size)
            self._transport.write(self._reply)


async def serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Canned, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
