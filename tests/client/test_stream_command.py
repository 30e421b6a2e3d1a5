"""`unroll stream` against a real server: formats, wrong rows, sessions that continue."""

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from serving import Oracle, Running

from unroll import cli

Oracles = Callable[[str], Oracle]
#: Runs the command with these arguments and stdin; returns status, stdout and stderr.
Run = Callable[..., tuple[int, bytes, str]]


@pytest.fixture
def run(server: Running, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]) -> Run:
    def call(*arguments: object, stdin: bytes = b"") -> tuple[int, bytes, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        status = cli.main(["stream", *map(str, arguments), "--url", server.url])
        out, err = capsysbinary.readouterr()
        return status, re.sub(rb"(?m)^\d{4}-\d\d-\d\d .*\n", b"", out), err.decode()  # without the server's log

    return call


@pytest.fixture
def x(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((150, 3)).astype(np.float32)


def as_csv(x: np.ndarray, names: str = "") -> bytes:
    return f"{names}\n".lstrip().encode() + "\n".join(",".join(map(str, row)) for row in x).encode()


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
    assert (status, err) == (0, "session 'kept' has had 40 steps: as many rows are skipped\n110 steps\n")
    assert np.array_equal(from_csv(out), right[40:])


@pytest.mark.parametrize(
    ("arguments", "stdin", "says"),
    [
        (("lstm",), b"1,2\n", "row 1 has 2 values, and a time step of 'lstm' has 3; --columns chooses some"),
        (("lstm",), b"a,b,c\n1,2,x\n", "row 2: 'x' takes float32: could not convert"),
        (("lstm", "--columns", "d"), b"a,b,c\n1,2,3\n", "there is no column 'd'; there are ['a', 'b', 'c']"),
        (("lstm", "--columns", "a"), b"1,2,3\n", "--columns needs a first row that names the columns"),
        (("lstm",), b"1,2,nan\n", "non_finite_input"),
        (("lstm", "--format", "jsonl"), b"[1,2,3]\n[1,2\n", "line 2 is not JSON"),
        (("lstm", "--format", "jsonl"), b"[1,2]\n", "line 1: 'x' has the shape (2,)"),
        (("lstm", "--format", "raw"), bytes(13), "the last time step has 1 of 12 bytes"),
        (("last",), b"1,2,3\n", "output without a time axis"),
        (("nothing",), b"", "model_unknown"),
        (("lstm", "no-such-file.csv"), b"", "No such file"),
    ],
)
def test_what_is_wrong_is_told(run: Run, arguments: tuple[str, ...], stdin: bytes, says: str) -> None:
    status, _, err = run(*arguments, stdin=stdin)
    assert status == 1
    assert err.startswith("unroll stream: ")
    assert says in err
