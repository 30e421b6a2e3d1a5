"""A recurrent layer's step in one kernel, `cells.cu`: packs the weights and divides the work into tiles."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from unroll.service.engine.cuda.device import Argument, Device, Kernel
from unroll.service.engine.cuda.parts import Layer
from unroll.service.engine.tensor_ref import TensorRef

Cell = Literal["LSTM", "GRU"]

_CHUNK, _SLICES, _GATES = 32, 4, 4
#: A layer's units are padded to a multiple of this: whole blocks of every tile.
_UNITS = 128


@dataclass(frozen=True, slots=True)
class Tile:
    """How a block's warps divide its work; the names are those of `cells.cu`.

    Attributes:
        split: The slices of the depth are spread over a cluster of blocks.
        wm, wn: Warps along the units and along the batch.
        wg: Unit groups of a warp.
        nt: A warp has 8 times as many rows of the batch.
        stages: Stages of the copy ring.
        blocks: Blocks of a multiprocessor, which limits a thread's registers.
    """

    split: bool
    wm: int
    wn: int
    wg: int
    nt: int
    stages: int = 3
    blocks: int = 1

    @property
    def rows(self) -> int:
        """Rows of the batch in a block."""
        return self.wn * self.nt * 8

    @property
    def cluster(self) -> int:
        return _SLICES if self.split else 1

    def units(self, cell: Cell) -> int:
        """Return the layer's units in a block."""
        return self.wm * self.wg * (8 if cell == "LSTM" else 16)

    def shared_bytes(self, cell: Cell, parts: int) -> int:
        """Return the bytes of the copy ring and the gates' sums. When the slices are split, the sums reuse the ring."""
        fragments = 16 * self.wm * self.wg * (2 if cell == "LSTM" else 3) * _CHUNK // 16 * parts * 32
        ring = self.stages * (fragments + 4 * self.rows * (_CHUNK + 4))
        sums = 4 * _GATES * self.rows * self.units(cell)
        return max(ring, sums) if self.split else ring + sums


#: From the widest to the narrowest.
TILES = (
    Tile(split=False, wm=1, wn=8, wg=2, nt=2),
    Tile(split=True, wm=2, wn=2, wg=1, nt=4, blocks=3),
    Tile(split=True, wm=2, wn=2, wg=1, nt=2, stages=4),
    Tile(split=True, wm=2, wn=2, wg=1, nt=1, stages=4),
    Tile(split=True, wm=4, wn=1, wg=1, nt=1, stages=4),
    Tile(split=True, wm=2, wn=1, wg=1, nt=1, stages=4),
)


