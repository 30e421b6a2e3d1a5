"""`unroll demo`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from unroll.commands.options import LOCAL, Json, Url, flag, option


@dataclass(frozen=True)
class Demo:
    """Stream a real time series through a running server.

    It sends 43 years of weekly CO₂ measurements through one session, one request each, and compares the forecasts with
    PyTorch's. The server needs the example model `co2`.
    """

    url: Url = LOCAL
    example: Annotated[
        Path | None,
        option("--example", "DIR", "folder with co2.csv and expected.safetensors (default: the package's own)"),
    ] = None
    quick: Annotated[bool, flag("--quick", "send only the last 520 weeks one by one")] = False
    json: Json = False

    def run(self) -> int:
        from unroll.examples import demo

        return demo.run(self.url, self.example or demo.EXAMPLE, quick=self.quick, as_json=self.json)
