"""Modules that are refused, each with its code."""

import threading
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from conformance.kinds.kind import Kind, gru, head, lstm, made, per_step
from conformance.kinds.layers import state_dropped
from conformance.kinds.states import with_cache


def running_mean(s: Any, x: Tensor) -> Tensor:
    s.mean = 0.9 * s.mean + 0.1 * x.mean(1, keepdim=True)
    return s.rnn(x - s.mean)[0]


def decayed(s: Any, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    y, h = s.rnn(x, h)
    return y, h * 0.9


def half_cached(s: Any, x: Tensor) -> Tensor:
    """The next call gets the convolution's history, but not the layer's state."""
    cache = x.new_zeros(x.shape[0], 3, 4) if s.cache is None else s.cache
    y, s.cache = with_cache(s, x, cache)
    return y


def changed_in_place(s: Any, x: Tensor) -> Tensor:
    y, h = s.rnn(x, s.h)
    s.h.copy_(h)
    return y


def by_length(s: Any, x: Tensor) -> Tensor:
    return s.rnn(x, torch.full((1, x.shape[0], 6), float(x.shape[1])))[0]


def packed_by_values(s: Any, x: Tensor) -> Tensor:
    lengths = (x[..., 0] > 0).sum(1).clamp(min=1)
    p = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    return pad_packed_sequence(s.rnn(p)[0], batch_first=True, total_length=x.shape[1])[0]


def growing(s: Any, x: Tensor) -> Tensor:
    h = torch.zeros(x.shape[0], 6)
    seen: list[Tensor] = []
    for t in range(x.shape[1]):
        h = s.cell(x[:, t], torch.stack([h, *seen]).mean(0))
        seen.append(h)
    return torch.stack(seen, 1)


def quantized() -> nn.Module:
    module = made(per_step, rnn=lstm(), head=head())
    # Only the module of the class matters.
    module.rnn.__class__ = type("LSTM", (nn.LSTM,), {"__module__": "torch.ao.nn.quantized.dynamic.modules.rnn"})
    return module


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but still in use
        return made(per_step, rnn=torch.jit.script(gru()), head=head())


def locked(s: Any, x: Tensor) -> Tensor:
    with s.lock:
        y: Tensor = s.rnn(x)[0]
    return y


def resized_in_place(s: Any, x: Tensor) -> Tensor:
    s.h.resize_(1, x.shape[0], 6).zero_()
    return s.rnn(x, s.h)[0]


def grown(s: Any, x: Tensor) -> Tensor:
    """The table is as long as the longest sequence so far."""
    if s.table.shape[0] < x.shape[1]:
        s.table = torch.arange(x.shape[1]) / 1000
    return s.rnn(x + s.table[: x.shape[1], None])[0]


def by_weights(s: Any, x: Tensor) -> Tensor:
    w, *others = s.rnn._flat_weights
    zeros = x.new_zeros(1, x.shape[0], 6)
    return torch.gru(x, zeros, [w * x.mean(), *others], True, 1, 0.0, s.training, False, True)[0]


def packed_parts(s: Any, x: Tensor) -> Tensor:
    p = pack_padded_sequence(x, torch.full((x.shape[0],), x.shape[1]), batch_first=True)
    zeros = x.new_zeros(1, x.shape[0], 6)
    return torch.gru(p.data, p.batch_sizes, zeros, s.rnn._flat_weights, True, 1, 0.0, s.training, False)[0]


def at_most(s: Any, x: Tensor) -> Tensor:
    if x.shape[1] > 5000:
        raise ValueError("too long")
    return s.rnn(x)[0]


REFUSED = [
    Kind(
        "a cell without a loop",
        lambda: made(lambda s, x: s.cell(x[:, 0])[0], cell=nn.LSTMCell(4, 6)),
        refused="no_recurrent_layer",
    ),
    Kind(
        "packed with lengths of its own",
        lambda: made(packed_by_values, rnn=gru()),
        refused="packed_sequence",
        says="as an argument",
    ),
    Kind("no recurrent layer", lambda: made(lambda s, x: s.head(x), head=head(4)), refused="no_recurrent_layer"),
    Kind(
        "a recurrent layer never called",
        lambda: made(lambda s, x: s.head(x), rnn=gru(), head=head(4)),
        refused="no_recurrent_layer",
    ),
    Kind(
        "parameters of two dtypes",
        lambda: made(per_step, rnn=gru(), head=head().half()),
        refused="dtype",
        says="2 dtypes",
    ),
    Kind(
        "float64 input",
        lambda: made(per_step, rnn=gru(), head=head()),
        lambda: {"x": torch.randn(2, 5, 4).double()},
        refused="dtype",
        says="'x'",
    ),
    Kind("scripted, and no class of its own to run", scripted, refused="scripted", says="nn.Module"),
    Kind(
        "a lock, which nothing copies",
        lambda: made(locked, rnn=gru(), lock=threading.Lock()),
        refused="not_copyable",
        says="'lock', a lock",
    ),
    Kind("quantized", quantized, refused="quantized", says="'rnn'"),
    Kind(
        "one step taken for a sequence",
        lambda: made(lambda s, x: s.rnn(x[:, 0])[0], rnn=gru()),
        refused="unbatched",
        says="2-D",
    ),
    Kind(
        "a state of another shape",
        lambda: made(with_cache, conv=nn.Conv1d(4, 4, 4), rnn=gru()),
        lambda: {"x": torch.randn(2, 7, 4), "cache": torch.zeros(2, 3, 4)},
        {"state": {"cache": "y0"}},
        refused="input",
        says="it returns y0 (2, 7, 6), y1 (2, 3, 4)",
    ),
    Kind(
        "a state that is not the layer's own",
        lambda: made(decayed, rnn=gru()),
        lambda: {"x": torch.randn(2, 7, 4), "h": torch.zeros(1, 2, 6)},
        {"state": {"h": "y1"}},
        refused="input",
        says="'y1' is not the final state of this layer",
    ),
    Kind(
        "a state that no client starts from",
        lambda: made(with_cache, conv=nn.Conv1d(4, 4, 4), rnn=gru()),
        lambda: {"x": torch.randn(2, 7, 4), "cache": torch.randn(2, 3, 4)},
        {"state": {"cache": "y1"}},
        refused="input",
        says="in every row",
    ),
    Kind(
        "one of two states kept",
        lambda: made(half_cached, conv=nn.Conv1d(4, 4, 4), rnn=gru(), cache=None),
        refused="keeps_state",
        says="'cache'",
    ),
    Kind(
        "state changed in place",
        lambda: made(changed_in_place, rnn=gru(), h=nn.Buffer(torch.zeros(1, 2, 6))),
        refused="keeps_state",
        says="'h'",
    ),
    Kind(
        "a buffer resized in place",
        lambda: made(resized_in_place, rnn=gru(), h=nn.Buffer(torch.zeros(1, 1, 6))),
        refused="not_exportable",
        says="refused.py",
    ),
    Kind(
        "a table that grows with the length",
        lambda: made(grown, rnn=gru(), table=nn.Buffer(torch.arange(3) / 1000)),
        refused="not_exportable",
        says="time",
    ),
    Kind(
        "weights computed from the inputs",
        lambda: made(by_weights, rnn=gru()),
        refused="not_exportable",
        says="weights that it gives to torch.gru",
    ),
    Kind(
        "the parts of a packed sequence",
        lambda: made(packed_parts, rnn=gru()),
        refused="packed_sequence",
        says="the padded tensor",
    ),
    Kind(
        "running mean in a buffer",
        lambda: made(running_mean, rnn=gru(), mean=nn.Buffer(torch.zeros(()))),
        refused="keeps_state",
        says="'mean'",
    ),
    Kind(
        "random numbers",
        lambda: made(lambda s, x: s.rnn(x + torch.randn_like(x))[0], rnn=gru()),
        refused="not_deterministic",
    ),
    Kind("initial state from the length", lambda: made(by_length, rnn=gru()), refused="not_exportable", says="length"),
    Kind(
        "rows of a given state differ",
        lambda: made(state_dropped, rnn=gru(), head=head()),
        lambda: {"x": torch.randn(2, 5, 4), "hc": torch.randn(1, 2, 6)},
        refused="initial_state",
        says="'hc'",
    ),
    Kind(
        "a loop that keeps all it has seen",
        lambda: made(growing, cell=nn.GRUCell(4, 6)),
        refused="calls_depend_on_time",
        says="loops over time steps",
    ),
    Kind("mean over the batch", lambda: made(lambda s, x: s.rnn(x - x.mean(0))[0], rnn=gru()), refused="rows_mixed"),
    Kind(
        "batch taken for time",
        lambda: made(per_step, rnn=nn.GRU(4, 6), head=head()),
        refused="layer_axes",
        says="batch_first=False",
    ),
    Kind(
        "every second step",
        lambda: made(lambda s, x: s.rnn(x[:, ::2])[0], rnn=gru()),
        refused="layer_axes",
        says="Pad the beginning",
    ),
    Kind(
        "a sequence per sensor",
        lambda: made(lambda s, x: s.rnn(x.flatten(0, 1))[0], rnn=gru()),
        lambda: {"x": torch.randn(2, 5, 7, 4)},
        refused="layer_axes",
    ),
    Kind("shorter output", lambda: made(lambda s, x: s.rnn(x)[0][:, 1:], rnn=gru()), refused="output", says="length"),
    Kind("batch and time folded", lambda: made(lambda s, x: s.rnn(x)[0].flatten(0, 1), rnn=gru()), refused="output"),
    Kind(
        "a number as output", lambda: made(lambda s, x: (s.rnn(x)[0], 1.5), rnn=gru()), refused="output", says="float"
    ),
    Kind(
        "an input without time",
        lambda: made(lambda s, x, u: s.rnn(x)[0] + u[:, None], rnn=gru()),
        lambda: {"x": torch.randn(2, 5, 4), "u": torch.randn(2, 6)},
        refused="batch_time",
    ),
    Kind(
        "one integer value only",
        lambda: made(lambda s, x: s.rnn(x.unsqueeze(-1).float())[0], rnn=gru(1)),
        lambda: {"x": torch.zeros(2, 5, dtype=torch.int64)},
        refused="input",
        says="one value",
    ),
    Kind(
        "a name forward lacks",
        lambda: made(per_step, rnn=gru(), head=head()),
        lambda: {"z": torch.randn(2, 5, 4)},
        refused="input",
    ),
    Kind("NaN", lambda: made(lambda s, x: s.rnn(x)[0].log(), rnn=gru()), refused="not_finite"),
    Kind(
        "a branch on values",
        lambda: made(lambda s, x: s.rnn(x)[0] * (2 if x.sum() > 0 else 3), rnn=gru()),
        refused="not_exportable",
        says="torch.where",
    ),
    Kind(
        "a longest length",
        lambda: made(at_most, rnn=gru()),
        refused="not_exportable",
        says="time <= 5000",
    ),
    Kind(
        "a branch on the length",
        lambda: made(lambda s, x: s.rnn(x[:, -50:] if x.shape[1] > 50 else x)[0], rnn=gru()),
        refused="not_exportable",
        says="time",
    ),
    Kind(
        "a table of positions",
        lambda: made(
            lambda s, x: s.rnn(x + s.table[: x.shape[1]])[0], rnn=gru(), table=nn.Parameter(torch.randn(30, 4))
        ),
        refused="not_exportable",
        says="time",
    ),
    Kind(
        "fixed length",
        lambda: made(lambda s, x: s.head(s.rnn(x)[0].flatten(1)), rnn=gru(), head=nn.Linear(42, 2)),
        refused="forward_failed",
    ),
]
