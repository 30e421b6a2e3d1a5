"""Exports random models. Each must be refused, or confirmed by an independent oracle; none may be silently wrong.

`python -m conformance fuzz --trees 2000` stores its results in `.fuzz/`, and a later run resumes from them.
"""

import copy
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings

from conformance import children, modules, onnx_registry, trees
from conformance.children import Died
from conformance.oracle import Wrong, WrongBits, examine
from conformance.strategies import trees as any_tree
from conformance.trees import Tree
from unroll.export import ExportError, Report, export

#: Trees per child process.
_TOGETHER = 25

#: Trees drawn per seed: few, because hypothesis draws similar trees in a row.
_ALIKE = 6

#: Successive calls of the module.
_CALLS = 60


@dataclass(frozen=True)
class Verdict:
    """A verdict on a tree: `outcome` is `streams`, `whole only`, `refused`, or one of BAD, which must not occur."""

    tree: str
    outcome: str
    code: str = ""
    says: str = ""
    error: float = 0.0


BAD = ("wrong", "wrong bits", "crashed", "timed out")


def judge(tree: Tree) -> Verdict:
    """Export the tree's model, and check the bundle, if any, with the oracle."""
    onnx_registry.cache_registry()
    verdict = partial(Verdict, repr(tree))
    model = modules.build(tree)
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = _export(model, Path(folder))
        except ExportError as refusal:
            return verdict("crashed" if refusal.code == "internal" else "refused", refusal.code, str(refusal))
        except Exception as failure:  # noqa: BLE001 any other exception is a finding
            return verdict("crashed", type(failure).__name__, str(failure)[:500])
        single, double = modules.build(tree), modules.build(tree).double()  # a call may leave state in a module
        try:
            error = examine(
                report.path,
                lambda inputs, wide: modules.answers(copy.deepcopy(double if wide else single), inputs, double=wide),
                lambda batch, time, rng: modules.draw(tree, batch, time, rng),
                seed=tree.seed,
            ).error
        except WrongBits as found:
            return verdict("wrong bits", "", str(found))
        except Wrong as found:
            return verdict("wrong", "", str(found))
        if differs := modules.differs_when_called_again(tree, _CALLS):
            return verdict("wrong", "", differs)
        if report.manifest.streamable:
            return verdict("streams", error=error)
        return verdict("whole only", "", str(report.manifest.not_streamable_because), error=error)


def _export(model: modules.Model, folder: Path) -> Report:
    tree, options = model.tree, dict[str, Any]()
    example: dict[str, Any] = modules.arguments(tree, modules.draw(tree, 2, 7, np.random.default_rng(1)))
    if isinstance(model, modules.StepModel):
        example = modules.at(example, 0) | model.start(2)
        options = {"step": True, "state": dict.fromkeys(model.start(2), "y1")}
    return export(
        model,
        example | ({"mask": None} if tree.mask == "None" else {}),
        name="m",
        repository=folder,
        batch_first=tree.layout != "time first",
        time_last=tree.layout == "time last",
        static={"goal"} & example.keys(),
        allow_nan={"x"} if tree.source == "missing" else (),
        **options,
    )


def draw(count: int) -> Iterator[Tree]:
    """Yield `count` distinct trees, the same ones on every run."""
    found: set[str] = set()
    number = 0
    while len(found) < count:
        for tree in _drawn(number):
            if repr(tree) not in found and len(found) < count:
                found.add(repr(tree))
                yield tree
        number += 1


def _drawn(number: int) -> list[Tree]:
    collected: list[Tree] = []

    @seed(number)
    @settings(
        max_examples=_ALIKE,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(any_tree())
    def collect(tree: Tree) -> None:
        collected.append(tree)

    collect()
    return collected


class Store:
    """Stores one verdict per line, so that an interrupted run loses nothing."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "verdicts.jsonl"
        if self._path.exists() and not (found := self._path.read_bytes()).endswith(b"\n"):
            self._path.write_bytes(found + b"\n")  # an earlier run was killed while writing

    def read(self) -> list[Verdict]:
        if not self._path.exists():
            return []
        verdicts = []
        for line in self._path.read_text().splitlines():
            with suppress(json.JSONDecodeError):  # an incomplete line
                verdicts.append(Verdict(**json.loads(line)))
        return verdicts

    def add(self, verdict: Verdict) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(verdict)) + "\n")


def run(count: int, folder: Path, workers: int) -> list[Verdict]:
    """Verdicts on `count` trees; those stored in `folder` are reused."""
    store = Store(folder)
    wanted = {repr(tree): tree for tree in draw(count)}
    done = {verdict.tree: verdict for verdict in store.read() if verdict.tree in wanted}
    todo = [tree for name, tree in wanted.items() if name not in done]
    for tree, answer in children.run(judge, todo, children=workers, each=_TOGETHER, seconds=600):
        verdict = answer
        if isinstance(answer, Died):
            verdict = Verdict(repr(tree), *answer.reason.partition(" (")[:1], says=answer.reason)
        store.add(verdict)
        done[repr(tree)] = verdict
        if verdict.outcome in BAD:
            print(f"{verdict.outcome}: {verdict.says}\n  {verdict.tree}", flush=True)
        if len(done) % 100 == 0:
            print(f"{len(done)} of {count}: {dict(Counter(v.outcome for v in done.values()))}", flush=True)
    return list(done.values())


def parse(text: str) -> Tree:
    """Parse the `repr` of a tree."""
    names = {name: value for name, value in vars(trees).items() if isinstance(value, type)}
    return eval(text, {"__builtins__": {}}, names)


def counts(verdicts: list[Verdict]) -> list[str]:
    """One line per outcome, with refusals by code."""
    outcomes = Counter(verdict.outcome for verdict in verdicts)
    codes = Counter(verdict.code for verdict in verdicts if verdict.outcome == "refused")
    worst = max((verdict.error for verdict in verdicts), default=0.0)
    lines = [f"{len(verdicts)} random models"]
    lines += [f"  {outcomes[name]:6} {name}" for name in ("streams", "whole only", "refused")]
    lines += [f"         {number:6} {code}" for code, number in codes.most_common()]
    lines += [f"  {outcomes[name]:6} {'silently wrong' if name == 'wrong' else name}" for name in BAD]
    return [*lines, f"  largest error against float64 of those exported: {worst:.2g}"]
