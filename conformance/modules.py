"""Builds the modules described by `trees.py`, with seeded weights, and their inputs."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from conformance.looping import CounterBlock, LoopBlock
from conformance.trees import (
    Along,
    Block,
    Both,
    Conv,
    Counter,
    Dense,
    Elementwise,
    Frames,
    Loop,
    Norm,
    Recurrent,
    Residual,
    Tree,
    Twice,
)

#: The size of the embeddings' vocabulary.
VOCABULARY = 7


class RecurrentBlock(nn.Module):
    def __init__(self, block: Recurrent) -> None:
        super().__init__()
        kind, *relu = block.kind.split()
        options: dict[str, Any] = {"nonlinearity": "relu"} if relu else {}
        if block.projection:
            options["proj_size"] = block.projection
        self.block = block
        self.rnn = getattr(nn, kind)(
            block.inputs,
            block.hidden,
            block.layers,
            bias=block.bias,
            batch_first=block.axes == "batch first",
            dropout=0.3 if block.layers > 1 else 0.0,
            bidirectional=block.bidirectional,
            **options,
        )
        directions = block.layers * (2 if block.bidirectional else 1)
        self.h = nn.Parameter(torch.rand(directions, 1, block.projection or block.hidden) - 0.5)
        self.c = nn.Parameter(torch.rand(directions, 1, block.hidden) - 0.5)
        self.to_h = nn.Linear(block.inputs, block.projection or block.hidden)
        self.kept: Any = None
        self.keeps = self.tells = False
        self.last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        start = self.kept if self.keeps else self._start(x)
        steps = x.transpose(0, 1) if self.block.axes == "time first" else x
        y, state = self.rnn(steps, start)
        if self.keeps:
            self.kept = state
        if self.tells:
            self.last = state
        return y.transpose(0, 1) if self.block.axes == "time first" else y

    def _start(self, x: Tensor) -> Any:
        if self.block.start == "none":
            return None
        h, c = (piece.expand(-1, x.shape[0], -1).contiguous() for piece in (self.h, self.c))
        if self.block.start == "zeros":
            h, c = torch.zeros_like(h), torch.zeros_like(c)
        elif self.block.start == "first step":
            h = self.to_h(x[:, 0]).expand_as(h).contiguous()
        return (h, c) if self.block.kind == "LSTM" else h


class ConvBlock(nn.Module):
    def __init__(self, block: Conv) -> None:
        super().__init__()
        self.reach = (block.kernel - 1) * block.dilation
        self.padding = block.padding
        groups = block.inputs if block.depthwise else 1
        outputs = block.inputs if block.depthwise else block.outputs
        self.conv = nn.Conv1d(block.inputs, outputs, block.kernel, dilation=block.dilation, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        left = {"causal": self.reach, "centred": self.reach // 2, "none": 0}[self.padding]
        right = self.reach - left if self.padding == "centred" else 0
        return self.conv(functional.pad(x.transpose(1, 2), (left, right))).transpose(1, 2)


class FramesBlock(nn.Module):
    def __init__(self, block: Frames) -> None:
        super().__init__()
        self.back = block.inputs if block.overlap else 0
        self.conv = nn.Conv1d(1, block.outputs, block.inputs + self.back, stride=block.inputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(functional.pad(x.flatten(1).unsqueeze(1), (self.back, 0))).transpose(1, 2)


class ElementwiseBlock(nn.Module):
    def __init__(self, block: Elementwise) -> None:
        super().__init__()
        self.kind = block.kind
        self.linear = nn.Linear(block.inputs, block.inputs)
        self.dropout = nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Tensor:
        match self.kind:
            case "gate":
                return x * self.linear(x).sigmoid()
            case "dropout":
                return self.dropout(x)
            case "clamp":
                return x.clamp(-0.5, 0.5)
            case _:
                return getattr(torch if self.kind == "tanh" else functional, self.kind)(x)


class NormBlock(nn.Module):
    def __init__(self, block: Norm) -> None:
        super().__init__()
        self.kind = block.kind
        if block.kind == "layer":
            self.norm: Any = nn.LayerNorm(block.inputs)
        elif block.kind == "rms":
            self.norm = nn.RMSNorm(block.inputs, eps=1e-5)
        elif block.kind == "instance":
            self.norm = nn.InstanceNorm1d(block.inputs, affine=True)
        elif block.kind == "batch":
            self.norm = nn.BatchNorm1d(block.inputs)
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "time mean":
            return x - x.mean(1, keepdim=True)
        if self.kind == "rows":
            return x - x.mean(0, keepdim=True)
        return self.norm(x.transpose(1, 2)).transpose(1, 2) if self.kind in {"batch", "instance"} else self.norm(x)


class AlongBlock(nn.Module):
    def __init__(self, block: Along) -> None:
        super().__init__()
        self.function = _ALONG[block.kind]

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _count(x: Tensor) -> Tensor:
    return torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[None, :, None]


def _attention(x: Tensor) -> Tensor:
    return torch.softmax(x @ x.transpose(1, 2), -1) @ x


def _causal_attention(x: Tensor) -> Tensor:
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    return torch.softmax((x @ x.transpose(1, 2)).masked_fill(~mask, -1e9), -1) @ x


def _lagged(x: Tensor, steps: int) -> Tensor:
    return functional.pad(x, (0, 0, steps, 0))[:, : x.shape[1]]


_ALONG: dict[str, Callable[[Tensor], Tensor]] = {
    "cumulative sum": lambda x: x.cumsum(1) * 0.1,
    "cumulative mean": lambda x: x.cumsum(1) / _count(x),
    "cumulative maximum": lambda x: x.cummax(1).values,
    "difference": lambda x: x - _lagged(x, 1),
    "lag": lambda x: _lagged(x, 2),
    "flip": lambda x: x.flip(1),
    "look ahead": lambda x: torch.cat([x[:, 1:], x[:, -1:]], 1),
    "position": lambda x: x + 0.1 * _count(x),
    "length": lambda x: x / x.shape[1],
    "attention": _attention,
    "causal attention": _causal_attention,
    "softmax": lambda x: x.softmax(1),
    "every second": lambda x: x[:, ::2],
    "last two": lambda x: x[:, -2:],
    "last forty": lambda x: x - x[:, -40:].mean(1, keepdim=True),
    "twice if long": lambda x: x * 2 if x.shape[1] > 40 else x,
    "windows of forty": lambda x: torch.cat([piece.cumsum(1) for piece in x.split(40, 1)], 1),
    "twice after forty": lambda x: torch.cat([x[:, :40], x[:, 40:] * 2], 1),
}


class ResidualBlock(nn.Module):
    def __init__(self, block: Residual) -> None:
        super().__init__()
        self.body = nn.Sequential(*map(build_block, block.body))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class BothBlock(nn.Module):
    def __init__(self, block: Both) -> None:
        super().__init__()
        self.left, self.right = build_block(block.left), build_block(block.right)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], -1)


class TwiceBlock(nn.Module):
    def __init__(self, block: Twice) -> None:
        super().__init__()
        self.body = build_block(block.body)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.body(x))


_BUILDERS: dict[type, Callable[[Any], nn.Module]] = {
    Recurrent: RecurrentBlock,
    Loop: LoopBlock,
    Counter: CounterBlock,
    Conv: ConvBlock,
    Frames: FramesBlock,
    Dense: lambda block: nn.Linear(block.inputs, block.outputs),
    Elementwise: ElementwiseBlock,
    Norm: NormBlock,
    Along: AlongBlock,
    Residual: ResidualBlock,
    Both: BothBlock,
    Twice: TwiceBlock,
}


def build_block(block: Block) -> nn.Module:
    return _BUILDERS[type(block)](block)


class Model(nn.Module):
    """A tree's model. Its forward takes `x`, `token` or both, and more; its results follow `tree.end`."""

    def __init__(self, tree: Tree) -> None:
        super().__init__()
        self.tree = tree
        self.embedding = nn.Embedding(VOCABULARY, tree.width)
        self.blocks = nn.Sequential(*map(build_block, tree.blocks))
        self.head = nn.Linear(tree.blocks[-1].outputs, 3)
        recurrent = [module for module in self.modules() if isinstance(module, RecurrentBlock)]
        self.last = recurrent[-1] if recurrent else None
        if self.last is not None:
            self.last.keeps, self.last.tells = tree.end in {"kept", "step"}, tree.end == "state"
        for module in recurrent if tree.end == "step kept" else ():
            module.keeps = True

    def forward(
        self,
        x: Tensor | None = None,
        token: Tensor | None = None,
        mask: Tensor | None = None,
        goal: Tensor | None = None,
    ) -> Any:
        x = None if x is None else to_steps(x, self.tree)
        if x is not None and self.tree.source == "missing":
            x = torch.where(torch.isnan(x), 0.3, x)
        steps = [
            piece
            for piece in (x, None if token is None else self.embedding(to_steps(token, self.tree)))
            if piece is not None
        ]
        hidden = steps[0] if len(steps) == 1 else steps[0] + steps[1]
        if goal is not None:
            hidden = hidden + goal.unsqueeze(1)
        if mask is not None:
            hidden = hidden.masked_fill(to_steps(mask, self.tree).unsqueeze(-1), 0)
        return self._end(self.head(self.blocks(hidden)))

    def _end(self, y: Tensor) -> Any:
        steps = from_steps(y, self.tree)
        match self.tree.end:
            case "last":
                return y[:, -1]
            case "mean":
                return y.mean(1)
            case "maximum":
                return y.amax(1)
            case "steps and last":
                return steps, y[:, -1]
            case "dict":
                return {"steps": steps, "choice": steps.argmax(-1)}
            case "time first":
                return y.transpose(0, 1)
            case "state":
                return steps, self.last.last if self.last is not None else None
            case _:
                return steps


