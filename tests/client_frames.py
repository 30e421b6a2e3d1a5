"""WebSocket frames as a client sends them, byte by byte."""

import struct

TEXT, BINARY, CONTINUATION, CLOSE, PING, PONG = 0x81, 0x82, 0x80, 0x88, 0x89, 0x8A
MASK = bytes.fromhex("37fa213d")


def masked(first: int, payload: bytes, mask: bytes = MASK) -> bytes:
    """Return one masked frame. first: The first byte, FIN and opcode."""
    size = len(payload)
    if size < 126:
        head = struct.pack("!BB", first, 0x80 | size)
    elif size < 1 << 16:
        head = struct.pack("!BBH", first, 0x80 | 126, size)
    else:
        head = struct.pack("!BBQ", first, 0x80 | 127, size)
    pad = (mask * (size // 4 + 1))[:size]
    return head + mask + (int.from_bytes(payload) ^ int.from_bytes(pad)).to_bytes(size)
