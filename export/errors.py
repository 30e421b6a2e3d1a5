"""ExportError, the only exception that export raises deliberately, and its codes."""

import re
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch

from unroll.export.source_lines import as_where, source_line

Code = Literal[
    "batch_time",  # an input's batch or time differs from the other inputs'
    "bundle",  # the bundle cannot be written: bad name or version, or it exists
    "calls_depend_on_time",  # calls of a layer depend on the length, or a loop's step cannot be identified
    "checkpoint",  # a model or its weights cannot be loaded
    "dtype",  # parameters of several dtypes, or a tensor that is not float32, int64, int32 or bool
    "forward_failed",  # forward raises on the example, or for another batch size or length
    "initial_state",  # an initial state that differs between the rows of the example, or is not finite
    "internal",  # a bug in export
    "input",  # the example inputs do not fit forward
    "keeps_state",  # forward keeps a value between calls, and the next call does not continue the stream
    "layer_axes",  # a recurrent layer receives another batch or time than the model
    "no_recurrent_layer",
    "max_error",  # a difference from PyTorch in float64 exceeds max_error
    "not_copyable",
    "not_deterministic",  # two identical calls give different answers
    "not_exportable",  # torch.export cannot follow forward
    "not_finite",  # an input or output holds NaN or infinity
    "output",  # an output has no batch axis, or a time axis of another length
    "packed_sequence",  # packed with lengths that forward computes, or padded to another length
    "parity",  # onnxruntime differs from PyTorch
    "precision",  # the model cannot be reduced to this precision
    "quantized",
    "rows_mixed",  # the answer to one sequence depends on its neighbours in the batch
    "scripted",
    "too_large",
    "unbatched",
]


class ExportError(Exception):
    """The model cannot be exported. `code` is stable; the message says what to change. The codes:

    * the module: `scripted`, `quantized`, `dtype`, `too_large`, `not_copyable`, `checkpoint`
    * the example: `input`, `batch_time`, `initial_state`, `unbatched`
    * forward: `forward_failed`, `not_deterministic`, `not_finite`, `output`, `packed_sequence`
    * its recurrence: `no_recurrent_layer`, `layer_axes`, `calls_depend_on_time`, `keeps_state`, `rows_mixed`
    * the graph: `not_exportable`, `parity`, `precision`, `max_error`
    * the target: `bundle`
    * a bug in export: `internal`
    """

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code: Code = code


#: Advice for models with complex numbers.
COMPLEX = (
    "ONNX has no complex numbers: keep real and imaginary parts as two tensors, as torch.view_as_real(w).unbind(-1) "
    "gives them, and compute with both: (a + ib)(c + id) is (ac - bd) + i(ad + bc)"
)

#: Terminal colour codes.
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")

#: PyTorch's message about an operator without a translation.
_NO_OPERATOR = re.compile(r"No ONNX function found for <OpOverload\(op='(\w+)\.(\w+)'")

#: Length limit for a quoted message, in characters; it is cut between sentences, after the first at the earliest.
_MESSAGE = 200


def first_line(error: BaseException) -> str:
    """Summarise the root cause of `error` in one line: its first sentences, and the line of the user's code."""
    place = source_line(error)
    while (cause := error.__cause__) is not None:
        error = cause
    text = _COLOUR.sub("", str(error)).strip()
    line = " ".join(text.split())
    if len(line) >= _MESSAGE:
        heading, *more = text.splitlines()
        line = f"{heading} {more[0].strip()}" if heading.endswith(":") and more else heading
    first, *others = re.split(r"(?<=[.!?])\s+", line)
    for sentence in others:
        if len(first) + len(sentence) >= _MESSAGE:
            break
        first = f"{first} {sentence}"
    return f"{type(error).__name__}: {first}{place}" if first else f"{type(error).__name__}{place}"


def untraceable(what: str, error: Exception, place: Callable[[str], str] = lambda _: "") -> ExportError:
    """The refusal when torch.export or its translation to ONNX cannot follow `what`.

    place: returns the line at which `what` calls an operator.
    """
    text = str(error)
    if "data-dependent" in text:
        written = as_where(error)
        return ExportError(
            "not_exportable",
            f"{what} depends on the value of a tensor, as in `if x.sum() > 0` or int(x){source_line(error)}; a graph "
            "runs the same operations for every input: select row by row with torch.where(condition, a, b)"
            + (f", as {written}" if written else ""),
        )
    if fixed := re.search(r"marked (\w+) as dynamic but your code specialized it", text):
        return ExportError(
            "not_exportable",
            f"{what} computes with one {'batch size' if fixed[1] == 'batch' else 'length'} only: a plain number, as "
            "from len(x) or int(), or a comparison of sizes fixes it; compute with x.shape itself",
        )
    if unknown := _NO_OPERATOR.search(text):
        library = "torch" if unknown[1] in {"aten", "prims"} else unknown[1]
        return no_operator(f"{what} calls {library}.{unknown[2]}{place(unknown[2])}")
    if "constant's list" in text:
        return ExportError(
            "not_exportable",
            f"{what} makes a tensor where torch.export cannot follow: in another thread, with gradients, or outside of "
            f"PyTorch; compute it in forward itself{source_line(error)}",
        )
    if "is not in the constants dictionary" in text:
        return ExportError(
            "not_exportable",
            f"{what} keeps a tensor that it computes, as a cache of derived weights does, and torch.export cannot "
            "follow that; compute it once in __init__ and register it as a buffer, or compute it in every call",
        )
    return ExportError("not_exportable", f"torch.export cannot follow {what}: {first_line(error)}")


def no_operator(what: str) -> ExportError:
    return ExportError(
        "not_exportable",
        f"{what}, which ONNX has no operator for; write it with other operators of PyTorch, or as a Python loop over "
        "time steps",
    )


def unexpected(error: Exception) -> ExportError:
    """The refusal for an error that export does not foresee: of the user's code, or else a bug in export."""
    if source_line(error):
        return ExportError(
            "forward_failed", f"the code of the module fails while export examines it: {first_line(error)}"
        )
    return ExportError(
        "internal",
        f"this is a bug in unroll: {first_line(error)}; please report it with a forward that reproduces it",
    )


def attempt(what: str, run: Callable[[], Any]) -> Any:
    """Run the user's forward.

    Args:
        what: describes forward's inputs in the message.
        run: calls forward.

    Raises:
        ExportError: forward_failed, for any other exception.
    """
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
            return run()
    except ExportError:
        raise
    except Exception as error:
        advice = ""
        if torch.get_default_dtype() == torch.float64 and "does not match weight dtype" in str(error):
            advice = (
                ". Export also runs forward in float64, and this layer stayed float32, because it is not a part of the "
                "module; assign it to an attribute, not to a global variable, a closure or a default argument"
            )
        raise ExportError("forward_failed", f"forward fails on {what}: {first_line(error)}{advice}") from error
