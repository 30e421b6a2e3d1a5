"""The export command: the files it writes, its output, and its exit code."""

import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import safetensors.torch
import torch
from torch import nn
from waiting import PATIENCE

from unroll import bundle, cli
from unroll.bundle.signature import TrustedKeys, make_pair, signed_by
from unroll.export.loading.example_inputs import examples
from unroll.export.loading.input_specs import InputSpec
from unroll.export.loading.user_code import from_factory, importable
from unroll.models.stacked_rnn import StackedRNN, StackedRNNConfig

SOURCE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, bidirectional=False):
        super().__init__()
        self.embed = nn.Embedding(17, 4)
        self.rnn = nn.LSTM(4, 6, batch_first=True, bidirectional=bidirectional)

    def forward(self, token):
        return self.rnn(self.embed(token))[0]

class Stateful(Net):
    def forward(self, token, hc):
        return self.rnn(self.embed(token), hc)

def both_ways():
    return Net(bidirectional=True)

def broken():
    raise RuntimeError("no such file")

def imaginary():
    return nn.Linear(4, 6, dtype=torch.complex64)

nothing = dict
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "usermodel.py").write_text(SOURCE)
    monkeypatch.delitem(sys.modules, "usermodel", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> int:
    return cli.main(["export", *arguments])


def test_checkpoint_is_exported_the_same_each_time(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = StackedRNNConfig(cell="gru", hidden_size=6, layers=2, output_size=3, input_size=4, dropout=0.1)
    StackedRNN(config).save(folder / "small")

    assert run("small.safetensors", "--repository", "models") == 0

    manifest = bundle.read(folder / "models/small/1").manifest
    assert [(spec.name, spec.shape) for spec in manifest.inputs] == [("x", (4,))]
    printed = capsys.readouterr()
    assert "\nfinding out whether it streams ..." in printed.err
    assert "streaming yes" in printed.out
    assert "tolerance" in printed.out

    before = (folder / "models/small/1/manifest.json").read_bytes()
    assert run("small", "--repository", "models") == 1
    assert "bundle: " in capsys.readouterr().err
    assert (folder / "models/small/1/manifest.json").read_bytes() == before
    make_pair(folder / "key.pem")
    assert run("small", "--repository", "models", "--replace", "--sign", "key.pem") == 0
    assert signed_by(bundle.read_content(folder / "models/small/1")) in TrustedKeys.read(folder / "key.pub.pem").keys
    assert run("small", "--repository", "models", "--replace", "--sign", "key.pub.pem") == 1
    assert "has no private key" in capsys.readouterr().err
    # The same model gives the same bytes, so the digest that binds sessions does not change.
    assert bundle.read(folder / "models/small/1").manifest.digest == manifest.digest


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_factory_with_weights(folder: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    with importable("usermodel:Net"):
        module = from_factory("usermodel:Net")
    weights, path = module.state_dict(), folder / f"weights{suffix}"
    safetensors.torch.save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)

    code = run(
        "usermodel:both_ways" if suffix == ".pt" else "usermodel:Net",
        *("--weights", str(path), "--input", "token:int64:", "--name", "net", "--version", "3", "--repository", "out"),
        *("--input-rate", "token=50"),
    )

    printed = capsys.readouterr()
    if suffix == ".pt":  # the weights are for one direction only
        assert (code, (folder / "out").exists()) == (1, False)
        assert "checkpoint: " in printed.err
        assert "reverse" in printed.err
    else:
        assert code == 0
        manifest = bundle.read(folder / "out/net/3").manifest
        assert (manifest.inputs[0].limit, manifest.inputs[0].shape, manifest.rates) == (17, (), {"token": 50.0})
        onnx_bytes = (folder / "out/net/3/model.onnx").read_bytes()
        assert weights["embed.weight"].numpy().tobytes() in onnx_bytes


def test_unstreamable_model_is_exported_and_reported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("usermodel:Net", "--arg", "bidirectional=True", *TOKEN, "--name", "b", "--repository", "out") == 0
    assert "streaming NO: layer 'rnn' is bidirectional" in capsys.readouterr().out


TOKEN = ("--input", "token:int64:", "--random-weights")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("usermodel:Net", "--name", "n"), 1, "input: "),
        (("usermodel:Net", "--input", "token:int64", "--name", "n"), 2, "NAME:DTYPE:SHAPE"),
        (("usermodel:Net", "--input", "token:float16:3", "--name", "n"), 2, "NAME:DTYPE:SHAPE"),
        (("usermodel:Net", "--input", "x:int64:", "--random-weights", "--name", "n"), 1, "input: "),
        (("usermodel:Net", *TOKEN, "--name", "n", "--weights", "none.pt"), 1, "checkpoint: "),
        (("usermodel:Net", *TOKEN, "--name", "../n"), 1, "bundle: "),
        (("usermodel:Net", *TOKEN, "--name", "n", "--version", "01"), 1, "bundle: "),
        (("usermodel:Other", *TOKEN, "--name", "n"), 1, "checkpoint: "),
        (("usermodel:broken", *TOKEN, "--name", "n"), 1, "no such file"),
        (("usermodel:Net", *TOKEN, "--name", "n", "--arg", "both=True"), 1, "unexpected keyword argument 'both'"),
        (("usermodel:Net", *TOKEN, "--name", "n", "--arg", "bidirectional"), 2, "NAME=VALUE"),
        (("usermodel:Net", *TOKEN, "--name", "n", "--input-rate", "token=0"), 2, "NAME=RATE"),
        (("usermodel:Net", *TOKEN, "--name", "n", "--input-rate", "x=8000"), 1, "a rate is given for 'x', which is no"),
        (("usermodel:Stateful", *TOKEN, "--name", "n"), 1, "--state hc:DTYPE:SHAPE=OUTPUT"),
        (("usermodel:nothing", *TOKEN, "--name", "n"), 1, "checkpoint: "),
        (("nowhere:Net", *TOKEN, "--name", "n"), 1, "checkpoint: "),
        (
            ("usermodel:imaginary", "--input", "input:float32:4", "--random-weights", "--name", "n"),
            1,
            "forward_failed: ",
        ),
        (("missing",), 1, "checkpoint: "),
        (("missing", *TOKEN), 1, "checkpoint: "),
        (("--nonsense",), 2, "usage"),
    ],
)
def test_invalid_command_is_refused(folder: Path, capsys, arguments: tuple[str, ...], code: int, says: str) -> None:
    assert run(*arguments, "--repository", "out") == code
    printed = capsys.readouterr()
    assert says in printed.err
    assert "Traceback" not in printed.err
    assert not (folder / "out").exists()


