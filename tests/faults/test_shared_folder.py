"""Servers that share a store folder: each accepts any step, and a process suspended during a write blocks the rest."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from faults.conftest import Replicas, start
from faults.crowd import Crowd
from faults.replica import Replica
from faults.wires import Wires
from oracle import Oracle
from waiting import PATIENCE, reached

from unroll.service.core.errors import StoreUnavailable
from unroll.service.store.lmdb_folder import LmdbFolder

needs_proc_locks = pytest.mark.skipif(not Path("/proc/locks").exists(), reason="no /proc/locks here")

_X = np.ones((1, 2), np.float32)

#: Begins a write to a store folder and suspends itself within the transaction.
_STOPS = """
import os, pathlib, signal, sys
from unroll.service.store.lmdb_folder import LmdbFolder

folder = LmdbFolder(pathlib.Path(sys.argv[1]), "everysec")
folder.write(lambda transaction: os.kill(os.getpid(), signal.SIGSTOP))
folder.close()
"""


async def test_session_may_step_on_either_of_two_servers(tmp_path: Path, replicas: Replicas, oracle: Oracle) -> None:
    cluster = replicas(2, "--store", f"file://{tmp_path}/store", "--session-capacity", "8")
    await start(cluster)
    async with Crowd([replica.port for replica in cluster], 12, 16, pause=0.01) as crowd:
        async with crowd.stepping():
            await crowd.acknowledged(300)
        verdict = await crowd.verdict(oracle)
    assert verdict.good, verdict.findings


@pytest.fixture
async def server(tmp_path: Path, replicas: Replicas, wires: Wires) -> Replica:
    """Start a server with a session `s` in the folder `store`."""
    (server,) = replicas(1, "--store", f"file://{tmp_path}/store")
    await server.start()
    assert (await wires.call("POST", server.port, "/sessions", {"session_id": "s"})).status == 201
    return server


@pytest.fixture
def stopped(server: Replica, tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A process suspended within a transaction on that folder."""
    process = subprocess.Popen([sys.executable, "-c", _STOPS, str(tmp_path / "store")])
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    yield process
    process.kill()
    process.wait(PATIENCE)


@pytest.mark.parametrize("then", [signal.SIGCONT, signal.SIGKILL])
async def test_process_suspended_in_a_transaction_delays_the_others(
    then: signal.Signals, server: Replica, stopped: "subprocess.Popen[bytes]", wires: Wires, oracle: Oracle
) -> None:
    """Other servers report the store as unavailable until the process resumes or is killed."""
    for _ in range(2):
        reply = await wires.send("raw", server.port, "s", _X, 0)
        assert (reply.status, reply.code) == (503, "store_unavailable")
    stopped.send_signal(then)

    async def is_answered() -> bool:
        reply = await wires.send("raw", server.port, "s", _X, 0)
        assert reply.status == 200 or reply.code == "store_unavailable", reply
        return (reply.position, reply.outputs) == (1, oracle(_X).tobytes())

    await reached(is_answered, "a step")


@needs_proc_locks
async def test_starting_server_names_the_process_suspended_in_a_transaction(
    server: Replica, stopped: "subprocess.Popen[bytes]", tmp_path: Path
) -> None:
    with pytest.raises(StoreUnavailable) as raised:
        await asyncio.to_thread(LmdbFolder, tmp_path / "store", "everysec", patience=0.5)
    assert f"process {stopped.pid}, python" in raised.value.message
    assert "(stopped)" in raised.value.message
    assert "kill -CONT" in raised.value.message


async def test_server_exits_cleanly_while_another_process_is_suspended_in_a_transaction(
    server: Replica, stopped: "subprocess.Popen[bytes]", wires: Wires
) -> None:
    assert (await wires.send("raw", server.port, "s", _X, 0)).code == "store_unavailable"
    assert await server.terminate() == 0
