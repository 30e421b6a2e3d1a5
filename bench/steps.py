"""One time step per request: HTTP, WebSocket, a single client, and the limits they are compared with."""

import subprocess
import sys

from bench import subjects
from bench.http_client import post
from bench.load import Measurement
from bench.outcomes import Outcome, Row, at_most, fastest, ratio
from bench.reference import Reference
from bench.turns import Bench, Servers, Turn, by_name
from bench.websocket_client import ENTRY, HEADER

CLIENTS = 64
#: Sessions per frame, and number of connections.
_ENTRIES, _CONNECTIONS = 256, 2
#: The most microseconds that the server may add to a bare echo plus the model.
_OWN_MICROSECONDS = 120


def limits(bench: Bench) -> list[Outcome]:
    """The limits of the machine."""
    found = []
    for name, reference in bench.models.items():
        features = reference.features
        with bench.servers() as servers:
            turns = [
                servers.turn(ceiling(features), CLIENTS),
                servers.turn(subjects.echo(features), CLIENTS),
                servers.turn(subjects.noop(features), CLIENTS),
                servers.turn(subjects.echo_websocket(features), CLIENTS),
                *(servers.raw(reference, batch) for batch in (1, 16, 64, 256)),
                *(servers.raw(reference, batch, 128) for batch in (1, 4, 16, 32, 64)),
            ]
            title = f"What the machine allows, {name}: one core; requests, steps or sequences a second"
            found.append(Outcome(f"limits-{name}", title, "1/s", bench.alternate(turns)))
    return found


def http(bench: Bench) -> list[Outcome]:
    """64 HTTP clients."""
    return [_http_small(bench), _http_medium(bench)]


def _http_small(bench: Bench) -> Outcome:
    reference = bench.models["small"]
    keys = str(bench.folder / "keys.toml")
    new_key = [sys.executable, "-m", "unroll", "keys", "new", keys, "--tenant", "bench"]
    key = subprocess.run(new_key, check=True, capture_output=True, text=True).stdout.strip()
    with bench.servers() as servers:
        launch, guarded = bench.unroll(), bench.unroll("--keys", keys, name="unroll-key")
        turns = [
            servers.turn(ceiling(reference.features), CLIENTS),
            servers.turn(subjects.echo(reference.features), CLIENTS),
            servers.turn(subjects.raw_steps(launch, reference), CLIENTS),
            servers.turn(subjects.raw_steps(guarded, reference, key), CLIENTS),
            servers.turn(subjects.json_steps(launch, reference), CLIENTS),
            servers.turn(subjects.infer_steps(launch, reference), CLIENTS),
        ]
        turns += _peers(bench, servers, reference, CLIENTS)
        rows = bench.alternate(turns)
    named = by_name(rows)
    ours, echo, triton = named["unroll"], named["echo"], fastest(named, "triton")
    verdicts = [
        ratio(1, "small, HTTP, raw bytes: of the bare echo", 1.4, ours, echo),
        ratio(1, "small, HTTP, raw bytes: of Triton", 2.2, ours, triton),
        ratio(1, "small, HTTP, raw bytes: of the naive server", 6.0, ours, named.get("naive")),
        ratio(1, "small, HTTP, raw bytes, with an API key: of without", 0.97, named["unroll-key"], ours),
        ratio(2, "small, HTTP, JSON: of the bare echo", 1.1, named["unroll-json"], echo),
        ratio(3, "small, HTTP, Open Inference: of the bare echo", 1.0, named["unroll-infer"], echo),
        ratio(3, "small, HTTP, Open Inference: of Triton", 2.0, named["unroll-infer"], triton),
    ]
    return Outcome("http-small", "One step a request, 64 HTTP clients, LSTM 2×64", "steps/s", rows, verdicts)


def _http_medium(bench: Bench) -> Outcome:
    reference = bench.models["medium"]
    with bench.servers() as servers:
        turns = [
            servers.turn(ceiling(reference.features), CLIENTS),
            servers.turn(subjects.echo(reference.features), CLIENTS),
            servers.turn(subjects.raw_steps(bench.unroll(), reference), CLIENTS),
        ]
        turns += _peers(bench, servers, reference, CLIENTS)
        rows = bench.alternate(turns)
    named = by_name(rows)
    says = "medium, HTTP, raw bytes: of the bare echo"
    verdicts = [ratio(4, says, 0.50, named["unroll"], named["echo"])]
    return Outcome("http-medium", "One step a request, 64 HTTP clients, LSTM 2×256", "steps/s", rows, verdicts)


