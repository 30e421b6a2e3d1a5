"""The stub's log in Python: the calls of each phase, in order."""

from dataclasses import dataclass, fields
from typing import Any

_QUEUED = ("kernel", "cudaMemcpyAsync", "cudaMemsetAsync", "cudaLaunchHostFunc", "cudaGraphLaunch", "cudnnRNNForward")


@dataclass(frozen=True, slots=True)
class Call:
    """origin, destination: `device`, `pinned` or `host`. source, target, stream: addresses. kernel: as C++ mangles it.

    graph: the capture of the call, 0 for none. launched: the graph it launches. call: the forbidden call.
    """

    name: str
    bytes: int = 0
    origin: str = ""
    destination: str = ""
    source: int = 0
    target: int = 0
    stream: int = 0
    graph: int = 0
    launched: int = 0
    blocks: int = 0
    threads: int = 0
    kernel: str = ""
    call: str = ""

    @property
    def queued(self) -> bool:
        """Whether the call enqueues GPU work."""
        return self.name in _QUEUED or "gemm" in self.name.lower() or "Matmul" in self.name


class Calls(list[Call]):
    def named(self, *names: str) -> "Calls":
        return Calls(call for call in self if call.name in names)

    @property
    def queued(self) -> "Calls":
        return Calls(call for call in self if call.queued)

    @property
    def captured(self) -> "Calls":
        return Calls(call for call in self if call.graph and call.queued)

    @property
    def forbidden(self) -> set[str]:
        """Calls that failed because a stream was capturing."""
        return {call.call for call in self if call.name == "forbidden"}

    @property
    def waits(self) -> list[str]:
        return [call.name for call in self if call.name.endswith(("Synchronize", "Query"))]

    @property
    def crossings(self) -> "Calls":
        """Copies between the host and the device, either way."""
        copies = self.named("cudaMemcpy", "cudaMemcpyAsync")
        return Calls(call for call in copies if (call.origin == "device") != (call.destination == "device"))


def read(log: str) -> dict[str, Calls]:
    """Return calls by phase; calls before the first have the phase ``. A phase entered again continues."""
    phases = {"": (current := Calls())}
    for line in log.splitlines():
        name, _, rest = line.partition(" ")
        if name == "mark":
            current = phases.setdefault(rest, Calls())
        else:
            current.append(Call(name, **dict(map(_value, rest.split()))))
    return phases


_NUMBERS = {field.name for field in fields(Call) if field.type is int}


def _value(pair: str) -> tuple[str, Any]:
    key, _, value = pair.partition("=")
    return key, int(value.replace("(nil)", "0"), 0) if key in _NUMBERS else value
