"""What a store is, and what its sessions survive, in words for the log and for `unroll doctor`."""

from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from unroll.service.core.errors import StoreUnavailable
from unroll.service.store.embedded_store import EmbeddedStoreConfig
from unroll.service.store.opening import StoreConfig

_FOLDER = {
    "always": "the end of any process, and a crash of the machine",
    "everysec": "the end of any process, and a crash of the machine but for the last second",
    "never": "the end of any process, but not a crash of the machine",
}


@dataclass(frozen=True, slots=True)
class Description:
    """A store.

    Attributes:
        kind: The program or library, with its version.
        where: Its place, without user and password.
        settings: Of Redis: those that decide what is kept, so far as it says them.
    """

    kind: str
    where: str
    survives: str
    settings: dict[str, str] = field(default_factory=dict)


async def describe(config: StoreConfig) -> Description:
    """Ask a store what it is. A folder need not be opened for that.

    Raises:
        StoreUnavailable: It does not answer.
        StoreRefused: Its URL is wrong.
    """
    if isinstance(config, EmbeddedStoreConfig):
        return Description("LMDB", place(config), _FOLDER[config.sync])
    from unroll.service.store.redis_description import describe_redis  # most servers do without its client

    return await describe_redis(config, place(config))


def place(config: StoreConfig) -> str:
    """Where the store is, without user, password and options."""
    if isinstance(config, EmbeddedStoreConfig):
        return f"the folder {config.folder}"
    parts = urlsplit(config.url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


async def where_sessions_are(config: StoreConfig | None, state_file: Path | None) -> dict[str, str]:
    """What the log says at the start: where sessions are kept, and what they survive."""
    if config is None:
        survive = f"an orderly end of the server, in {state_file}" if state_file else "nothing; --store keeps them"
        return {"where": "memory", "survive": survive}
    try:
        found = await describe(config)
    except StoreUnavailable as error:
        return {"where": place(config), "survive": f"unknown: {error.message}"}
    return {"where": f"{found.where} ({found.kind})", "survive": found.survives}
