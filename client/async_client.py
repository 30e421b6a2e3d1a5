"""The asynchronous client: `AsyncClient` and its sessions. `Client` documents their methods."""

import asyncio
import ssl
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Self, TypeVar

import aiohttp
from yarl import URL

from unroll.client import model_calls
from unroll.client.async_stream import AsyncStream, as_async
from unroll.client.errors import ServerError, UnrollError, quiet_after
from unroll.client.exchange import EVENTS, Exchange, Request, Response
from unroll.client.retries import Retries, RetryPolicy, check_timeout
from unroll.client.rollout_calls import Map, On, RolledStep, RolloutCall, RolloutWish
from unroll.client.server import ServerAddress
from unroll.client.session_calls import Durability, Mode, SessionCalls, SessionFacts, Snapshot, Start
from unroll.client.tensors import ArrayLike, Arrays, Model

T = TypeVar("T")

#: Concurrent sequences of one call, which the server can run as one batch.
_CONCURRENT = 64
_BROKEN = (OSError, aiohttp.ClientError, TimeoutError)


class AsyncClient:
    """`Client` for asyncio. Any number of tasks may share it.

    async with AsyncClient("http://127.0.0.1:8000") as client, client.session("co2") as session:
        forecast = await session.step([371.2])

    Args:
        url, api_key, headers, timeout, retry_for, tls: As for `Client`.
        connections: The most connections at a time; 0 means no limit.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 60.0,
        retry_for: float = 60.0,
        tls: ssl.SSLContext | None = None,
        connections: int = 100,
    ) -> None:
        self._address = ServerAddress.of(url, api_key, headers, tls)
        self._timeout = check_timeout(timeout)
        self._policy = RetryPolicy(self._address.url, retry_for, time.monotonic)
        self._connections = connections
        self._http: aiohttp.ClientSession | None = None
        self._catalogue = model_calls.Catalogue()

    def __repr__(self) -> str:
        return f"<AsyncClient {self._address.url}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections. Sessions stay open on the server."""
        if self._http is not None:
            await self._http.close()
            self._http = None

    async def models(self) -> list[Model]:
        """As `Client.models`."""
        return await self.run(self._catalogue.models())

    async def model(self, name: str) -> Model:
        """As `Client.model`."""
        return await self.run(self._catalogue.model(name))

    async def sequences(
        self,
        model: str,
        inputs: Sequence[ArrayLike],
        *,
        static: Sequence[Mapping[str, ArrayLike]] | None = None,
    ) -> list[Arrays]:
        """As `Client.sequences`."""
        given = model_calls.check_sequences(inputs, static)
        served = await self.model(model)
        room = asyncio.Semaphore(_CONCURRENT)

        async def run(values: ArrayLike, first: Mapping[str, ArrayLike] | None) -> Arrays:
            async with room:
                return await self.run(model_calls.sequence(served, values, first))

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(run(*each)) for each in zip(inputs, given, strict=True)]
        except* UnrollError as failed:
            raise failed.exceptions[0] from None
        return [task.result() for task in tasks]

    def session(
        self,
        model: str,
        session_id: str | None = None,
        *,
        mode: Mode = "new",
        durability: Durability | None = None,
        static: Mapping[str, ArrayLike] | None = None,
        snapshot: Snapshot | None = None,
    ) -> "AsyncSession":
        """As `Client.session`. The session opens when it is entered with `async with` or awaited:

        session = await client.session("co2")
        """
        start: Start = {"durability": durability, "static": static, "snapshot": snapshot}
        return AsyncSession(self, lambda: SessionCalls.start(self._catalogue, model, session_id, mode, **start))

    def stream(self, model: str) -> AsyncStream:
        """As `Client.stream`; enter it with `async with`."""
        return AsyncStream(self._address, model, lambda: self.model(model), self._timeout, self._policy)

    async def roll_out(self, call: RolloutCall) -> AsyncIterator[RolledStep]:
        """Receive a rollout, retrying after a broken connection."""
        retries = Retries(self._policy)
        while not call.complete:
            try:
                async with self._request(call.begin(), aiohttp.ClientTimeout(None, sock_read=self._timeout)) as answer:
                    if answer.content_type != EVENTS:
                        raise Response(answer.status, _headers(answer), await answer.read()).refusal()
                    async for content in answer.content.iter_any():
                        for step in call.receive(content):
                            retries = Retries(self._policy)
                            yield step
                if call.complete:
                    return
                raise ConnectionResetError("the answer was cut off")
            except (ServerError, *_BROKEN) as error:
                pause = call.pause(error, retries)
            await asyncio.sleep(pause)

    async def run(self, exchange: Exchange[T]) -> T:
        """Send the requests of the operation, and return its result."""
        response = None
        try:
            while True:
                response = await self._send(exchange.send(response))  # type: ignore[arg-type]
        except StopIteration as done:
            return done.value

    async def _send(self, request: Request) -> Response:
        """Send a request, with retries. Raises ConnectionFailed if no attempt was answered."""
        retries = Retries(self._policy)
        while True:
            try:
                response = await self._attempt(request)
                pause = retries.pause(response.retry_after) if response.may_succeed_later else None
            except _BROKEN as error:
                pause = retries.reconnect(error)
            if pause is None:
                break
            await asyncio.sleep(pause)
        response.repeated = retries.count > 0
        return response

    async def _attempt(self, request: Request) -> Response:
        async with self._request(request, aiohttp.ClientTimeout(self._timeout)) as answer:
            return Response(answer.status, _headers(answer), await answer.read())

    def _request(
        self, request: Request, timeout: aiohttp.ClientTimeout
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        if self._http is None:
            self._http = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self._connections, ssl=self._address.tls or True),
                headers=self._address.headers,
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
            )
        url = URL(self._address.url + request.path, encoded=True)
        body = request.body or None
        return self._http.request(
            request.method, url, data=body, headers=request.headers, timeout=timeout, allow_redirects=False
        )


