"""`python -m bench`: throughput and latency of Unroll, compared with the machine's limits and with other servers."""

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from bench import (
    clients,
    durability,
    environments,
    inputs,
    machine,
    models,
    python_client,
    report,
    scale,
    sequences,
    steps,
    workers,
)
from bench.outcomes import Outcome
from bench.peers import PEERS, Peer
from bench.reference import Reference, export
from bench.servers import ROOT, on_cores
from bench.turns import FAILURES, Bench

SCENARIOS: dict[str, Callable[[Bench], list[Outcome]]] = {
    "limits": steps.limits,
    "http": steps.http,
    "websocket": steps.websocket,
    "latency": steps.latency,
    "sequences": sequences.sequences,
    "mixed": sequences.mixed,
    "ramp": clients.ramp,
    "clients": clients.clients,
    "open-loop": clients.open_loop,
    "sessions": scale.sessions,
    "start": scale.start,
    "durability": durability.durability,
    "durability-medium": durability.durability_medium,
    "workers": workers.workers,
    "models": models.models,
    "python-client": python_client.python_client,
}
RESULTS = ROOT / ".bench" / "results.json"
_QUICK_SECONDS, _QUICK_REPEATS = 0.1, 1
_MOST_REPEATS = 12  # each turn of `ramp` has new sessions, and inputs has values for this many turns


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    if arguments.write_docs:
        from bench import documents  # only this needs matplotlib

        documents.write(documents.merged(arguments.write_docs), ROOT / "docs")
        return 0
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    about = machine.describe(_options(arguments))
    cores = about["cores"]
    print(f"servers on core {cores[0]}, load generator on core {cores[-1]} of {about['cpu']}", flush=True)
    try:
        peers = _peers(arguments.peers)
        with tempfile.TemporaryDirectory(prefix="bench-") as folder, on_cores({cores[-1]}):
            return _run(arguments, about, _prepare(arguments, cores, peers, Path(folder)))
    except environments.EnvironmentFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the servers are stopped", file=sys.stderr)
        return 130


def _run(arguments: argparse.Namespace, about: dict[str, Any], bench: Bench) -> int:
    """Run the scenarios one after another; the results file is written after each."""
    remarks = machine.remarks(about)
    settings = {"seconds": bench.seconds, "repeats": bench.repeats, "quick": bench.quick, "peers": [*bench.peers]}
    results: dict[str, Any] = {"runs": [{"about": about, "settings": settings, "remarks": remarks}], "outcomes": {}}
    good = True
    for name in arguments.only:
        for outcome in _outcomes(name, bench):
            document = outcome.document(judged=not bench.quick)
            document["remarks"] += bench.failures
            results["outcomes"][outcome.name] = document
            print(report.table(document), flush=True)
            good = good and not outcome.failed
        bench.failures.clear()
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    print("\n" + "\n".join(f"Note: {remark}" for remark in remarks) + f"\nresults: {arguments.json}")
    return 0 if good else 1


def _outcomes(name: str, bench: Bench) -> list[Outcome]:
    """Run a scenario; if it fails, it has no figures, and the rest still run."""
    try:
        return SCENARIOS[name](bench)
    except FAILURES as error:
        return [Outcome(name, name, failed=f"{type(error).__name__}: {error}")]


def _prepare(
    arguments: argparse.Namespace, cores: list[int], peers: Mapping[str, tuple[Peer, Path]], folder: Path
) -> Bench:
    repository = arguments.models or folder / "repository"
    if arguments.models is None:
        export(repository)
    models = {name: Reference(name, repository) for name in inputs.MODELS}
    seconds, repeats = arguments.seconds, arguments.repeats
    if arguments.quick:
        seconds, repeats = _QUICK_SECONDS, _QUICK_REPEATS
    return Bench(folder, seconds, repeats, arguments.quick, cores[0], cores, repository, models, peers)


def _peers(which: str) -> dict[str, tuple[Peer, Path]]:
    """The peers to compare with, and their interpreters."""
    found = {}
    for name, peer in PEERS.items():
        if which == "none" or (which == "naive" and peer.environment):
            continue
        build = environments.ensure if which == "all" else environments.existing
        if python := build(name, peer.environment):
            found[name] = peer, python
    return found


def _options(arguments: argparse.Namespace) -> list[str]:
    """The command line options that the figures depend on."""
    options = ["--quick"] if arguments.quick else []
    options += [f"--seconds={arguments.seconds:g}", f"--repeats={arguments.repeats}", f"--peers={arguments.peers}"]
    return options if arguments.only == [*SCENARIOS] else [*options, f"--only={','.join(arguments.only)}"]


def _interrupt(number: int, frame: FrameType | None) -> None:
    """As Ctrl-C, which a running event loop handles."""
    signal.raise_signal(signal.SIGINT)


def _scenarios(text: str) -> list[str]:
    wanted = text.split(",")
    if unknown := set(wanted) - SCENARIOS.keys():
        raise argparse.ArgumentTypeError(f"no scenario {', '.join(sorted(unknown))}")
    return [name for name in SCENARIOS if name in wanted]


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    names = ",".join(SCENARIOS)
    parser.add_argument("--only", type=_scenarios, default=[*SCENARIOS], metavar="NAMES", help=f"of {names}")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one turn, at most 60 (default: 3)")
    parser.add_argument("--repeats", type=int, default=5, help=f"turns of each, at most {_MOST_REPEATS} (default: 5)")
    parser.add_argument("--quick", action="store_true", help="functional test; the figures mean nothing")
    peers = "servers to compare with (default: those whose environments exist; all: create the environments first)"
    parser.add_argument("--peers", choices=["none", "naive", "existing", "all"], default="existing", help=peers)
    parser.add_argument("--models", type=Path, metavar="FOLDER", help="output of `python -m bench.model FOLDER`")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE", help="results (default: .bench)")
    docs = "only write docs/benchmarks.md from these results; later files take precedence"
    parser.add_argument("--write-docs", type=Path, nargs="+", metavar="FILE", help=docs)
    arguments = parser.parse_args(argv)
    if not (0 < arguments.seconds <= 60 and 0 < arguments.repeats <= _MOST_REPEATS):
        parser.error("out of bounds, see --help")
    return arguments


if __name__ == "__main__":
    os.chdir(ROOT)
    raise SystemExit(main())
