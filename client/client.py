"""The synchronous client: `Client`, its sessions, and the connections they share."""

import http.client
import ssl
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self, TypeVar

from unroll.client import model_calls
from unroll.client.errors import ServerError, quiet_after
from unroll.client.exchange import EVENTS, Exchange, Request, Response
from unroll.client.retries import Retries, RetryPolicy, check_timeout
from unroll.client.rollout_calls import Map, On, RolledStep, RolloutCall, RolloutWish
from unroll.client.server import ServerAddress
from unroll.client.session_calls import Durability, Mode, SessionCalls, SessionFacts, Snapshot, Start
from unroll.client.stream import Stream
from unroll.client.tensors import ArrayLike, Arrays, Model

T = TypeVar("T")

#: Concurrent sequences of one call, which the server can run as one batch.
_CONCURRENT = 16
#: Connection errors, after which the request is retried on a new connection.
_BROKEN = (OSError, http.client.HTTPException)
#: The most bytes of a streamed response to read at a time.
_PART_BYTES = 65_536


class Client:
    """A client for one Unroll server, or for several behind one address. Threads may share it.

    with Client("http://127.0.0.1:8000") as client, client.session("co2") as session:
        forecast = session.step([371.2])

    The client retries a request after a broken connection, and after status 429, 502, 503 or 504. Each step carries its
    position, so the server applies it once, however often it is sent.

    Args:
        url: An http:// or https:// URL, with a path if the server is behind one.
        api_key: Sent as `Authorization: Bearer …`.
        headers: Sent with every request.
        timeout: Seconds per attempt, at most 1,000,000.
        retry_for: Seconds to keep retrying a request; 0 disables retries, inf retries forever.
        tls: The context for https://; the default verifies the server's certificate.

    Raises:
        InvalidInput: The URL, `timeout` or `retry_for` is invalid.
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
    ) -> None:
        self._address = ServerAddress.of(url, api_key, headers, tls)
        self._timeout = check_timeout(timeout)
        self._policy = RetryPolicy(self._address.url, retry_for, time.monotonic)
        self._idle: list[http.client.HTTPConnection] = []
        self._catalogue = model_calls.Catalogue()

    def __repr__(self) -> str:
        return f"<Client {self._address.url}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. Sessions stay open on the server."""
        while self._idle:
            self._idle.pop().close()

    def models(self) -> list[Model]:
        """List the server's models, in the newest version of each."""
        return self._run(self._catalogue.models())

    def model(self, name: str) -> Model:
        """Describe one model, `name` or `name:version`. Raises ModelUnknown or ModelUnavailable."""
        return self._run(self._catalogue.model(name))

    def sequences(
        self,
        model: str,
        inputs: Sequence[ArrayLike],
        *,
        static: Sequence[Mapping[str, ArrayLike]] | None = None,
    ) -> list[Arrays]:
        """Run whole sequences, each from the model's initial state. The server keeps no state.

        Args:
            model: `name` or `name:version`.
            inputs: For each sequence an array (T, *shape), or a dict with an array per input. Lengths may differ.
            static: The static inputs of each sequence, if the model has any.

        Returns:
            For each sequence an array (T, *shape), or a dict with an array per output.

        Raises:
            InvalidInput: An array does not fit the model.
            ServerError: The server refused the request; the class says why.
            ConnectionFailed: No server answered.
        """
        given = model_calls.check_sequences(inputs, static)
        served = self.model(model)

        def run(values: ArrayLike, first: Mapping[str, ArrayLike] | None) -> Arrays:
            return self._run(model_calls.sequence(served, values, first))

        if len(given) == 1:
            return [run(inputs[0], given[0])]
        with ThreadPoolExecutor(min(_CONCURRENT, len(given) or 1)) as threads:
            return list(threads.map(run, inputs, given))

    def session(
        self,
        model: str,
        session_id: str | None = None,
        *,
        mode: Mode = "new",
        durability: Durability | None = None,
        static: Mapping[str, ArrayLike] | None = None,
        snapshot: Snapshot | None = None,
    ) -> "Session":
        """Open a session. It ends with its `with` block, or with `close()`.

        Args:
            model: `name` or `name:version`.
            session_id: 1 to 128 characters; random if None.
            mode: new opens a session; resume attaches to the open session with this id; either attaches, or opens one
                if the id is unknown.
            durability: memory (lost with its server), stored (in the server's store) or client (this object holds the
                state and sends it with each step); the server's default if None.
            static: The model's static inputs.
            snapshot: The state to start from: the bytes from `Session.snapshot()`, or a file with them.

        Raises:
            SessionExists: A session with this id is open.
            SessionUnknown, SessionGone: With mode resume, the session does not exist, or no longer exists.
            NotStreamable: The model serves whole sequences only.
            DurabilityUnavailable: The server has no store, or no keys for client-held states.
            InvalidInput, ServerError, ConnectionFailed: As for `sequences`.
        """
        start: Start = {"durability": durability, "static": static, "snapshot": snapshot}
        calls = SessionCalls.start(self._catalogue, model, session_id, mode, **start)
        return Session(self, self._run(calls))

    def stream(self, model: str) -> Stream:
        """A WebSocket that carries the steps of many sessions. See `Stream`."""
        return Stream(self._address, model, self.model(model), self._timeout, self._policy)

    def roll_out(self, call: RolloutCall) -> Iterator[RolledStep]:
        """Receive a rollout, retrying after a broken connection."""
        retries = Retries(self._policy)
        while not call.complete:
            try:
                for content in self._receive(call.begin()):
                    for step in call.receive(content):
                        retries = Retries(self._policy)
                        yield step
                if call.complete:
                    return
                raise ConnectionResetError("the answer was cut off")
            except (ServerError, *_BROKEN) as error:
                pause = call.pause(error, retries)
            time.sleep(pause)

    def _receive(self, request: Request) -> Iterator[bytes]:
        """Yield the parts of the body as they arrive. Raises ServerError if the request is refused."""
        connection = self._address.connection(self._timeout)
        try:
            connection.send(self._head(request) + request.body)
            with http.client.HTTPResponse(connection.sock, method=request.method) as answer:
                answer.begin()
                if answer.headers.get_content_type() != EVENTS:
                    raise Response(answer.status, _headers(answer), answer.read()).refusal()
                while content := answer.read1(_PART_BYTES):
                    yield content
        finally:
            connection.close()

    def _run(self, exchange: Exchange[T]) -> T:
        """Send the requests of the operation, and return its result."""
        response = None
        try:
            while True:
                response = self._send(exchange.send(response))  # type: ignore[arg-type]
        except StopIteration as done:
            return done.value

    def _send(self, request: Request) -> Response:
        """Send a request, with retries. Raises ConnectionFailed if no attempt was answered."""
        retries = Retries(self._policy)
        while True:
            try:
                response = self._attempt(request)
                pause = retries.pause(response.retry_after) if response.may_succeed_later else None
            except _BROKEN as error:
                pause = retries.reconnect(error)
            if pause is None:
                break
            time.sleep(pause)
        response.repeated |= retries.count > 0
        return response

    def _attempt(self, request: Request) -> Response:
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._address.connection(self._timeout)
        if connection.sock is None:
            return self._ask(connection, request)
        try:
            return self._ask(connection, request)
        except ConnectionError:
            self.close()  # the server may have closed all idle connections
        response = self._ask(self._address.connection(self._timeout), request)
        response.repeated = True
        return response

    def _ask(self, connection: http.client.HTTPConnection, request: Request) -> Response:
        try:
            connection.send(self._head(request) + request.body)  # a single write, unlike `request`
            with http.client.HTTPResponse(connection.sock, method=request.method) as answer:
                answer.begin()
                body = answer.read()
            if answer.length is None and not answer.chunked:  # http.client accepts truncated headers
                raise http.client.IncompleteRead(body)
        except BaseException:
            connection.close()
            raise
        if answer.will_close:
            connection.close()
        else:
            self._idle.append(connection)
        return Response(answer.status, _headers(answer), body)

    def _head(self, request: Request) -> bytes:
        lines = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
        head = (
            f"{request.method} {self._address.path}{request.path} HTTP/1.1\r\n{self._address.head}{lines}"
            f"Content-Length: {len(request.body)}\r\n\r\n"
        )
        return head.encode("latin-1")


