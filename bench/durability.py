"""The cost of durable sessions.

Redis runs on the load generator's core, as if on another machine: the server's work for a commit counts, but not
Redis's own.
"""

import base64
import json
import random
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from time import perf_counter

import numpy as np
from redis import Redis

from bench import inputs
from bench.http_client import JSON, RAW, http_client, post
from bench.load import WARM_UP, Client, Measurement
from bench.outcomes import Outcome, Row, ratio
from bench.reference import Reference
from bench.roaming import roaming_client
from bench.servers import HOST, Server, running_server
from bench.steps import CLIENTS, ceiling
from bench.subjects import Launch, Subject, WrongAnswer, check_steps, raw_steps
from bench.turns import Bench, Servers, Turn, by_name
from deploy import local_redis

#: The target, as a share of the rate with sessions in memory.
_BOUND = 0.6
#: Number of sessions that are reloaded, one after another.
_RELOADED = 500
_FSYNC = ("everysec", "always")
_SYNC = ("never", "everysec", "always")
_SNAPSHOT_KEYS = ("--snapshot-keys", '["a key of the benchmark"]')


def durability(bench: Bench) -> list[Outcome]:
    return _durability(bench, bench.models["small"], "durability")


def durability_medium(bench: Bench) -> list[Outcome]:
    return _durability(bench, bench.models["medium"], "durability-medium")


def _durability(bench: Bench, reference: Reference, name: str) -> list[Outcome]:
    if why := local_redis.missing():
        return [Outcome(name, "Durable sessions", remarks=[f"skipped: {why}"])]
    folder = bench.folder / name
    folder.mkdir()
    with ExitStack() as stack:
        redis = {fsync: stack.enter_context(_redis(bench, folder / fsync, fsync)) for fsync in _FSYNC}
        stores = {fsync: ("--store", f"redis://{HOST}:{server.port}/0") for fsync, server in redis.items()}
        local = ("--store", f"file://{folder}/routing")
        outcomes = [
            _durability_levels(bench, reference, folder, stores, redis),
            _reload(bench, reference, stores["everysec"]),
            _routing(bench, reference, "-routing", "Redis", stores["everysec"]),
            _routing(bench, reference, "-routing-folder", "a folder", local),
        ]
    layers = f"LSTM 2×{inputs.MODELS[reference.name].hidden}"
    return [replace(each, name=f"{name}{each.name}", title=f"{each.title}, {layers}") for each in outcomes]


@contextmanager
def _redis(bench: Bench, folder: Path, fsync: str) -> Iterator[Server]:
    """A redis-server on the load generator's core."""
    folder.mkdir()
    flags = f"--port PORT --bind {HOST} --dir {folder} --appendonly yes --appendfsync {fsync} --loglevel warning"
    command = (local_redis.server_path(), *flags.split(), "--save", "")
    with running_server(command, {sorted(bench.cores)[-1]}, folder / "log") as server:
        yield server


# ── steps, by durability ─────────────────────────────────────────────────────────────────────────


def _durability_levels(
    bench: Bench, reference: Reference, folder: Path, stores: dict[str, tuple[str, str]], redis: dict[str, Server]
) -> Outcome:
    with bench.servers() as servers:
        memory, held = bench.unroll(), bench.unroll(*_SNAPSHOT_KEYS, name="unroll-client")
        subjects = {memory: raw_steps(memory, reference), held: _client_held(held, reference)}
        for fsync, store in stores.items():
            launch = bench.unroll(*store, name=f"unroll-{fsync}")
            subjects[launch] = stored(launch, reference, f"in Redis, appendfsync {fsync}")
        for sync in _SYNC:
            local = ("--store", f"file://{folder}/{sync}-sync", "--store-sync", sync)
            launch = bench.unroll(*local, name=f"unroll-folder-{sync}")
            subjects[launch] = stored(launch, reference, f"in a folder, --store-sync {sync}")
        measured = {launch: servers.turn(subject, CLIENTS) for launch, subject in subjects.items()}
        turns = [servers.turn(ceiling(reference.features), CLIENTS), *measured.values()]
        rows = bench.alternate(turns)
        processes = {server.name: servers.server(server) for server in measured}
        processes |= {f"Redis with {fsync}": server for fsync, server in redis.items()}
        remarks = [processor_time(bench, turn, processes) for turn in measured.values()]
    remarks.append(
        f"a session takes {_bytes_of_a_session(redis['everysec'].port):,.0f} bytes in Redis (MEMORY USAGE of its keys)"
    )
    named = by_name(rows)
    says = "HTTP, raw bytes, sessions in Redis (everysec): of those in memory"
    verdicts = [ratio(13, says, _BOUND, named["unroll-everysec"], named["unroll"])]
    title = f"Durability, a step a request, {CLIENTS} HTTP clients; Redis on the load generator's core"
    return Outcome("", title, "steps/s", rows, verdicts if reference.name == "small" else [], remarks)


def processor_time(bench: Bench, turn: Turn, processes: dict[str, Server]) -> str:
    """Processor time of a step, which is insensitive to other load."""
    before = {name: process.cpu_seconds() for name, process in processes.items()}
    steps = turn.measure(bench.seconds).rate * bench.seconds * (1 + WARM_UP)
    took = {name: (process.cpu_seconds() - before[name]) / steps * 1e6 for name, process in processes.items()}
    each = ", ".join(f"{took[name]:.0f} µs in {name}" for name in took if took[name] >= 1)
    return f"{turn.name}: a step takes {each}"


def stored(launch: Launch, reference: Reference, where: str) -> Subject:
    subject = raw_steps(launch, reference)
    return replace(subject, name=launch.name, what=f"Unroll, raw bytes, {where}")


