"""Check sessions on a Redis Cluster of three nodes: slots migrate between nodes while clients step on two replicas.

    python -m deploy.cluster_check         needs unroll and a redis-server or valkey-server; takes half a minute

Exits with 0 if every output equals that of an uninterrupted run, otherwise with 1.
"""

import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from redis import Redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from deploy import local_redis
from deploy.check import MODEL, PATIENCE_SECONDS, equals_whole
from unroll.client import Client

ROOT = Path(__file__).parents[1]
HOST = "127.0.0.1"
NODES, REPLICAS = (27601, 27602, 27603), ("27611", "27612")
SESSIONS, SLOTS = 24, 2500
#: The number of slots of a Redis Cluster.
ALL_SLOTS = 16384


class Node:
    """An administrative client for one node; `slots` is its initial range."""

    def __init__(self, index: int) -> None:
        self.port = NODES[index]
        self.slots = range(ALL_SLOTS * index // len(NODES), ALL_SLOTS * (index + 1) // len(NODES))
        self._client = Redis(HOST, self.port, retry=Retry(ConstantBackoff(0.02), 500))

    def __call__(self, *words: str | int | bytes) -> Any:
        return self._client.execute_command(*words, NEVER_DECODE=True)

    @property
    def id(self) -> bytes:
        return bytes(self("CLUSTER", "MYID"))

    @property
    def is_ready(self) -> bool:
        info = self("CLUSTER", "INFO")
        return b"cluster_state:ok" in info and b"cluster_known_nodes:%d" % len(NODES) in info


def start(stack: ExitStack, *command: str, folder: Path) -> None:
    """Start a process that ends with the stack."""
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    stack.callback(process.wait)
    stack.callback(process.terminate)


def start_cluster(stack: ExitStack, root: Path) -> list[Node]:
    nodes = [Node(index) for index in range(len(NODES))]
    for epoch, node in enumerate(nodes, start=1):
        folder = root / str(node.port)
        folder.mkdir()
        flags = f"--port {node.port} --bind {HOST} --cluster-enabled yes --appendonly yes"
        start(stack, local_redis.server_path(), *flags.split(), "--save", "", folder=folder)
        node("CLUSTER", "ADDSLOTS", *node.slots)
        node("CLUSTER", "SET-CONFIG-EPOCH", epoch)
        nodes[0]("CLUSTER", "MEET", HOST, node.port)
    end, pause = time.monotonic() + PATIENCE_SECONDS, threading.Event()
    while not all(node.is_ready for node in nodes):
        if time.monotonic() > end:
            raise TimeoutError(f"the cluster was not ready after {PATIENCE_SECONDS:.0f} s")
        pause.wait(0.02)
    return nodes


def migrate(slots: range, source: Node, target: Node, others: Sequence[Node]) -> None:
    """Move slots with their keys, as `redis-cli --cluster reshard` does."""
    source_id, target_id = source.id, target.id
    for slot in slots:
        target("CLUSTER", "SETSLOT", slot, "IMPORTING", source_id)
        source("CLUSTER", "SETSLOT", slot, "MIGRATING", target_id)
        while keys := source("CLUSTER", "GETKEYSINSLOT", slot, 100):
            source("MIGRATE", HOST, target.port, "", 0, 5000, "KEYS", *keys)
        for node in (target, source, *others):
            node("CLUSTER", "SETSLOT", slot, "NODE", target_id)


def start_replicas(stack: ExitStack, root: Path) -> None:
    repository = str(ROOT / "examples" / "repository")
    for port in REPLICAS:
        (root / port).mkdir()
        flags = ["--repository", repository, "--port", port, "--store", f"redis+cluster://{HOST}:{NODES[0]}"]
        start(stack, sys.executable, "-m", "unroll", "serve", *flags, folder=root / port)
        with connected(port) as client:
            client.models()


def connected(port: str) -> Client:
    return Client(f"http://{HOST}:{port}", retry_for=PATIENCE_SECONDS)


def run(moving: threading.Event) -> tuple[int, bool]:
    """Run one session, one step per request at a random replica, until the slots have migrated."""
    one, other = map(connected, REPLICAS)
    opened = one.session(MODEL, durability="stored")
    sessions = [opened, other.session(MODEL, opened.id, mode="resume")]
    values: list[np.ndarray] = []
    outputs: list[np.ndarray] = []
    while moving.is_set():
        values.append(np.array([random.uniform(340, 400)], np.float32))
        outputs.append(random.choice(sessions).step(values[-1], position=len(outputs)))
    return len(values), equals_whole(one, np.array(values), outputs)


def main() -> int:
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        nodes = start_cluster(stack, root)
        start_replicas(stack, root)
        moving = threading.Event()
        moving.set()
        with ThreadPoolExecutor(SESSIONS) as threads:
            running = [threads.submit(run, moving) for _ in range(SESSIONS)]
            try:
                for source, target, *others in zip(nodes, nodes[1:] + nodes[:1], nodes[2:] + nodes[:2], strict=True):
                    migrate(source.slots[:SLOTS], source, target, others)
                    print(f"moved {SLOTS} slots from {source.port} to {target.port}")
            finally:
                moving.clear()
            results = [session.result() for session in running]
    equal = sum(good for _, good in results)
    print(f"{len(results)} sessions, {sum(n for n, _ in results)} steps: {equal} equal to one uninterrupted run")
    return 0 if equal == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
