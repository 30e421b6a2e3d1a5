"""Check sessions on a Redis Cluster of three nodes: slots migrate between nodes while clients step at two replicas.

    python -m deploy.cluster_check         needs redis-server, redis-cli and unroll; half a minute

Exits with 0 if every output equals that of an uninterrupted run, else with 1.
"""

import random
import secrets
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TypeVar

from deploy.check import MODEL, known, open_durable, retried
from unroll.examples.client import Client

ROOT = Path(__file__).parents[1]
NODES, REPLICAS = ("27601", "27602", "27603"), ("27611", "27612")
SESSIONS, SLOTS = 24, 2500

T = TypeVar("T")


def cli(*arguments: str) -> str:
    return subprocess.run(["redis-cli", *arguments], check=True, capture_output=True, text=True).stdout.strip()


def start(stack: ExitStack, *command: str, folder: Path) -> None:
    """Start a process that ends with the stack."""
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    stack.callback(process.wait)
    stack.callback(process.terminate)


def start_everything(stack: ExitStack) -> None:
    root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    for port in NODES:
        (root / port).mkdir()
        flags = f"--port {port} --bind 127.0.0.1 --cluster-enabled yes --appendonly yes"
        start(stack, "redis-server", *flags.split(), "--save", "", folder=root / port)
        retry(partial(cli, "-p", port, "ping"))
    cli("--cluster", "create", *(f"127.0.0.1:{port}" for port in NODES), "--cluster-yes")
    repository = str(ROOT / "examples" / "repository")
    for port in REPLICAS:
        (root / port).mkdir()
        flags = ["--repository", repository, "--port", port, "--store", f"redis+cluster://127.0.0.1:{NODES[0]}"]
        start(stack, sys.executable, "-m", "unroll", "serve", *flags, folder=root / port)
        with Client(f"http://127.0.0.1:{port}") as client:
            retried(partial(client.get, "/readyz"))


def retry(call: Callable[[], T]) -> T:
    pause = threading.Event()
    for _ in range(500):
        try:
            return call()
        except subprocess.CalledProcessError:
            pause.wait(0.02)
    return call()


def run(moving: threading.Event) -> tuple[int, bool]:
    """Run one session, one step per request at a random replica, until the slots have migrated."""
    clients = [Client(f"http://127.0.0.1:{port}") for port in REPLICAS]
    session_id = f"check-{secrets.token_hex(8)}"
    open_durable(clients[0], session_id)
    sessions = [known(client, session_id) for client in clients]
    values: list[float] = []
    outputs = b""

    def step() -> bytes:
        return random.choice(sessions).steps(struct.pack("<f", values[-1]), position=len(values) - 1)

    while moving.is_set():
        values.append(random.uniform(340, 400))
        outputs += retried(step)
    whole = clients[0].sequence(MODEL, struct.pack(f"<{len(values)}f", *values))
    return len(values), outputs == whole


def main() -> int:
    with ExitStack() as stack:
        start_everything(stack)
        nodes = {port: cli("-p", port, "cluster", "myid") for port in NODES}
        moving = threading.Event()
        moving.set()
        with ThreadPoolExecutor(SESSIONS) as threads:
            running = [threads.submit(run, moving) for _ in range(SESSIONS)]
            try:
                for giver, taker in zip(NODES, (*NODES[1:], NODES[0]), strict=True):
                    slots = f"--cluster-from {nodes[giver]} --cluster-to {nodes[taker]} --cluster-slots {SLOTS}"
                    cli("--cluster", "reshard", f"127.0.0.1:{NODES[0]}", *slots.split(), "--cluster-yes")
                    print(f"moved {SLOTS} slots from {giver} to {taker}")
            finally:
                moving.clear()
            results = [session.result() for session in running]
    equal = sum(good for _, good in results)
    print(f"{len(results)} sessions, {sum(n for n, _ in results)} steps: {equal} equal to one uninterrupted run")
    return 0 if equal == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
