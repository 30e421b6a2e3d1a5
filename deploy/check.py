"""Check that a durable session survives the loss of a replica: those of docker-compose.yml, or any others.

    python -m deploy.check                 step through the proxy on 127.0.0.1:8000 and compare with one whole sequence
    python -m deploy.check --kill          the same, and `docker kill` the replica that served the session

Exits with 0 if every step was applied once and every output equals that of an uninterrupted run, else with 1.
Standard library only; where Unroll is not installed, set PYTHONPATH=src.
"""

import argparse
import json
import os
import secrets
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from deploy.plain_client import Client, RemoteSession, ServerError

MODEL = "co2"
STEPS = [350.0 + number / 8 for number in range(40)]
#: A dead replica is noticed within seconds; nothing here should take longer.
PATIENCE_SECONDS = 30.0
#: Codes after which a client resends the same step: the position shows whether it was applied. None: no reply,
#: or a reply by the proxy.
RETRIED = {None, "store_unavailable", "session_contended", "draining", "queue_full", "deadline_exceeded"}

T = TypeVar("T")


def retried(request: Callable[[], T]) -> T:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return request()
        except ServerError as error:
            if error.code not in RETRIED or time.monotonic() > deadline:
                raise
            print(f"  retry after: {error}")
            time.sleep(0.2)


def steps(session: RemoteSession, values: list[float]) -> bytes:
    return b"".join(retried(partial(session.steps, struct.pack("<f", value))) for value in values)


def docker(*arguments: str) -> str:
    return subprocess.run(["docker", *arguments], check=True, capture_output=True, text=True).stdout


def applied() -> dict[str, float]:
    """Steps of the model applied by each running replica since its start, by container."""
    scrape = "import urllib.request; print(urllib.request.urlopen('http://127.0.0.1:8000/metrics').read().decode())"
    project = os.environ.get("COMPOSE_PROJECT_NAME", "unroll")
    labels = {"com.docker.compose.project": project, "com.docker.compose.service": "unroll"}
    replicas = docker("ps", "-q", *(f"--filter=label={name}={value}" for name, value in labels.items())).split()
    return {
        replica: sum(
            float(line.split()[-1])
            for line in docker("exec", replica, "python", "-c", scrape).splitlines()
            if line.startswith("unroll_steps_total") and f'model="{MODEL}"' in line
        )
        for replica in replicas
    }


def open_durable(client: Client, session_id: str) -> RemoteSession:
    sessions = f"/v1/models/{MODEL}/sessions"
    wanted = json.dumps({"session_id": session_id, "durability": "redis"}).encode()
    client.exchange("POST", sessions, wanted, {"Content-Type": "application/json", "X-Session-Id": session_id})
    return known(client, session_id)


def known(client: Client, session_id: str) -> RemoteSession:
    """A session that is already open, possibly opened by another client."""
    return RemoteSession(client, f"/v1/models/{MODEL}/sessions/{session_id}")


def check(url: str, kill: bool) -> bool:
    with Client(url) as client:
        session_id = f"check-{secrets.token_hex(8)}"
        with open_durable(client, session_id) as session:
            print(f"opened {session_id}, durable, through {url}")
            half = len(STEPS) // 2
            before = applied() if kill else {}
            outputs = steps(session, STEPS[:half])
            if kill:
                after = applied()
                print("steps by replica:", {name: after[name] - before[name] for name in after})
                server = max(after, key=lambda name: after[name] - before[name])
                docker("kill", server)
                print(f"killed {server}, at position {session.position}, {len(after) - 1} replicas left")
            outputs += steps(session, STEPS[half:])
            position = session.position
        whole = client.sequence(MODEL, struct.pack(f"<{len(STEPS)}f", *STEPS), len(STEPS))
    print(f"position {position} after {len(STEPS)} steps; outputs equal to one whole sequence: {outputs == whole}")
    return position == len(STEPS) and outputs == whole


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="URL of the proxy (default: %(default)s)")
    parser.add_argument("--kill", action="store_true", help="kill the replica that served the session (needs 2)")
    arguments = parser.parse_args()
    try:
        return 0 if check(arguments.url, arguments.kill) else 1
    except (ServerError, subprocess.CalledProcessError) as error:
        print(f"failed: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
