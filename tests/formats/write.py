"""Rewrites the golden files, for a new format only: `PYTHONPATH=tests python -m formats.write`."""

import base64
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from formats import exchanges, files, names
from formats.server import start
from serving import RAW
from torch import Tensor, nn

import unroll
from unroll.bundle import Manifest
from unroll.service.state.sealed_snapshot import SnapshotKeys
from unroll.service.state.snapshot import Snapshot

_UNSAID = 2**64 - 1
_UNBOUND = 99


class Steps(nn.Module):
    """One input, one output."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


class Mixed(nn.Module):
    """Two inputs and a static one, an output per step and one of the last step, and a non-zero initial state."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 2)
        self.rnn = nn.LSTM(4, 3, batch_first=True)
        self.start = nn.Parameter(torch.randn(1, 1, 3))
        self.level, self.final = nn.Linear(3, 1), nn.Linear(3, 2)

    def forward(self, token: Tensor, x: Tensor, plant: Tensor) -> dict[str, Tensor]:
        begin = self.start.expand(1, x.shape[0], 3).contiguous()
        y, _ = self.rnn(torch.cat([self.embedding(token), x], -1), (begin, torch.zeros_like(begin)))
        return {"level": self.level(y) + plant[:, None, :], "final": self.final(y[:, -1])}


def write_bundles(repository: Path) -> None:
    shutil.rmtree(repository, ignore_errors=True)
    torch.manual_seed(13)
    x = torch.randn(2, 5, 3)
    unroll.export(Steps().eval(), {"x": x}, name="steps", repository=repository)
    example = {"token": torch.randint(0, 7, (2, 5)), "x": x[..., :2], "plant": torch.randn(2, 1)}
    unroll.export(Mixed().eval(), example, static=["plant"], name="mixed", repository=repository)


def values(*shape: int) -> np.ndarray:
    """Return multiples of 1/64, whose JSON text is the same on every machine."""
    count = int(np.prod(shape))
    return (((np.arange(count) * 37) % 129 - 64) / 64).astype("<f4").reshape(shape)


# ── the stream ───────────────────────────────────────────────────────────────────────────────────


def _text(answers: int = 1, **message: Any) -> dict[str, Any]:
    return {"text": json.dumps(message), "answers": answers}


def _frame(*entries: tuple, **options: Any) -> dict[str, Any]:
    """Return a frame of entries: handle, position, and the values of each input, (T, *shape)."""
    head = struct.pack("<BBHI", 1, 0, 0, len(entries))
    table = [struct.pack("<IIQ", h, len(x), _UNSAID if p is None else p) for h, p, x, *_ in entries]
    columns = zip(*[inputs for _, _, *inputs in entries], strict=True)
    content = b"".join([head, *table, *[x.tobytes() for column in columns for x in column]])
    return {"hex": content.hex(), "answers": len(entries), **options}


def _stream_mixed() -> list[dict[str, Any]]:
    token, x = np.array([1, 0, 6, 5], "<i8"), values(4, 2)
    return [
        _text(
            op="open",
            sessions=[
                {"handle": 4, "session_id": "e", "static": {"plant": [0.5]}},
                {"handle": 2**32 - 1, "session_id": "f", "static": {"plant": [-1]}},
                {"handle": 6, "session_id": "g"},
            ],
        ),
        _frame((4, 0, token[:1], x[:1])),
        _frame((4, 1, token, x)),
        _frame((4, 5, token + 1, x)),
        _frame((4, 5, token[:2], x[:2]), (2**32 - 1, 0, token[2:], x[2:])),
        *[_frame((4, None, token[i:][:1], x[i:][:1]), (2**32 - 1, None, token[:1], x[:1])) for i in range(3)],
        _text(op="close", handles=[4, 2**32 - 1]),
    ]


