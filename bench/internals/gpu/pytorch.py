"""PyTorch's `nn.LSTM` or `nn.GRU`, stepped under a CUDA graph with states in arenas; and whole sequences."""

from collections.abc import Callable

import numpy as np
import torch

from bench.internals.gpu.shapes import Model


def set_tf32(allowed: bool) -> None:
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed


class TorchSteps:
    """Arenas of h and c, each (layers, slots, hidden), so that gather and scatter keep cuDNN's layout."""

    def __init__(self, model: Model, slots: np.ndarray, x: np.ndarray, count: int) -> None:
        self._model = model
        lstm = isinstance(model.rnn, torch.nn.LSTM)
        shape = (model.rnn.num_layers, count, model.rnn.hidden_size)
        self._arenas = [torch.zeros(shape, device="cuda") for _ in range(2 if lstm else 1)]
        self._slots = torch.from_numpy(slots).cuda()
        self._x = torch.from_numpy(x).cuda()
        with torch.inference_mode():
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                for _ in range(3):
                    self._step()
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._y = self._step()
            for arena in self._arenas:
                arena.zero_()

    def launch(self) -> None:
        self._graph.replay()

    def answer(self) -> np.ndarray:
        torch.cuda.synchronize()
        return self._y.cpu().numpy()

    def _step(self) -> torch.Tensor:
        states = [arena.index_select(1, self._slots) for arena in self._arenas]
        y, after = self._model.rnn(self._x, tuple(states) if len(states) == 2 else states[0])
        for arena, state in zip(self._arenas, after if len(states) == 2 else [after], strict=True):
            arena.index_copy_(1, self._slots, state)
        return self._model.head(y)


def sequences(model: Model, x: np.ndarray) -> Callable[[], np.ndarray]:
    """From host memory to host memory, as a server would: x (batch, time, features)."""

    def run() -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(x).cuda()).cpu().numpy()

    return run


def seconds_per_launch(launch: Callable[[], object], count: int, stream: int | None = None) -> float:
    """On the device, launched back to back. stream: address of the stream it runs on, if not PyTorch's current one."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    with torch.cuda.stream(None if stream is None else torch.cuda.ExternalStream(stream)):
        begin.record()
        for _ in range(count):
            launch()
        end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / count / 1e3


def copy_rate() -> float:
    """Bytes per second, reads plus writes, of a copy much larger than the cache."""
    source = torch.zeros(2**30, device="cuda")
    target = torch.empty_like(source)
    seconds = seconds_per_launch(lambda: target.copy_(source), 10)
    return 2 * source.nbytes / seconds


def product_rate(*, tf32: bool) -> float:
    """Operations per second of a large product of float32 matrices."""
    set_tf32(tf32)
    one, other = (torch.randn(8192, 8192, device="cuda") for _ in range(2))
    out = torch.empty_like(one)
    seconds = seconds_per_launch(lambda: torch.mm(one, other, out=out), 5)
    return 2 * 8192**3 / seconds
