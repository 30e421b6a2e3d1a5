"""The report of `unroll inspect`: a bundle's inputs, outputs, state, operators and measured parity."""

import json
from collections.abc import Iterator
from typing import Any

from unroll.bundle.files import GOLDEN, MODEL, Bundle
from unroll.bundle.graph import operators
from unroll.bundle.manifest import StateSlot, TensorSpec


def describe(bundle: Bundle, signed_by: str | None) -> dict[str, Any]:
    """Return the manifest's fields, plus `path`, `signed_by`, `operators`, and `bytes` of the files and of a state row.

    Args:
        signed_by: The signer's public key, or None.
    """
    manifest = bundle.manifest
    return {
        **json.loads(manifest.to_json()),
        "rates": manifest.rates,
        "path": str(bundle.path),
        "signed_by": signed_by,
        "operators": operators(bundle.model),
        "bytes": {MODEL: len(bundle.model), GOLDEN: bundle.golden_bytes, "state": 4 * manifest.state_size},
    }


def lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield the report of what `describe` returned."""
    yield f"{found['name']} version {found['version']}: {found['path']}"
    yield f"  size       {found['bytes'][MODEL]} bytes, golden vectors {found['bytes'][GOLDEN]}"
    yield f"  streaming  {'yes' if found['streamable'] else 'NO: ' + found['not_streamable_because']}"
    yield f"  ragged     {'yes' if found['ragged'] else 'no: rows of different lengths cannot share a batch'}"
    yield f"  bit-exact  {'yes' if found['bit_exact'] else 'no: the last bits of a row may depend on its batch'}"
    yield f"  precision  {found['precision']}; inputs, outputs and state are float32"
    yield f"  operators  {', '.join(f'{count} {name}' for name, count in found['operators'].items())}"
    yield f"  signed by  {found['signed_by'] or 'nobody'}"
    yield f"  written by {', '.join(f'{name} {version}' for name, version in found['tools'].items())}"
    for title in ("inputs", "outputs"):
        yield ""
        yield from table([title, "dtype", "a client's tensor", "limit"], [_tensor(t) for t in found[title]])
        if title == "inputs":
            yield from (f"  {name}: {rate:g} values per second" for name, rate in found["rates"].items())
    if found["static"]:
        yield ""
        rows = [_tensor(t | {"time": False}) for t in found["static"]]
        yield from table(["given once", "dtype", "a client's tensor", "limit"], rows)
    initial = "zeros" if found["initial_state"] is None else "in the manifest"
    yield ""
    yield f"  state: {found['state_size']} float32, {found['bytes']['state']} bytes per client; initially {initial}"
    yield from table(list(StateSlot.__dataclass_fields__), [list(map(str, slot.values())) for slot in found["state"]])
    yield ""
    yield from table(
        ["difference from PyTorch float64", "onnxruntime", "PyTorch float32", "tolerance"],
        [
            [p["output"], *(f"{p[name]:.2e}" for name in ("onnxruntime", "torch_float32", "tolerance"))]
            for p in found["parity"]
        ],
    )


def _tensor(tensor: dict[str, Any]) -> list[str]:
    named = {name: tensor.get(name, False) for name in ("name", "dtype", "shape", "time", "limit", "nan")}
    spec = TensorSpec(**named)
    shape = ", ".join(["time"] * spec.time + [str(size) for size in spec.shape])
    limit = "may be NaN" if spec.nan else "" if spec.limit is None else f"0 <= value < {spec.limit}"
    return [spec.name, spec.dtype, f"({shape})", limit]


def table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    """Yield the lines of a table with left-aligned columns."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, *rows]:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
