"""Sessions, sequences and models through both clients, compared with plain onnxruntime."""

import asyncio
import itertools
import json
import math
import threading
import warnings
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from serving import Oracle, Running

from unroll.client import AsyncClient, Client, PrecisionWarning, errors

Oracles = Callable[[str], Oracle]


def floats(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


# ── answers ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("durability", ["memory", "stored", "client"])
def test_steps_and_chunks_equal_the_whole_sequence(
    client: Any, oracle: Oracles, rng: np.random.Generator, durability: str
) -> None:
    x = floats(rng, 7, 3)
    right = oracle("lstm")(x)
    with client.session("lstm", durability=durability) as session:
        assert (session.position, session.durability, session.model.name) == (0, durability, "lstm")
        got = [session.step(x[0]), *session.steps(x[1:4]), *session.stream(x[4:])]
        assert session.position == session.refresh() == 7
    assert np.array_equal(got, right)


def test_whole_sequences_of_different_lengths(client: Any, oracle: Oracles, rng: np.random.Generator) -> None:
    given = [floats(rng, length, 3) for length in (1, 9, 4, 30)]
    for name in ("lstm", "last", "whole"):
        outputs = client.sequences(name, given)
        assert len(outputs) == 4
        for x, y in zip(given, outputs, strict=True):
            assert np.array_equal(y, oracle(name)(x))
    assert client.sequences("lstm", []) == []


def test_output_may_have_no_time_axis(client: Any, oracle: Oracles, rng: np.random.Generator) -> None:
    x = floats(rng, 4, 3)
    with client.session("last") as session:
        assert np.array_equal(session.steps(x[:3]), oracle("last")(x[:3]))
        assert np.array_equal(session.step(x[3]), oracle("last")(x))


@pytest.mark.parametrize("durability", ["memory", "client"])
def test_several_inputs_and_outputs_are_dicts(
    client: Any, oracle: Oracles, rng: np.random.Generator, durability: str
) -> None:
    a, b = floats(rng, 5, 2), floats(rng, 5, 3)
    (level, slope), _ = oracle("two").all(a, b)
    with client.session("two", durability=durability) as session:
        first = session.step({"b": b[0], "a": a[0]})
        rest = session.steps({"a": a[1:], "b": b[1:]})
    assert np.array_equal(first["level"], level[0])
    assert np.array_equal(first["slope"], slope[0])
    assert np.array_equal(rest["slope"], slope[1:])
    (whole,) = client.sequences("two", [{"a": a, "b": b}])
    assert np.array_equal(whole["level"], level)


def test_static_inputs_begin_sessions_and_sequences(client: Any, oracle: Oracles, rng: np.random.Generator) -> None:
    x, static = floats(rng, 6, 3), {"speaker": 3, "gain": [0.1, 0.5]}
    row = oracle("voices").manifest.initial_row({"speaker": np.array(3), "gain": np.float32([0.1, 0.5])})
    right = oracle("voices").all(x, state=row)[0][0]
    with client.session("voices", static=static) as session:
        assert np.array_equal(session.steps(x), right)
    assert np.array_equal(client.sequences("voices", [x], static=[static])[0], right)
    with client.stream("voices") as stream:
        (session,) = stream.open(static=static)
        assert np.array_equal(session.steps(x), right)
    with pytest.raises(errors.InvalidInput, match="needs \\['speaker', 'gain'\\]"):
        client.session("voices", static={"speaker": 3})
    with pytest.raises(errors.InvalidInput, match="static inputs for 1"):
        client.sequences("voices", [x, x], static=[static])


def test_models_are_described(client: Any) -> None:
    assert {"lstm", "gru", "whole"} <= {model.name for model in client.models()}
    model = client.model("gru:1")
    assert (model.name, model.version, model.streamable) == ("gru", "1", True)
    assert [(t.name, t.dtype, t.shape, t.time) for t in model.inputs] == [("x", "float32", (3,), True)]
    assert client.model("gru").version == "2"
    assert not client.model("whole").streamable
    with pytest.raises(errors.ModelUnknown):
        client.model("nothing")
    with pytest.raises(errors.NotStreamable):
        client.session("whole")


# ── inputs ───────────────────────────────────────────────────────────────────────────────────────


def test_arrays_of_other_libraries_are_accepted(client: Any, oracle: Oracles, rng: np.random.Generator) -> None:
    x = floats(rng, 4, 3)
    right = oracle("lstm")(x)
    strided = np.asfortranarray(x)
    for given in (torch.from_numpy(x), x.tolist(), memoryview(x), strided, x.astype(">f4")):
        with client.session("lstm") as session, warnings.catch_warnings():
            warnings.simplefilter("ignore", PrecisionWarning)
            assert np.array_equal(session.steps(given), right), type(given)
    with client.session("lstm") as session, pytest.raises(errors.InvalidInput, match=r"\.detach\(\)"):
        session.steps(torch.from_numpy(x).requires_grad_())
    with client.session("tokens") as session:
        for token in (3, np.int8(3), torch.tensor(3)):
            assert session.step(token).shape == (11,)
        assert session.steps([3, 4]).shape == (2, 11)


def test_float64_is_rounded_with_one_warning(client: Any, oracle: Oracles, rng: np.random.Generator) -> None:
    x = rng.standard_normal((4, 3))
    with client.session("lstm") as session:
        with pytest.warns(PrecisionWarning, match=r"\.astype\('float32'\)"):
            first = session.step(x[0])
        rest = session.steps(x[1:])
    assert np.array_equal([first, *rest], oracle("lstm")(x.astype(np.float32)))


@pytest.mark.parametrize(
    ("model", "values", "reason"),
    [
        ("lstm", [1.0, 2.0], r"\(2,\).*takes \(3,\)"),
        ("lstm", [[1.0, 2.0, 3.0]], "`steps` takes several time steps"),
        ("lstm", {"x": [1.0] * 3, "y": [1.0]}, r"takes \['x'\]"),
        ("lstm", [True, False, True], "type bool"),
        ("lstm", ["a", "b", "c"], "takes float32"),
        ("lstm", np.array([1j, 2, 3]), "complex128"),
        ("lstm", np.array([2**24 + 1, 0, 0]), "cannot hold"),
        ("lstm", object(), "takes float32"),
        ("tokens", 3.0, "takes int64"),
        ("tokens", np.uint64(2**63), "cannot hold"),
        ("two", [1.0, 2.0], r"give a dict with \['a', 'b'\]"),
        ("two", {"a": [1.0, 2.0], "b": [1.0]}, r"'b' has the shape \(1,\)"),
    ],
)
def test_invalid_inputs_are_not_sent(client: Any, model: str, values: object, reason: str) -> None:
    with client.session(model) as session:
        with pytest.raises(errors.InvalidInput, match=reason):
            session.step(values)
        assert session.refresh() == 0
    with pytest.raises(errors.InvalidInput), client.session("two") as session:
        session.steps({"a": np.zeros((2, 2), "f4"), "b": np.zeros((3, 3), "f4")})
    with client.session("lstm") as session, pytest.raises(errors.InvalidInput, match="is empty"):
        session.steps(np.zeros((0, 3), np.float32))


# ── forks, snapshots, resumption ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("durability", ["memory", "stored", "client"])
def test_fork_snapshot_and_rewind(
    client: Any, oracle: Oracles, rng: np.random.Generator, durability: str, tmp_path: Path
) -> None:
    x = floats(rng, 6, 3)
    right = oracle("lstm")(x)
    with client.session("lstm", durability=durability) as session:
        session.steps(x[:3])
        with session.fork() as other:
            assert (other.position, other.durability) == (3, durability)
            assert np.array_equal(other.steps(x[3:]), right[3:])
            assert session.position == 3
        saved = tmp_path / "state"
        saved.write_bytes(session.snapshot())
        assert np.array_equal(session.steps(x[3:]), right[3:])
        assert session.rewind(saved) == 3
        assert np.array_equal(session.step(x[3]), right[3])
        with client.session("lstm", durability=durability, snapshot=saved) as restored:
            assert np.array_equal(restored.steps(x[3:]), right[3:])
    with pytest.raises(errors.InvalidInput, match="cannot be read"):
        client.session("lstm", snapshot=tmp_path / "nothing")
    with pytest.raises(errors.SnapshotInvalid):
        client.session("lstm", snapshot=b"no snapshot")


def test_opening_mode_is_obeyed(client: Any) -> None:
    name = f"pump/7 ö {type(client).__name__}"
    with pytest.raises(errors.SessionUnknown):
        client.session("lstm", name, mode="resume")
    with client.session("lstm", name, mode="either") as session:
        session.step([1.0, 2.0, 3.0])
        with pytest.raises(errors.SessionExists) as exists:
            client.session("lstm", name)
        assert exists.value.members["position"] == 1
        for mode in ("resume", "either"):
            again = client.session("lstm", name, mode=mode)
            assert again.position == 1
        with pytest.raises(errors.InvalidInput, match="durability"):
            client.session("lstm", name, mode="resume", durability="memory")
    with pytest.raises(errors.InvalidInput, match="session_id"):
        client.session("lstm", mode="resume")
    with pytest.raises(errors.SessionClosed):
        client.session("lstm", name, mode="resume")


def test_errors_have_classes_and_give_the_position_to_continue_from(client: Any) -> None:
    with client.session("lstm", f"watched {type(client).__name__}") as session:
        session.steps(np.ones((3, 3), np.float32))
        other = client.session("lstm", session.id, mode="resume")
        other.step([1.0, 2.0, 3.0])
        with pytest.raises(errors.PayloadMismatch) as mismatch:
            session.step([9.0, 9.0, 9.0])
        assert (mismatch.value.code, mismatch.value.status, mismatch.value.expected) == ("payload_mismatch", 409, 4)
        assert session.refresh() == 4
        session.step([9.0, 9.0, 9.0])
        with pytest.raises(errors.NonFiniteInput):
            session.step([np.nan, 0.0, 0.0])
        assert session.position == 5
        last = session.step([1.0, 1.0, 1.0])
        assert np.array_equal(session.step([1.0, 1.0, 1.0], position=5), last)  # the same step
        with pytest.raises(errors.PositionGap):
            session.steps([[1.0, 1.0, 1.0]], position=9)
        assert session.position == 6
    session.close()  # once more
    with pytest.raises(errors.SessionGone):
        session.step([1.0, 2.0, 3.0])


def test_every_code_of_the_server_has_a_class() -> None:
    codes = json.loads((Path(__file__).parents[1] / "formats" / "golden" / "names.json").read_text())["codes"]
    for code in codes:
        assert errors.ServerError.of(code, "why").code == code
        assert type(errors.ServerError.of(code, "why")) is not errors.ServerError, code
    unknown = errors.ServerError.of("a_later_one", "why", 418)
    assert (type(unknown), unknown.code, unknown.status) == (errors.ServerError, "a_later_one", 418)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://host:port", "http://host/?q"])
def test_invalid_addresses_are_refused(url: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(errors.InvalidInput, match="URL"):
            kind(url)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_invalid_timeouts_are_refused(kind: Any) -> None:
    for seconds in (math.inf, math.nan, 0, -1, 1e7):
        with pytest.raises(errors.InvalidInput, match=r"timeout is .*: give the seconds for one attempt"):
            kind("http://127.0.0.1", timeout=seconds)
    for seconds in (math.nan, -1):
        with pytest.raises(errors.InvalidInput, match=r"retry_for is .*: give seconds"):
            kind("http://127.0.0.1", retry_for=seconds)


def test_client_may_retry_forever(make_client: Callable[..., Any]) -> None:
    """Its timeout is the longest that the client accepts."""
    attempts = itertools.count()

    class Late(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(503 if next(attempts) < 2 else 200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"[]")

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Late) as late:
        thread = threading.Thread(target=late.serve_forever, args=(0.01,))
        thread.start()
        try:
            client = make_client(f"http://127.0.0.1:{late.server_port}", timeout=1e6, retry_for=math.inf)
            assert client.models() == []
        finally:
            late.shutdown()
            thread.join()


def test_one_invalid_sequence_refuses_all(client: Any) -> None:
    with pytest.raises(errors.InvalidInput, match=r"\(2, 2\)"):
        client.sequences("lstm", [np.ones((2, 3), "f4"), np.ones((2, 2), "f4"), np.ones((2, 2), "f4")])


def test_answer_of_another_server_is_reported() -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            moved = self.path.endswith("moved")
            self.send_response(301 if moved else 200)
            self.send_header("Location", "https://elsewhere")
            self.send_header("Content-Length", "9")
            self.end_headers()
            self.wfile.write(b"[{}]     " if self.path.endswith("/models") else b"<html>...")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as other:
        serving = threading.Thread(target=other.serve_forever, args=(0.01,))
        serving.start()
        try:
            with Client(f"http://127.0.0.1:{other.server_port}", retry_for=0) as client:
                with pytest.raises(errors.ServerError, match="did not come from Unroll"):
                    client.model("co2")
                with pytest.raises(errors.ServerError, match="did not come from Unroll"):
                    client.models()
                with pytest.raises(errors.ServerError, match="redirected to https://elsewhere"):
                    client.model("moved")
        finally:
            other.shutdown()
            serving.join()


def test_tasks_share_a_client(server: Running, oracle: Oracles, rng: np.random.Generator) -> None:
    """Different sessions step concurrently; steps of one session wait for each other."""
    x = floats(rng, 20, 12, 3)

    async def run() -> list[np.ndarray]:
        async with AsyncClient(server.url) as client:

            async def one(steps: np.ndarray) -> np.ndarray:
                async with client.session("lstm") as session:
                    return np.array(await asyncio.gather(*map(session.step, steps)))

            return await asyncio.gather(*map(one, x))

    for steps, outputs in zip(x, asyncio.run(run()), strict=True):
        assert np.array_equal(outputs, oracle("lstm")(steps))