class StepModel(Model):
    """Computes one time step. With `tree.end == "step"`, takes and returns the last recurrent layer's state."""

    def forward(
        self,
        x: Tensor | None = None,
        token: Tensor | None = None,
        mask: Tensor | None = None,
        goal: Tensor | None = None,
        state: Any = None,
    ) -> Any:
        if self.last is not None and state is not None:
            keep = 1 if mask is None else 1 - mask.to(self.head.weight.dtype)[None, :, None]
            self.last.kept = tuple(part * keep for part in state) if isinstance(state, tuple) else state * keep
        x, token, mask = (None if piece is None else piece.unsqueeze(1) for piece in (x, token, mask))
        y = super().forward(x, token, mask, goal)
        return y[:, 0] if self.last is None or state is None else (y[:, 0], self.last.kept)

    def start(self, batch: int) -> dict[str, Any]:
        """The state argument at the start of a sequence, if there is one."""
        if self.last is None or self.tree.end != "step":
            return {}
        h, c = (torch.zeros_like(one).repeat(1, batch, 1) for one in (self.last.h, self.last.c))
        return {"state": (h, c) if self.last.block.kind == "LSTM" else h}


def to_steps(tensor: Tensor, tree: Tree) -> Tensor:
    """From the layout of the tree's forward to (batch, time, ...)."""
    return {"time first": tensor.transpose(0, 1), "time last": tensor.movedim(-1, 1)}.get(tree.layout, tensor)


