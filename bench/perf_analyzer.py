"""Triton's own load generator, perf_analyzer, on Unroll and on the Triton peers, in turns.

    python -m bench.perf_analyzer PROGRAM [--clients 1,16,64] [--seconds 5] [--repeats 5]

Sequences of 50 single steps over HTTP, so every fiftieth request is a START and every fiftieth an END. The servers have
one core, perf_analyzer another. The bench does not install PROGRAM. Its own wheel needs glibc 2.38. With an older one,
take it from the wheel of tritonclient 2.41.0, and put libcudart 12 and libb64, which the Triton peer's environment has,
on LD_LIBRARY_PATH.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from urllib.request import urlopen

from bench.environments import existing
from bench.peers import PEERS
from bench.servers import HOST, Server, on_cores, running_server, suspended
from bench.subjects import Launch, peer_launch, unroll

_MODEL, _SHAPE, _LENGTH = "small", "x:1,16", 50
_WINDOWS = 3
_EXPORT_SECONDS = 300
_HEADER = f"{'server':<16}{'clients':>8}{'steps/s':>10}{'Unroll is ×':>14}{'p50 ms':>9}{'p99 ms':>9}{'cpu µs/step':>13}"

#: Steps per second, p50 and p99 in milliseconds, the server's processor microseconds per step.
Figures = tuple[float, float, float, float]


def _launches(repository: Path) -> list[Launch]:
    """Unroll, and the Triton peers whose environment exists."""
    models = {_MODEL: repository / _MODEL / "1" / "model.onnx"}
    peers = [peer for peer in PEERS.values() if peer.program == "triton"]
    pythons = [(peer, existing(peer.name, peer.environment)) for peer in peers]
    return [unroll(repository), *(peer_launch(peer, python, models) for peer, python in pythons if python)]


def _steps(server: Server) -> int:
    with urlopen(f"http://{HOST}:{server.port}/v2/models/{_MODEL}/stats", timeout=10) as answer:
        count: int = json.load(answer)["model_stats"][0]["inference_count"]
    return count


def _measure(program: Path, server: Server, clients: int, seconds: float, table: Path) -> Figures:
    options = f"-m {_MODEL} -u {HOST}:{server.port} -i http --shape {_SHAPE} --percentile 99 -f {table}"
    options += f" --sequence-length {_LENGTH} --sequence-length-variation 0 --concurrency-range {clients}:{clients}"
    # It measures until three windows agree: any three do.
    options += f" --measurement-interval {seconds * 1000:.0f} --max-trials {_WINDOWS} --stability-percentage 999"
    steps, computed = _steps(server), server.cpu_seconds()
    done = subprocess.run([program, *options.split()], capture_output=True, text=True, timeout=60 + 10 * seconds)
    if done.returncode:
        raise SystemExit(f"perf_analyzer failed: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    row = next(csv.DictReader(table.open()))
    rate, *latencies = (float(row[column]) for column in ("Inferences/Second", "p50 latency", "p99 latency"))
    cpu = (server.cpu_seconds() - computed) / (_steps(server) - steps) * 1e6
    return rate, latencies[0] / 1e3, latencies[1] / 1e3, cpu


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.perf_analyzer", description=__doc__.partition("\n")[0])
    parser.add_argument("program", type=Path)
    parser.add_argument("--clients", default="1,16,64")
    parser.add_argument("--seconds", type=float, default=5.0, help=f"length of each of a turn's {_WINDOWS} windows")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args(argv)
    cores = sorted(os.sched_getaffinity(0))
    found: dict[tuple[int, str], list[Figures]] = defaultdict(list)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="perf-")))
        export = [sys.executable, "-m", "bench.model", str(folder / "repository")]
        subprocess.run(export, check=True, timeout=_EXPORT_SECONDS)
        stack.enter_context(on_cores(cores[-1:]))
        servers = {}
        for launch in _launches(folder / "repository"):
            (folder / launch.name).mkdir()
            log = folder / f"{launch.name}.log"
            command = launch.command(folder / launch.name)
            server = stack.enter_context(running_server(command, cores[:1], log, launch.ready_path))
            servers[launch.name] = server
        for clients in map(int, arguments.clients.split(",")):
            for _ in range(arguments.repeats):
                for name, server in servers.items():
                    with suspended(other for other in servers.values() if other is not server):
                        table = folder / "table.csv"
                        figures = _measure(arguments.program, server, clients, arguments.seconds, table)
                        found[clients, name].append(figures)
    print(_HEADER)
    for (clients, name), runs in found.items():
        rate, p50, p99, cpu = (median(values) for values in zip(*runs, strict=True))
        ratios = [ours[0] / run[0] for ours, run in zip(found[clients, "unroll"], runs, strict=True)]
        of = f"{min(ratios):.2f}–{max(ratios):.2f}"
        print(f"{name:<16}{clients:>8}{rate:>10,.0f}{of:>14}{p50:>9.2f}{p99:>9.2f}{cpu:>13.1f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
