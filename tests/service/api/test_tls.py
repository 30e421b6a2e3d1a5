"""TLS in the server: HTTP, streams, client certificates, and a new certificate while streams run."""

import asyncio
import signal
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import trustme
from client_frames import PING, TEXT, masked
from processes import Launched, Process, StartProcess, spawn
from raw_http import STEP, UPGRADE, Wire, request
from serving import Running, Serve
from waiting import PATIENCE, until

import unroll
from unroll.service.access.certificate import TlsFiles, TlsRefused
from unroll.service.settings import Settings


class Authority:
    """A CA and certificate files signed by it."""

    def __init__(self, folder: Path) -> None:
        self._ca = trustme.CA()
        self._folder = folder
        self.file = folder / "ca.pem"
        self._ca.cert_pem.write_to_path(str(self.file))

    def certificate(self, name: str) -> Path:
        """Write a file with key and chain."""
        path = self._folder / f"{name}.pem"
        made = self._ca.issue_cert("localhost", "127.0.0.1", common_name=name)
        made.private_key_and_cert_chain_pem.write_to_path(str(path))
        return path

    def context(self, client: Path | None = None) -> ssl.SSLContext:
        """The TLS context of a client with this certificate."""
        context = ssl.create_default_context(cafile=self.file)
        if client is not None:
            context.load_cert_chain(client)
        return context


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def secure(few: Path, authority: Authority) -> Iterator[Running]:
    """A TLS server with a half-second timeout."""
    running = Running(Settings(repository=few, tls_cert=authority.certificate("server"), head_timeout=0.5))
    yield running
    running.stop()


def secured(running: Running, context: ssl.SSLContext) -> Wire:
    wire = Wire(running.port)
    wire.socket = context.wrap_socket(wire.socket, server_hostname="127.0.0.1")
    return wire


def subject(port: int, context: ssl.SSLContext) -> str:
    """Connect and return the common name of the server's certificate."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as wrapped,
    ):
        certificate = wrapped.getpeercert()
        assert certificate is not None
        return dict(field[0] for field in certificate["subject"])["commonName"]  # type: ignore[misc]


async def test_clients_refuse_an_unknown_certificate_without_a_retry(secure: Running) -> None:
    with (
        pytest.raises(unroll.errors.ConnectionFailed, match=r"attempts: 1.*certificate"),
        unroll.Client(secure.url) as one,
    ):
        one.models()
    with pytest.raises(unroll.errors.ConnectionFailed, match=r"attempts: 1.*certificate"):
        async with unroll.AsyncClient(secure.url) as other:
            await other.models()


def test_the_client_steps_over_http_and_a_stream(secure: Running, authority: Authority) -> None:
    x = np.zeros(3, np.float32)
    with unroll.Client(secure.url, tls=authority.context()) as client:
        first = client.session("lstm").step(x)
        with client.stream("lstm") as stream:
            (session,) = stream.open(1)
            assert np.array_equal(session.step(x), first)


def test_requests_of_one_segment_are_answered_in_order(secure: Running, authority: Authority) -> None:
    wire = secured(secure, authority.context())
    wire.send(
        request("/v1/models/lstm/sequences")
        + b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
        + b"BREW / HTTP/1.1\r\n\r\n"
    )
    assert [wire.answer()[0] for _ in range(3)] == [200, 200, 501]
    wire.socket.close()


def test_frames_of_a_stream_are_handled_in_whatever_record_they_arrive(secure: Running, authority: Authority) -> None:
    opening = masked(TEXT, b'{"op": "open", "sessions": [{"handle": 0}]}') + masked(PING, b"early")
    sent = UPGRADE + opening
    for cut in range(len(UPGRADE) - 8, len(sent), 8):
        wire = secured(secure, authority.context())
        wire.send(sent[:cut], sent[cut:])
        assert wire.head()[0] == 101
        assert {wire.frame()[1][:5] for _ in range(2)} == {b'{"op"', b"early"}
        wire.socket.close()


def test_an_answer_that_is_not_read_is_counted_and_timed(secure: Running, authority: Authority) -> None:
    wire, path, steps = secured(secure, authority.context()), "/v1/models/lstm/sequences", 60_000
    wire.send(request(path))
    assert wire.answer()[0] == 200
    secure.keep_little_for(wire.socket)
    wire.send(request(path, bytes(steps * STEP.nbytes), steps=steps))
    until(lambda: secure.server.held.by_kind["answers"] > 65_536, "an answer that is not read")
    until(lambda: not secure.uvicorn.server_state.connections, "the end of the connection")
    assert not any(secure.server.held.by_kind.values())
    wire.socket.close()


def test_a_refused_stream_leaves_nothing_behind_without_uvloop(
    serve: Serve, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """asyncio's TLS transport breaks when it is closed twice."""
    monkeypatch.setattr("uvicorn.loops.auto.auto_loop_factory", lambda **_: asyncio.SelectorEventLoop)
    running = serve(tls_cert=authority.certificate("server"))
    assert type(running.uvicorn.loop) is asyncio.SelectorEventLoop
    for sent, status in ((UPGRADE.replace(b"dGhl", b"-"), 400), (UPGRADE.replace(b"lstm", b"no"), 404)):
        wire = secured(running, authority.context())
        wire.send(sent + masked(PING, b"early"))
        assert wire.head()[0] == status
        wire.socket.close()
    until(lambda: not running.uvicorn.server_state.connections, "no connection")


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01", b"GET /livez HTTP/1.1\r\n\r\n"], ids=["silent", "half", "http"])
def test_a_handshake_that_does_not_come_is_ended(secure: Running, sent: bytes) -> None:
    wire = Wire(secure.port)
    wire.send(sent)
    until(lambda: not wire.socket.recv(1000), "the end of the connection")
    wire.socket.close()
    until(lambda: not secure.uvicorn.server_state.connections, "no connection")


