"""`unroll stream` and `unroll rollout` against a real server: formats, invalid rows, continued sessions."""

import io
import json
import re
import sys
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from serving import Oracle, Running

from unroll import Client, cli
from unroll.client import wav
from unroll.client.errors import InvalidInput
from unroll.client.tensors import Model, Tensor

Oracles = Callable[[str], Oracle]
#: Runs the command with arguments and stdin and returns its status, stdout and stderr.
Run = Callable[..., tuple[int, bytes, str]]


@pytest.fixture
def run(server: Running, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]) -> Run:
    def call(*arguments: object, stdin: bytes = b"", command: str = "stream") -> tuple[int, bytes, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        status = cli.main([command, *map(str, arguments), "--url", server.url])
        out, err = capsysbinary.readouterr()
        return status, re.sub(rb"(?m)^\d{4}-\d\d-\d\d .*\n", b"", out), err.decode()  # without the server's log

    return call


@pytest.fixture
def x(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((150, 3)).astype(np.float32)


def as_csv(x: np.ndarray, names: str = "") -> bytes:
    return f"{names}\n".lstrip().encode() + "\n".join(",".join(map(str, row)) for row in x).encode()


def as_wav(x: np.ndarray, rate: int) -> bytes:
    """Write 16-bit samples in one channel."""
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes((x.ravel() * 2**15).astype("<i2").tobytes())
    return content.getvalue()


def from_csv(out: bytes) -> np.ndarray:
    return np.array([line.split(",") for line in out.decode().splitlines()[1:]], np.float32)


@pytest.mark.parametrize("names", ["", "time,a,b"])
def test_csv_of_a_pipe_and_of_a_file(run: Run, oracle: Oracles, x: np.ndarray, tmp_path: Path, names: str) -> None:
    status, out, err = run("lstm", stdin=as_csv(x, names))
    assert (status, err) == (0, "150 steps\n")
    assert out.splitlines()[0] == b"y_0,y_1"
    assert np.array_equal(from_csv(out), oracle("lstm")(x))
    (tmp_path / "x.csv").write_bytes(as_csv(x, names))
    assert run("lstm", tmp_path / "x.csv") == (status, out, err)
    assert run("lstm", tmp_path / "x.csv", "--rate", "1e9") == (status, out, err)


def test_static_inputs_are_an_object(run: Run, oracle: Oracles, x: np.ndarray) -> None:
    row = oracle("voices").manifest.initial_row({"speaker": np.array(3), "gain": np.float32([0.25, -0.5])})
    given = '{"speaker": 3, "gain": [0.25, -0.5]}'
    _, out, _ = run("voices", "--static", given, stdin=as_csv(x))
    assert np.array_equal(from_csv(out), oracle("voices").all(x, state=row)[0][0])
    constant = '{"kind": "columns", "columns": [{"constant": 1}, {"constant": 1}, {"constant": 1}]}'
    options = ("--static", given, "--steps", 1, "--map", constant)
    _, rolled, _ = run("voices", *options, stdin=as_csv(x), command="rollout")
    assert np.array_equal(from_csv(rolled)[0], from_csv(out)[-1])
    status, _, err = run("voices", "--static", "[3]")
    assert (status, err.splitlines()[0]) == (2, "unroll stream: invalid value for '--static': [3] is no JSON object")


def test_columns_are_chosen_by_name(run: Run, oracle: Oracles, x: np.ndarray) -> None:
    _, out, _ = run("lstm", "--columns", "c,a,b", stdin=b"\xef\xbb\xbf" + as_csv(x, "a,b,c"))
    assert np.array_equal(from_csv(out), oracle("lstm")(x[:, [2, 0, 1]]))


def test_jsonl_and_raw(run: Run, oracle: Oracles, x: np.ndarray, rng: np.random.Generator) -> None:
    lines = "\n".join(json.dumps(row) for row in x.tolist()).encode()
    _, out, _ = run("lstm", "--format", "jsonl", stdin=lines)
    assert np.array_equal(np.array([json.loads(line) for line in out.splitlines()], np.float32), oracle("lstm")(x))
    _, out, _ = run("lstm", "--format", "raw", stdin=x.tobytes())
    assert out == oracle("lstm")(x).tobytes()
    a, b = rng.standard_normal((4, 2)).astype("f4"), rng.standard_normal((4, 3)).astype("f4")
    rows = "\n".join(json.dumps({"a": p, "b": q}) for p, q in zip(a.tolist(), b.tolist(), strict=True))
    _, out, _ = run("two", "--format", "jsonl", stdin=rows.encode())
    (level, slope), _ = oracle("two").all(a, b)
    found = [json.loads(line) for line in out.splitlines()]
    assert np.array_equal(np.array([row["slope"] for row in found], np.float32), slope)
    _, out, _ = run("two", stdin=as_csv(np.hstack([a, b])))
    assert np.array_equal(from_csv(out), np.hstack([level, slope]))


def test_a_second_run_continues_the_session(run: Run, oracle: Oracles, x: np.ndarray) -> None:
    right = oracle("lstm")(x)
    _, out, _ = run("lstm", "--session", "kept", "--durability", "stored", stdin=as_csv(x[:40]))
    assert np.array_equal(from_csv(out), right[:40])
    status, out, err = run("lstm", "--session", "kept", stdin=as_csv(x))
    assert (status, err) == (0, "session 'kept' is at step 40: skipping as many rows\n110 steps\n")
    assert np.array_equal(from_csv(out), right[40:])


@pytest.mark.parametrize(
    ("arguments", "stdin", "says"),
    [
        (("lstm",), b"1,2\n", "row 1 has 2 values, and a time step of 'lstm' has 3; --columns chooses some"),
        (("lstm",), b"a,b,c\n1,2,x\n", "row 2: 'x' takes float32: could not convert"),
        (("lstm",), b"a,b,c\n1,,3\n", "row 2: a value of 'x' is missing: fill the gap, or omit the row"),
        (("lstm", "--columns", "d"), b"a,b,c\n1,2,3\n", "there is no column 'd'; there are ['a', 'b', 'c']"),
        (("lstm", "--columns", "a"), b"1,2,3\n", "--columns needs a first row that names the columns"),
        (("lstm",), b"1,2,nan\n", "non_finite_input"),
        (("lstm", "--format", "jsonl"), b"[1,2,3]\n[1,2\n", "line 2 is not JSON"),
        (("lstm", "--format", "jsonl"), b"[1,2]\n", "line 1: 'x' has the shape (2,)"),
        (("lstm", "--format", "wav"), b"RIFF", "not a readable WAV file"),
        (
            ("lstm", "--format", "wav"),
            as_wav(np.zeros(3), 8_000),
            "not a whole number of samples a second: add --to csv",
        ),
        (("lstm", "--to", "wav"), b"1,2,3\n", "--to wav needs a WAV file as input"),
        (("lstm", "--format", "lines"), b"a", "not a model of bytes"),
        (("lstm", "--format", "raw"), bytes(13), "the last time step has 1 of 12 bytes"),
        (("last",), b"1,2,3\n", "output without a time axis"),
        (("nothing",), b"", "model_unknown"),
        (("lstm", "no-such-file.csv"), b"", "No such file"),
    ],
)
def test_errors_are_reported(run: Run, arguments: tuple[str, ...], stdin: bytes, says: str) -> None:
    status, _, err = run(*arguments, stdin=stdin)
    assert status == 1
    assert err.startswith("unroll stream: ")
    assert says in err


def test_wav_in_and_out(run: Run, oracle: Oracles) -> None:
    x = np.random.default_rng(2).integers(-(2**15), 2**15, (40, 3)).astype(np.float32) / 2**15
    right = oracle("lstm")(x)
    status, out, err = run("lstm", "--format", "wav", "--to", "raw", stdin=as_wav(x, 24_000))
    assert (status, out, err) == (0, right.tobytes(), "40 steps\n")
    status, out, _ = run("lstm", "--format", "wav", stdin=as_wav(x, 24_000))
    assert status == 0
    with wave.open(io.BytesIO(out)) as file:
        assert (file.getframerate(), file.getnframes(), file.getnchannels()) == (16_000, 80, 1)
        samples = np.frombuffer(file.readframes(80), "<i2").reshape(40, 2)
    assert np.abs(samples / 2**15 - right.clip(-1, 1)).max() <= 2**-15


def test_a_wav_of_another_rate_than_the_model_declares_is_refused() -> None:
    samples = Tensor("samples", "float32", (256,), rate=16_000)
    model = Model("sound", "1", "", (samples,), (), (), True, None, {})
    assert wav.Reader(model, io.BytesIO(as_wav(np.zeros(512), 16_000))).steps == 2
    with pytest.raises(InvalidInput, match="the file has 8000 samples a second, and 'sound' takes 16000: convert it"):
        wav.Reader(model, io.BytesIO(as_wav(np.zeros(512), 8_000)))


@pytest.mark.parametrize("cut", [2, 1], ids=["after a sample", "within a sample"])
def test_a_wav_that_ends_within_a_time_step_is_filled_with_zeros(run: Run, oracle: Oracles, cut: int) -> None:
    x = np.array([0.5, 0.25, -0.5, 0.125], np.float32)
    _, out, err = run("lstm", "--format", "wav", "--to", "raw", stdin=as_wav(np.append(x, 0.75), 8_000)[:-cut])
    assert out == oracle("lstm")(np.pad(x, (0, 2)).reshape(2, 3)).tobytes()
    assert err == "the last time step is padded with 2 zeros\n2 steps\n"


def test_lines_format_reads_and_writes_bytes(run: Run, oracle: Oracles) -> None:
    text = bytes([1, 5, 10, 3])  # \n is one of the input bytes
    status, out, _ = run("tokens", "--format", "lines", stdin=text)
    logits = oracle("tokens")(np.array(list(text), np.int64))
    assert (status, out) == (0, bytes(logits.argmax(-1).tolist()))


def test_plot_is_drawn_once_without_a_terminal(run: Run, x: np.ndarray) -> None:
    _, out, err = run("lstm", "--plot", stdin=as_csv(x))
    plotted = err.splitlines()
    assert len(out.splitlines()) == 151
    assert [line.split()[0] for line in plotted] == ["y_0", "y_1", "150"]
    assert all(set("▁█") <= set(line) for line in plotted[:2])


@pytest.fixture
def roll(run: Run) -> Run:
    return lambda *arguments, stdin=b"": run(*arguments, stdin=stdin, command="rollout")


def test_a_rollout_continues_the_rows(roll: Run, server: Running, x: np.ndarray) -> None:
    mapped = {"kind": "columns", "columns": [{"from": 0}, {"from": 1}, {"constant": 0.5}]}
    status, out, err = roll("lstm", "--steps", "4", "--map", json.dumps(mapped), stdin=as_csv(x))
    with Client(server.url) as client, client.session("lstm") as session:
        rolled = [step.outputs for step in session.rollout(4, map=mapped, inputs=x)]
    assert (status, err) == (0, "4 steps\n")
    assert np.array_equal(from_csv(out), np.array(rolled))


def test_a_rollout_draws_bytes_and_leaves_the_session_as_it_is(roll: Run, server: Running) -> None:
    with Client(server.url) as client, client.session("tokens") as session:
        session.steps([1, 5, 3])
        drawn = [step.inputs for step in session.rollout(6, map={"kind": "sample", "seed": 3, "top_k": 4})]
        words = ("--format", "lines", "--map", "sample", "--seed", "3", "--top-k", "4", "--session", session.id)
        status, out, _ = roll("tokens", "--steps", "6", *words)
        assert (status, out) == (0, bytes(int(one) for one in drawn))
        assert session.refresh() == 3
        assert roll("tokens", "--steps", "6", *words, stdin=b"")[1] == out


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["--map", "{"], 2, "--map is not JSON"),
        (["--seed", "3"], 2, "are for --map sample"),
        (["--map", '{"kind": "sample"}', "--seed", "3"], 2, "are for --map sample"),
        (["--map", "identity"], 1, "map_invalid"),
    ],
)
def test_map_that_does_not_fit_is_refused(roll: Run, words: list[str], status: int, says: str) -> None:
    found, _, err = roll("lstm", "--steps", "2", *words, stdin=b"1,2,3\n")
    assert found == status
    assert err.startswith("unroll rollout: ")
    assert says in err


def test_a_rollout_writes_bytes_of_a_model_that_takes_bytes_only(roll: Run, server: Running, x: np.ndarray) -> None:
    with Client(server.url) as client, client.session("lstm") as session:
        session.steps(x)
        mapped = '{"kind": "columns", "columns": [{"from": 0}, {"from": 0}, {"from": 0}]}'
        words = ("--format", "lines", "--map", mapped, "--session", session.id)
        status, out, err = roll("lstm", "--steps", "2", *words)
    assert (status, out) == (1, b"")
    assert "'lstm' is not a model of bytes" in err
