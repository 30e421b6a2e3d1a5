"""nginx with our configuration routes in front of scripted servers and a real one."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from redis_server import free_port
from scripted_replicas import Proxy, behind, check_routing, steps
from serving import Oracle, Running
from waiting import until

import unroll
from unroll.service.settings import Settings

CONFIGURATION = Path(__file__).parents[2] / "deploy" / "nginx.conf"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is missing")

_AROUND = """\
daemon off;
master_process off;
pid nginx.pid;
events {{}}
http {{
  access_log off;
  client_body_temp_path body;
  proxy_temp_path proxy;
  {}
}}
"""


@contextmanager
def nginx(folder: Path, servers: dict[str, int]) -> Iterator[int]:
    """Start nginx in front of servers on these ports; return its port."""
    port = free_port()
    text, listens = re.subn(r"listen 8000;", f"listen 127.0.0.1:{port};", CONFIGURATION.read_text())
    text, upstreams = re.subn(
        r"server unroll-1:8000 (.*)\n.*", "".join(rf"server 127.0.0.1:{p} \1\n" for p in servers.values()), text
    )
    assert (listens, upstreams) == (1, 1), "deploy/nginx.conf has changed"
    (folder / "nginx.conf").write_text(_AROUND.format(text))
    where = ("-p", str(folder), "-c", "nginx.conf", "-e", "stderr")
    process = subprocess.Popen([str(NGINX), *where])
    try:
        yield port
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[Proxy]:
    with behind(partial(nginx, tmp_path)) as proxy:
        yield proxy


def test_session_stays_at_one_replica_and_sessions_are_spread(proxy: Proxy) -> None:
    check_routing(proxy)


def test_only_an_undelivered_step_is_sent_again(proxy: Proxy) -> None:
    proxy.replicas[0].deadly = True
    assert {proxy.ask(steps(str(session)))[0] for session in range(20)} == {200, 502}
    proxy.replicas[0].shutdown()
    proxy.replicas[0].server_close()
    until(lambda: {proxy.ask(steps(str(session))) for session in range(20)} == {(200, "b")}, "answers of b alone")


def test_sessions_and_streams_of_a_real_server(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "lstm").symlink_to(repository / "lstm")
    running = Running(Settings(repository=tmp_path / "models"))
    x = np.random.default_rng(1).standard_normal((4, 3)).astype("<f4")
    expected = Oracle(repository, "lstm")(x)
    try:
        with nginx(tmp_path, {"unroll": running.port}) as port, unroll.Client(f"http://127.0.0.1:{port}") as client:
            session = client.session("lstm")
            assert np.array_equal(np.stack([session.step(row) for row in x]), expected)
            with client.stream("lstm") as stream:
                (handle,) = stream.open(1)
                assert np.array_equal(np.stack([stream.step([handle], row[None])[0] for row in x]), expected)
    finally:
        running.stop()
