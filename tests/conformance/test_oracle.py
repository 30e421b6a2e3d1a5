"""The oracle detects bundles that contradict their manifest; otherwise passing it would mean nothing."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch

from conformance import modules
from conformance.oracle import Wrong, WrongBits, examine
from conformance.trees import Conv, Dense, Recurrent, Tree
from unroll import bundle
from unroll.export import export

GRU = Recurrent("GRU", 3, 4)
GOOD = Tree("floats", 3, (GRU, Dense(4, 3)), "steps")


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`write(tree, **claims)` returns the path of the tree's bundle, with these claims in its manifest."""

    @cache
    def exported(tree: Tree) -> bundle.Bundle:
        example = {name: torch.from_numpy(a) for name, a in modules.draw(tree, 2, 7, np.random.default_rng(0)).items()}
        report = export(modules.build(tree), example, name="m", repository=tmp_path_factory.mktemp("exported"))
        return bundle.read(report.path)

    def one(tree: Tree, **claims: object) -> Path:
        found = exported(tree)
        manifest = replace(found.manifest, **claims)
        folder = tmp_path_factory.mktemp("claims")
        return bundle.write(folder, manifest, found.model, found.golden)

    return one


def ask(path: Path, tree: Tree) -> object:
    single, double = modules.build(tree), modules.build(tree).double()
    return examine(
        path,
        lambda inputs, wide: modules.answers(double if wide else single, inputs, double=wide),
        partial(modules.draw, tree),
    )


def test_valid_bundle_passes_the_oracle(write) -> None:
    finding = ask(write(GOOD), GOOD)
    assert finding.error < 1e-6
    assert finding.bits


def test_changed_weights_are_detected(write) -> None:
    with pytest.raises(Wrong, match=r"y of \d sequences of 6 steps is off"):
        ask(write(GOOD), replace(GOOD, seed=1))


@pytest.mark.long
def test_false_streaming_claim_is_detected(write) -> None:
    tree = Tree("floats", 3, (replace(GRU, bidirectional=True),), "steps")
    with pytest.raises(Wrong, match="in chunks"):
        ask(write(tree, streamable=True, not_streamable_because=None), tree)


@pytest.mark.long
def test_false_ragged_claim_is_detected(write) -> None:
    tree = replace(GOOD, end="last")
    with pytest.raises(Wrong, match="padded to"):
        ask(write(tree, ragged=True), tree)


@pytest.mark.long
def test_changed_initial_state_is_detected(write) -> None:
    tree = replace(GOOD, blocks=(replace(GRU, start="learned"), Dense(4, 3)))
    with pytest.raises(Wrong, match="is off"):
        ask(write(tree, initial_state=None), tree)


@pytest.mark.long
def test_false_exactness_claim_is_detected(write) -> None:
    tree = replace(GOOD, blocks=(Conv(3, 3, 1), GRU))
    path = write(tree, bit_exact=True)
    with pytest.raises(WrongBits, match="bit_exact"):
        ask(path, tree)
