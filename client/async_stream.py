"""The asynchronous stream: `AsyncStream` and its sessions. `Stream` documents their methods."""

import asyncio
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import AsyncExitStack, aclosing, suppress
from typing import Literal, Self, TypeVar
from weakref import WeakSet

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from unroll.client.errors import InvalidInput, quiet_after
from unroll.client.places import Place, PlaceFacts
from unroll.client.retries import Retries, RetryPolicy
from unroll.client.rollout_calls import Map, On, RolledStep, RolloutWish
from unroll.client.server import ServerAddress
from unroll.client.session_calls import Durability, Mode
from unroll.client.stream import BROKEN, pause_after, websocket_options
from unroll.client.stream_calls import ControlCall, StepsCall, StreamCalls
from unroll.client.stream_rollouts import StreamRollout
from unroll.client.tensors import ArrayLike, Arrays, Model

T = TypeVar("T")


async def as_async(items: Iterable[T] | AsyncIterable[T]) -> AsyncIterator[T]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


class AsyncStream:
    """`Stream` for asyncio. Any number of tasks may share it: their concurrent steps are sent together.

    async with client.stream("co2") as stream:
        sessions = await stream.open(64)
        forecasts = await stream.step(sessions, measurements)  # (64, features) -> (64, outputs), one message
        forecast = await sessions[0].step([371.2])
    """

    model: Model
    _opened: StreamCalls | None = None

    def __init__(
        self,
        address: ServerAddress,
        reference: str,
        describe: Callable[[], Awaitable[Model]],
        timeout: float,
        policy: RetryPolicy,
    ) -> None:
        self._address = address
        self._url = address.stream_url(reference)
        self._describe = describe
        self._timeout = timeout
        self._policy = policy
        self._link: _Link | None = None
        self._connecting = asyncio.Lock()
        self._sessions: dict[int, AsyncStreamSession] = {}
        self._outliving: set[asyncio.Task[None]] = set()

    @property
    def _calls(self) -> StreamCalls:
        """Raises InvalidInput if the stream is not open yet."""
        if self._opened is None:
            raise InvalidInput("the stream is not open yet: write `async with client.stream(…) as stream`")
        return self._opened

    def __repr__(self) -> str:
        return f"<AsyncStream {self._url} with {len(self._sessions)} sessions>"

    async def __aenter__(self) -> Self:
        self.model = await self._describe()
        self._opened = StreamCalls(self.model)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            with quiet_after(kind):
                await self.close(list(self._sessions.values()))
        finally:
            await self.disconnect()

    async def open(
        self,
        sessions: int | Sequence[str] = 1,
        *,
        mode: Mode = "new",
        durability: Durability | None = None,
        static: Mapping[str, ArrayLike] | None = None,
    ) -> "list[AsyncStreamSession]":
        """As `Stream.open`."""
        call = self._calls.open(sessions, mode, durability, static)
        await self._exchange(call)
        places, others, refused = self._calls.opened(call, mode)
        if refused is not None:
            await self._end("close" if mode == "new" else "detach", places)
            await self._end("detach", others)
            raise refused
        opened = [AsyncStreamSession(self, place) for place in places]
        self._sessions |= {session.place.handle: session for session in opened}
        return opened

    async def step(self, sessions: "Sequence[AsyncStreamSession]", inputs: ArrayLike) -> Arrays:
        """As `Stream.step`."""
        return await self._apply(sessions, inputs, chunk=False, several=True)

    async def steps(self, sessions: "Sequence[AsyncStreamSession]", inputs: ArrayLike) -> Arrays:
        """As `Stream.steps`."""
        return await self._apply(sessions, inputs, chunk=True, several=True)

    async def close(self, sessions: "Sequence[AsyncStreamSession]") -> None:
        """As `Stream.close`."""
        await self._end("close", [session.place for session in sessions])

    async def disconnect(self) -> None:
        """As `Stream.disconnect`."""
        if self._link is not None:
            link, self._link = self._link, None
            await link.close()

    async def _end(self, op: Literal["close", "detach"], places: Sequence[Place]) -> None:
        if places:
            call = self._calls.end(op, places)
            await self._exchange(call)
            self._calls.ended(places)
            for place in places:
                self._sessions.pop(place.handle, None)
            call.result()

    async def _apply(
        self, sessions: "Sequence[AsyncStreamSession]", inputs: ArrayLike, *, chunk: bool, several: bool
    ) -> Arrays:
        locks = dict.fromkeys(session.lock for session in sorted(sessions, key=lambda session: session.place.handle))
        async with AsyncExitStack() as held:
            for lock in locks:
                await held.enter_async_context(lock)
            places = [session.place for session in sessions]
            call = self._calls.steps(places, inputs, chunk=chunk, several=several)
            held.callback(call.end)
            try:
                await self._exchange(call)
            except asyncio.CancelledError:
                if self._link is not None and self._link.will_answer(call):
                    self._outlive(self._link, call, held.pop_all())
                raise
            return call.result(chunk=chunk, several=several)

    def _outlive(self, link: "_Link", call: StepsCall, held: AsyncExitStack) -> None:
        """Wait for the answers of a cancelled call, so that they are not mistaken for those of the next call."""

        async def wait() -> None:
            async with held:
                try:
                    await link.wait(call, self._timeout)
                except BROKEN:
                    if link is self._link:
                        await self.disconnect()

        task = asyncio.create_task(wait())
        self._outliving.add(task)
        task.add_done_callback(self._outliving.discard)

    async def _exchange(self, call: ControlCall | StepsCall) -> None:
        """Send and wait for all answers; retry temporary refusals and broken connections."""
        retries = Retries(self._policy)
        while not call.complete:
            call.begin()
            link = None
            try:
                link = await self._connected()
                await link.ask(call, self._timeout)
                if call.complete:
                    return
                if (pause := retries.pause(call.retry_after)) is None:
                    call.give_up()
                    return
                if isinstance(call, ControlCall) and call.op == "close" and link is self._link:
                    await self.disconnect()  # the server has unbound the handle: reconnecting binds it again
            except BROKEN as error:
                if link is not None and link is self._link:
                    await self.disconnect()
                pause = pause_after(error, retries)
            await asyncio.sleep(pause)

    async def _roll_out(self, rollout: StreamRollout) -> AsyncGenerator[RolledStep]:
        """Receive a rollout, retrying after a broken connection."""
        retries = Retries(self._policy)
        try:
            while not rollout.complete:
                link = None
                try:
                    link = await self._connected()
                    await link.roll(rollout, self._timeout)
                except BROKEN as error:
                    if link is not None and link is self._link:
                        await self.disconnect()
                    await asyncio.sleep(pause_after(error, retries))
                while rollout.ready:
                    retries = Retries(self._policy)
                    yield rollout.take()
                if (refused := rollout.refused) is not None:
                    await asyncio.sleep(rollout.pause(refused, retries))
        finally:
            if (message := self._calls.stop(rollout)) is not None and self._link is not None:
                await self._link.say(message)

    async def _connected(self) -> "_Link":
        """The connection. If there is none, connect and resume the sessions."""
        async with self._connecting:
            if self._link is not None and self._link.broken is None:
                return self._link
            await self.disconnect()
            link = _Link(await connect(self._url, **websocket_options(self._address, self._timeout)), self._calls)
            try:
                if (call := self._calls.resume()) is not None:
                    await link.ask(call, self._timeout)
                    self._calls.resumed(call)
            except BaseException:
                await link.close()
                raise
            self._link = link
            return link