def _client_held(launch: Launch, reference: Reference) -> Subject:
    """Each request carries the snapshot of the previous reply."""
    sessions = f"/v1/models/{reference.name}/sessions"
    outputs = 4 * reference.features

    def client(n: int) -> Client:
        made = http_client((), n, unstepped=1)
        rows = reference.rows[n]

        def next_request() -> bytes:
            if not made.answered:
                return post(sessions, {"session_id": f"held-{n}", "durability": "client"})
            body = made.last[0]
            first = made.answered == 1
            snapshot = base64.b64decode(json.loads(body)["snapshot"]) if first else body[:-outputs]
            row = rows[(made.answered - 1) % len(rows)]
            headers = {"Unroll-Snapshot-Length": str(len(snapshot))}
            return post(f"{sessions}/held-{n}/steps", snapshot + row.tobytes(), headers)

        made.next_request = next_request
        return made

    check = check_steps(launch.name, reference, lambda body: np.frombuffer(body[-outputs:], np.float32))
    return Subject(launch.name, "Unroll, raw bytes, the client holds the signed state", launch, client, check)


def _bytes_of_a_session(port: int) -> float:
    """The mean over all sessions in Redis."""
    with Redis(HOST, port) as redis:
        keys: list[bytes] = redis.keys("unroll:*")
        total = sum(redis.memory_usage(key, samples=0) for key in keys)
        return total / len({key.removesuffix(b":gone") for key in keys})


# ── one session, two replicas ────────────────────────────────────────────────────────────────────


def _reload(bench: Bench, reference: Reference, store: tuple[str, str]) -> Outcome:
    """A session's first step at a replica that does not hold it, and its second."""
    path = f"/v1/models/{reference.name}/sessions"
    row = reference.rows[0, 0].tobytes()
    first, second = [], []
    with bench.servers() as servers:
        here, there = (servers.server(bench.unroll(*store, name=f"unroll-{name}")).port for name in ("here", "there"))
        with closing(HTTPConnection(HOST, here)) as one, closing(HTTPConnection(HOST, there)) as other:
            for n in range(20 if bench.quick else _RELOADED):
                _timed_post(one, path, json.dumps({"session_id": f"reloaded-{n}"}).encode(), JSON)
                step = f"{path}/reloaded-{n}/steps"
                _timed_post(one, step, row)
                first.append(_timed_post(other, step, row))
                second.append(_timed_post(other, step, row))
    rows = [
        Row("reloaded", "the first step at another replica, one client", [_measurement(first)]),
        Row("resident", "the step after it", [_measurement(second)]),
    ]
    return Outcome("-reload", "A session goes on at another replica", "steps/s", rows)


def _timed_post(connection: HTTPConnection, path: str, body: bytes, media: str = RAW) -> float:
    """POST, and return the seconds until the reply."""
    began = perf_counter()
    connection.request("POST", path, body, {"Content-Type": media})
    reply = connection.getresponse()
    content = reply.read()
    if reply.status not in (200, 201):
        raise WrongAnswer(f"a step of a session was answered with {reply.status}: {content[:200]!r}")
    return perf_counter() - began


def _measurement(seconds: list[float]) -> Measurement:
    p50, p99 = np.percentile(seconds, [50, 99]) * 1e3
    return Measurement(len(seconds) / sum(seconds), float(p50), float(p99))


def _routing(bench: Bench, reference: Reference, name: str, where: str, store: tuple[str, str]) -> Outcome:
    """Two replicas on the server's core."""
    with bench.servers() as servers:
        launches = [bench.unroll(*store, name=f"unroll-{name}") for name in ("one", "two")]
        ports = [servers.server(launch).port for launch in launches]
        turns = [
            _routed_turn(servers, "sticky", "each session at one of two replicas", launches[0], reference, ports),
            _routed_turn(servers, "random", "each step at either of two replicas", launches[0], reference, ports),
            _routed_turn(servers, "positions", "the same, with positions", launches[0], reference, ports),
        ]
        sticky, random_routing, positions = rows = bench.alternate(turns)
        processes = {launch.name: servers.server(launch) for launch in launches}
        remarks = [processor_time(bench, turn, processes) for turn in turns]
    title = f"Two replicas on one core, {CLIENTS} HTTP clients, sessions in {where}"
    shares = (random_routing.rate / sticky.rate, positions.rate / sticky.rate)
    remarks.append("random routing has {:.2f} of the rate of sticky routing, and {:.2f} with positions".format(*shares))
    return Outcome(name, title, "steps/s", rows, remarks=remarks)


def _routed_turn(
    servers: Servers, name: str, what: str, launch: Launch, reference: Reference, ports: list[int]
) -> Turn:
    sessions = f"/v1/models/{reference.name}/sessions"
    chance = random.Random(0)

    def client(n: int) -> Client:
        path, rows = f"{sessions}/{name}-{n}/steps", [row.tobytes() for row in reference.rows[n]]
        opening = [post(sessions, {"session_id": f"{name}-{n}"})]
        use_other = (lambda: n % 2 == 1) if name == "sticky" else (lambda: chance.random() < 0.5)
        made = roaming_client([post(path, row) for row in rows], n, opening, ports[1], use_other)

        def next_request() -> bytes:
            if not made.answered:
                return opening[0]
            return post(path, rows[made.steps % len(rows)], {"Unroll-Position": str(made.steps)})

        if name == "positions":
            made.next_request = next_request
        return made

    check = check_steps(name, reference, lambda body: np.frombuffer(body, np.float32))
    subject = Subject(name, f"Unroll, raw bytes, {what}", launch, client, check)
    return servers.load_turn(subject, ports[0], [client(n) for n in range(CLIENTS)], other_ports=ports[1:])
