"""Checks in float64 that the lifted model equals the user's own, both for a single call and for successive calls."""

from functools import partial

import numpy as np
import torch
from torch import nn

from unroll.bundle.golden import Arrays
from unroll.export.errors import ExportError, attempt
from unroll.export.lifting.float64 import double_precision
from unroll.export.lifting.module_state import Attribute, refusal
from unroll.export.lifting.streaming import Named, StreamingModule
from unroll.export.loading.copies import detached_copy
from unroll.export.signature.samples import as_tensors
from unroll.export.verification import trials
from unroll.export.verification.decisions import Decided
from unroll.export.verification.trials import Subject

#: Tolerance in float64: the lifted model may at most compute in another order.
_CLOSE = 1e-9


def check_same_as_original(
    exact: nn.Module, double: StreamingModule, reference: Subject, attributes: list[Attribute]
) -> None:
    """Check that the lifted model, started from the initial state, answers like the user's own.

    Args:
        exact: the user's own model in float64.
        double, reference: the lifted model in float64.
        attributes: the attributes of `exact` that hold state.

    Raises:
        ExportError: parity, if the answers differ.
    """
    for trial in (*trials.ORIGINAL, *trials.EXTREME):
        inputs, rows = reference.inputs(trial), reference.begin(trial)
        # A call may leave state in the module.
        original = detached_copy(exact) if attributes else exact
        try:
            lifted = reference.whole(inputs, rows)
            with Decided.as_written():
                returned = ask_original("other inputs", original, double, inputs, rows)
        except ExportError:
            if trial.may_fail:
                continue
            raise
        for output in double.outputs:
            expected = output.batch_major(returned[output.index][1]).numpy()
            if not np.allclose(lifted[output.spec.name], expected, _CLOSE, _CLOSE, equal_nan=True):
                raise ExportError(
                    "parity",
                    f"output {output.spec.name!r} changes when recurrent layers take their state from the row; does "
                    "forward read the weights or the states of a layer itself, or count values, as len(y.unique())?"
                    if trial.scale == 1
                    else f"output {output.spec.name!r} differs from forward's own for inputs {trial.scale:g} times the "
                    "example's: does every step read only its own time step and its own row?",
                )


def check_continues(exact: nn.Module, double: StreamingModule, reference: Subject, attributes: list[Attribute]) -> None:
    """Check that the user's own model, which keeps state in `attributes`, continues the sequence in its next call.

    Raises:
        ExportError: keeps_state, if it does not.
    """
    trial = trials.CONTINUED
    inputs, rows = reference.inputs(trial), reference.begin(trial)
    lifted = reference.whole(inputs, rows)
    original, pieces, start = detached_copy(exact), [], 0
    for length in trial.chunkings[0]:
        chunk = {name: array[:, start : start + length] for name, array in inputs.items()}
        pieces.append(ask_original("a second call", original, double, chunk, rows))
        start += length
    for output in double.outputs:
        parts = [output.batch_major(piece[output.index][1]).numpy() for piece in pieces]
        found = np.concatenate(parts, 1) if output.time is not None else parts[-1]
        if not np.allclose(lifted[output.spec.name], found, _CLOSE, _CLOSE):
            raise refusal(attributes)


def ask_original(what: str, original: nn.Module, double: StreamingModule, inputs: Arrays, rows: np.ndarray) -> Named:
    """Run the user's own model. Raises ExportError(forward_failed); `what` names the inputs in its message."""
    tensors = tuple(as_tensors(inputs, double=True).values())
    with double_precision():
        return attempt(what, partial(double.ask, original, tensors, torch.from_numpy(rows).double()))
