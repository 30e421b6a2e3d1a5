"""A million open sessions, and the time from start to ready."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
import uvloop

from bench import inputs
from bench.http_client import http_client, post
from bench.load import Client, Load, Measurement
from bench.outcomes import Outcome, Row, Verdict, at_most, ratio
from bench.reference import Reference
from bench.servers import running_server
from bench.subjects import Launch, Subject, WrongAnswer
from bench.turns import Bench, Servers
from bench.websocket_client import read_outputs, steps_frame, websocket_client

_MANY, _FEW = 1_000_000, 1_000
_QUICK_MANY = 20_000
_GIB = 2**30
_NEEDED_GIB, _ALLOWED_GIB = 6.0, 2.5
#: The number of sessions per connection, and of entries per frame.
_OPENED, _ENTRIES = 4000, 1000
_CONNECTIONS = 4
#: The number of HTTP clients afterwards, and of prepared requests of each, to sessions that no other client uses.
_CLIENTS, _REQUESTS = 64, 1000
_START_BOUND_SECONDS = 1.5


def sessions(bench: Bench) -> list[Outcome]:
    """1,000,000 sessions with a step each: their memory, and their effect on the step rate."""
    many = _QUICK_MANY if bench.quick else _MANY
    title = f"{many:,} open sessions, LSTM 2×64"
    free = _available_bytes() / _GIB
    if free < _NEEDED_GIB:
        remark = f"skipped: {free:.1f} GiB of memory are free, it needs {_NEEDED_GIB:g}"
        return [Outcome("sessions", title, remarks=[remark])]
    options = ("--session-capacity", str(_MANY), "--idle-timeout", "0")
    resident = {}
    with bench.servers() as servers:
        turns = []
        for count in (_FEW, many):
            launch = bench.unroll(*options, name=f"unroll-{count}")
            before = servers.server(launch).resident_bytes() / _GIB
            _open_all(servers, launch, bench.models["small"], count)
            resident[count] = before, servers.server(launch).resident_bytes() / _GIB
            turns.append(servers.turn(_spread(launch, bench.models["small"], count), _CLIENTS))
        few, lots = rows = bench.alternate(turns)
        after = servers.server(launch).resident_bytes() / _GIB
    remarks = [f"{n:,} sessions: {b:.2f} GiB before, {a:.2f} GiB after" for n, (b, a) in resident.items()]
    most = max(after, resident[many][1])
    says = f"{_MANY:,} sessions of small"
    verdicts = [
        Verdict(11, f"{says}: memory", _ALLOWED_GIB, most, at_least=False, unit=" GiB"),
        ratio(11, f"{says}: step rate, of that with {_FEW:,}", 0.9, lots, few),
    ]
    return [Outcome("sessions", title, "steps/s", rows, verdicts, remarks)]


def start(bench: Bench) -> list[Outcome]:
    """From the start of the process to the first 200 of the readiness probe, with the small model only."""
    repository = bench.folder / "start"
    repository.mkdir()
    (repository / "small").symlink_to(bench.repository / "small", target_is_directory=True)
    command = bench.unroll().command(repository)
    command = tuple(str(repository) if word == str(bench.repository) else word for word in command)
    seconds = []
    for _ in range(bench.repeats):
        with running_server(command, {bench.server_core}, bench.folder / "start.log", "/v2/health/ready") as server:
            seconds.append(server.start_seconds)
    turns = [Measurement(1 / each, each * 1e3, each * 1e3) for each in seconds]
    rows = [Row("unroll", "from the process's start to ready; starts/s", turns)]
    says = "small: from the start to ready"
    verdict = at_most(12, says, _START_BOUND_SECONDS, median(seconds), seconds, " s")
    return [Outcome("start", "Start to ready, LSTM 2×64", "1/s", rows, [verdict])]


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _open_all(servers: Servers, launch: Launch, reference: Reference, count: int) -> None:
    """Open `count` sessions many-0, many-1, …, step each once, and compare every answer."""
    port = servers.server(launch).port
    firsts = np.stack([reference.last(session, 1) for session in range(inputs.SESSIONS)])
    groups = [range(first, min(first + _OPENED, count)) for first in range(0, count, _OPENED)]
    for i in range(0, len(groups), _CONNECTIONS):
        uvloop.run(_step_all(port, reference, groups[i : i + _CONNECTIONS], firsts))


async def _step_all(port: int, reference: Reference, groups: Sequence[range], firsts: np.ndarray) -> None:
    clients = [_opener(reference, group) for group in groups]
    async with Load(port, clients) as load:
        for _ in clients[0].requests:
            await load.run_once()
            for client in clients:
                handles, positions, values = (
                    np.concatenate(part) for part in zip(*map(read_outputs, client.last), strict=True)
                )
                right = np.array_equal(values, firsts[handles % inputs.SESSIONS])
                if len(handles) != _ENTRIES or (positions != 1).any() or not right:
                    raise WrongAnswer("unroll: a wrong answer to the first step of a session")


def _opener(reference: Reference, group: range) -> Client:
    frames = []
    for first in range(group.start, group.stop, _ENTRIES):
        numbers = np.arange(first, first + _ENTRIES)
        frames.append(steps_frame(numbers, reference.rows[numbers % inputs.SESSIONS, 0]))
    return websocket_client(f"/v1/models/{reference.name}/stream", frames, group, "many", _ENTRIES)


def _spread(launch: Launch, reference: Reference, count: int) -> Subject:
    """64 clients, each with its own share of the sessions, in random order."""
    order = np.random.default_rng(0).permutation(count)

    def numbers(n: int) -> np.ndarray:
        """The sessions of client n's requests."""
        return np.resize(order[n::_CLIENTS], _REQUESTS)

    def client(n: int) -> Client:
        path = f"/v1/models/{reference.name}/sessions/many-{{}}/steps"
        rows = reference.rows[n]
        requests = [post(path.format(s), rows[i % inputs.ROWS].tobytes()) for i, s in enumerate(numbers(n))]
        return http_client(requests, n)

    def check(client: Client) -> None:
        n, sent = client.sessions[0], np.arange(client.answered) % _REQUESTS
        each = numbers(n)
        session = each[sent[-1]]
        its = reference.rows[n][sent[each[sent] == session] % inputs.ROWS]
        first = reference.rows[session % inputs.SESSIONS, :1]
        if client.last[0] != reference.outputs(np.concatenate([first, its]))[-1].tobytes():
            raise WrongAnswer(f"unroll: session many-{session} got a wrong answer")

    return Subject(
        f"{count:,} sessions", "Unroll, raw bytes; each client goes round its sessions", launch, client, check
    )
