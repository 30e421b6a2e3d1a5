"""Which nodes and inputs a model is exported to, and which sources a model may come from."""

import copy
import threading
import weakref
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from oracle import Oracle
from torch import Tensor, nn
from torch.nn import functional

from conformance.kinds.kind import made
from unroll import cli
from unroll.bundle import Manifest
from unroll.export import ExportError, export
from unroll.export.lifting.float64 import converted, double_precision
from unroll.export.loading.copies import detached_copy
from unroll.export.verification.preconditions import check_copy


class Handwritten(nn.Module):
    """An LSTM with a custom gate order, one weight matrix, and c before h. `limit` turns it into another function."""

    def __init__(self, limit: float | None = None) -> None:
        super().__init__()
        self.joint = nn.Linear(10, 24)
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        c = h = x.new_zeros(x.shape[0], 6)
        outs = []
        for t in range(x.shape[1]):
            o, i, g, f = self.joint(torch.cat([h, x[:, t]], 1)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            if self.limit is not None:
                c = c.clamp(-self.limit, self.limit)
            h = o.sigmoid() * c.tanh()
            outs.append(h)
        return torch.stack(outs, 1)


@pytest.mark.parametrize(
    ("limit", "node", "kinds"),
    [(None, "LSTM", ["h", "c"]), pytest.param(50.0, "Scan", ["carry", "carry"], marks=pytest.mark.long)],
)
def test_cell_is_recognised_by_its_results(few_steps: None, tmp_path: Path, limit, node: str, kinds: list[str]) -> None:
    report = export(Handwritten(limit), {"x": torch.randn(2, 6, 4)}, name="m", repository=tmp_path)
    nodes = Counter(each.op_type for each in onnx.load(report.path / "model.onnx").graph.node)
    assert (nodes["LSTM"], nodes["Scan"]) == (node == "LSTM", node == "Scan")
    assert sorted(slot.kind for slot in report.manifest.state) == sorted(kinds)
    assert report.manifest.streamable
    assert report.manifest.bit_exact


def collected(s: Any, steps: Iterable[Tensor]) -> list[Tensor]:
    h, outs = torch.zeros(1, 4), []
    for step in steps:
        h = torch.tanh(step + h * s.r)
        outs.append(h)
    return outs


def two_loops(s: Any, x: Tensor) -> Tensor:
    """The second loop iterates over a list of the first loop's outputs."""
    return torch.stack(collected(s, collected(s, x.unbind(1))), 1)


def three_loops(s: Any, x: Tensor) -> Tensor:
    return torch.stack([s.head(h) for h in collected(s, collected(s, x.unbind(1)))], 1)


@pytest.mark.long
@pytest.mark.parametrize("forward", [two_loops, three_loops])
def test_loops_over_the_outputs_of_an_earlier_loop_stream(few_steps: None, tmp_path: Path, forward: Any) -> None:
    module = made(forward, r=nn.Parameter(torch.rand(4) / 2), head=nn.Linear(4, 3))
    report = export(module, {"x": torch.randn(2, 7, 4)}, name="m", repository=tmp_path)
    assert report.manifest.streamable
    assert report.manifest.ragged


class Forecast(nn.Module):
    """A time series with static inputs: the item and the location."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(13, 3)
        self.rnn = nn.GRU(9, 6, batch_first=True)

    def forward(self, item: Tensor, x: Tensor, where: Tensor) -> Tensor:
        known = torch.cat([self.items(item), where], 1)[:, None].expand(-1, x.shape[1], -1)
        return self.rnn(torch.cat([x, known], 2))[0]


def test_static_inputs_are_kept_in_the_row(tmp_path: Path) -> None:
    module = Forecast()
    example = {"item": torch.tensor([3, 4]), "x": torch.randn(2, 7, 4), "where": torch.randn(2, 2)}
    report = export(module, example, static=["item", "where"], name="m", repository=tmp_path)
    manifest = report.manifest
    assert [spec.name for spec in manifest.inputs] == ["x"]
    assert {spec.name: (spec.dtype, spec.shape, spec.limit) for spec in manifest.static} == {
        "item": ("int64", (), 13),
        "where": ("float32", (2,), None),
    }
    assert manifest.streamable
    assert manifest.bit_exact
    assert "static" in str(report)

    x, where = np.random.default_rng(0).standard_normal((1, 5, 4), np.float32), np.array([0.5, -2], np.float32)
    row = manifest.initial_row({"item": np.array(12), "where": where})[None]
    session = onnxruntime.InferenceSession(report.path / "model.onnx", providers=["CPUExecutionProvider"])
    found = []
    for t in range(5):
        feeds = {"x": x[:, t : t + 1], "state": row, "sequence_lens": np.ones(1, np.int32)}
        y, row = session.run(["y", "state_out"], feeds)
        found.append(y)
    with torch.no_grad():
        expected = module(torch.tensor([12]), torch.from_numpy(x), torch.from_numpy(where)[None])
    assert np.allclose(np.concatenate(found, 1), expected.numpy(), atol=1e-6)

    _refuses_a_wrong_beginning(manifest)


def _refuses_a_wrong_beginning(manifest: Manifest) -> None:
    item, where = np.array(1), np.zeros(2)
    for wrong, words in (
        ({}, "needs the static inputs"),
        ({"item": item}, "needs the static inputs"),
        ({"item": item, "where": np.zeros(3)}, "is \\(3,\\), not \\(2,\\)"),
        ({"item": np.array(13), "where": where}, "below 13"),
        ({"item": np.array(-1), "where": where}, "at least 0"),
    ):
        with pytest.raises(ValueError, match=words):
            manifest.initial_row(wrong)


class Rarely(nn.Module):
    """Code that affects only late steps or rare inputs, which probes would not reach."""

    def __init__(self, which: str) -> None:
        super().__init__()
        self.which = which
        self.embed = nn.Embedding(500, 4)
        self.rnn = nn.GRU(4, 6, batch_first=True)
        self.other = nn.Parameter(torch.randn(6))

    def forward(self, token: Tensor) -> Tensor:
        x, h = self.embed(token), None
        if self.which == "count":
            x = x + self.embed((torch.arange(x.shape[1]) // 1440) % 7)
        elif self.which == "past":
            x = x + functional.pad(x, (0, 0, 2000, 0))[:, : x.shape[1]]
        else:
            h = torch.where(token[:, :1] == 3, self.other, 0.0)[None]
        return self.rnn(x, h)[0]


@pytest.mark.parametrize(
    "which", [pytest.param("count", marks=pytest.mark.long), pytest.param("past", marks=pytest.mark.long), "has begun"]
)
def test_late_or_rare_differences_are_kept(tmp_path: Path, which: str) -> None:
    manifest = export(Rarely(which), {"token": torch.randint(0, 500, (2, 9))}, name="m", repository=tmp_path).manifest
    assert manifest.streamable
    assert which in {slot.kind for slot in manifest.state} | {slot.module for slot in manifest.state}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 6, 2, batch_first=True)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_file_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.jit.script(Net().eval()).save(str(tmp_path / "net.pt"))
    arguments = ["export", str(tmp_path / "net.pt"), "--input", "x:float32:4", "--repository", str(tmp_path / "r")]
    assert cli.main(arguments) == 0
    nodes = Counter(node.op_type for node in onnx.load(tmp_path / "r/net/1/model.onnx").graph.node)
    assert nodes["LSTM"] == 2


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The tensor attributes")
def test_torch_export_program_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, both = torch.randn(2, 7, 4), {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    program = torch.export.export(Net().eval(), (x,), dynamic_shapes=(both,))
    assert export(program, {"x": x}, name="m", repository=tmp_path).manifest.streamable

    with pytest.raises(ExportError, match="dynamic_shapes"):
        export(torch.export.export(Net().eval(), (x,)), {"x": x}, name="n", repository=tmp_path)

    arguments = ["export", "net.pt2", "--input", "x:float32:4", "--repository", str(tmp_path)]
    assert cli.main(arguments) == 1
    assert "can run code" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float16, marks=pytest.mark.long)])
def test_models_in_other_dtypes_are_exported_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    report = export(Net().to(dtype), {"x": torch.randn(2, 7, 4, dtype=dtype)}, name="m", repository=tmp_path)
    assert report.manifest.inputs[0].dtype == "float32"
    assert any("computes in float32" in note for note in report.notes)


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 5, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, _ = self.rnn(x)
        return y.mean(1), (x * x).sum(dim=1, keepdim=True)


def test_long_means_and_sums_round_no_more_than_in_pytorch(repository: Path) -> None:
    module = Pooled().eval()
    export(module, {"x": torch.randn(2, 8, 3)}, name="pooled", repository=repository)
    x = torch.randn(5000, 3)
    found, _ = Oracle(repository, "pooled").all(x.numpy())
    with torch.no_grad():
        single, double = module(x[None]), module.double()(x[None].double())
    for mine, pytorch, truth in zip(found, single, double, strict=True):
        assert abs(mine - truth[0].numpy()).max() <= 2 * abs(pytorch - truth).max() + 1e-8


class CopiesItself(nn.Linear):
    """Its `__deepcopy__` drops other attributes and fails for its weights."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "CopiesItself":
        copied = CopiesItself(self.in_features, self.out_features)
        copied.state.data = self.state.data.clone()  # type: ignore[union-attr, operator]
        return copied


class PicklesItself(nn.Linear):
    """Is rebuilt from its sizes and weights when unpickled; the weights then require gradients again."""

    __slots__ = ("gain",)

    def __getstate__(self) -> dict[str, Any]:
        return {"sizes": (self.in_features, self.out_features), "weights": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(*state["sizes"])  # type: ignore[misc]
        self.load_state_dict(state["weights"])


@pytest.mark.parametrize("kind", [CopiesItself, PicklesItself])
def test_copy_of_a_self_copying_module_keeps_added_attributes(kind: type[nn.Linear]) -> None:
    module = nn.Sequential(kind(3, 2))
    if kind is PicklesItself:
        PicklesItself.gain.__set__(module[0], 3.0)  # type: ignore[attr-defined]
    copied = detached_copy(module)
    copied[0].put = copied[0].weight
    again = copy.deepcopy(copied)
    assert type(again[0]) is kind
    assert getattr(again[0], "gain", 3.0) == 3.0
    assert not again[0].weight.requires_grad
    assert again[0].put is again[0].weight
    torch.testing.assert_close(again[0].weight, module[0].weight)


def test_replaced_forward_is_refused() -> None:
    module = nn.Sequential(nn.Linear(3, 2))
    before = module[0].forward
    module[0].forward = lambda x: before(x)
    with pytest.raises(ExportError, match=r"'0.forward' is a function that refers to a module") as refused:
        detached_copy(module)
    assert refused.value.code == "not_copyable"


class Drops:
    """A helper whose copies lose its gain, as a cache that is not pickled."""

    def __init__(self) -> None:
        self.gain: Any = 3.0

    def __getstate__(self) -> dict[str, Any]:
        return {"gain": 1.0}


class Rebuilds(Drops):
    def __deepcopy__(self, memo: dict[int, Any]) -> "Rebuilds":
        return Rebuilds()


class Locked(Drops):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class Shared:
    """Has no `__dict__`, and its copies are itself."""

    __slots__ = ("gain",)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Shared":
        return self


class Gained(nn.Module):
    """Scales by the gain of a helper, and writes to everything that it holds."""

    def __init__(self, helper: Any) -> None:
        super().__init__()
        self.helper, self.plain = [helper], [nn.Linear(3, 3)]
        self.count, self.last = nn.Buffer(torch.zeros(1)), {"x": torch.zeros(1)}

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.last["x"] = x
        helper = self.helper[0]
        return self.plain[0](x) * (helper[0] if isinstance(helper, list) else helper.gain)


@pytest.mark.parametrize("kind", [Drops, Rebuilds, Locked, Shared])
def test_a_helper_that_copies_itself_keeps_its_values(kind: Any) -> None:
    helper, x = kind(), torch.randn(2, 3)
    helper.gain = torch.full((3,), 5.0)
    module = Gained(helper)
    again = converted(detached_copy(module), torch.float64)
    check_copy(module, detached_copy(module), {"x": x})
    assert (module.count, module.last, module.training) == (torch.zeros(1), {"x": torch.zeros(1)}, True)
    torch.testing.assert_close(again(x.double()), module(x).double())


def test_a_module_that_is_hidden_from_its_parent_is_converted() -> None:
    module = nn.Sequential(nn.Linear(3, 2))
    module.__dict__["hidden"] = nn.Linear(3, 2)
    again = converted(detached_copy(module), torch.float64)
    assert again.hidden.weight.dtype == torch.float64


LAYER = nn.GRU(4, 3, batch_first=True).eval()


class Elsewhere(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return LAYER(x)[0]


class Rolled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.roll(self.rnn(x)[0], 1, 1)


@pytest.mark.parametrize(
    ("module", "says"), [(Elsewhere(), "not a part of the module"), (Rolled(), r"torch.roll.*: shift as with")]
)
def test_a_refusal_says_what_to_write_instead(few_steps: None, tmp_path: Path, module: nn.Module, says: str) -> None:
    with pytest.raises(ExportError, match=says):
        export(module, {"x": torch.randn(2, 6, 4)}, name="m", repository=tmp_path)


class Ones(list[float]):
    def __deepcopy__(self, memo: dict[int, Any]) -> "Ones":
        return Ones([1.0])


class Known(nn.Linear):
    gains: ClassVar = weakref.WeakKeyDictionary[nn.Module, float]()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gains.get(self, 1.0)


@pytest.mark.parametrize(
    ("module", "says"), [(Gained(Ones([2.0])), r"helper\[0\] \(Ones\)"), (Known(3, 3), r"id\(self\)")]
)
def test_a_copy_that_answers_differently_is_refused(module: nn.Module, says: str) -> None:
    Known.gains[module] = 2.0
    with pytest.raises(ExportError, match=says) as refused:
        check_copy(module, detached_copy(module), {"x": torch.randn(2, 3)})
    assert refused.value.code == "not_copyable"


@pytest.mark.parametrize("reference", [weakref.ref, weakref.proxy])
def test_a_weak_reference_to_a_module_is_refused(reference: Any) -> None:
    module = nn.Sequential(nn.Linear(3, 2))
    module.__dict__["parent"] = reference(module)
    with pytest.raises(ExportError, match="'parent' is a weak reference"):
        detached_copy(module)


def test_float64_takes_tensors_outside_the_module() -> None:
    weights, total = torch.eye(3), torch.zeros(2, 3)
    with double_precision():
        assert (torch.ones(2, 3) @ weights).dtype == torch.float64
        with pytest.raises(RuntimeError, match="dtype"):
            total.addmm_(torch.ones(2, 3), weights)


class Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(2, 3, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y, x = x.unbind(-1)
        return (
            self.rnn(torch.stack([y, x], -1))[0],
            torch.atan2(y, x),
            torch.signbit(y),
            torch.copysign(x, y),
            functional.logsigmoid(y * 50) + torch.logaddexp(y * 99, x * 99),
        )


def test_zeros_have_signs(repository: Path, few_steps: None) -> None:
    export(Turned().eval(), {"x": torch.randn(2, 8, 2)}, name="turned", repository=repository)
    x = torch.cartesian_prod(*[torch.tensor([0.0, -0.0, 1.0, -2.0])] * 2)
    (_, angle, negative, copied, log), _ = Oracle(repository, "turned").all(x.numpy())
    y, other = x.unbind(-1)
    torch.testing.assert_close(torch.from_numpy(angle), torch.atan2(y, other))
    torch.testing.assert_close(
        torch.from_numpy(log), functional.logsigmoid(y * 50) + torch.logaddexp(y * 99, other * 99)
    )
    assert torch.equal(torch.from_numpy(negative), y.signbit())
    assert torch.equal(torch.from_numpy(copied), torch.copysign(other, y))


class Fading(nn.Module):
    """Numbers that are nearly 0 and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(2, 3, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sound = x.abs()
        return self.rnn(x)[0], x * 0.999995, x / (sound + 1e-8)


def test_numbers_near_0_and_1_are_kept(repository: Path, few_steps: None) -> None:
    export(Fading().eval(), {"x": torch.randn(2, 8, 2)}, name="fading", repository=repository)
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    (_, faded, sign), _ = Oracle(repository, "fading").all(x.numpy())
    torch.testing.assert_close(torch.from_numpy(faded), x * 0.999995, rtol=1e-7, atol=0)
    torch.testing.assert_close(torch.from_numpy(sign), x / (x.abs() + 1e-8))
