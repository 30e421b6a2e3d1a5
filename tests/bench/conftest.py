"""Scripted WebSocket servers in the test's event loop, and the exported models."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, serve

from bench import inputs, model

Serve = Callable[[Callable[[ServerConnection], Awaitable[None]]], Any]


@pytest.fixture
def websocket_server() -> Serve:
    """`websocket_server(handler)` serves each connection with the handler and yields the port."""

    @asynccontextmanager
    async def serving(handler: Callable[[ServerConnection], Awaitable[None]]) -> AsyncIterator[int]:
        async with serve(handler, "127.0.0.1", 0, compression=None) as server:
            yield server.sockets[0].getsockname()[1]

    return serving


@pytest.fixture(scope="session")
def models(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """The repository of the benchmark's models; PyTorch's outputs are in its parent folder."""
    return made_once("bench", lambda path: model.write(path / "repository", inputs.MODELS)) / "repository"
