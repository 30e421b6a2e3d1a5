"""`unroll sessions list|show|close|export|import`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from unroll.commands.options import Json, Store, WrongOption, argument, flag, not_negative, option, positive

_EPILOG = """
    The store may be in use by servers. Give the servers' --idle-timeout, so that idle times agree. The exit status is 1
    if the command failed for some of the named sessions; the output says which.
"""


@dataclass(frozen=True, kw_only=True)
class OnStore:
    """The options of the store."""

    store: Store
    store_prefix: Annotated[
        str | None, option("--store-prefix", "PREFIX", "the servers' prefix of Redis keys (default: that of servers)")
    ] = None
    idle_timeout: Annotated[
        str | None,
        option(
            "--idle-timeout",
            "SECONDS",
            "the servers' idle timeout (default: $UNROLL_IDLE_TIMEOUT, or that of servers)",
        ),
    ] = None

    tenant: Annotated[
        str,
        option("--tenant", "TENANT", "the sessions' tenant, for servers with keys (list, export: all by default)"),
    ] = ""

    def run(self) -> int:
        from unroll.service.commands import sessions

        try:
            return sessions.run(self, self.store)
        except sessions.StoreUnusable as error:
            raise WrongOption(str(error)) from error


@dataclass(frozen=True, kw_only=True)
class Filtered(OnStore):
    """The options that select sessions."""

    model: Annotated[str | None, option("--model", "MODEL", "only sessions of this model")] = None
    min_idle: Annotated[
        float | None, option("--min-idle", "SECONDS", "only sessions idle for at least this long", not_negative)
    ] = None
    min_position: Annotated[int, option("--min-position", "N", "only sessions at this position or later")] = 0
    max_position: Annotated[int | None, option("--max-position", "N", "only sessions at this position or earlier")] = (
        None
    )


@dataclass(frozen=True, kw_only=True)
class List(Filtered):
    __doc__ = "List open sessions without their states, a page at a time.\n" + _EPILOG

    limit: Annotated[int, option("--limit", "N", "maximum sessions per page", check=positive)] = 100
    after: Annotated[str, option("--after", "PAGE", "continue after this page, as printed with it")] = ""
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class Show(OnStore):
    __doc__ = "Show one session, even if it has ended.\n" + _EPILOG

    model: Annotated[str, argument("MODEL", "name of the session's model")]
    session: Annotated[str, argument("SESSION", "id of the session")]
    state: Annotated[bool, flag("--state", "also show its state, as numbers")] = False
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class Close(OnStore):
    __doc__ = "Close sessions; their next request gets 410 session_closed.\n" + _EPILOG

    model: Annotated[str, argument("MODEL", "name of the sessions' model")]
    session: Annotated[list[str], argument("SESSION", "ids of the sessions")]
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class Export(Filtered):
    __doc__ = "Write open sessions and their states to a file; they stay open.\n" + _EPILOG

    file: Annotated[Path, argument("FILE", "file to create; it must not exist")]
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class Import(OnStore):
    __doc__ = "Import sessions from a file of `export` or of --state-file.\n" + _EPILOG

    file: Annotated[Path, argument("FILE", "written by `unroll sessions export`, or by a server's --state-file")]
    replace: Annotated[bool, flag("--replace", "also replace sessions that are open or have ended")] = False
    json: Json = False