class _Link:
    """One connection, its reader task, and the calls that wait for answers."""

    def __init__(self, socket: ClientConnection, calls: StreamCalls) -> None:
        self._socket = socket
        self._calls = calls
        self._waiting: set[asyncio.Future[None]] = set()
        self._outbox: list[StepsCall] = []
        self._sent: WeakSet[StepsCall] = WeakSet()
        self._sender: asyncio.Task[None] | None = None
        self._closed = False
        self._reader = asyncio.create_task(self._read())
        self.broken: Exception | None = None

    async def ask(self, call: ControlCall | StepsCall, timeout: float) -> None:
        """Send the call and wait until it is settled. Raises the error that broke the connection, or TimeoutError."""
        if self.broken is not None:
            raise self.broken
        if call.settled:
            return
        if isinstance(call, ControlCall):
            for message in self._calls.controls(call):
                await self._socket.send(message)
        else:
            self._post(call)
        await self.wait(call, timeout)

    async def roll(self, rollout: StreamRollout, timeout: float) -> None:
        """Wait until the rollout has something for its caller. Raises as `ask`."""
        if self.broken is not None:
            raise self.broken
        if not rollout.sent:
            await self._socket.send(self._calls.roll_out(rollout))
        await self.wait(rollout, timeout)

    async def say(self, message: str) -> None:
        """Send a message without waiting for an answer."""
        with suppress(ConnectionClosed):
            await self._socket.send(message)

    async def wait(self, call: ControlCall | StepsCall | StreamRollout, timeout: float) -> None:
        """Wait until a sent call is settled. Raises as `ask`."""
        if call.settled:
            return
        if self.broken is not None:
            raise self.broken
        settled = asyncio.get_running_loop().create_future()
        call.on_settled = lambda: None if settled.done() else settled.set_result(None)
        self._waiting.add(settled)
        try:
            async with asyncio.timeout(timeout):
                await settled
        finally:
            self._waiting.discard(settled)
            call.on_settled = None

    def will_answer(self, call: StepsCall) -> bool:
        """Were the steps sent but not yet answered? Unsent steps are dropped."""
        if call in self._outbox:
            self._outbox.remove(call)
        return call in self._sent and not call.settled and self.broken is None

    async def close(self) -> None:
        """Close the connection and ignore late answers, which belong to calls that were sent again."""
        self._closed = True
        await self._socket.close()
        await asyncio.wait([self._reader])

    def _post(self, call: StepsCall) -> None:
        """Queue the steps, to be sent together with those of other tasks in this turn of the event loop."""
        self._outbox.append(call)
        if self._sender is None:
            self._sender = asyncio.create_task(self._flush())

    async def _flush(self) -> None:
        try:
            while self._outbox:
                calls, self._outbox = self._outbox, []
                self._sent.update(calls)
                for frame in self._calls.frames(calls):
                    await self._socket.send(frame)
        except ConnectionClosed:
            pass  # the reader wakes the waiting calls
        finally:
            self._sender = None

    async def _read(self) -> None:
        try:
            while True:
                message = await self._socket.recv()
                if not self._closed:
                    self._calls.receive(message)
        except Exception as error:  # noqa: BLE001 the waiting calls raise it
            self.broken = error
            for settled in self._waiting:
                if not settled.done():
                    settled.set_exception(error)


class AsyncStreamSession(PlaceFacts):
    """A session on a stream, opened by `AsyncStream.open`. Tasks may share it; their steps are serialised."""

    def __init__(self, stream: AsyncStream, place: Place) -> None:
        self._stream = stream
        self.place = place
        self.lock = asyncio.Lock()

    async def step(self, inputs: ArrayLike) -> Arrays:
        """As `Session.step`."""
        return await self._stream._apply([self], inputs, chunk=False, several=False)

    async def steps(self, inputs: ArrayLike) -> Arrays:
        """As `Session.steps`."""
        return await self._stream._apply([self], inputs, chunk=True, several=False)

    async def stream(self, inputs: Iterable[ArrayLike] | AsyncIterable[ArrayLike]) -> AsyncIterator[Arrays]:
        """As `AsyncSession.stream`."""
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
        """As `StreamSession.rollout`."""
        wish = RolloutWish(steps, map, on, inputs, outputs)
        async with self.lock:
            rollout = self._stream._calls.rollout(self.place, wish)
        async with aclosing(self._stream._roll_out(rollout)) as rolling:
            async for step in rolling:
                yield step

    async def close(self) -> None:
        """End the session on the server."""
        await self._stream.close([self])