def from_steps(tensor: Tensor, tree: Tree) -> Tensor:
    """The opposite of `to_steps`."""
    return {"time first": tensor.transpose(0, 1), "time last": tensor.movedim(1, -1)}.get(tree.layout, tensor)


#: The bundle's outputs by `tree.end`, each with whether it has a time axis.
OUTPUTS: dict[str, dict[str, bool]] = {
    "last": {"y": False},
    "mean": {"y": False},
    "maximum": {"y": False},
    "steps and last": {"y0": True, "y1": False},
    "dict": {"steps": True, "choice": True},
}


def build(tree: Tree) -> Model:
    """Build the model, with weights far enough from zero to have a visible effect."""
    torch.manual_seed(tree.seed)
    model = StepModel(tree) if is_step(tree) else Model(tree)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.InstanceNorm1d, nn.BatchNorm1d)):
                module.weight.uniform_(0.5, 1.5)
    return model.eval()


def is_step(tree: Tree) -> bool:
    return tree.end in {"step", "step kept"}


def draw(tree: Tree, batch: int, time: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draw inputs, each (batch, time, ...) but `goal`, independent of the model's own axes."""
    found: dict[str, np.ndarray] = {}
    if tree.source != "tokens":
        found["x"] = rng.standard_normal((batch, time, tree.width)).astype(np.float32)
    if tree.source == "missing":
        found["x"][rng.random(found["x"].shape) < 0.2] = np.nan
    if tree.source == "goal":
        found["goal"] = rng.standard_normal((batch, tree.width)).astype(np.float32)
    if tree.source in {"tokens", "both"}:
        found["token"] = rng.integers(0, VOCABULARY, (batch, time))
    if tree.mask == "booleans":
        found["mask"] = rng.random((batch, time)) < 0.3
    return found


def answers(model: Model, inputs: dict[str, np.ndarray], *, double: bool) -> dict[str, np.ndarray]:
    """The model's own answers, with the bundle's names and axes (batch, time, ...)."""
    tree = model.tree
    tensors = arguments(tree, inputs)
    if double:
        tensors = {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}
    with torch.no_grad():
        if isinstance(model, StepModel):
            return {"y": _stepped(model, tensors).numpy()}
        returned = model(**tensors)
    outputs = OUTPUTS.get(tree.end, {"y": True})
    flat = list(_tensors(returned))[: len(outputs)]
    layout = replace(tree, layout="time first") if tree.end == "time first" else tree
    return {
        name: (to_steps(tensor, layout) if time else tensor).numpy()
        for (name, time), tensor in zip(outputs.items(), flat, strict=True)
    }


def arguments(tree: Tree, inputs: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """The inputs in the layout of the tree's forward."""
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    return {name: tensor if name == "goal" else from_steps(tensor, tree) for name, tensor in tensors.items()}


def at(inputs: dict[str, Any], step: int) -> dict[str, Any]:
    """One time step of inputs, without the time."""
    return {name: array if name == "goal" else array[:, step] for name, array in inputs.items()}


def _stepped(model: StepModel, inputs: dict[str, Tensor]) -> Tensor:
    """Call a step model for each time step."""
    series = next(tensor for name, tensor in inputs.items() if name != "goal")
    state, steps = model.start(len(series)), []
    for t in range(series.shape[1]):
        y = model(**at(inputs, t), **state)
        y, state = (y[0], {"state": y[1]}) if state else (y, state)
        steps.append(y)
    return torch.stack(steps, 1)


def differs_when_called_again(tree: Tree, calls: int) -> str | None:
    """Check a module's answers to successive calls; returns a description of the first error, if any.

    The answers must be equal; if the module keeps a state, they must be those for the whole sequence.
    """
    keeps = tree.end in {"kept", "step kept"}
    model, inputs = build(tree).double(), draw(tree, 2, calls if keeps else 8, np.random.default_rng(tree.seed))
    whole = answers(build(tree).double(), inputs, double=True)
    for call in range(calls):
        piece = {n: array if n == "goal" or not keeps else array[:, call : call + 1] for n, array in inputs.items()}
        for name, array in answers(model, piece, double=True).items():
            expected = whole[name][:, call : call + 1] if keeps else whole[name]
            if not np.allclose(array, expected, 1e-6, 1e-6, equal_nan=True):
                return f"{name} of call {call + 1} is not that of a module that was not called before"
    return None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from value.values()
    else:
        yield from (item for item in value if isinstance(item, Tensor))
