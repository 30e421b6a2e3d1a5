"""One WebSocket for the steps of many sessions: `Stream` and its sessions."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Self

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI, SecurityError
from websockets.sync.client import ClientConnection, connect

from unroll.client.errors import BodyTooLarge, Overloaded, ServerError, quiet_after
from unroll.client.exchange import Response
from unroll.client.places import Place, PlaceFacts
from unroll.client.retries import Retries, RetryPolicy
from unroll.client.rollout_calls import Map, On, RolledStep, RolloutWish
from unroll.client.server import ServerAddress
from unroll.client.session_calls import Durability, Mode
from unroll.client.stream_calls import ControlCall, StepsCall, StreamCalls
from unroll.client.stream_rollouts import StreamRollout
from unroll.client.tensors import ArrayLike, Arrays, Model

#: The close code for a message that is too large.
_TOO_LARGE = 1009
#: Connection errors, after which the sessions are resumed on a new connection.
BROKEN = (OSError, ConnectionClosed, InvalidHandshake, InvalidURI, Overloaded)


def websocket_options(address: ServerAddress, timeout: float) -> dict[str, Any]:
    """The arguments of `websockets.connect`."""
    return {
        "ssl": address.tls,
        "additional_headers": address.headers,
        "open_timeout": timeout,
        "compression": None,
        "max_size": None,
        "proxy": None,
    }


def final(error: BaseException | None) -> ServerError | None:
    """The error to raise if a retry would fail again: no WebSocket can be opened, or a message is too large."""
    if isinstance(error, ConnectionClosed) and error.rcvd is not None and error.rcvd.code == _TOO_LARGE:
        return BodyTooLarge("the steps of one session exceed the server's --max-body-bytes: send fewer at a time")
    if isinstance(error, InvalidURI | SecurityError):  # the server redirected to another URL
        error = error.__context__
    if not isinstance(error, InvalidStatus):
        return None
    response = _response(error)
    if response.may_succeed_later:
        return None
    return response.error() or ServerError(f"HTTP status {response.status} in place of a stream", "no_stream")


def asked_to_wait(error: Exception) -> float | None:
    """The delay in seconds that the server asked for when it refused a connection, or to resume sessions."""
    if isinstance(error, InvalidStatus):
        return _response(error).retry_after
    return error.retry_after if isinstance(error, Overloaded) else None


def pause_after(error: Exception, retries: Retries) -> float:
    """Seconds until a broken connection is replaced. Raises UnrollError if it is not replaced."""
    if (refused := final(error)) is not None:
        raise refused from error
    return retries.reconnect(error, asked_to_wait(error))


def _response(error: InvalidStatus) -> Response:
    answer = error.response
    headers = {name.lower(): value for name, value in answer.headers.raw_items()}
    return Response(answer.status_code, headers, bytes(answer.body or b""))


class Stream:
    """Many sessions of one model over one connection. Use it from one thread; `AsyncStream` serves many tasks.

    with client.stream("co2") as stream:
        sessions = stream.open(64)
        forecasts = stream.step(sessions, measurements)  # (64, features) -> (64, outputs), one message

    After a broken connection the sessions are resumed on a new one. They end with the `with` block.
    """

    def __init__(
        self, address: ServerAddress, reference: str, model: Model, timeout: float, policy: RetryPolicy
    ) -> None:
        self.model = model
        self._address = address
        self._url = address.stream_url(reference)
        self._timeout = timeout
        self._policy = policy
        self._calls = StreamCalls(model)
        self._socket: ClientConnection | None = None
        self._sessions: dict[int, StreamSession] = {}

    def __repr__(self) -> str:
        return f"<Stream of {self.model.name} with {len(self._sessions)} sessions>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            with quiet_after(kind):
                self.close(list(self._sessions.values()))
        finally:
            self.disconnect()

    def open(
        self,
        sessions: int | Sequence[str] = 1,
        *,
        mode: Mode = "new",
        durability: Durability | None = None,
        static: Mapping[str, ArrayLike] | None = None,
    ) -> "list[StreamSession]":
        """Open sessions, or attach to open ones.

        Args:
            sessions: The number of sessions, or their ids.
            mode, durability, static: As in `Client.session`, for each session.

        Raises:
            ServerError: The server refused a session; this is the error of the first. New sessions are closed again,
                all others stay open on the server.
            InvalidInput, ConnectionFailed: As for `Client.session`.
        """
        call = self._calls.open(sessions, mode, durability, static)
        self._exchange(call)
        places, others, refused = self._calls.opened(call, mode)
        if refused is not None:
            self._end("close" if mode == "new" else "detach", places)
            self._end("detach", others)
            raise refused
        opened = [StreamSession(self, place) for place in places]
        self._sessions |= {session.place.handle: session for session in opened}
        return opened

    def step(self, sessions: "Sequence[StreamSession]", inputs: ArrayLike) -> Arrays:
        """Apply one time step to each session, all in one message.

        Args:
            sessions: N distinct sessions of this stream.
            inputs: An array (N, *shape), or a dict with an array per input.

        Returns:
            An array (N, *shape), or a dict with an array per output.

        Raises:
            SomeFailed: The steps of some sessions were refused; the rest were applied. A single session raises its own
                error instead.
            InvalidInput, ConnectionFailed: As for `Session.step`.
        """
        return self._apply([session.place for session in sessions], inputs, chunk=False, several=True)

    def steps(self, sessions: "Sequence[StreamSession]", inputs: ArrayLike) -> Arrays:
        """Apply T time steps to each session, (N, T, *shape). Otherwise as `step`."""
        return self._apply([session.place for session in sessions], inputs, chunk=True, several=True)

    def close(self, sessions: "Sequence[StreamSession]") -> None:
        """End the sessions on the server."""
        self._end("close", [session.place for session in sessions])

    def disconnect(self) -> None:
        """Close the connection. The sessions stay open on the server; the next call resumes them."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _end(self, op: Literal["close", "detach"], places: Sequence[Place]) -> None:
        if places:
            call = self._calls.end(op, places)
            self._exchange(call)
            self._calls.ended(places)
            for place in places:
                self._sessions.pop(place.handle, None)
            call.result()

    def _apply(self, places: Sequence[Place], inputs: ArrayLike, *, chunk: bool, several: bool) -> Arrays:
        call = self._calls.steps(places, inputs, chunk=chunk, several=several)
        try:
            self._exchange(call)
        finally:
            call.end()
            if not call.settled:  # late answers must not be mistaken for those of the next call
                self.disconnect()
        return call.result(chunk=chunk, several=several)

    def _exchange(self, call: ControlCall | StepsCall) -> None:
        """Send and wait for all answers; retry temporary refusals and broken connections."""
        retries = Retries(self._policy)
        while not call.complete:
            call.begin()
            try:
                socket = self._socket or self._connect()
                self._send(socket, call)
                if call.complete:
                    return
                if (pause := retries.pause(call.retry_after)) is None:
                    call.give_up()
                    return
                if isinstance(call, ControlCall) and call.op == "close":
                    self.disconnect()  # the server has unbound the handle: reconnecting binds it again
            except BROKEN as error:
                self.disconnect()
                pause = pause_after(error, retries)
            time.sleep(pause)

    def _roll_out(self, rollout: StreamRollout) -> Iterator[RolledStep]:
        """Receive a rollout, retrying after a broken connection."""
        retries = Retries(self._policy)
        try:
            while not rollout.complete:
                try:
                    self._await(rollout)
                except BROKEN as error:
                    self.disconnect()
                    time.sleep(pause_after(error, retries))
                while rollout.ready:
                    retries = Retries(self._policy)
                    yield rollout.take()
                if (refused := rollout.refused) is not None:
                    time.sleep(rollout.pause(refused, retries))
        finally:
            if (message := self._calls.stop(rollout)) is not None and self._socket is not None:
                try:
                    self._socket.send(message)
                except BROKEN:
                    self.disconnect()

    def _await(self, rollout: StreamRollout) -> None:
        """Wait until the rollout has something for its caller."""
        socket = self._socket or self._connect()
        if not rollout.sent:
            socket.send(self._calls.roll_out(rollout))
        while not rollout.settled:
            self._calls.receive(socket.recv(self._timeout))

    def _connect(self) -> ClientConnection:
        """Connect, and resume the sessions."""
        socket = connect(self._url, **websocket_options(self._address, self._timeout)).__enter__()
        try:
            if (call := self._calls.resume()) is not None:
                self._send(socket, call)
                self._calls.resumed(call)
        except BaseException:
            socket.close()
            raise
        self._socket = socket
        return socket

    def _send(self, socket: ClientConnection, call: ControlCall | StepsCall) -> None:
        """Send a call and receive its answers, also between messages, so that neither side blocks on a full buffer."""
        messages = self._calls.controls(call) if isinstance(call, ControlCall) else self._calls.frames([call])
        for message in messages:
            waiting = len(call.unanswered)
            socket.send(message)
            while len(call.unanswered) == waiting:
                self._calls.receive(socket.recv(self._timeout))
        while not call.settled:
            self._calls.receive(socket.recv(self._timeout))


