"""The report of `unroll doctor`: the facts of this machine, and findings with remedies."""

import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import metadata
from itertools import groupby
from typing import TYPE_CHECKING, Any

from unroll import __version__
from unroll.service.doctor import ask, machine, nvidia_driver
from unroll.service.doctor.facts import Driver, Facts, Runtime
from unroll.service.doctor.findings import Finding, Status, devices, judge

if TYPE_CHECKING:
    from unroll.commands.doctor import Doctor


def report(options: "Doctor") -> tuple[list[Finding], dict[str, Any]]:
    """Examine this machine, and the store and files in the options. Returns the findings and their facts."""
    facts = examine(options.device)
    stored, about_store = _examine_store(options.store) if options.store else (None, [])
    findings = [*judge(facts, options.device), *about_store, *_examine_files(options)]
    return findings, asdict(facts) | {"store": stored}


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


def _examine_files(options: "Doctor") -> list[Finding]:
    """Return the findings. Imported on demand, like the store."""
    try:
        from unroll.service.access.certificate import TlsFiles
        from unroll.service.doctor import files
    except ImportError as error:
        return [Finding("files", Status.BROKEN, str(error), "pip install 'unroll-serve[cpu]'")]
    cert = options.tls_cert
    tls = None if cert is None else TlsFiles(cert, options.tls_key, options.tls_password_file)
    return [*files.examine(tls, options.keys)]


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
