"""Weight files in common formats, with common keys and prefixes, and models without weights."""

import argparse
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from tests.bundle.sum_model import MANIFEST
from unroll import cli
from unroll.export import Report

SOURCE = """
import argparse

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


class Features(Net):
    def __init__(self):
        super().__init__()
        self.frequencies = torch.randn(3)


def trained():
    torch.manual_seed(5)
    return Net()


model = Net()


class Settings(argparse.Namespace):
    pass
"""

INPUT = ("--input", "x:float32:3")


class Exported:
    """Records the arguments that the command passes to `unroll.export`, in place of an export."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []

    def __call__(self, module: nn.Module, example: dict[str, Tensor], **options: Any) -> Report:
        self.modules.append(module)
        return Report(Path("out"), MANIFEST, ())


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Exported:
    (tmp_path / "mynet.py").write_text(SOURCE)
    monkeypatch.delitem(sys.modules, "mynet", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    fake = Exported()
    monkeypatch.setattr("unroll.export.command.export", fake)
    return fake


@pytest.fixture
def net(exported: Exported) -> nn.Module:
    import mynet

    return mynet.Net()


def run(*arguments: str) -> int:
    return cli.main(["export", *arguments, "--name", "n", "--repository", "out"])


def prefixed(prefix: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


def lightning(state: dict[str, Tensor]) -> dict[str, Any]:
    import mynet

    return {
        "state_dict": prefixed("model.")(state) | {"criterion.weight": torch.ones(2)},
        "hyper_parameters": {
            "settings": mynet.Settings(width=4),
            "folder": Path("/data"),
            "plain": argparse.Namespace(),
        },
        "epoch": 3,
    }


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (prefixed(""), ""),
        (lambda state: {"model_state_dict": state, "epoch": 3}, "under the key 'model_state_dict'"),
        (lambda state: {"state_dict": state, "ema": state}, "under the key 'state_dict'"),
        (lambda state: {"generator": state, "step": 3}, "under the key 'generator'"),
        (prefixed("module."), "without the prefix 'module.'"),
        (prefixed("_orig_mod."), "without the prefix '_orig_mod.'"),
        (prefixed("model."), "without the prefix 'model.'"),
        (
            lambda state: {"model": prefixed("module._orig_mod.net.")(state)},
            "under the key 'model', without the prefix 'module._orig_mod.net.'",
        ),
        (
            lambda state: {name.replace("rnn.", "rnn._orig_mod."): tensor for name, tensor in state.items()},
            "without '_orig_mod' in its names",
        ),
        (lightning, "under the key 'state_dict', without the prefix 'model.', ignoring criterion.weight"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_weights_under_usual_keys_and_prefixes(
    exported: Exported, net: nn.Module, capsys: pytest.CaptureFixture[str], content: Any, says: str, zipped: bool
) -> None:
    if content is lightning and not zipped:
        pytest.skip("no trainer writes the old format")
    torch.save(content(net.state_dict()), "weights.pt", _use_new_zipfile_serialization=zipped)
    assert run("mynet:Net", "--weights", "weights.pt", *INPUT) == 0
    loaded = exported.modules[0].state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in net.state_dict().items())
    printed = capsys.readouterr().out
    assert f"  note      weights.pt: read {says}\n" in printed if says else "note" not in printed


class Sized(nn.Module):
    """A module built from a Lightning checkpoint's hyper-parameters."""

    def __init__(self, width: int, kind: str = "GRU", settings: Any = None) -> None:
        super().__init__()
        self.rnn, self.settings = getattr(nn, kind)(3, width, batch_first=True), settings

    def forward(self, x: Tensor) -> Any:
        return self.rnn(x)[0]


def test_a_module_is_made_with_the_hyper_parameters_of_its_checkpoint(
    exported: Exported, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import mynet

    monkeypatch.setattr(mynet, "Sized", Sized, raising=False)
    content = {"state_dict": Sized(5, "RNN").state_dict(), "hyper_parameters": {"width": 5, "kind": "LSTM", "lr": 0.1}}
    torch.save(content, "l.ckpt")
    assert run("mynet:Sized", "--weights", "l.ckpt", "--arg", "kind=RNN", *INPUT) == 0
    assert "  note      made with width=5: hyper_parameters in l.ckpt\n" in capsys.readouterr().out
    made = exported.modules[0]
    assert isinstance(made, Sized)
    assert (type(made.rnn), made.rnn.hidden_size) == (nn.RNN, 5)

    content["hyper_parameters"]["settings"] = mynet.Settings(depth=2)
    torch.save(content, "l.ckpt")
    assert run("mynet:Sized", "--weights", "l.ckpt", "--arg", "kind=RNN", *INPUT) == 1
    assert "--arg settings=VALUE" in capsys.readouterr().err
    assert run("mynet:Sized", "--weights", "l.ckpt", "--arg", "kind=RNN", "--arg", "settings=(1, 2)", *INPUT) == 0
    assert exported.modules[1].settings == (1, 2)


def damaged(path: Path) -> None:
    torch.save({"a": torch.randn(500)}, path)
    path.write_bytes(path.read_bytes()[:900])


def script(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(nn.Linear(3, 4)).save(str(path))


def whole(path: Path) -> None:
    import mynet

    torch.save(mynet.Net(), path)


#: Per case: the function that writes the file, and the expected message.
FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "garbage": (lambda path: path.write_bytes(b"everything else" * 99), "is no PyTorch model or weights file"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "lfs": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "`git lfs pull`"),
    "hdf5": (
        lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)),
        "is a Keras file; write the model as a PyTorch",
    ),
    "folder": (lambda path: path.mkdir(), "is a folder"),
    "missing": (lambda path: None, "there is no file"),
    "damaged": (damaged, "damaged"),
    "whole": (whole, "is a pickled module of the class mynet.Net"),
    "list": (lambda path: torch.save([torch.ones(2)], path), "holds a list, not weights by name"),
}


