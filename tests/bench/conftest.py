"""Servers in the test's own loop that answer what the test says."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, serve

Serve = Callable[[Callable[[ServerConnection], Awaitable[None]]], Any]


@pytest.fixture
def websocket_server() -> Serve:
    """Yields the port on which the handler is called with each connection."""

    @asynccontextmanager
    async def serving(handler: Callable[[ServerConnection], Awaitable[None]]) -> AsyncIterator[int]:
        async with serve(handler, "127.0.0.1", 0, compression=None) as server:
            yield server.sockets[0].getsockname()[1]

    return serving
