"""`unroll stream`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from unroll.commands.options import LOCAL, ApiKey, Static, Url, argument, flag, option, positive


@dataclass(frozen=True)
class Stream:
    """Send the rows of a file or of stdin through a session, and print the outputs.

    CSV: one row per time step; a first row without numbers names the columns. JSONL: one line per time step, an array
    or an object with an array per input. raw: little-endian values without separators. wav: the samples of a WAV file,
    from -1 to 1, as many per time step as the input has values. lines: text for models of bytes, one byte per time
    step; the output is the most probable next byte.

    Each step is applied exactly once, even if the server restarts. With --session, the session is kept: a second run
    with the same id skips the rows that the session has already consumed, so give all rows from the first one on.
    """

    model: Annotated[str, argument("MODEL", "a model of the server: NAME or NAME:VERSION")]
    file: Annotated[Path | None, argument("FILE", "rows to send (default: stdin)")] = None
    url: Url = LOCAL
    api_key: ApiKey = None
    format: Annotated[
        str | None,
        option("--format", "csv|jsonl|raw|wav|lines", "format of input and output (default: by FILE's suffix, or csv)"),
    ] = None
    to: Annotated[
        str | None, option("--to", "csv|jsonl|raw|wav|lines", "format of the output (default: that of the input)")
    ] = None
    columns: Annotated[str | None, option("--columns", "A,B", "CSV: columns to send, in this order")] = None
    session: Annotated[
        str | None, option("--session", "ID", "id of a session to open or continue; it is kept afterwards")
    ] = None
    durability: Annotated[
        Literal["memory", "stored"] | None,
        option("--durability", "memory|stored", "durability of a new session (default: the server's)"),
    ] = None
    static: Static = None
    rate: Annotated[
        float | None, option("--rate", "N", "time steps per second (default: as fast as possible)", check=positive)
    ] = None
    plot: Annotated[bool, flag("--plot", "draw the latest outputs on stderr")] = False

    def run(self) -> int:
        from unroll.client import stream_command

        return stream_command.run(self)
