"""Small models for every code path of the server, exported once per run; a CUDA stub, and a Redis."""

import fcntl
import gc
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from httpx._config import DEFAULT_TIMEOUT_CONFIG
from httpx._transports import default
from redis_server import RedisServer
from stub_cuda.child import Outcome, Stub
from torch import Tensor, nn
from waiting import PATIENCE

import unroll
from conformance import onnx_registry

#: The fixture `made_once`.
MadeOnce = Callable[[str, Callable[[Path], object]], Path]

torch.set_num_threads(1)
onnx_registry.cache_registry()
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same for the processes that tests start


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that wait for processes run first, in parallel with those that compute; short tests run last."""
    items.sort(key=lambda item: "faults" not in item.path.parts)


def pytest_collection_finish() -> None:
    """Imported objects stay: the collector need not scan half a million of them."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _httpx_is_quick_and_patient() -> Iterator[None]:
    """httpx reads all certificates for each client, which takes long and is of no use here, and gives up after 5 s."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(default, "create_ssl_context", cache(default.create_ssl_context))
        for phase in ("connect", "read", "write", "pool"):
            patch.setattr(DEFAULT_TIMEOUT_CONFIG, phase, PATIENCE)
        yield


class Recurrent(nn.Module):
    """A stack of LSTM or GRU layers and a head for every step, or for the last."""

    def __init__(self, kind: type[nn.RNNBase], features: int = 3, *, last: bool = False, **options: object) -> None:
        super().__init__()
        self.rnn = kind(features, 8, batch_first=True, **options)  # type: ignore[arg-type]
        self.head = nn.Linear(16 if options.get("bidirectional") else 8, 2)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(x)
        return self.head(y[:, -1] if self.last else y)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.rnn = nn.GRU(4, 8, batch_first=True)
        self.head = nn.Linear(8, 11)

    def forward(self, token: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(token))[0])


class TwoInTwoOut(nn.Module):
    """Two inputs, two outputs, and a learned initial state."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(5, 6, batch_first=True)
        self.start = nn.Parameter(torch.randn(1, 1, 6))
        self.level, self.slope = nn.Linear(6, 1), nn.Linear(6, 2)

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        start = self.start.expand(1, a.shape[0], 6).contiguous()
        y, _ = self.rnn(torch.cat([a, b], -1), start)
        return {"level": self.level(y), "slope": self.slope(y)}


def build(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model of that name with the same weights each time, and example inputs."""
    torch.manual_seed(sum(name.encode()))
    x = torch.randn(2, 9, 3)
    match name:
        case "lstm":
            return Recurrent(nn.LSTM, num_layers=2).eval(), {"x": x}
        case "gru":
            return Recurrent(nn.GRU, num_layers=2).eval(), {"x": x}
        case "last":
            return Recurrent(nn.LSTM, last=True).eval(), {"x": x}
        case "whole":
            return Recurrent(nn.GRU, bidirectional=True).eval(), {"x": x}
        case "tokens":
            return Tokens().eval(), {"token": torch.randint(0, 11, (2, 9))}
        case "two":
            return TwoInTwoOut().eval(), {"a": torch.randn(2, 9, 2), "b": x}
    raise KeyError(name)


NAMES = ("lstm", "gru", "last", "whole", "tokens", "two")


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """`made_once(name, make)`: a folder that `make` fills, once for all processes of a run; nobody changes it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent

    def call(name: str, make: Callable[[Path], object]) -> Path:
        path, done = folder / f"shared-{name}", folder / f"shared-{name}.done"
        with (folder / f"shared-{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                path.mkdir()
                make(path)
                done.touch()
        return path

    return call


def export_all(path: Path) -> None:
    for name in NAMES:
        module, example = build(name)
        unroll.export(module, example, name=name, repository=path)
    torch.manual_seed(99)
    unroll.export(
        Recurrent(nn.GRU, num_layers=2).eval(), {"x": torch.randn(2, 9, 3)}, name="gru", version="2", repository=path
    )


@pytest.fixture(scope="session")
def repository(made_once: MadeOnce) -> Path:
    """A repository with version 1 of each of NAMES, and version 2 of `gru` with other weights."""
    return made_once("repository", export_all)


@pytest.fixture(scope="session")
def run_with_stub(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outcome]:
    """`run_with_stub(script, *arguments)` runs Python where onnxruntime-gpu finds the CUDA of `stub_cuda/`.

    What it computes means nothing; the outcome tells what was called.
    """
    if missing := Stub.missing():
        pytest.skip(missing)
    return Stub(tmp_path_factory.mktemp("stub_cuda")).run


@pytest.fixture(scope="session")
def redis_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One Redis for the whole run; tests take `redis_server`."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def redis_server(redis_process: RedisServer) -> RedisServer:
    """An empty Redis. A test that harms the process itself makes a RedisServer of its own."""
    redis_process.flush()
    return redis_process