def tile_for(cell: Cell, hidden: int, batch: int, multiprocessors: int) -> Tile:
    """Return the widest tile that the batch fills by half and that gives almost every multiprocessor a block."""
    for tile in TILES:
        blocks = -(-hidden // tile.units(cell)) * tile.cluster * -(-batch // tile.rows)
        if tile.rows < 2 * max(batch, 8) and blocks >= 0.9 * multiprocessors:
            return tile
    return TILES[-1]


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A layer's weights in the kernel's layout.

    Attributes:
        fragments: (unit groups, chunks, tiles, 2, parts, 8, 4, 2, 2, 2) float16.
        bias: (4, hidden) float32.
        unscale: Undoes the power of two that scales the weights to float16's range.
    """

    fragments: np.ndarray
    bias: np.ndarray
    unscale: float


def pack(layer: Layer, parts: int) -> Packed:
    """Pack a layer's weights. parts: float16 numbers that hold one weight: 2 for float32's accuracy, 1 for TF32's."""
    gates, hidden = layer.r.shape[0] // layer.hidden, layer.hidden
    padded = -(-hidden // _UNITS) * _UNITS
    sides = []
    for side in (layer.w, layer.r):
        wide = np.zeros((gates, padded, -(-side.shape[1] // _CHUNK) * _CHUNK), np.float32)
        wide[:, :hidden, : side.shape[1]] = side.reshape(gates, hidden, -1)
        sides.append(wide)
    both = np.concatenate(sides, axis=2)
    power = 14 - int(np.frexp(np.abs(both).max())[1])
    both = np.ldexp(both, power)
    high = both.astype(np.float16)
    halves = np.stack([high, (both - high).astype(np.float16)][:parts])
    # depth = 32 chunk + 8 t + 4 step + 2 upper + pair; an MMA tile's rows 0-7 and 8-15: two gates, or 16 units of one
    depth = (both.shape[2] // _CHUNK, 4, 2, 2, 2)
    if layer.cell == "LSTM":
        rows = halves.reshape(parts, 2, 2, padded // 8, 8, *depth).swapaxes(2, 3)
    else:
        rows = halves.reshape(parts, 3, padded // 16, 2, 8, *depth)
    # part tile group half g chunk t step upper pair -> group chunk tile step part g t upper half pair
    fragments = np.ascontiguousarray(rows.transpose(2, 5, 1, 7, 0, 4, 6, 8, 3, 9))
    wb, rb = layer.b.reshape(2, gates, hidden)
    bias = wb + rb if layer.cell == "LSTM" else np.stack([wb[0] + rb[0], wb[1] + rb[1], wb[2], rb[2]])
    return Packed(fragments, np.ascontiguousarray(bias, np.float32), 2.0**-power)


class CellKernel:
    """A layer's kernel and weights on the device. `width` is the size of a state row."""

    def __init__(self, device: Device, layer: Layer, width: int, *, tf32: bool) -> None:
        self._device, self._layer, self._width = device, layer, width
        self._parts = 1 if tf32 else 2
        packed = pack(layer, self._parts)
        self._weights, self._bias = _upload(device, packed.fragments), _upload(device, packed.bias)
        self._unscale = np.float32(packed.unscale)

    def bind(
        self,
        size: int,
        x: TensorRef,
        arena: TensorRef,
        sources: TensorRef,
        state_out: TensorRef,
        y: TensorRef,
        *,
        overlaps_previous: bool,
    ) -> Callable[[], None]:
        """Return a function that queues one step.

        Args:
            x: The layer's input, (size, inputs).
            arena: The state rows, (slots, width).
            sources: The rows that hold h and c, (size,).
            state_out: Receives h and c, (size, width).
            y: Receives h, (size, hidden).
            overlaps_previous: The previous kernel is another layer's.
        """
        layer = self._layer
        tile = tile_for(layer.cell, layer.hidden, size, self._device.multiprocessors)
        sizes = (layer.inputs, layer.hidden, self._width, layer.h, layer.c)
        kernel = Kernel(
            "cells.cu",
            "step",
            (
                ("LSTM", int(layer.cell == "LSTM")),
                ("PARTS", self._parts),
                ("VEC", 4 if all(length % 4 == 0 for length in sizes) else 1),  # floats read at a time
                ("SPLIT", int(tile.split)),
                ("WM", tile.wm),
                ("WN", tile.wn),
                ("WG", tile.wg),
                ("NT", tile.nt),
                ("STAGES", tile.stages),
                ("BLOCKS", tile.blocks),
            ),
            threads=32 * tile.wm * tile.wn,
            cluster=tile.cluster,
            shared_bytes=tile.shared_bytes(layer.cell, self._parts),
            overlaps_previous=overlaps_previous,
        )
        self._device.prepare(kernel)
        blocks = -(-layer.hidden // tile.units(layer.cell)) * tile.cluster, -(-size // tile.rows)
        pointers = (x, arena, sources, state_out, y, self._weights, self._bias)
        arguments: tuple[Argument, ...] = (
            *(memory.pointer for memory in pointers),
            self._unscale,
            *(np.int32(number) for number in (layer.bounded, size, *sizes)),
        )
        return lambda: self._device.run(kernel, blocks, *arguments)


def _upload(device: Device, array: np.ndarray) -> TensorRef:
    memory = device.allocate(array.shape, array.dtype)
    device.upload(memory.pointer, array)
    return memory
