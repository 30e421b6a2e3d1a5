"""`unroll sessions list|show|close|export|import`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from unroll.commands.options import Json, WrongOption, argument, flag, not_negative, option, positive

_EPILOG = """
    Servers may use the store at the same time. Idle times are those of servers with the same --idle-timeout. The exit
    status is 1 if it was not done for all of the sessions that were named; the output says for which.
"""


@dataclass(frozen=True, kw_only=True)
class OnStore:
    """The store that a command works on."""

    store: Annotated[
        str | None, option("--store", "URL", "the store, as for `unroll serve`", envvar="UNROLL_STORE")
    ] = None
    store_prefix: Annotated[
        str | None, option("--store-prefix", "PREFIX", "of keys in Redis, as of the servers (default: theirs)")
    ] = None
    idle_timeout: Annotated[
        str | None,
        option("--idle-timeout", "SECONDS", "as of the servers (default: $UNROLL_IDLE_TIMEOUT, or theirs)"),
    ] = None

    tenant: Annotated[
        str, option("--tenant", "TENANT", "whose sessions, of servers with keys (default: of list and export, all)")
    ] = ""

    def run(self) -> int:
        if self.store is None:
            raise WrongOption("give --store URL, or set UNROLL_STORE")
        from unroll.service.commands import sessions

        try:
            return sessions.run(self, self.store)
        except sessions.StoreUnusable as error:
            raise WrongOption(str(error)) from error


@dataclass(frozen=True, kw_only=True)
class Filtered(OnStore):
    """Which sessions are meant."""

    model: Annotated[str | None, option("--model", "MODEL", "only sessions of this model")] = None
    min_idle: Annotated[
        float | None, option("--min-idle", "SECONDS", "only sessions idle for so long", not_negative)
    ] = None
    min_position: Annotated[int, option("--min-position", "N", "only sessions from this position on")] = 0
    max_position: Annotated[int | None, option("--max-position", "N", "only sessions up to this position")] = None


@dataclass(frozen=True, kw_only=True)
class List(Filtered):
    __doc__ = "List open sessions, a page at a time; never their states.\n" + _EPILOG

    limit: Annotated[int, option("--limit", "N", "maximum sessions of a page", check=positive)] = 100
    after: Annotated[str, option("--after", "PAGE", "continue where the page before ended, as it says")] = ""
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class Show(OnStore):
    __doc__ = "Show one session, also one that has ended.\n" + _EPILOG

    model: Annotated[str, argument("MODEL", "name of its model")]
    session: Annotated[str, argument("SESSION", "id of the session")]
    state: Annotated[bool, flag("--state", "also its state, as numbers")] = False
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class Close(OnStore):
    __doc__ = "Close sessions; their next request gets 410 session_closed.\n" + _EPILOG

    model: Annotated[str, argument("MODEL", "name of their model")]
    session: Annotated[list[str], argument("SESSION", "ids of the sessions")]
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class Export(Filtered):
    __doc__ = "Write open sessions to a file, with their states; they stay open.\n" + _EPILOG

    file: Annotated[Path, argument("FILE", "must not exist")]
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class Import(OnStore):
    __doc__ = "Read the sessions of a file of `export` or of --state-file.\n" + _EPILOG

    file: Annotated[Path, argument("FILE", "written by `unroll sessions export`, or by a server's --state-file")]
    replace: Annotated[bool, flag("--replace", "also sessions that are open, or have ended; else they stay so")] = False
    json: Json = False