def _stream() -> list[dict[str, Any]]:
    x = values(12, 3)
    bad = x[:1] * np.float32(np.nan)
    ids = ("a", "b", "c")
    return [
        {"connect": "unknown"},
        _text(
            op="open",
            sessions=[
                {"handle": 0, "session_id": "a"},
                {"handle": 1, "session_id": "b", "mode": "either", "durability": "memory"},
                {"handle": 2, "session_id": "c", "depth": 2},
                {"handle": 0, "session_id": "d"},
                {"handle": 3, "session_id": "a"},
                {"handle": 3, "session_id": "n" * 129, "mode": "resume"},
                {"handle": 3, "session_id": "nobody", "mode": "resume"},
                {"handle": 3, "mode": "resume"},
                {"handle": 3, "durability": "redis"},
                {"handle": 3, "static": {"plant": [0.5]}},
            ],
        ),
        _frame((0, 0, x[:1])),
        _frame((0, None, x[1:4])),
        _frame((0, 1, x[1:4])),  # a retry
        _frame((0, 1, x[2:5])),
        _frame((0, 0, x[:1])),
        _frame((0, 7, x[:1])),
        _frame((0, 4, bad)),
        _frame((_UNBOUND, None, x[:1])),
        *[_frame(*[(handle, None, x[i + handle : i + handle + 1]) for handle in range(3)]) for i in range(4)],
        _frame(*[(handle, [8, 4, 4][handle], x[handle : handle + 1]) for handle in range(3)]),
        _frame(*[(handle, [9, 5, 5][handle], x[handle : handle + 2]) for handle in range(3)]),
        _frame(*[(handle, None, x[: handle + 1]) for handle in range(3)], any_order=True),
        _frame((0, None, bad), (1, 3, x[:1]), (_UNBOUND, None, x[:1]), (2, None, x[:1]), any_order=True),
        {"hex": "01", "answers": 1},
        {"hex": "0200000001000000", "answers": 1},
        {"hex": "0100000000000000", "answers": 1},
        {"hex": struct.pack("<BBHIIIQ", 1, 0, 0, 1, 0, 2, _UNSAID).hex() + x[:1].tobytes().hex(), "answers": 1},
        {"text": "{", "answers": 1},
        _text(op="reopen"),
        _text(op="open", sessions=[]),
        _text(op="open", sessions=[{"handle": 5, "session": "e"}]),
        _text(op="detach", handles=[2, _UNBOUND]),
        _text(op="detach", handles=[2]),
        _text(op="open", sessions=[{"handle": 7, "session_id": ids[2], "mode": "resume"}]),
        _frame((7, None, x[:2])),
        _text(op="close", handles=[1, _UNBOUND]),
        _frame((1, None, x[:1])),
        _text(op="open", sessions=[{"handle": 1, "session_id": ids[1], "mode": "either"}]),
        {"stop": True},
    ]


# ── HTTP ─────────────────────────────────────────────────────────────────────────────────────────


def _http(manifest: Manifest) -> list[dict[str, Any]]:
    """Return the HTTP requests. manifest: The manifest of the model `steps`."""
    row = 4 * manifest.state_size
    state = [("same", 52), ("floats", row), ("skip", 16)]
    sealed = [("same", 12 + len(files.SESSION) + 52), ("floats", row), ("skip", 16 + 32)]
    snapshot = Snapshot(manifest.digest, 9, values(manifest.state_size))
    held = SnapshotKeys(files.KEYS).seal(files.SESSION, snapshot)
    models, sessions = "/v1/models/steps", "/v1/models/steps/sessions"
    x = values(4, 3)
    raw, typed = {**RAW}, {"Content-Type": "application/json"}

    def post(path: str, body: object = None, headers: dict[str, str] | None = None, **options: Any) -> dict[str, Any]:
        sent = {"method": "POST", "path": path, **options}
        if isinstance(body, bytes):
            return {**sent, "headers": {**raw, **(headers or {})}, "hex": body.hex()}
        return {**sent, "headers": {**typed, **(headers or {})}, "text": json.dumps(body)}

    def get(path: str, method: str = "GET", **options: Any) -> dict[str, Any]:
        return {"method": method, "path": path, **options}

    return [
        get("/livez"),
        get("/readyz"),
        get("/v1/models", ignored=["parity", "stability"]),
        get("/v1/models/mixed:1", ignored=["parity", "stability"]),
        get("/v1/models/unknown"),
        post(sessions, {"session_id": "s"}),
        post(sessions, {"session_id": "s"}),
        post(f"{sessions}/s/steps", x[:1].tobytes()),
        post(f"{sessions}/s/steps", x[1:3].tobytes(), {"Unroll-Position": "1", "Unroll-Steps": "2"}),
        post(f"{sessions}/s/steps", x[1:3].tobytes(), {"Unroll-Position": "1", "Unroll-Steps": "2"}),
        post(f"{sessions}/s/steps", {"inputs": x[3:].tolist(), "position": 3}),
        post(f"{sessions}/s/steps", {"inputs": {"x": x[:2].tolist()}}),
        post(f"{sessions}/s/steps", {"inputs": x[:1].tolist(), "position": 9}),
        post(f"{sessions}/s/steps", {"inputs": x[:1].tolist(), "position": 2}),
        post(f"{sessions}/s/steps", {"inputs": x[:1].tolist(), "position": 4}),
        post(f"{sessions}/s/steps", {"inputs": [[1, 2]]}),
        post(f"{sessions}/s/steps", {"inputs": [["1", 2, 3]]}),
        post(f"{sessions}/s/steps", {"input": []}),
        post(f"{sessions}/s/steps", (x[:1] * np.float32(np.inf)).tobytes()),
        post(f"{sessions}/s/steps", b"", {"Content-Type": "text/plain"}),
        post(f"{sessions}/unknown/steps", x[:1].tobytes()),
        get(f"{sessions}/s"),
        get(f"{sessions}/s/state", layout=state),
        post(f"{sessions}/s/fork", {"session_id": "t"}),
        post(f"{sessions}/t/steps", x.tobytes(), {"Unroll-Steps": "4"}),
        {**get(f"{sessions}/s/state", "PUT"), "headers": raw, "hex": snapshot.to_bytes().hex()},
        {**get(f"{sessions}/s/state", "PUT"), "headers": raw, "hex": files.SNAPSHOT.to_bytes().hex()},
        {**get(f"{sessions}/s/state", "PUT"), "headers": raw, "hex": "00"},
        post(f"{sessions}/s/steps", x.tobytes(), {"Unroll-Steps": "4"}),
        get(f"{sessions}/s", "DELETE"),
        get(f"{sessions}/s"),
        get(f"{sessions}/unknown"),
        post(f"{models}/sequences", x.tobytes(), {"Unroll-Steps": "4"}),
        post(f"{models}/sequences", {"inputs": [x.tolist(), x[:2].tolist()]}),
        post("/v1/models/mixed/sessions", {"session_id": "m", "static": {"plant": [0.25]}}),
        post("/v1/models/mixed/sessions", {"session_id": "n"}),
        post(
            "/v1/models/mixed/sessions/m/steps",
            {"inputs": {"token": [1, 6], "x": values(2, 2).tolist()}},
        ),
        post(
            "/v1/models/mixed/sessions/m/steps",
            np.array([1, 6], "<i8").tobytes() + values(2, 2).tobytes(),
        ),
        post("/v1/models/mixed/sessions/m/steps", {"inputs": {"token": [7], "x": values(1, 2).tolist()}}),
        post(sessions, {"session_id": files.SESSION, "durability": "client"}),
        post(
            f"{sessions}/{files.SESSION}/steps",
            held + x.tobytes(),
            {"Unroll-Snapshot-Length": str(len(held)), "Unroll-Steps": "4"},
        )
        | {"layout": [*sealed, ("floats", -1)]},
        post(
            f"{sessions}/{files.SESSION}/steps",
            {"inputs": x[:2].tolist(), "snapshot": _base64(held), "position": 9},
            ignored=["snapshot"],
        ),
        post(f"{sessions}/{files.SESSION}/steps", {"inputs": x[:2].tolist(), "snapshot": _base64(held[:-1])}),
        get("/v2", ignored=["version"]),
        get("/v2/health/ready"),
        get("/v2/models/steps"),
        get("/v2/models/mixed/versions/1"),
        get("/v2/models/unknown"),
        _infer(x, {}),
        _infer(x, {"binary_data_output": True}),
        _infer(x, {}, binary=True),
        _infer(x, {"binary_data_output": True}, binary=True),
        _infer(x, {"sequence_id": 5, "sequence_start": True, "binary_data_output": True}, binary=True),
        _infer(x[:1], {"sequence_id": 5, "binary_data_output": True}, binary=True),
        _infer(x[:1], {"sequence_id": 5, "sequence_position": 5}),
        _infer(x[:1], {"sequence_id": 5, "sequence_position": 9}),
        _infer(x[:1], {"sequence_id": 5, "sequence_end": True}),
        _infer(x[:1], {"sequence_id": 5}),
        _infer(x[:1], {"sequence_id": "never"}),
        post(
            "/v2/models/steps/infer", {"inputs": [{"name": "x", "shape": [1, 1, 3], "datatype": "INT8", "data": [1]}]}
        ),
        get("/v2/models/steps/stats", ignored=["ns", "last_inference", "warm_up", "best_batch_size"]),
        get("/v1/nowhere"),
        get("/v2/nowhere"),
    ]


