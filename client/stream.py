"""One WebSocket for the steps of many sessions: `Stream`, and its sessions."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Self

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI, SecurityError
from websockets.sync.client import ClientConnection, connect

from unroll.client.errors import BodyTooLarge, ConnectionFailed, Overloaded, ServerError
from unroll.client.exchange import Response
from unroll.client.places import Place, PlaceFacts
from unroll.client.retries import Retries, RetryPolicy
from unroll.client.rollout_calls import Map, On, RolledStep, RolloutWish
from unroll.client.server import ServerAddress
from unroll.client.session_calls import Durability, Mode
from unroll.client.stream_calls import ControlCall, StepsCall, StreamCalls
from unroll.client.stream_rollouts import StreamRollout
from unroll.client.tensors import ArrayLike, Arrays, Model

#: Close code of a server that does not take a message of this size.
_TOO_LARGE = 1009
#: Errors of a connection, after which the sessions are resumed on a new one.
BROKEN = (OSError, ConnectionClosed, InvalidHandshake, InvalidURI, Overloaded)


def websocket_options(address: ServerAddress, timeout: float) -> dict[str, Any]:
    """For `connect` of the package websockets."""
    return {
        "ssl": address.tls,
        "additional_headers": address.headers,
        "open_timeout": timeout,
        "compression": None,
        "max_size": None,
        "proxy": None,
    }


def final(error: BaseException | None) -> ServerError | None:
    """What the error means if it would only come again: why there is no WebSocket, or that a message was too large."""
    if isinstance(error, ConnectionClosed) and error.rcvd is not None and error.rcvd.code == _TOO_LARGE:
        return BodyTooLarge("the steps of one session exceed the server's --max-body-bytes: send fewer at a time")
    if isinstance(error, InvalidURI | SecurityError):  # where it was redirected to
        error = error.__context__
    if not isinstance(error, InvalidStatus):
        return None
    response = _response(error)
    if response.may_succeed_later:
        return None
    return response.error() or ServerError(f"HTTP status {response.status} in place of a stream", "no_stream")


def asked_to_wait(error: Exception) -> float | None:
    """Seconds that the server has said with the refusal of a connection, or of sessions that were to be resumed."""
    if isinstance(error, InvalidStatus):
        return _response(error).retry_after
    return error.retry_after if isinstance(error, Overloaded) else None


def pause_after(error: Exception, retries: Retries, address: ServerAddress) -> float:
    """Seconds until a broken connection is replaced. Raises what the caller is told if it is not."""
    if (refused := final(error)) is not None:
        raise refused from error
    if (pause := retries.pause(asked_to_wait(error))) is None:
        raise ConnectionFailed(address.failed(error, retries.count)) from error
    return pause


def _response(error: InvalidStatus) -> Response:
    answer = error.response
    headers = {name.lower(): value for name, value in answer.headers.raw_items()}
    return Response(answer.status_code, headers, bytes(answer.body or b""))


class Stream:
    """Many sessions of one model over one connection. For one thread; `AsyncClient` has streams for many tasks.

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
            self.close(list(self._sessions.values()))
        except Exception:
            if kind is None:  # otherwise the first error matters more
                raise
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
            sessions: How many, or their ids.
            mode, durability, static: As in `Client.session`, for each of them.

        Raises:
            ServerError: Of the first session that the server refuses. The others are closed again if they are new, and
                left open on the server otherwise.
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
            sessions: N sessions of this stream, each once.
            inputs: (N, *shape), or a dict with one array per input.

        Returns:
            (N, *shape), or a dict with one array per output.

        Raises:
            SomeFailed: The steps of some sessions were refused; the others' were applied. If there is only one
                session: its error.
            InvalidInput, ConnectionFailed: As for `Session.step`.
        """
        return self._apply([session.place for session in sessions], inputs, chunk=False, several=True)

    def steps(self, sessions: "Sequence[StreamSession]", inputs: ArrayLike) -> Arrays:
        """Apply T time steps to each session, (N, T, *shape); otherwise as `step`."""
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
            if not call.settled:  # its late answers must not be taken for those of the next call
                self.disconnect()
        return call.result(chunk=chunk, several=several)

    def _exchange(self, call: ControlCall | StepsCall) -> None:
        """Send, receive until all is answered, and send again what is refused for now or was cut off."""
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
                    self.disconnect()  # the server has unbound the handle: first it is bound again
            except BROKEN as error:
                self.disconnect()
                pause = pause_after(error, retries, self._address)
            time.sleep(pause)

    def _roll_out(self, rollout: StreamRollout) -> Iterator[RolledStep]:
        """Receive a rollout, and send it again after a broken connection."""
        retries = Retries(self._policy)
        try:
            while not rollout.complete:
                try:
                    self._await(rollout)
                except BROKEN as error:
                    self.disconnect()
                    time.sleep(pause_after(error, retries, self._address))
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
        """Until there is something for its caller."""
        socket = self._socket or self._connect()
        if not rollout.sent:
            socket.send(self._calls.roll_out(rollout))
        while not rollout.settled:
            self._calls.receive(socket.recv(self._timeout))

    def _connect(self) -> ClientConnection:
        """A new connection, on which the sessions are resumed."""
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
        """Answers are received between the messages: neither side may wait for the other to read."""
        messages = self._calls.controls(call) if isinstance(call, ControlCall) else self._calls.frames([call])
        for message in messages:
            waiting = len(call.unanswered)
            socket.send(message)
            while len(call.unanswered) == waiting:
                self._calls.receive(socket.recv(self._timeout))
        while not call.settled:
            self._calls.receive(socket.recv(self._timeout))


class StreamSession(PlaceFacts):
    """A session on a stream. Opened by `Stream.open`."""

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
        """Apply one time step for each item, and yield its outputs before the next item is asked for."""
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

        If a rollout on the session is not iterated to its end, its last step may have run, and the next step is refused
        with PositionError then. The stream opens the session again where it is, with mode resume.
        """
        wish = RolloutWish(steps, map, on, inputs, outputs)
        return self._stream._roll_out(self._stream._calls.rollout(self.place, wish))

    def close(self) -> None:
        """End the session on the server."""
        self._stream.close([self])
