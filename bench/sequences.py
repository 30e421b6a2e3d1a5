"""Whole sequences: by themselves, and uploaded while other clients stream."""

import asyncio

import uvloop

from bench import subjects
from bench.load import Client, Load, Measurement
from bench.outcomes import Outcome, Row, at_most, fastest, ratio
from bench.turns import Bench, by_name, require_no_errors

_LENGTH, _CLIENTS = 128, 16
_BATCHES = (1, 4, 16, 32, 64)
#: Clients that stream, and clients that upload sequences at the same time.
_STREAMS, _UPLOADS, _UPLOAD_LENGTH = 64, 4, 4096


def sequences(bench: Bench) -> list[Outcome]:
    """16 clients, 128 time steps per request; the server on one core, and on all."""
    found = []
    for name, of_triton in (("small", 1.1), ("medium", 1.0)):
        found.append(_sequences(bench, name, of_triton, all_cores=False))
        found.append(_sequences(bench, name, of_triton, all_cores=True))
    return found


def _sequences(bench: Bench, name: str, of_triton: float, *, all_cores: bool) -> Outcome:
    reference = bench.models[name]
    where = f"{len(bench.cores)} cores" if all_cores else "one core"
    with bench.servers(bench.cores if all_cores else None) as servers:
        turns = [] if all_cores else [servers.raw(reference, batch, _LENGTH) for batch in _BATCHES]
        turns.append(servers.turn(subjects.raw_sequences(bench.unroll(), reference, _LENGTH), _CLIENTS))
        peers = bench.peer_subjects(
            servers, lambda peer, launch: subjects.peer_sequences(peer, launch, reference, _LENGTH)
        )
        turns += [servers.turn(subject, _CLIENTS) for subject in peers]
        rows = bench.alternate(turns)
    named = by_name(rows)
    says = f"{name}, sequences of {_LENGTH}, {where}"
    verdicts = [ratio(8, f"{says}: of Triton", of_triton, named["unroll"], fastest(named, "triton"))]
    if not all_cores:
        best = fastest(named, "raw")
        verdicts.append(ratio(8, f"{says}: of onnxruntime's best batch", 0.75, named["unroll"], best))
    title = f"Sequences of {_LENGTH} steps, {_CLIENTS} HTTP clients, {name} model, server on {where}"
    suffix = "-cores" if all_cores else ""
    return Outcome(f"sequences-{name}{suffix}", title, "sequences/s", rows, verdicts)


def mixed(bench: Bench) -> list[Outcome]:
    """64 streams while 4 clients upload long sequences, and each by itself."""
    reference = bench.models["small"]
    with bench.servers() as servers:
        launch = bench.unroll()
        port = servers.server(launch).port
        streaming = subjects.raw_steps(launch, reference)
        uploading = subjects.raw_sequences(launch, reference, _UPLOAD_LENGTH)
        streams = [streaming.client(number) for number in range(_STREAMS)]
        uploads = [uploading.client(number) for number in range(_UPLOADS)]
        alone = [servers.load_turn(streaming, port, streams), servers.load_turn(uploading, port, uploads)]
        for turn in alone:
            turn.check()
        measured: list[tuple[Measurement, ...]] = []
        for _ in range(bench.repeats):
            separate = [turn.measure(bench.seconds) for turn in alone]
            together = uvloop.run(_together(port, streams, uploads, bench.seconds))
            measured.append((*separate, *together))
        for turn in alone:
            turn.compare()
    names = {
        "streams alone": f"{_STREAMS} clients, one step a request",
        "uploads alone": f"{_UPLOADS} clients, {_UPLOAD_LENGTH} steps a request; sequences/s",
        "streams": "while there are uploads",
        "uploads": "while there are streams; sequences/s",
    }
    columns = zip(*measured, strict=True)
    rows = [Row(name, what, runs) for (name, what), runs in zip(names.items(), columns, strict=True)]
    streams_alone, uploads_alone, mixed_streams, mixed_uploads = rows
    says = "streams while others upload: p99, of their p99 alone"
    pairs = zip(mixed_streams.turns, streams_alone.turns, strict=True)
    slower = [in_mix.p99 / by_itself.p99 for in_mix, by_itself in pairs]
    p99_ratio = mixed_streams.p99 / streams_alone.p99
    p99 = at_most(9, says, 2.0, p99_ratio, slower, "×")
    says = "uploads while others stream: of their rate alone"
    rate = ratio(9, says, 0.5, mixed_uploads, uploads_alone)
    title = f"{_STREAMS} streams while {_UPLOADS} clients upload {_UPLOAD_LENGTH} steps, LSTM 2×64"
    return [Outcome("mixed", title, "steps/s", rows, [p99, rate])]


async def _together(
    port: int, streams: list[Client], uploads: list[Client], seconds: float
) -> tuple[Measurement, Measurement]:
    async with Load(port, streams) as first, Load(port, uploads) as second:
        await first.run_once()
        both = await asyncio.gather(first.run(seconds), second.run(seconds))
    return require_no_errors("streams", both[0]), require_no_errors("uploads", both[1])