def _infer(x: np.ndarray, parameters: dict[str, Any], *, binary: bool = False) -> dict[str, Any]:
    tensor: dict[str, Any] = {"name": "x", "shape": [1, *x.shape], "datatype": "FP32"}
    tensor |= {"parameters": {"binary_data_size": x.nbytes}} if binary else {"data": x.ravel().tolist()}
    text = json.dumps({"id": "golden", "inputs": [tensor], "parameters": parameters}).encode()
    sent = {"method": "POST", "path": "/v2/models/steps/infer", "headers": {"Content-Type": "application/json"}}
    if binary:
        sent["headers"] |= {"Content-Type": RAW["Content-Type"], "Inference-Header-Content-Length": str(len(text))}
    return {**sent, "hex": (text + x.tobytes() * binary).hex()}


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


# ── all ──────────────────────────────────────────────────────────────────────────────────────────


def main() -> None:
    files.GOLDEN.mkdir(exist_ok=True)
    write_bundles(files.REPOSITORY)
    files.write(files.GOLDEN)
    manifest = Manifest.from_json((files.REPOSITORY / "steps" / "1" / "manifest.json").read_bytes())
    running = start()
    with httpx.Client(base_url=running.url) as client:
        _save("http", [{"sent": sent, "answer": exchanges.ask(client, sent)} for sent in _http(manifest)])
        known = {
            "flags": names.flags(),
            "settings": names.settings(),
            "codes": names.codes(),
            "bundle_codes": names.bundle_codes(),
            "routes": names.routes(client),
            "bodies": names.bodies(client),
            "metrics": names.metrics(client),
            "store_metrics": names.store_metrics(),
            "worker_metrics": names.worker_metrics(),
        }
    _save("names", known)
    for model, said in ("mixed", _stream_mixed()), ("steps", _stream()):
        conversation = exchanges.Conversation(running, model)
        _save(f"stream_{model}", [{"sent": sent, "came": conversation.exchange(sent)} for sent in said])
        conversation.close()


def _save(name: str, content: Any) -> None:
    (files.GOLDEN / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
