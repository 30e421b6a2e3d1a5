"""Many small models in one server, and large models, whose cost is computing."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

from bench import inputs
from bench.durability import processor_time
from bench.outcomes import Outcome, ratio
from bench.reference import Reference, export
from bench.subjects import Subject, raw_steps, unroll
from bench.turns import Bench, by_name

_MODELS, _SESSIONS = 40, 20
_CLIENTS = (1, 16, 64)
#: The targets: of one model's rate, and of onnxruntime alone.
_MANY_BOUND, _LARGE_BOUND = 0.7, 0.95


def models(bench: Bench) -> list[Outcome]:
    repository = bench.folder / "large" / "repository"
    export(repository, "large")
    return [_small(bench), *(_large(bench, Reference(name, repository)) for name in inputs.LARGE)]


def _small(bench: Bench) -> Outcome:
    """The same number of sessions on one model and on 40, all stepping at the same time."""
    reference = bench.models["small"]
    subjects = raw_steps(bench.unroll(), reference), _many(bench, reference)
    with bench.servers() as servers:
        turns = [servers.turn(subject, _MODELS * _SESSIONS) for subject in subjects]
        one, many = rows = bench.alternate(turns)
        processes = {subject.name: servers.server(subject.launch) for subject in subjects}
        remarks = [processor_time(bench, turn, processes) for turn in turns]
    says = f"small, HTTP, raw bytes, {_MODELS} models with {_SESSIONS} sessions each: of one model with all"
    title = f"{_MODELS * _SESSIONS} sessions on one model and on {_MODELS}, a step a request, LSTM 2×64"
    return Outcome("models", title, "steps/s", rows, [ratio(16, says, _MANY_BOUND, many, one)], remarks)


def _many(bench: Bench, reference: Reference) -> Subject:
    repository = bench.folder / "many"
    launch = unroll(repository, name="unroll-many")
    subjects = []
    for number in range(_MODELS):
        model = copy.copy(reference)
        model.name = f"{reference.name}-{number}"
        _copy(reference.path.parent, repository / model.name / "1", model.name)
        subjects.append(raw_steps(launch, model))
    what = f"Unroll, raw bytes, {_MODELS} models"
    return Subject("unroll-many", what, launch, lambda n: subjects[n % _MODELS].client(n), subjects[0].check)


def _copy(bundle: Path, folder: Path, name: str) -> None:
    shutil.copytree(bundle, folder)
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"name": name}))


def _large(bench: Bench, reference: Reference) -> Outcome:
    """As many clients as onnxruntime alone has rows in its batch."""
    subject = raw_steps(unroll(reference.path.parents[2]), reference)
    with bench.servers() as servers:
        ours = [replace(turn, name=f"unroll-{turn.at}", at=None) for turn in servers.turns(subject, _CLIENTS)]
        rows = bench.alternate([*(servers.raw(reference, count) for count in _CLIENTS), *ours])
    named, name = by_name(rows), reference.name
    verdicts = [
        ratio(
            17,
            f"{name}, HTTP, raw bytes, {n} clients: of onnxruntime alone",
            _LARGE_BOUND,
            named[f"unroll-{n}"],
            named[f"raw-{n}"],
        )
        for n in _CLIENTS[1:]
    ]
    return Outcome(f"models-{name}", f"One step a request, {name}", "steps/s", rows, verdicts)
