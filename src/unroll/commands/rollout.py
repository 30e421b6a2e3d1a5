"""`unroll rollout`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from unroll.commands.options import LOCAL, ApiKey, Static, Url, WrongOption, argument, flag, option, positive


@dataclass(frozen=True)
class Rollout:
    """Feed a model's outputs back as its inputs on the server, and print each time step.

    The rows of FILE or stdin run first, and the forecast continues from their end. With --session, it continues an open
    session, and needs no rows. By default the rollout runs on a copy and leaves the session unchanged.

    The outputs have the format of the rows: CSV, JSONL or raw values; with lines, the bytes themselves.
    """

    model: Annotated[str, argument("MODEL", "a model of the server: NAME or NAME:VERSION")]
    steps: Annotated[int, option("--steps", "N", "time steps to feed back", positive)]
    file: Annotated[Path | None, argument("FILE", "rows to run first (default: stdin, or none with --session)")] = None
    url: Url = LOCAL
    api_key: ApiKey = None
    map: Annotated[
        str,
        option("--map", "MAP", "how to compute inputs from outputs: identity, argmax, sample, or a map as JSON"),
    ] = "identity"
    temperature: Annotated[float | None, option("--temperature", "T", "for --map sample", positive)] = None
    top_k: Annotated[int | None, option("--top-k", "K", "for --map sample", positive)] = None
    seed: Annotated[int | None, option("--seed", "N", "for --map sample")] = None
    format: Annotated[
        str | None,
        option("--format", "csv|jsonl|raw|lines", "format of input and output (default: by FILE's suffix, or csv)"),
    ] = None
    session: Annotated[str | None, option("--session", "ID", "id of an open session to start from")] = None
    static: Static = None
    on: Annotated[
        Literal["fork", "session"],
        option("--on", "fork|session", "run on a copy of the session, or advance the session itself"),
    ] = "fork"
    plot: Annotated[bool, flag("--plot", "draw the outputs on stderr")] = False

    def run(self) -> int:
        mapped = self._mapped()
        from unroll.client import stream_command

        return stream_command.roll_out(self, mapped)

    def _mapped(self) -> Any:
        """The map as the server takes it. Raises WrongOption."""
        drawn = {"temperature": self.temperature, "top_k": self.top_k, "seed": self.seed}
        given = {name: value for name, value in drawn.items() if value is not None}
        if given and self.map != "sample":
            raise WrongOption("--temperature, --top-k and --seed are for --map sample")
        if self.map.startswith("{"):
            try:
                return json.loads(self.map)
            except ValueError as error:
                raise WrongOption(f"--map is not JSON: {error}") from error
        return {"kind": self.map} | given
