"""The public names: flags, error codes with their statuses, routes, members of bodies, metrics."""

import contextlib
import io
import re

import httpx
from prometheus_client.parser import text_string_to_metric_families

from unroll import cli
from unroll.bundle.errors import REMEDIES
from unroll.service.api.all_workers import metrics_of_all
from unroll.service.core.errors import with_codes
from unroll.service.descriptions import PREFIX
from unroll.service.settings import Settings
from unroll.service.sources import CONFIG
from unroll.service.telemetry.metrics import Collector, StoreFigures

_OPTIONS = re.compile(r"^ {1,4}(-\S.*?)(?:  |$)", re.MULTILINE)
_COMMAND = re.compile(r"^  ([a-z]+)  ", re.MULTILINE)
_FLAG = re.compile(r"(?<![\w-])--?[a-z][a-z0-9-]*")


def flags() -> dict[str, list[str]]:
    """Return the flags of every command, as its help lists them."""
    found = {}
    for command in _COMMAND.findall(_help()):
        actions = _COMMAND.findall(_help(command)) if "COMMAND ..." in _help(command) else []
        found |= {f"{command} {action}": _flags(_help(command, action)) for action in actions} or {
            command: _flags(_help(command))
        }
    return found


def _help(*command: str) -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        cli.main([*command, "--help"])
    return text.getvalue()


def _flags(text: str) -> list[str]:
    return sorted({flag for options in _OPTIONS.findall(text) for flag in _FLAG.findall(options)})


def settings() -> list[str]:
    return sorted([CONFIG, *(f"{PREFIX}{name.upper()}" for name in Settings.model_fields)])


def codes() -> dict[str, int]:
    """Return the HTTP status of every error code."""
    return {kind.code: kind.status for kind in sorted(with_codes(), key=lambda kind: kind.code)}


def bundle_codes() -> list[str]:
    """Return the codes with which bundles are refused."""
    return sorted(REMEDIES)


def routes(client: httpx.Client) -> list[str]:
    paths = client.get("/openapi.json").json()["paths"]
    return sorted(f"{method.upper()} {path}" for path, methods in paths.items() for method in methods)


def bodies(client: httpx.Client) -> dict[str, list[str]]:
    """Return the members of every schema; `!` marks required ones."""
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    return {
        name: [member + "!" * (member in schema.get("required", ())) for member in schema["properties"]]
        for name, schema in sorted(schemas.items())
    }


def metrics(client: httpx.Client) -> list[str]:
    """Return the name of every sample, with its label names."""
    return _samples(client.get("/metrics").text)


def store_metrics() -> list[str]:
    """Return the metrics that exist only with a store."""
    figures = StoreFigures(evicts=False, bytes={"file": 0, "used": 0})
    text = b"".join(Collector(list, {}, (), (), dict, figures).exposition()).decode()
    return [name for name in _samples(text) if name.startswith("unroll_store")]


def worker_metrics() -> list[str]:
    """Return the metrics of the port shared by the workers."""
    return _samples(bytes(metrics_of_all([None]).body).decode())


def _samples(text: str) -> list[str]:
    families = text_string_to_metric_families(text)
    samples = [sample for family in families for sample in family.samples if sample.name.startswith("unroll")]
    return sorted({f"{sample.name}{{{','.join(sorted(sample.labels))}}}" for sample in samples})