@pytest.mark.parametrize("what", FILES)
@pytest.mark.parametrize("name", ["file.pt", "file.ckpt"])
def test_a_file_that_is_refused_is_described(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str, name: str
) -> None:
    write, says = FILES[what]
    write(tmp_path / name)
    for arguments in (("mynet:Net", "--weights", name), (name,)):
        assert run(*arguments, *INPUT) == 1
        assert says in refusal(capsys)
    assert exported.modules == []


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("model.keras", b"PK\x05\x06" + bytes(18), "is a Keras file"),
        ("model.onnx", b"\x08\x0a" + bytes(99), "is an ONNX graph"),
        ("model.tflite", b"\x1c\0\0\0TFL3" + bytes(99), "is a TensorFlow Lite model"),
        ("saved/saved_model.pb", b"\x08\x01", "saved is a TensorFlow SavedModel"),
    ],
)
def test_model_of_another_framework_gets_its_conversion_path(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, says: str
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    assert run(name.partition("/")[0], *INPUT) == 1
    printed = refusal(capsys)
    assert says in printed
    assert "write the model as a PyTorch module, copy the weights into it, and export that" in printed


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the message; check that it is one line of whole sentences without colours."""
    printed = capsys.readouterr().err
    assert re.fullmatch(r"unroll export: checkpoint: [^\n\x1b]+[\w`)>]\n", printed), printed
    return printed


def test_unsupported_file_gets_the_command_to_run(
    exported: Exported, net: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(net.state_dict(), "plain.pt")
    safetensors.torch.save_file(net.state_dict(), "plain.safetensors")
    for name in ("plain.pt", "plain.safetensors"):
        assert run(name, *INPUT) == 1
        assert f"unroll export MODULE:CLASS --weights {name}" in refusal(capsys)
    for name in ("script.pt", "script.ts", "script.jit"):
        script(Path(name))
        assert run("mynet:Net", "--weights", name, *INPUT) == 1
        assert f"unroll export {name} --input" in refusal(capsys)
        assert run(name, *INPUT) == 0
        capsys.readouterr()
    whole(Path("whole.pt"))
    assert run("whole.pt", *INPUT) == 1
    assert "unroll export mynet:Net --weights weights.pt" in refusal(capsys)


def test_weights_that_do_not_fit_are_listed(
    exported: Exported, net: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    state = net.state_dict()
    del state["head.bias"]
    torch.save({"state_dict": state | {"more": torch.ones(2), "rnn.bias_hh_l0": torch.ones(3)}}, "weights.pt")
    assert run("mynet:Net", "--weights", "weights.pt", *INPUT) == 1
    assert refusal(capsys).endswith(
        "weights.pt (under the key 'state_dict') does not fit Net: the file lacks head.bias; the model lacks more; "
        "rnn.bias_hh_l0 is (3,) in the file and (12,) in the model\n"
    )


@pytest.mark.parametrize("target", ["mynet:Net", "mynet:model", "mynet.py:Net", "mynet.py:model"])
def test_a_model_that_is_not_trained_is_refused(
    exported: Exported, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    assert run(target, *INPUT) == 1
    message = refusal(capsys)
    assert "it is not trained" in message
    assert "--weights FILE" in message
    assert exported.modules == []
    assert run(target, *INPUT, "--random-weights") == 0


def test_a_model_that_loads_its_own_weights_is_not_random(exported: Exported) -> None:
    before = torch.get_rng_state()
    assert run("mynet:trained", *INPUT) == 0
    assert len(exported.modules) == 1
    torch.set_rng_state(before)


def test_random_tensors_that_the_weights_do_not_hold_are_refused(
    exported: Exported, net: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(net.state_dict(), "weights.pt")
    assert run("mynet:Features", "--weights", "weights.pt", *INPUT) == 1
    assert "mynet:Features fills frequencies with random numbers, and weights.pt does not hold them" in refusal(capsys)
