"""Check that a durable session survives the loss of a replica, with docker-compose.yml or any other deployment.

    python -m deploy.check                 step through the proxy on 127.0.0.1:8000 and compare with one whole sequence
    python -m deploy.check --kill          the same, and `docker kill` the replica that served the session

Exits with 0 if every step was applied once and every output equals that of an uninterrupted run, otherwise with 1.
It needs only `unroll.Client`: `pip install unroll-serve`.
"""

import argparse
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from unroll.client import Client, Session, errors

MODEL = "co2"
STEPS = np.array([[350 + number / 8] for number in range(40)], np.float32)
#: A dead replica is detected within seconds; nothing here should take longer.
PATIENCE_SECONDS = 30.0


@contextmanager
def durable_session(url: str) -> Iterator[tuple[Client, Session]]:
    """Open a session in the store. Its client sends the id as a header, by which a proxy can route."""
    session_id = f"check-{secrets.token_hex(8)}"
    with (
        Client(url, headers={"X-Session-Id": session_id}, retry_for=PATIENCE_SECONDS) as client,
        client.session(MODEL, session_id, durability="stored") as session,
    ):
        yield client, session


def equals_whole(client: Client, values: np.ndarray, outputs: list[np.ndarray]) -> bool:
    """Do the outputs equal those of one uninterrupted run over `values` (T, 1)?"""
    return np.array_equal(outputs, client.sequences(MODEL, [values])[0])


def docker(*arguments: str) -> str:
    return subprocess.run(["docker", *arguments], check=True, capture_output=True, text=True).stdout


def applied() -> dict[str, float]:
    """The steps that each running replica has applied since its start, by container."""
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


def check(url: str, kill: bool) -> bool:
    with durable_session(url) as (client, session):
        print(f"opened {session.id}, durable, through {url}")
        half = len(STEPS) // 2
        before = applied() if kill else {}
        outputs = list(session.stream(STEPS[:half]))
        if kill:
            after = applied()
            print("steps by replica:", {name: after[name] - before[name] for name in after})
            server = max(after, key=lambda name: after[name] - before[name])
            docker("kill", server)
            print(f"killed {server}, at position {session.position}, {len(after) - 1} replicas left")
        outputs += session.stream(STEPS[half:])
        position, equal = session.refresh(), equals_whole(client, STEPS, outputs)
    print(f"position {position} after {len(STEPS)} steps; outputs equal to one whole sequence: {equal}")
    return position == len(STEPS) and equal


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="URL of the proxy (default: %(default)s)")
    parser.add_argument("--kill", action="store_true", help="kill the replica that served the session (needs 2)")
    arguments = parser.parse_args()
    try:
        return 0 if check(arguments.url, arguments.kill) else 1
    except (errors.UnrollError, subprocess.CalledProcessError) as error:
        print(f"failed: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