class StreamSession(PlaceFacts):
    """A session on a stream, opened by `Stream.open`."""

    def __init__(self, stream: Stream, place: Place) -> None:
        self._stream = stream
        self.place = place

    def step(self, inputs: ArrayLike) -> Arrays:
        """Apply one time step. As `Session.step`."""
        return self._stream._apply([self.place], inputs, chunk=False, several=False)

    def steps(self, inputs: ArrayLike) -> Arrays:
        """Apply T time steps. As `Session.steps`."""
        return self._stream._apply([self.place], inputs, chunk=True, several=False)

    def stream(self, inputs: Iterable[ArrayLike]) -> Iterator[Arrays]:
        """Apply one time step per item, and yield its outputs before requesting the next item."""
        for values in inputs:
            yield self.step(values)

    def rollout(
        self,
        steps: int,
        *,
        map: Map,
        on: On = "fork",
        inputs: ArrayLike | None = None,
        outputs: ArrayLike | None = None,
    ) -> Iterator[RolledStep]:
        """As `Session.rollout`. Other sessions of the stream may be stepped in between.

        If you stop iterating a rollout on the session early, its last step may still run. The next step then raises
        PositionError; to continue, open the session again with mode resume.
        """
        wish = RolloutWish(steps, map, on, inputs, outputs)
        return self._stream._roll_out(self._stream._calls.rollout(self.place, wish))

    def close(self) -> None:
        """End the session on the server."""
        self._stream.close([self])
