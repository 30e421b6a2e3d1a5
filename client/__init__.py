"""A client for Unroll servers. It needs NumPy, aiohttp and websockets, but neither torch nor the server."""

from unroll.client import errors
from unroll.client.async_client import AsyncClient, AsyncSession
from unroll.client.async_stream import AsyncStream, AsyncStreamSession
from unroll.client.client import Client, Session
from unroll.client.rollout_calls import RolledStep
from unroll.client.stream import Stream, StreamSession
from unroll.client.tensors import Model, PrecisionWarning, Tensor

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
