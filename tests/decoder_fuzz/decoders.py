"""The decoders, each with its allowed errors and its seeds: valid bytes, and known attacks on servers."""

import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from unroll.bundle import BundleError, Manifest, TensorSpec
from unroll.service.access.jwt_verifier import KeySet
from unroll.service.access.keys import KeysRefused
from unroll.service.core.errors import UnrollError
from unroll.service.protocol import json, open_inference
from unroll.service.protocol.frames import FrameCodec
from unroll.service.protocol.tensors import Codec
from unroll.service.state.envelope import checksum
from unroll.service.state.sealed_snapshot import SnapshotKeys
from unroll.service.state.snapshot import Snapshot
from unroll.service.store import record, state_file

GOLDEN = Path(__file__).parents[1] / "formats" / "golden"
MANIFEST = Path(__file__).parents[1] / "served_models" / "bundles" / "gru" / "1" / "manifest.json"
_MODEL = Manifest.from_json(MANIFEST.read_bytes())
_TYPES = TensorSpec("x", "float32", (3,), True), TensorSpec("t", "int64", (), True), TensorSpec("b", "bool", (2,), True)
_CODEC, _FRAMES = Codec(_MODEL, 100, 10), FrameCodec(_TYPES, 100)
_KEYS = SnapshotKeys([b"k" * 16])
_LIMIT = 10_000
_SCRATCH = Path(tempfile.gettempdir()) / "unroll-decoder-fuzz"


@dataclass(frozen=True)
class Decoder:
    """A decoder of untrusted bytes; `decode` may raise only `refusals`."""

    decode: Callable[[bytes], object]
    seeds: dict[str, bytes]
    refusals: tuple[type[Exception], ...] = (UnrollError,)


def _json_steps(content: bytes) -> object:
    document = json.parse_object(content, _LIMIT)
    if "sequences" in document:
        return _CODEC.sequences_from_json(document["sequences"])
    return _CODEC.from_json(document.get("inputs"))


def _raw_steps(content: bytes) -> object:
    steps = content[0] if content else None
    return _CODEC.from_raw(content[1:], steps or None), _CODEC.sequence_from_raw(content[1:], steps)


def _infer(content: bytes) -> object:
    """Decode a request. The first two bytes are the length of its JSON, unless they are zero."""
    length = int.from_bytes(content[:2], "little") or None
    request = open_inference.parse(content[2:], length, _LIMIT)
    return open_inference.read_inputs(request, _TYPES[:1])


def _frame(content: bytes) -> object:
    single = _FRAMES.decode_single(content)
    if single is not None:
        return _FRAMES.fault(single.inputs)
    return _FRAMES.faults(_FRAMES.decode(content))


def _resealed(content: bytes) -> bytes:
    """Correct the checksum, which anyone can compute."""
    return content[:-16] + checksum(content[:-16]).digest()


def _snapshot(content: bytes) -> object:
    content = _resealed(content)
    return Snapshot.from_bytes(content, digest=Snapshot.model_of(content), state_size=_MODEL.state_size)


def _state_file(content: bytes) -> object:
    _SCRATCH.write_bytes(_resealed(content))
    return state_file.read(_SCRATCH)


def _wire(text: object, binary: bytes = b"", length: int | None = None) -> bytes:
    encoded = text if isinstance(text, bytes) else orjson.dumps(text)
    size = len(encoded) if length is None else length
    return struct.pack("<H", size % 2**16) + encoded + binary


def _tensor(shape: list[Any], name: str = "x", **parameters: object) -> dict[str, Any]:
    return {"inputs": [{"name": name, "shape": shape, "datatype": "FP32", "parameters": parameters}]}