def test_a_slow_request_over_tls_is_answered_by_408(secure: Running, authority: Authority) -> None:
    wire = secured(secure, authority.context())
    wire.send(b"GET /livez HT")
    assert wire.answer()[0] == 408
    wire.socket.close()


def test_versions_before_1_2_are_refused(secure: Running) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with pytest.warns(DeprecationWarning, match="TLSv1_1 is deprecated"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError):
        secured(secure, context)


def test_clients_need_a_certificate_of_the_ca(serve: Serve, authority: Authority, tmp_path: Path) -> None:
    server, client = authority.certificate("server"), authority.certificate("client")
    stranger = Authority(tmp_path).certificate("stranger")
    running = serve(tls_cert=server, tls_client_ca=authority.file)
    assert httpx.get(f"{running.url}/v1/models", verify=authority.context(client)).status_code == 200
    for refused in (None, stranger):
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{running.url}/livez", verify=authority.context(refused))


def test_connections_in_their_handshake_count_and_make_room(serve: Serve, authority: Authority) -> None:
    running = serve(tls_cert=authority.certificate("server"), max_connections=2)
    silent = [Wire(running.port) for _ in range(3)]
    assert silent[0].socket.recv(1) == b""
    assert httpx.get(f"{running.url}/v1/models", verify=authority.context()).status_code == 200
    for wire in silent:
        wire.socket.close()


def test_a_new_certificate_is_for_new_connections(start_process: StartProcess, authority: Authority) -> None:
    path = authority.certificate("rotating")
    process: Process = start_process("--tls-cert", str(path))
    assert process.url.startswith("https://")
    context, port = authority.context(), httpx.URL(process.url).port
    assert port is not None
    x = np.zeros(3, np.float32)
    with unroll.Client(process.url, tls=context) as client, client.stream("gru") as stream:
        (session,) = stream.open(1)
        session.step(x)
        path.write_bytes(authority.certificate("renewed").read_bytes())
        process.popen.send_signal(signal.SIGHUP)
        until(lambda: subject(port, context) == "renewed", "the new certificate")
        session.step(x)
        path.write_text("nothing")
        process.popen.send_signal(signal.SIGHUP)
        assert subject(port, context) == "renewed"
    process.popen.terminate()
    process.end()
    assert "certificate read again" in [line["event"] for line in process.log]


def test_an_encrypted_key_is_opened_by_the_password_of_a_file(
    serve: Serve, authority: Authority, tmp_path: Path
) -> None:
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    whole = authority.certificate("server").read_bytes()
    key = serialization.load_pem_private_key(whole, None)
    how = serialization.BestAvailableEncryption(b"a password")
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (tmp_path / "key.pem").write_bytes(key.private_bytes(*form, how))
    password = tmp_path / "password"
    password.write_bytes(b"a password\r\n")
    (tmp_path / "cert.pem").write_bytes(whole[whole.index(b"-----BEGIN CERT") :])
    files = {"cert": tmp_path / "cert.pem", "key": tmp_path / "key.pem"}
    running = serve(tls_cert=files["cert"], tls_key=files["key"], tls_password_file=password)
    assert httpx.get(f"{running.url}/livez", verify=authority.context()).status_code == 200
    with pytest.raises(TlsRefused, match="add --tls-password-file"):
        TlsFiles(**files).load()
    for content, reason in (
        (b"\n", "has 1 to 1024 bytes, not 0"),
        (b"x" * 1025, "has 1 to 1024 bytes, not 1025"),
        (b"another", "check the password"),
    ):
        password.write_bytes(content)
        with pytest.raises(TlsRefused, match=reason):
            TlsFiles(**files, password=password).load()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--tls-cert", "/dev/null"], "--tls-cert /dev/null: no certificate with its key in PEM"),
        (["--tls-cert", "CERT", "--tls-key", "/nowhere"], "No such file or directory"),
        (["--tls-cert", "CERT", "--tls-client-ca", "/dev/null"], "--tls-client-ca /dev/null: no CAs in PEM"),
    ],
)
def test_files_that_cannot_be_used_end_the_start(
    shelf: Path, authority: Authority, flags: list[str], reason: str
) -> None:
    cert = str(authority.certificate("server"))
    flags = [cert if flag == "CERT" else flag for flag in flags]
    process = Launched("--repository", str(shelf), "--port", "0", *flags)
    _, log = process.communicate()
    assert process.returncode == 1
    assert reason in log


@pytest.mark.long
def test_workers_speak_tls_to_clients_and_to_each_other(
    start_process: StartProcess, authority: Authority, tmp_path: Path, ports: list[int]
) -> None:
    process: Process = start_process(
        *("--workers", "2", "--store", f"file://{tmp_path}/store", "--worker-port", str(ports[0])),
        *("--tls-cert", str(authority.certificate("server")), "--tls-client-ca", str(authority.file)),
        start=spawn,
    )
    context = authority.context(authority.certificate("client"))
    metrics = httpx.get(f"{process.url}/metrics", verify=context).text
    assert [f'unroll_worker_up{{worker="{n}"}} 1.0' in metrics for n in (1, 2)] == [True, True]
    assert httpx.get(f"https://127.0.0.1:{ports[1]}/livez", verify=context).status_code == 200
