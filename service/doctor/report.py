"""The report of `unroll doctor`: the facts of this machine, and findings with remedies."""

import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any

from unroll import __version__
from unroll.service.doctor import ask, machine, nvidia_driver
from unroll.service.doctor.facts import Driver, Facts, Runtime
from unroll.service.doctor.findings import Finding, Status, devices, judge


@dataclass(frozen=True, slots=True)
class Given:
    """The store and files of a server, which must work.

    Attributes:
        store: A URL.
        tls_cert, tls_key, tls_password_file, keys: Paths of files.
    """

    store: str | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_password_file: Path | None = None
    keys: Path | None = None


def report(device: str, given: Given) -> tuple[list[Finding], dict[str, Any]]:
    """Examine this machine; return the findings and the facts behind them.

    Args:
        device: The device that must work: cpu, auto, cuda:N or several of these.
        given: The store and files that must work.
    """
    facts = examine(device)
    stored, about_store = _examine_store(given.store) if given.store else (None, [])
    return [*judge(facts, device), *about_store, *_examine_files(given)], asdict(facts) | {"store": stored}


def examine(device: str) -> Facts:
    """Collect the facts. This takes about a second on a CPU, and a few on each GPU.

    Args:
        device: Tried even if it does not seem to exist.
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
        packages={
            package.name: package.version
            for package in metadata.distributions()
            if "onnxruntime" in (package.read_text("top_level.txt") or "").split()
        },
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
        from unroll.service.doctor import store
    except ImportError as error:
        return None, [Finding("store", Status.BROKEN, str(error), "pip install 'unroll-serve[cpu]'")]
    known = store.examine(url)
    return asdict(known), list(store.judge(known))


def _examine_files(given: Given) -> list[Finding]:
    """Return the findings. Imported on demand, like the store."""
    try:
        from unroll.service.access.certificate import TlsFiles
        from unroll.service.doctor import files
    except ImportError as error:
        return [Finding("files", Status.BROKEN, str(error), "pip install 'unroll-serve[cpu]'")]
    tls = None if given.tls_cert is None else TlsFiles(given.tls_cert, given.tls_key, given.tls_password_file)
    return [*files.examine(tls, given.keys)]


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