_SHAPES = {
    "product above 64 bits": [2**32, 2**32, 3],
    "product that wraps to a small one": [2**62, 4, 3],
    "product that wraps to zero": [2**63, 2, 3],
    "negative": [-1, 1, 3],
    "two negatives": [-(2**31), -(2**31), 3],
    "zero": [0, 2**40, 3],
    "beyond 64 bits": [10**19, 1, 3],
    "floats": [1.0, 1e308, 3],
    "no numbers": [None, "1", [1]],
    "long": [1] * 2000,
}
_INFER_SEEDS = {
    "good": _wire(_tensor([1, 1, 3], binary_data_size=12), b"\x00" * 12),
    **{f"shape: {name}": _wire(_tensor(shape, binary_data_size=12), b"\x00" * 12) for name, shape in _SHAPES.items()},
    **{f"shape as JSON: {name}": _wire(_tensor(shape) | {"id": "1"}) for name, shape in _SHAPES.items()},
    "binary size above what follows": _wire(_tensor([1, 1, 3], binary_data_size=2**31), b"\x00" * 12),
    "binary size negative": _wire(_tensor([1, 1, 3], binary_data_size=-12), b"\x00" * 12),
    "binary size beyond 64 bits": _wire(_tensor([1, 1, 3], binary_data_size=2**63 - 1), b"\x00" * 12),
    "length beyond the body": _wire(_tensor([1, 1, 3]), length=60_000),
    "length inside the JSON": _wire(_tensor([1, 1, 3]), length=5),
    "shared memory": _wire(_tensor([1, 1, 3], shared_memory_region="/dev/shm/other", shared_memory_byte_size=12)),
    "shared memory elsewhere": _wire(_tensor([1, 1, 3], shared_memory_region="../../etc/passwd")),
    "name a path": _wire(_tensor([1, 1, 3], name="../../x")),
    "deep": _wire(b'{"inputs":' + b"[" * 5000 + b"]" * 5000 + b"}"),
    "sequence id beyond 64 bits": _wire(_tensor([1, 1, 3]) | {"parameters": {"sequence_id": 2**64 - 1}}),
}
_JSON_SEEDS = {
    "good": orjson.dumps({"inputs": {"x": [[0.5, 1.0, 2.0]]}}),
    "bare": orjson.dumps({"inputs": [[0.5, 1.0, 2.0]]}),
    "NaN": b'{"inputs": [[NaN, 1, 2]]}',
    "infinite": b'{"inputs": [[1e999, 1, 2]]}',
    "beyond 64 bits": b'{"inputs": [[' + b"9" * 400 + b", 1, 2]]}",
    "a lone surrogate": rb'{"inputs": {"\ud800": [[1, 2, 3]]}}',
    "bad UTF-8": b'{"inputs": {"\xff": [[1, 2, 3]]}}',
    "deep": b'{"inputs":' + b"[" * 4000 + b"]" * 4000 + b"}",
    "many empty lists": b'{"inputs":[' + b"[]," * 3000 + b"[]]}",
    "good sequences": orjson.dumps({"sequences": [[[1, 2, 3]], [[1, 2, 3], [4, 5, 6]]]}),
    "ragged": orjson.dumps({"inputs": [[1, 2, 3], [1, 2]]}),
    "a sequence of nothing": orjson.dumps({"sequences": [[[1, 2, 3]], []]}),
}
_FRAME = struct.Struct("<IIQ")
_FRAME_SEEDS = {
    "empty": b"",
    "many entries announced": struct.pack("<I", 2**32 - 1) + bytes(60),
    "many steps announced": _FRAME.pack(1, 2**32 - 1, 0) + bytes(48),
    "positions beyond": _FRAME.pack(1, 1, 2**64 - 1) + bytes(48),
    "all ones": b"\xff" * 64,
}


def _golden(*names: str) -> dict[str, bytes]:
    return {name: (GOLDEN / f"{name}.bin").read_bytes() for name in names}


DECODERS = {
    "v1 JSON": Decoder(_json_steps, _JSON_SEEDS),
    "v1 binary": Decoder(_raw_steps, {"good": b"\x01" + np.ones(3, "<f4").tobytes(), "long": b"\xff" * 1201}),
    "v2": Decoder(_infer, _INFER_SEEDS),
    "stream frame": Decoder(_frame, _FRAME_SEEDS),
    "snapshot": Decoder(_snapshot, _golden("snapshot")),
    "sealed snapshot": Decoder(lambda content: _KEYS.open("s", content), _golden("sealed_snapshot")),
    "record": Decoder(
        lambda content: record.Record.from_bytes(_resealed(content)), _golden("record", "record_untouched")
    ),
    "origin": Decoder(record.Origin.from_bytes, _golden("origin")),
    "last replies": Decoder(record.unpack_last, _golden("last")),
    "state file": Decoder(_state_file, _golden("sessions")),
    "manifest": Decoder(Manifest.from_json, {"good": MANIFEST.read_bytes()}, (BundleError, ValueError)),
    "JWK set": Decoder(KeySet.read, {"none": b'{"keys": []}', "EC": b'{"keys": [{"kty": "EC"}]}'}, (KeysRefused,)),
}
