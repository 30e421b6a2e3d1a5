"""`unroll doctor`: collects the facts, prints the findings, and exits with 0 if the requested device and store work."""

import argparse
import json
import os
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import import_module, metadata
from itertools import groupby
from typing import Any

from unroll import __version__
from unroll.service.doctor import ask, machine, nvidia_driver
from unroll.service.doctor.facts import Driver, Facts, Runtime
from unroll.service.doctor.findings import Finding, Status, devices, judge


def main(argv: list[str]) -> int:
    """Return 0 if the requested device and store work, else 1."""
    options = _parser().parse_args(argv)
    facts = examine(options.device)
    stored, about_store = _examine_store(options.store) if options.store else (None, [])
    findings = [*judge(facts, options.device), *about_store]
    works = not any(finding.fault for finding in findings)
    if options.json:
        report = {"works": works, "device": options.device, "findings": list(map(asdict, findings))}
        print(json.dumps(report | {"facts": asdict(facts) | {"store": stored}}, indent=2))
    else:
        print(*lines(findings), sep="\n")
    return 0 if works else 1


def examine(device: str) -> Facts:
    """Collect the facts. This takes about a second on a CPU, and a few on each GPU.

    Args:
        device: Is tried even if it does not seem to exist.
    """
    found = nvidia_driver.find()
    runtime, problem = None, None
    try:
        runtime = ask.runtime()
    except ask.TrialFailed as failure:
        problem = str(failure)
    return Facts(
        python=f"{platform.python_version()}, {sys.executable}",
        unroll=__version__,
        packages={name: metadata.version(name) for name in metadata.packages_distributions().get("onnxruntime", [])},
        machine=machine.look(),
        bindings=next((package.version for package in metadata.distributions(name="cuda-bindings")), None),
        driver=found,
        runtime=runtime,
        runtime_problem=problem,
        sessions={name: ask.session(name) for name in _to_try(device, found, runtime)},
    )


def _examine_store(url: str) -> tuple[dict[str, Any] | None, list[Finding]]:
    """Return the facts and the findings. Imported on demand: the packages of the server may be missing."""
    try:
        examine_store = import_module("unroll.service.doctor.store").examine
        judge_store = import_module("unroll.service.doctor.store_findings").judge_store
    except ImportError as error:
        return None, [Finding("store", Status.BROKEN, str(error), "pip install 'unroll-serve[cpu]'")]
    known = examine_store(url)
    return asdict(known), list(judge_store(known))


def lines(findings: Sequence[Finding]) -> Iterator[str]:
    """Yield one line for each finding, and the remedy below the findings that share it."""
    width = max(len(finding.name) for finding in findings)
    for mend, together in groupby(findings, key=lambda finding: finding.mend):
        for finding in together:
            yield f"{finding.status:<8} {finding.name:<{width}}  {finding.says}"
        if mend:
            yield f"{'':<8} {'':<{width}}  → {mend}"


def _to_try(device: str, found: Driver | None, runtime: Runtime | None) -> list[str]:
    if runtime is None:
        return []
    cuda = "CUDAExecutionProvider" in runtime.providers
    there = [f"cuda:{index}" for index in range(len(found.gpus) if found and cuda else 0)]
    return list(dict.fromkeys(["cpu", *there, *devices(device, runtime)]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "unroll doctor", description="Report what this machine can serve models with, and how to fix the rest."
    )
    parser.add_argument(
        "--device",
        type=_device,
        default=os.environ.get("UNROLL_DEVICE", "auto"),
        help="device that must work: cpu, cuda:N, several as in cuda:0,cuda:1, or auto (default: %(default)s)",
    )
    parser.add_argument(
        "--store",
        metavar="URL",
        default=os.environ.get("UNROLL_STORE"),
        help="store that must work, as for `unroll serve`: what it is, what it survives, and how long a commit takes",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def _device(word: str) -> str:
    if not re.fullmatch(r"cpu|auto|cuda:\d+(,cuda:\d+)*", word):
        raise argparse.ArgumentTypeError("use cpu, auto, or GPUs as in cuda:0 or cuda:0,cuda:1")
    return word


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
