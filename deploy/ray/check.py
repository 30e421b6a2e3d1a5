"""Check durable sessions under Ray Serve: steps go to either of two replicas, then one replica is killed.

    python -m deploy.ray.check             needs ray[serve], unroll and a redis-server; see `make check-ray`

Exits with 0 if both replicas took part and every output equals that of an uninterrupted run, otherwise with 1.
"""

import re
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import ray
from ray import serve

from deploy import local_redis
from deploy.check import MODEL, durable_session, equals_whole
from deploy.ray.app import app

ROOT = Path(__file__).parents[2]
SESSIONS, STEPS = 16, 50


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def redis() -> Iterator[str]:
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--bind 127.0.0.1 --port {port} --dir {folder} --appendonly yes"
        command = [local_redis.server_path(), *flags.split()]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.terminate()
            process.wait()


@contextmanager
def served(store: str) -> Iterator[str]:
    port = free_port()
    environment = {"env_vars": {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}}
    ray.init(_node_ip_address="127.0.0.1", num_cpus=4, include_dashboard=False, runtime_env=environment)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(app({"repository": str(ROOT / "examples" / "repository"), "store": store}), name="unroll")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def applied(url: str) -> set[float]:
    """The steps run by each replica, including whole sequences. Any replica may answer a scrape."""
    pattern = rf'^unroll_steps_total{{.*model="{MODEL}".*}} (\S+)$'
    scrapes = [urllib.request.urlopen(f"{url}/metrics").read().decode() for _ in range(40)]
    return {float(number) for scrape in scrapes for number in re.findall(pattern, scrape, re.MULTILINE)}


def kill_a_replica() -> None:
    """Kill a replica without notice, like a lost machine."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    victim = next(actor for actor in actors if actor["name"].startswith("SERVE_REPLICA::unroll#Unroll"))
    ray.kill(ray.get_actor(**victim))
    print(f"killed {victim['name']}")


def run(url: str, values: np.ndarray, halfway: threading.Barrier) -> bool:
    """Run one session, one step per request. values: (STEPS, 1)."""
    with durable_session(url) as (client, session):
        outputs = list(session.stream(values[: STEPS // 2]))
        halfway.wait()
        outputs += session.stream(values[STEPS // 2 :])
        return equals_whole(client, values, outputs)


def check(url: str, kill: bool) -> bool:
    inputs = np.random.default_rng().uniform(340, 400, (SESSIONS, STEPS, 1)).astype(np.float32)
    halfway = threading.Barrier(SESSIONS + 1, timeout=60)
    with ThreadPoolExecutor(SESSIONS) as threads:
        running = [threads.submit(run, url, values, halfway) for values in inputs]
        halfway.wait()
        if kill:
            kill_a_replica()
        equal = sum(session.result() for session in running)
    print(f"{SESSIONS} sessions of {STEPS} steps: {equal} equal to one uninterrupted run")
    return equal == SESSIONS


def main() -> int:
    with redis() as store, served(store) as url:
        good = check(url, kill=False)
        shares = applied(url)
        print(f"steps by replica: {sorted(shares)}")
        return 0 if good and len(shares) == 2 and check(url, kill=True) else 1


if __name__ == "__main__":
    sys.exit(main())