def _headers(answer: http.client.HTTPResponse) -> dict[str, str]:
    return {name.lower(): value for name, value in answer.getheaders()}


class Session(SessionFacts):
    """One session on the server. Its steps are applied exactly once and in order, whatever fails in between.

    Threads may share it; their steps are serialised.
    """

    def __init__(self, client: Client, calls: SessionCalls) -> None:
        self._client = client
        self._opened = calls
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with quiet_after(kind):
            self.close()

    def step(self, inputs: ArrayLike, *, position: int | None = None) -> Arrays:
        """Apply one time step.

        Args:
            inputs: An array of the input's shape, or a dict with an array per input.
            position: The step's number, from 0, if you count steps yourself. A step that was already applied is not
                applied again; it returns the same answer.

        Returns:
            An array of the output's shape, or a dict with an array per output.

        Raises:
            InvalidInput: An array does not fit the model; nothing was sent.
            PositionError: The session is at another position, `error.expected`.
            SessionGone: Its state is lost; the class says why.
            ServerError: Any other refusal; the session is unchanged.
            ConnectionFailed: No server answered, and the step may have been applied: call again with the same inputs.
        """
        return self._run(self._calls.step(inputs, position))

    def steps(self, inputs: ArrayLike, *, position: int | None = None) -> Arrays:
        """Apply T time steps at once, (T, *shape). Otherwise as `step`; `position` is that of the first one."""
        return self._run(self._calls.steps(inputs, position))

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
        """Feed outputs back as inputs on the server, and yield each time step as it arrives.

        Args:
            steps: The number of time steps to feed back.
            map: How to compute inputs from outputs: `identity`, `argmax`, or an object such as
                `{"kind": "sample", "temperature": 0.8, "seed": 7}`, see docs/rollout.md; a dict of these for a model
                with several inputs.
            on: fork runs on a copy of the state and leaves the session unchanged. session runs on the session, which
                advances once the last step was yielded; if you stop earlier, call `refresh`.
            inputs: Time steps to run first, (T, *shape). The last one is yielded, too.
            outputs: Instead of `inputs`, the outputs of the last time step; by default those that this session
                received, or that the server kept.

        Raises:
            MapInvalid: The map does not fit the model.
            PositionError: The session has moved to another position.
            InvalidInput, ServerError, ConnectionFailed: As for `step`.
        """
        with self._lock:
            call = RolloutCall(self._calls, RolloutWish(steps, map, on, inputs, outputs))
        return self._client.roll_out(call)

    def refresh(self) -> int:
        """Adopt the session's position on the server, and return it."""
        return self._run(self._calls.refresh())

    def fork(self, session_id: str | None = None) -> "Session":
        """Open a second session that continues from the same state. Raises SessionExists."""
        return Session(self._client, self._run(self._calls.fork(session_id)))

    def snapshot(self) -> bytes:
        """Get state and position as bytes, for `rewind`, `Client.session(snapshot=…)` or a file."""
        return self._run(self._calls.snapshot())

    def rewind(self, snapshot: Snapshot) -> int:
        """Restore the state of a snapshot, given as bytes or as a file. Returns the position."""
        return self._run(self._calls.rewind(snapshot))

    def close(self) -> None:
        """End the session on the server."""
        self._run(self._calls.close())

    def _run(self, exchange: Exchange[T]) -> T:
        with self._lock:
            return self._client._run(exchange)
