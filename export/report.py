"""The human-readable report on an export."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from unroll.bundle import Manifest
from unroll.export.lifting.lifted_model import LiftedModel
from unroll.export.lifting.module_state import Attribute, described
from unroll.export.report_html import as_html


@dataclass(frozen=True, slots=True)
class Report:
    """The result of an export.

    Attributes:
        path: the folder of the bundle.
        manifest: the manifest of the bundle.
        notes: differences from the model that its author may not expect.
    """

    path: Path
    manifest: Manifest
    notes: tuple[str, ...]

    def __str__(self) -> str:
        manifest = self.manifest
        lines = [
            f"{manifest.name} version {manifest.version}: {self.path}",
            *(f"  {name:<9} {text}" for name, text in self._rows()),
            "",
            f"  {'difference from PyTorch float64':<42}{'onnxruntime':>14}{'PyTorch float32':>18}{'tolerance':>12}",
            *(
                f"  {p.output:<42}{p.onnxruntime:>14.2e}{p.torch_float32:>18.2e}{p.tolerance:>12.2e}"
                for p in manifest.parity
            ),
        ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return as_html([("bundle", str(self.path)), *self._rows()], self.manifest)

    def _rows(self) -> list[tuple[str, str]]:
        manifest = self.manifest
        inputs = ", ".join(f"{t.name} {t.dtype}{list(t.shape)}" for t in manifest.inputs)
        outputs = ", ".join(f"{t.name} {t.dtype}{list(t.shape)}{'' if t.time else ' (last)'}" for t in manifest.outputs)
        static = ", ".join(f"{t.name} {t.dtype}{list(t.shape)} (once, at the beginning)" for t in manifest.static)
        return [
            ("inputs", inputs),
            *([("static", static)] if static else []),
            ("outputs", outputs),
            ("state", f"{manifest.state_size} values, {4 * manifest.state_size} bytes per client"),
            ("streaming", "yes" if manifest.streamable else f"NO: {manifest.not_streamable_because or ''}"),
            ("ragged", "yes" if manifest.ragged else "no: rows of different lengths cannot share a batch"),
            ("precision", manifest.precision),
            ("bit-exact", "yes" if manifest.bit_exact else "no: the last bits of a row may depend on its batch"),
            *(("note", note) for note in self.notes),
        ]


def notes_on(
    lifted: LiftedModel, dropped_outputs: Iterable[str], attributes: list[Attribute], dtype: torch.dtype
) -> tuple[str, ...]:
    """Differences between the bundle and the model that its author may not expect.

    Args:
        lifted: the lifted model.
        dropped_outputs: names of outputs that only return a final state.
        attributes: the attributes that hold state.
        dtype: dtype of the user's parameters.
    """
    notes = [f"output {name!r} is the final state: it is part of state_out, not an output" for name in dropped_outputs]
    if attributes:
        notes.append(
            f"the state that forward keeps in the module ({described(attributes)}) is kept separately for each client"
        )
    if dtype != torch.float32:
        notes.append(f"the model is {str(dtype).removeprefix('torch.')}, the bundle computes in float32")
    notes += [
        f"input {name!r} is the initial state: it is kept in the manifest, not an input"
        for name in lifted.single.arguments.constants
    ]
    notes += [
        f"output {output.spec.name!r} is returned as (batch, {'time, ' if output.time is not None else ''}...)"
        for output in lifted.single.outputs
        if output.batch != 0 or output.time not in {None, 1}
    ]
    notes += [
        f"{'static inputs' if name == 'state' else f'input {name!r}'}: each element has its own range of values; a "
        "value outside is answered with the error non_finite_output"
        for name in lifted.single.ranges
    ]
    return tuple(notes)