def websocket(bench: Bench) -> list[Outcome]:
    """64 WebSockets with one step per frame; two with 256 sessions per frame."""
    reference = bench.models["small"]
    with bench.servers() as servers:
        frame_bytes = HEADER.size + ENTRY.itemsize + 4 * reference.features
        turns = [
            servers.turn(subjects.ceiling_websocket(frame_bytes), CLIENTS),
            servers.turn(subjects.echo_websocket(reference.features), CLIENTS),
            servers.turn(subjects.stream_steps(bench.unroll(), reference), CLIENTS),
        ]
        rows = bench.alternate(turns)
    named = by_name(rows)
    says = "small, WebSocket, a step a frame: of the bare WebSocket echo"
    verdict = ratio(5, says, 0.8, named["unroll-ws"], named["ws-echo"])
    single = Outcome("websocket", "One step a frame, 64 WebSockets, LSTM 2×64", "steps/s", rows, [verdict])
    return [single, _wide_frames(bench, "small", 0.70), _wide_frames(bench, "medium", 0.88)]


def _wide_frames(bench: Bench, name: str, bound: float) -> Outcome:
    """Two connections, so that the server computes one frame while the other is in transit."""
    reference = bench.models[name]
    with bench.servers() as servers:
        turns = [
            servers.raw(reference, _ENTRIES),
            servers.turn(subjects.echo_websocket(reference.features, _ENTRIES), _CONNECTIONS),
            servers.turn(subjects.stream_steps(bench.unroll(), reference, _ENTRIES), _CONNECTIONS),
        ]
        rows = bench.alternate(turns)
    raw, _, ours = rows
    says = f"{name}, WebSocket, {_ENTRIES} sessions a frame: of onnxruntime alone"
    verdict = ratio(6, says, bound, ours, raw)
    title = f"{_ENTRIES} sessions a frame, {_CONNECTIONS} WebSockets, {name} model"
    return Outcome(f"websocket-{name}-{_ENTRIES}", title, "steps/s", rows, [verdict])


def latency(bench: Bench) -> list[Outcome]:
    """One client that sends one step at a time."""
    reference = bench.models["small"]
    with bench.servers() as servers:
        launch = bench.unroll()
        turns = [
            servers.raw(reference, 1),
            servers.turn(subjects.echo(reference.features), 1),
            servers.turn(subjects.raw_steps(launch, reference), 1),
            servers.turn(subjects.echo_websocket(reference.features), 1),
            servers.turn(subjects.stream_steps(launch, reference), 1),
            *_peers(bench, servers, reference, 1),
        ]
        rows = bench.alternate(turns)
    named = by_name(rows)
    raw, echo, ours = (named[name] for name in ("raw-1", "echo", "unroll"))
    says = "one client: median latency above that of the bare echo and of onnxruntime alone"
    each = [_above(*turns) for turns in zip(ours.turns, echo.turns, raw.turns, strict=True)]
    verdict = at_most(7, says, _OWN_MICROSECONDS, _above(ours, echo, raw), each, " µs")
    return [Outcome("latency", "One client, one step at a time, LSTM 2×64", "steps/s", rows, [verdict])]


def _above(ours: Row | Measurement, echo: Row | Measurement, raw: Row | Measurement) -> float:
    """Microseconds of median latency above echo plus model, of rows or of single turns."""
    return (ours.p50 - echo.p50 - raw.p50) * 1e3


def _peers(bench: Bench, servers: Servers, reference: Reference, clients: int) -> list[Turn]:
    found = bench.peer_subjects(servers, lambda peer, launch: subjects.peer_steps(peer, launch, reference))
    return [servers.turn(subject, clients) for subject in found]


def ceiling(features: int) -> subjects.Subject:
    return subjects.ceiling(post("/", bytes(4 * features)), 4 * features)
