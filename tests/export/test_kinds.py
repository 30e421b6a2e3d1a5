"""Every kind of module is either exported with PyTorch's results or refused with a reason.

`make test` skips kinds that take the same path through export as another, and runs loops over few steps.
`make long-test` exports all kinds and runs loops over as many steps as a user's export.
"""

import copy
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from served_models.models import BUNDLES
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils import _pytree as pytree

from conformance.kinds import TESTED, Kind
from conformance.kinds.shipped import SHIPPED
from unroll import bundle
from unroll.export import ExportError, export
from unroll.export.signature.outputs import leaves

#: The exported kinds in `make test`: one per path through export.
SHORT = {
    "time first throughout",
    "learned initial state",
    "a GRU as a function, with a mask on its weights",
    "state in self.h",
}
#: The refused kinds that `make test` skips: they are slow, and another kind is refused for the same reason.
LONG = {
    "an operator that ONNX lacks",
    "a loop that depends on the length",
    "one of two states kept",
    "a loop that skips every 168th step",
    "a loop that returns nothing before step 30",
    "a loop with a table that changes by day",
    "a loop that ends after a million steps",
    "a loop that begins again every 24 steps",
    "a loop that begins again every 5000 steps",
    "a loop that grows until step 5000",
    "a loop over the first 64 steps",
    "a loop in windows of 50",
    "a loop that keeps all it has seen",
    "a layer whose rows of one sequence are apart",
    "mean over the batch",
    "another number in each step",
    "a loop from the second step",
}


ALL = [*TESTED, *SHIPPED]
EXPORTED = [kind for kind in ALL if kind.refused is None]
REFUSED = [kind for kind in ALL if kind.refused is not None]


def _named(kinds: Iterable[Kind]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("kind", [pytest.param(kind, id=kind.name) for kind in kinds])


@_named(kind for kind in EXPORTED if kind.name in SHORT)
def test_supported_kind_is_exported_after_few_steps(kind: Kind, few_steps: None, tmp_path: Path) -> None:
    _export(kind, tmp_path)


@pytest.mark.long
@_named(EXPORTED)
def test_supported_kind_is_exported(kind: Kind, tmp_path: Path) -> None:
    _export(kind, tmp_path)


def _export(kind: Kind, repository: Path) -> None:
    module, example = kind.build(), kind.example()
    given = copy.deepcopy(example)
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    training, random_state = module.training, torch.get_rng_state()

    report = export(module, example, name="m", repository=repository, **kind.options)

    manifest = report.manifest
    assert manifest.streamable == kind.streams, manifest.not_streamable_because
    assert kind.says in (manifest.not_streamable_because or "")
    assert manifest.ragged == kind.ragged
    assert manifest.bit_exact or not kind.bit_exact
    assert tuple(spec.name for spec in manifest.outputs) == kind.outputs
    assert (report.path / "golden.safetensors").stat().st_size <= 64 * 1024
    assert bundle.read(report.path).manifest == manifest
    assert b".py" not in (report.path / "model.onnx").read_bytes()  # no stack traces with local paths
    assert module.training == training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(map(torch.equal, _tensors(given), _tensors(example))), "the caller's example was changed"
    assert all(torch.equal(tensor, weights[name]) for name, tensor in module.state_dict().items())
    _answers_like_torch(kind, module, example, report)


def _tensors(example: dict) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, torch.Tensor)]


def _answers_like_torch(kind, module, example, report) -> None:
    """Compare the bundle, from its initial state, with the unmodified module on inputs of another size."""
    first, unbatched = kind.options.get("batch_first", True), "without a batch" in kind.name
    last = kind.options.get("time_last", False)
    inputs, given = {}, {}
    for name, value in example.items():
        packed = isinstance(value, PackedSequence)
        tensor = pad_packed_sequence(value, batch_first=True)[0] if packed else value[None] if unbatched else value
        if name in {spec.name for spec in report.manifest.inputs}:
            tensor = tensor.movedim(-1, 1) if last else tensor
            major = tensor if first else tensor.transpose(0, 1)
            rows = major[torch.randint(0, len(major), (2,))][:, torch.randint(0, major.shape[1], (11,))]
            inputs[name] = rows
            given[name] = rows.movedim(1, -1) if last else rows if first else rows.transpose(0, 1)
            if packed:
                given[name] = pack_padded_sequence(rows, torch.tensor([11, 11]), batch_first=True)
        else:
            given[name] = torch.tensor([11, 11]) if name == "lengths" else value
    feeds = {name: tensor.numpy().copy() for name, tensor in inputs.items()}  # forward may change its arguments
    static = [{spec.name: given[spec.name][row].numpy() for spec in report.manifest.static} for row in range(2)]
    feeds |= {
        "state": np.stack([report.manifest.initial_row(values) for values in static]),
        "sequence_lens": np.full(2, 11, np.int32),
    }
    session = onnxruntime.InferenceSession(report.path / "model.onnx", providers=["CPUExecutionProvider"])
    names = [spec.name for spec in report.manifest.outputs]
    with torch.no_grad():
        module.eval()
        if unbatched:
            one_by_one = [leaves(module(**{name: value[row] for name, value in given.items()})) for row in range(2)]
            returned = [torch.stack([tensor for _, tensor in each]) for each in zip(*one_by_one, strict=True)]
        else:
            returned = [tensor for _, tensor in leaves(module(**given))]
    for name, ours in zip(names, session.run(names, feeds), strict=True):
        axes = [(tensor, axes) for tensor in returned for axes in _orders(tensor)]
        assert any(
            t.permute(order).shape == ours.shape and np.allclose(t.permute(order), ours, atol=3e-6) for t, order in axes
        ), name


def _orders(tensor: torch.Tensor) -> list[tuple[int, ...]]:
    rest = range(tensor.dim())
    return [(a, b, *(i for i in rest if i not in {a, b})) for a in rest for b in rest if a != b]


@_named(kind for kind in REFUSED if kind.name not in LONG)
def test_unsupported_kind_is_refused_after_few_steps(kind: Kind, few_steps: None, tmp_path: Path) -> None:
    _refuse(kind, tmp_path)


@pytest.mark.long
@_named(REFUSED)
def test_unsupported_kind_is_refused(kind: Kind, tmp_path: Path) -> None:
    _refuse(kind, tmp_path)


def _refuse(kind: Kind, repository: Path) -> None:
    with pytest.raises(ExportError) as refusal:
        export(kind.build(), kind.example(), name="m", repository=repository, **kind.options)
    assert refusal.value.code == kind.refused, refusal.value
    assert kind.says in str(refusal.value)
    assert len(str(refusal.value)) < 400
    assert list(repository.iterdir()) == []


def test_named_kinds_exist() -> None:
    assert {kind.name for kind in REFUSED} > LONG
    assert {kind.name for kind in EXPORTED} > SHORT


def test_one_node_per_layer() -> None:
    """The committed bundle has one node per layer; tests/served_models checks that a new export equals it."""
    found = bundle.read(BUNDLES / "embedding-LSTM-norm-GRU" / "1")
    nodes = [node.op_type for node in onnx.ModelProto.FromString(found.model).graph.node]
    assert nodes.count("LSTM") == 2
    assert nodes.count("GRU") == 1
    assert found.manifest.inputs[0].limit == 11
    assert found.manifest.state_size == 6 * 2 * 2 + 5
    assert [(s.module, s.layer, s.kind, s.offset) for s in found.manifest.state] == [
        ("first", 0, "h", 0),
        ("first", 0, "c", 6),
        ("first", 1, "h", 12),
        ("first", 1, "c", 18),
        ("second", 0, "h", 24),
    ]