def _headers(answer: aiohttp.ClientResponse) -> dict[str, str]:
    return {name.lower(): value for name, value in answer.headers.items()}


class AsyncSession(SessionFacts):
    """`Session` for asyncio: `async with client.session(…) as session`, or `session = await client.session(…)`.

    Tasks may share it; their steps are serialised. A cancelled step may have been applied: repeat it, or call `refresh`
    first.
    """

    def __init__(self, client: AsyncClient, opening: Callable[[], Exchange[SessionCalls]]) -> None:
        self._client = client
        self._opening = opening
        self._lock = asyncio.Lock()

    def __await__(self) -> Generator[Any, None, Self]:
        return self.__aenter__().__await__()

    async def __aenter__(self) -> Self:
        async with self._lock:
            if self._opened is None:
                self._opened = await self._client.run(self._opening())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with quiet_after(kind):
            await self.close()

    async def step(self, inputs: ArrayLike, *, position: int | None = None) -> Arrays:
        """As `Session.step`."""
        return await self._run(self._calls.step(inputs, position))

    async def steps(self, inputs: ArrayLike, *, position: int | None = None) -> Arrays:
        """As `Session.steps`."""
        return await self._run(self._calls.steps(inputs, position))

    async def stream(self, inputs: Iterable[ArrayLike] | AsyncIterable[ArrayLike]) -> AsyncIterator[Arrays]:
        """As `Session.stream`; the items may come from an asynchronous iterator."""
        async for values in as_async(inputs):
            yield await self.step(values)

    async def rollout(
        self,
        steps: int,
        *,
        map: Map,
        on: On = "fork",
        inputs: ArrayLike | None = None,
        outputs: ArrayLike | None = None,
    ) -> AsyncIterator[RolledStep]:
        """As `Session.rollout`."""
        async with self._lock:
            call = RolloutCall(self._calls, RolloutWish(steps, map, on, inputs, outputs))
        async for step in self._client.roll_out(call):
            yield step

    async def refresh(self) -> int:
        """As `Session.refresh`."""
        return await self._run(self._calls.refresh())

    async def fork(self, session_id: str | None = None) -> "AsyncSession":
        """As `Session.fork`."""
        forked = AsyncSession(self._client, self._opening)
        forked._opened = await self._run(self._calls.fork(session_id))
        return forked

    async def snapshot(self) -> bytes:
        """As `Session.snapshot`."""
        return await self._run(self._calls.snapshot())

    async def rewind(self, snapshot: Snapshot) -> int:
        """As `Session.rewind`."""
        return await self._run(self._calls.rewind(snapshot))

    async def close(self) -> None:
        """End the session on the server."""
        await self._run(self._calls.close())

    async def _run(self, exchange: Exchange[T]) -> T:
        async with self._lock:
            return await self._client.run(exchange)
