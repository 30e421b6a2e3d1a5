"""Draws random trees with hypothesis: mostly common models, some that cannot stream, and some invalid ones."""

from typing import Any, TypeVar, get_args

from hypothesis import strategies as st

from conformance.trees import (
    Along,
    AlongKind,
    Block,
    Both,
    Cell,
    Conv,
    Counter,
    Dense,
    Elementwise,
    End,
    Frames,
    Holds,
    Iterates,
    LateKind,
    Loop,
    Memory,
    Norm,
    Recurrent,
    Residual,
    Tree,
    Twice,
)

Draw = Any
T = TypeVar("T")

#: The maximum nesting of blocks.
_DEPTH = 2


def _mostly(usual: T, *others: T, times: int = 8) -> st.SearchStrategy[T]:
    """Sample `usual` `times` as often as each of `others`."""
    return st.sampled_from((*[usual] * times, *others))


@st.composite
def recurrents(draw: Draw, inputs: int, outputs: int | None = None) -> Recurrent:
    """A recurrent layer with `outputs` features, or with any number if None."""
    kind = draw(st.sampled_from(("LSTM", "GRU", "RNN", "RNN relu", "LSTM", "GRU")))
    hidden = outputs or draw(st.integers(1, 6))
    both_ways = outputs is None and draw(_mostly(False, True, times=12))
    return Recurrent(
        kind,
        inputs,
        hidden=hidden,
        layers=draw(st.integers(1, 3)),
        bias=draw(_mostly(True, False)),
        bidirectional=both_ways,
        projection=draw(_mostly(0, 1, times=12)) if kind == "LSTM" and outputs is None and hidden > 1 else 0,
        axes=draw(_mostly("batch first", "time first", "time first", "wrong", times=20)),
        start=draw(_mostly("none", "zeros", "learned", "learned", "first step", times=12)),
    )


@st.composite
def loops(draw: Draw, inputs: int) -> Loop:
    return Loop(
        draw(st.sampled_from(get_args(Cell))),
        inputs,
        hidden=draw(st.integers(1, 5)),
        iterates=draw(st.sampled_from(get_args(Iterates))),
        late=draw(_mostly("none", *get_args(LateKind)[1:], times=6)),
        when=draw(st.sampled_from((6, 12, 24, 30, 50, 168, 700, 2000, 5000, 5000))),
        memory=draw(_mostly("none", *get_args(Memory)[1:], times=6)),
        holds=draw(_mostly("parameter", *get_args(Holds)[1:], times=4)),
    )


@st.composite
def blocks(draw: Draw, inputs: int, depth: int = 0) -> Block:
    kinds = ["recurrent"] * 5 + ["dense"] * 3 + ["elementwise"] * 4 + ["norm"] * 4 + ["conv"] * 3
    kinds += ["loop"] * 5 + ["along"] * 2 + ["counter", "frames"]
    if depth < _DEPTH:
        kinds += ["residual"] * 4 + ["both"] * 2 + ["twice"]
    match draw(st.sampled_from(kinds)):
        case "recurrent":
            return draw(recurrents(inputs))
        case "dense":
            return Dense(inputs, draw(st.integers(1, 6)))
        case "elementwise":
            usual = ("relu", "gelu", "tanh", "silu", "elu", "softplus", "gate", "dropout", "clamp")
            return Elementwise(draw(st.sampled_from(usual)), inputs)
        case "norm":
            return Norm(
                draw(st.sampled_from(("layer", "batch", "rms") * 4 + ("instance", "time mean", "rows"))), inputs
            )
        case "conv":
            return _conv(draw, inputs)
        case "frames":
            return Frames(inputs, draw(st.integers(1, 6)), overlap=draw(st.booleans()))
        case "loop":
            return draw(loops(inputs))
        case "counter":
            kept = ("attribute", "dict", "list", "object", "array", "generator", "class", "global", "iterator")
            return Counter(draw(st.sampled_from(kept)), inputs)
        case "along":
            return Along(draw(st.sampled_from(get_args(AlongKind))), inputs)
        case "residual":
            body = [draw(blocks(inputs, depth + 1))]
            return Residual(
                (*body, Dense(body[-1].outputs, inputs)) if body[-1].outputs != inputs else (*body,), inputs
            )
        case "both":
            return Both(draw(blocks(inputs, depth + 1)), draw(blocks(inputs, depth + 1)))
        case _:
            return Twice(draw(recurrents(inputs, outputs=inputs)))


def _conv(draw: Draw, inputs: int) -> Conv:
    depthwise = draw(st.booleans())
    return Conv(
        inputs,
        inputs if depthwise else draw(st.integers(1, 6)),
        kernel=draw(st.sampled_from((1, 2, 3, 5))),
        dilation=draw(_mostly(1, 2, 4, times=4)),
        depthwise=depthwise,
        padding=draw(_mostly("causal", "centred", "none")),
    )


@st.composite
def trees(draw: Draw) -> Tree:
    width = draw(st.integers(1, 5))
    chain: list[Block] = []
    now = width
    for _ in range(draw(st.integers(0, 3))):
        chain.append(draw(blocks(now)))
        now = chain[-1].outputs
    # A model without a recurrent layer is refused immediately, so nearly all get one, anywhere in the chain.
    if draw(_mostly(True, False, times=20)):
        place = draw(st.integers(0, len(chain)))
        inputs = chain[place - 1].outputs if place else width
        following = place < len(chain)
        chain.insert(place, draw(recurrents(inputs, outputs=inputs if following else None)))
    if not chain:
        chain.append(Dense(width, width))
    end = draw(st.sampled_from(("last", "steps", "steps", "steps", "steps", *get_args(End))))
    return Tree(
        source=draw(st.sampled_from(("floats", "floats", "floats", "tokens", "both", "goal", "missing"))),
        width=width,
        blocks=tuple(chain),
        end=end,
        layout="batch first" if "step" in end.split() else draw(_mostly("batch first", "time first", "time last")),
        mask=draw(_mostly("left out", "None", "booleans")),
        seed=draw(st.integers(0, 9)),
    )
