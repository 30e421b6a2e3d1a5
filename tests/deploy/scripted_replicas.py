"""Two scripted servers behind a proxy, and a client of the proxy."""

import base64
import hashlib
import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from waiting import PATIENCE, until

#: RFC 6455's GUID for the Sec-WebSocket-Accept header, which the proxy verifies.
_RFC_6455 = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


class Replica(ThreadingHTTPServer):
    """Replies with its name. If `deadly`, it closes the connection of a POST without a reply."""

    daemon_threads = True

    def __init__(self, name: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.name, self.ready, self.deadly = name, True, False
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def handle_error(self, *_: object) -> None:
        """Ignore errors: the proxy's health checks may disconnect at any time."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise the body waits until the headers are acknowledged
    server: Replica

    def do_GET(self) -> None:
        if self.headers.get("Upgrade") == "websocket":
            accept = base64.b64encode(hashlib.sha1(self.headers["Sec-WebSocket-Key"].encode() + _RFC_6455).digest())
            self.wfile.write(
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Accept: %b\r\n\r\n" % accept
            )
            self.wfile.write(self.rfile.read(4))
            self.close_connection = True
            return
        self._answer(200 if self.server.ready else 503)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.deadly:
            self.close_connection = True
            return
        self._answer(200)

    def _answer(self, status: int) -> None:
        body = self.server.name.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Proxy:
    def __init__(self, port: int, replicas: list[Replica]) -> None:
        self.port, self.replicas = port, replicas

    def ask(self, path: str, method: str = "POST", **headers: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        body = response.read().decode()
        connection.close()
        return response.status, body

    def wait_for(self, names: set[str]) -> None:
        """Wait until requests without a session reach exactly these replicas."""

        def answered() -> set[str]:
            try:
                return {self.ask("/readyz", "GET")[1] for _ in range(4)}
            except ConnectionRefusedError:  # not listening yet
                return set()

        until(lambda: answered() == names, f"answers of {names}")


@contextmanager
def behind(start: Callable[[dict[str, int]], AbstractContextManager[int]]) -> Iterator[Proxy]:
    """Run two replicas, `a` and `b`, behind the proxy that `start(ports by name)` starts; it yields its own port."""
    replicas = [Replica("a"), Replica("b")]
    try:
        with start({each.name: each.server_port for each in replicas}) as port:
            proxy = Proxy(port, replicas)
            proxy.wait_for({"a", "b"})
            yield proxy
    finally:
        for replica in replicas:
            replica.shutdown()
            replica.server_close()


def steps(session: str) -> str:
    return f"/v1/models/co2/sessions/{session}/steps"


def check_routing(proxy: Proxy) -> None:
    """Check that each session stays at one replica over every API, and that sessions and other requests are spread."""
    places = {session: proxy.ask(steps(session))[1] for session in map(str, range(40))}
    assert set(places.values()) == {"a", "b"}
    for session, place in places.items():
        assert proxy.ask(steps(session))[1] == place
        assert proxy.ask(f"/v1/models/co2/sessions/{session}", "GET")[1] == place
        assert proxy.ask("/v2/models/co2/infer", X_Session_Id=session)[1] == place
        escaped = "".join(f"%{ord(character):02x}" for character in session)
        assert proxy.ask(steps(escaped))[1] == place
    assert {proxy.ask("/v1/models/co2/sequences")[1] for _ in range(20)} == {"a", "b"}
