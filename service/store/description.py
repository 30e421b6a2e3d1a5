"""Describes a store and which failures its sessions survive, for the log and for `unroll doctor`."""

from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from unroll.service.core.errors import StoreUnavailable
from unroll.service.store.embedded_store import EmbeddedStoreConfig
from unroll.service.store.opening import StoreConfig

_FOLDER = {
    "always": "the end of any process, and a crash of the machine",
    "everysec": "the end of any process, and a crash of the machine except for the last second",
    "never": "the end of any process, but not a crash of the machine",
}


@dataclass(frozen=True, slots=True)
class Description:
    """A store.

    Attributes:
        kind: The program or library, with its version.
        where: Its location, without user and password.
        survives: The failures that its sessions survive.
        settings: The settings of Redis that affect durability, as far as it reports them.
    """

    kind: str
    where: str
    survives: str
    settings: dict[str, str] = field(default_factory=dict)


async def describe(config: StoreConfig) -> Description:
    """Describe a store. A Redis is queried; a folder is not opened.

    Raises:
        StoreUnavailable: The store does not answer.
        StoreRefused: Its URL is invalid.
    """
    if isinstance(config, EmbeddedStoreConfig):
        return Description("LMDB", place(config), _FOLDER[config.sync])
    from unroll.service.store.redis_description import describe_redis  # most servers do not need the Redis client

    return await describe_redis(config, place(config))


def place(config: StoreConfig) -> str:
    """The location of a store, without user, password and options."""
    if isinstance(config, EmbeddedStoreConfig):
        return f"the folder {config.folder}"
    parts = urlsplit(config.url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


async def where_sessions_are(config: StoreConfig | None, state_file: Path | None) -> dict[str, str]:
    """Where sessions are kept and which failures they survive, for the log at the start."""
    if config is None:
        survive = f"an orderly shutdown, in {state_file}" if state_file else "nothing; use --store to keep them"
        return {"where": "memory", "survive": survive}
    try:
        found = await describe(config)
    except StoreUnavailable as error:
        return {"where": place(config), "survive": f"unknown: {error.message}"}
    return {"where": f"{found.where} ({found.kind})", "survive": found.survives}
