"""A client for Unroll servers. It needs NumPy, aiohttp and websockets, but neither torch nor the server."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from unroll.client import errors
from unroll.client.async_stream import AsyncStream, AsyncStreamSession
from unroll.client.client import Client, Session
from unroll.client.rollout_calls import RolledStep
from unroll.client.stream import Stream, StreamSession
from unroll.client.tensors import Model, PrecisionWarning, Tensor

if TYPE_CHECKING:
    from unroll.client.async_client import AsyncClient as AsyncClient
    from unroll.client.async_client import AsyncSession as AsyncSession

__all__ = [
    "AsyncClient",
    "AsyncSession",
    "AsyncStream",
    "AsyncStreamSession",
    "Client",
    "Model",
    "PrecisionWarning",
    "RolledStep",
    "Session",
    "Stream",
    "StreamSession",
    "Tensor",
    "errors",
]


def __getattr__(name: str) -> Any:
    """The asynchronous client is imported on first use: aiohttp is most of what an import takes."""
    if name in ("AsyncClient", "AsyncSession"):
        return getattr(import_module("unroll.client.async_client"), name)
    raise AttributeError(f"module 'unroll.client' has no attribute {name!r}")
