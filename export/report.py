"""What an export found and proved, for people."""

from dataclasses import dataclass
from pathlib import Path

from unroll.bundle import Manifest


@dataclass(frozen=True, slots=True)
class Report:
    """`path` is the bundle's folder; `notes` say what differs from what the model's author may expect."""

    path: Path
    manifest: Manifest
    notes: tuple[str, ...]

    def __str__(self) -> str:
        manifest = self.manifest
        inputs = ", ".join(f"{t.name} {t.dtype}{list(t.shape)}" for t in manifest.inputs)
        outputs = ", ".join(f"{t.name} {t.dtype}{list(t.shape)}{'' if t.time else ' (last)'}" for t in manifest.outputs)
        static = ", ".join(f"{t.name} {t.dtype}{list(t.shape)} (once, at the beginning)" for t in manifest.static)
        lines = [
            f"{manifest.name} version {manifest.version}: {self.path}",
            f"  inputs    {inputs}",
            *([f"  static    {static}"] if static else []),
            f"  outputs   {outputs}",
            f"  state     {manifest.state_size} values, {4 * manifest.state_size} bytes per client",
            f"  streaming {'yes' if manifest.streamable else 'NO: ' + (manifest.not_streamable_because or '')}",
            f"  ragged    {'yes' if manifest.ragged else 'no: rows of different length do not share a batch'}",
            f"  precision {manifest.precision}",
            f"  bit-exact {'yes' if manifest.bit_exact else 'no: the batch a row is in may change its last bits'}",
            *(f"  note      {note}" for note in self.notes),
            "",
            f"  {'difference from PyTorch float64':<42}{'onnxruntime':>14}{'PyTorch float32':>18}{'tolerance':>12}",
            *(
                f"  {p.output:<42}{p.onnxruntime:>14.2e}{p.torch_float32:>18.2e}{p.tolerance:>12.2e}"
                for p in manifest.parity
            ),
        ]
        return "\n".join(lines)
