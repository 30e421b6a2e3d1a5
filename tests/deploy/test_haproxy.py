"""The proxy configuration in front of two scripted servers: routing and retries."""

import base64
import hashlib
import http.client
import json
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from redis_server import free_port
from serving import Running
from waiting import PATIENCE, until

from unroll.service.settings import Settings

CONFIGURATION = Path(__file__).parents[2] / "deploy" / "haproxy.cfg"
HAPROXY = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
#: RFC 6455's GUID for the accept header, which the proxy verifies.
_RFC_6455 = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"

pytestmark = pytest.mark.skipif(HAPROXY is None, reason="haproxy is missing")


class Replica(ThreadingHTTPServer):
    """Replies with its name; on scripted paths it dies before it replies."""

    daemon_threads = True

    def __init__(self, name: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.name, self.ready, self.deadly = name, True, False
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def handle_error(self, *_: object) -> None:
        """The proxy's health checks may disconnect at any time."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
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
def haproxy(folder: Path, servers: dict[str, int]) -> Iterator[int]:
    """HAProxy with our configuration in front of these ports; its own port."""
    port = free_port()
    text = CONFIGURATION.read_text().replace("bind :8000", f"bind 127.0.0.1:{port}")
    # A server that gets no processor for a second is not down.
    lines = text.replace("timeout connect 1s", f"timeout connect 1s\n  timeout check {PATIENCE:.0f}s").splitlines()
    [template] = [line for line in lines if "server-template" in line]
    at = lines.index(template)
    lines[at : at + 1] = [f"  server {name} 127.0.0.1:{number}" for name, number in servers.items()]
    (folder / "haproxy.cfg").write_text("\n".join(lines) + "\n")
    process = subprocess.Popen([str(HAPROXY), "-db", "-q", "-f", str(folder / "haproxy.cfg")])
    try:
        yield port
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[Proxy]:
    replicas = [Replica("a"), Replica("b")]
    try:
        with haproxy(tmp_path, {each.name: each.server_port for each in replicas}) as port:
            proxy = Proxy(port, replicas)
            proxy.wait_for({"a", "b"})
            yield proxy
    finally:
        for replica in replicas:
            replica.shutdown()
            replica.server_close()


def steps(session: str) -> str:
    return f"/v1/models/co2/sessions/{session}/steps"


def test_the_configuration_is_valid():
    checked = subprocess.run([str(HAPROXY), "-c", "-f", str(CONFIGURATION)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert "WARNING" not in checked.stderr


def test_a_session_stays_at_one_replica_and_sessions_are_shared_out(proxy: Proxy):
    places = {session: proxy.ask(steps(session))[1] for session in map(str, range(40))}
    assert set(places.values()) == {"a", "b"}
    for session, place in places.items():
        assert proxy.ask(steps(session))[1] == place
        assert proxy.ask(f"/v1/models/co2/sessions/{session}", "GET")[1] == place
        assert proxy.ask("/v2/models/co2/infer", X_Session_Id=session)[1] == place
        escaped = "".join(f"%{ord(character):02x}" for character in session)
        assert proxy.ask(steps(escaped))[1] == place
    assert {proxy.ask("/v1/models/co2/sequences")[1] for _ in range(4)} == {"a", "b"}


def test_what_is_not_ready_gets_nothing(proxy: Proxy):
    proxy.replicas[0].ready = False
    proxy.wait_for({"b"})
    assert {proxy.ask(steps(str(session)))[1] for session in range(20)} == {"b"}
    proxy.replicas[0].ready = True
    proxy.wait_for({"a", "b"})


def test_a_step_with_a_position_survives_the_death_of_its_replica(proxy: Proxy):
    proxy.replicas[0].deadly = True
    assert {proxy.ask(steps(str(session)), Unroll_Position="3") for session in range(20)} == {(200, "b")}


def test_a_step_without_one_is_never_sent_twice(proxy: Proxy):
    proxy.replicas[0].deadly = True
    statuses = {proxy.ask(steps(str(session)))[0] for session in range(20)}
    assert statuses == {200, 502}


def test_what_never_arrived_is_sent_to_another(proxy: Proxy):
    proxy.replicas[0].shutdown()
    proxy.replicas[0].server_close()
    assert {proxy.ask(steps(str(session))) for session in range(20)} == {(200, "b")}


def test_a_websocket_passes(proxy: Proxy):
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=PATIENCE) as connection:
        connection.sendall(
            b"GET /v1/models/co2/stream HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        answer = connection.makefile("rb")
        assert b" 101 " in answer.readline()
        while answer.readline() != b"\r\n":
            pass
        connection.sendall(b"ping")
        assert answer.read(4) == b"ping"


def test_an_offer_of_http_2_costs_no_body(repository: Path, tmp_path: Path):
    """Java's client sends one with each request; the proxy passes it on."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "lstm").symlink_to(repository / "lstm")
    running = Running(Settings(repository=tmp_path / "models"))
    try:
        with haproxy(tmp_path, {"unroll": running.port}) as port:
            proxy = Proxy(port, [])
            until(lambda: answers(proxy) == 200, "a server behind the proxy")
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
            offer = {"Upgrade": "h2c", "Connection": "Upgrade, HTTP2-Settings", "HTTP2-Settings": "AAEAAEAAAAIAAAAB"}
            headers = {**offer, "Content-Type": "application/json"}
            connection.request("POST", "/v1/models/lstm/sessions", b'{"session_id": "java-1"}', headers)
            response = connection.getresponse()
            assert (response.status, json.load(response)["session_id"]) == (201, "java-1")
            headers["Content-Type"] = "application/octet-stream"
            connection.request("POST", "/v1/models/lstm/sessions/java-1/steps", bytes(12), headers)
            response = connection.getresponse()
            assert (response.status, response.getheader("unroll-position")) == (200, "1")
            connection.close()
    finally:
        running.stop()


def answers(proxy: Proxy) -> int:
    try:
        return proxy.ask("/readyz", "GET")[0]
    except ConnectionRefusedError:  # not listening yet
        return 0