def test_nothing_is_written_when_parity_fails(folder: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unroll.export.verification.parity._tolerance", lambda own, expected: 0.0)
    assert run("usermodel:Net", *TOKEN, "--name", "n", "--repository", "out") == 1
    assert "parity: " in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_a_refusal_names_the_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "faulty.py").write_text(SOURCE.replace("return self.rnn", "return self.nothing"))
    assert run("faulty:Net", *TOKEN, "--name", "n", "--repository", "out") == 1
    printed = capsys.readouterr().err
    assert "no attribute 'nothing' (at faulty.py:12: return self.nothing(self.embed(token))[0])" in printed


def test_internal_export_error_is_reported_as_one(folder: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unroll.export.pipeline.lift", mock.Mock(side_effect=KeyError("lost")))
    assert run("usermodel:Net", *TOKEN, "--name", "n", "--repository", "out") == 1
    assert "internal: this is a bug in unroll: KeyError: 'lost'" in capsys.readouterr().err


def test_help_describes_the_arguments(capsys) -> None:
    assert run("--help") == 0
    assert "MODULE:FACTORY" in capsys.readouterr().out


def test_wrong_arguments_do_not_wait_for_torch() -> None:
    arguments = "['export', 'net:Net', '--input', 'x:float16:3', '--repository', 'out']"
    source = f"import sys; from unroll import cli; print(cli.main({arguments}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert done.stdout == "2 False\n"


def test_a_factory_may_be_the_module_itself(folder: Path) -> None:
    (folder / "instance.py").write_text("from torch import nn\nmodel = nn.GRU(2, 3, batch_first=True)\n")
    example = examples([InputSpec.parse("input:float32:2")])
    with importable("instance:model"):
        module = from_factory("instance:model")
    assert isinstance(module, nn.GRU)
    assert example["input"].shape == (2, 16, 2)


DELAY = """
import torch
from torch import nn


class Delay(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(3, 4, batch_first=True)

    def forward(self, x, cache):
        joined = torch.cat([cache, x], 1)
        return self.rnn(x - joined[:, :-2])[0], joined[:, -2:]
"""


def test_state_returned_by_forward_is_carried(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "delay.py").write_text(DELAY)
    delay = ("delay:Delay", "--input", "x:float32:3", "--random-weights", "--name", "delay", "--repository", "out")
    assert run(*delay, "--state", "cache:float32:2x3") == 2
    assert "NAME:DTYPE:SHAPE=OUTPUT" in capsys.readouterr().err
    assert run(*delay, "--state", "cache:float32:3x3=y1") == 1
    printed = capsys.readouterr().err
    assert "forward fails on the example" in printed
    assert "Traceback" not in printed
    assert run(*delay, "--state", "cache:float32:3x3=y1", "--verbose") == 1
    assert "Traceback" in capsys.readouterr().err
    assert run(*delay, "--state", "cache:float32:2x3=y1") == 0
    manifest = bundle.read(folder / "out/delay/1").manifest
    assert manifest.streamable
    assert [spec.name for spec in manifest.inputs + manifest.outputs] == ["x", "y"]
    assert {slot.kind: slot.size for slot in manifest.state} == {"h": 4, "carry": 6}


class Canary:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, (f"open({str(self.path)!r}, 'w')",)


def test_weights_that_would_run_code_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"embed.weight": Canary(folder / "canary")}, folder / "evil.pt")
    assert run("usermodel:Net", *TOKEN, "--name", "n", "--weights", "evil.pt", "--repository", "out") == 1
    assert "checkpoint: " in capsys.readouterr().err
    assert not (folder / "canary").exists()
    assert not (folder / "out").exists()


TIME_LAST = """
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(3, 4, batch_first=True)

    def forward(self, x):
        return self.rnn(x.transpose(1, 2))[0].transpose(1, 2)
"""


def test_time_axis_may_be_last(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "channels.py").write_text(TIME_LAST)
    net = ("channels:Net", "--input", "x:float32:3", "--random-weights", "--repository", "out", "--name", "net")
    assert run(*net, "--time-last", "--time-first") == 1
    assert "either first or last" in capsys.readouterr().err
    assert run(*net, "--time-last") == 0
    manifest = bundle.read(folder / "out/net/1").manifest
    assert manifest.streamable
    assert [spec.shape for spec in manifest.inputs + manifest.outputs] == [(3,), (4,)]
