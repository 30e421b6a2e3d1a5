"""HAProxy with our configuration routes and retries in front of two scripted servers."""

import http.client
import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from redis_server import free_port
from scripted_replicas import Proxy, behind, check_routing, steps
from serving import Running
from waiting import PATIENCE, until

from unroll.service.settings import Settings

CONFIGURATION = Path(__file__).parents[2] / "deploy" / "haproxy.cfg"
HAPROXY = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")

pytestmark = pytest.mark.skipif(HAPROXY is None, reason="haproxy is missing")


@contextmanager
def haproxy(folder: Path, servers: dict[str, int]) -> Iterator[int]:
    """Start HAProxy with our configuration in front of these ports; return its port."""
    port = free_port()
    text = CONFIGURATION.read_text().replace("bind :8000", f"bind 127.0.0.1:{port}")
    # A server without CPU time for a second is not down.
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
    with behind(partial(haproxy, tmp_path)) as proxy:
        yield proxy


def test_the_configuration_is_valid():
    checked = subprocess.run([str(HAPROXY), "-c", "-f", str(CONFIGURATION)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert "WARNING" not in checked.stderr


def test_session_stays_at_one_replica_and_sessions_are_spread(proxy: Proxy):
    check_routing(proxy)


def test_unready_replica_gets_no_requests(proxy: Proxy):
    proxy.replicas[0].ready = False
    proxy.wait_for({"b"})
    assert {proxy.ask(steps(str(session)))[1] for session in range(20)} == {"b"}
    proxy.replicas[0].ready = True
    proxy.wait_for({"a", "b"})


def test_a_step_with_a_position_survives_the_death_of_its_replica(proxy: Proxy):
    proxy.replicas[0].deadly = True
    assert {proxy.ask(steps(str(session)), Unroll_Position="3") for session in range(20)} == {(200, "b")}


def test_step_without_a_position_is_never_sent_twice(proxy: Proxy):
    proxy.replicas[0].deadly = True
    statuses = {proxy.ask(steps(str(session)))[0] for session in range(20)}
    assert statuses == {200, 502}


def test_undelivered_request_goes_to_another_replica(proxy: Proxy):
    proxy.replicas[0].shutdown()
    proxy.replicas[0].server_close()
    assert {proxy.ask(steps(str(session))) for session in range(20)} == {(200, "b")}


def test_websocket_passes_the_proxy(proxy: Proxy):
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


def test_http_2_offer_keeps_the_request_body(repository: Path, tmp_path: Path):
    """Java's client offers HTTP/2 with each request, and the proxy passes the offer on."""
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
