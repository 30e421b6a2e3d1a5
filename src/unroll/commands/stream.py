"""`unroll stream`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from unroll.commands.options import LOCAL, ApiKey, Static, Url, argument, flag, option, positive


@dataclass(frozen=True)
class Stream:
    """Send the rows of a file or of stdin through a session, and print the outputs.

    CSV: one row per time step; a first row without numbers names the columns. JSONL: one line per time step, an array,
    or an object with one array per input. raw: little-endian values without anything between. wav: the samples of a WAV
    file, from -1 to 1, as many per time step as the input has values. lines: text for models of bytes, a byte each; the
    output is the most probable next byte.

    The steps are applied once, even if the server restarts. With --session, the session is kept: a
    second run with the same id skips as many rows as the session has had, so give it all rows from the first one on.
    """

    model: Annotated[str, argument("MODEL", "a model of the server: NAME or NAME:VERSION")]
    file: Annotated[Path | None, argument("FILE", "rows to send (default: stdin)")] = None
    url: Url = LOCAL
    api_key: ApiKey = None
    format: Annotated[
        str | None,
        option("--format", "csv|jsonl|raw|wav|lines", "of input and output (default: by FILE's name, else csv)"),
    ] = None
    to: Annotated[str | None, option("--to", "csv|jsonl|raw|wav|lines", "of the output (default: as the input)")] = None
    columns: Annotated[str | None, option("--columns", "A,B", "CSV: the columns to send, in this order")] = None
    session: Annotated[
        str | None, option("--session", "ID", "id of the session, which is kept; continues it if it is open")
    ] = None
    durability: Annotated[
        Literal["memory", "stored"] | None,
        option("--durability", "memory|stored", "of a new session (default: the server's)"),
    ] = None
    static: Static = None
    rate: Annotated[
        float | None, option("--rate", "N", "time steps per second (default: as fast as possible)", check=positive)
    ] = None
    plot: Annotated[bool, flag("--plot", "draw the latest outputs on stderr")] = False

    def run(self) -> int:
        from unroll.client import stream_command

        return stream_command.run(self)
