"""Examines a store: what it is, whether it answers and takes writes, and how long a commit takes.

It needs the packages of the server, unlike the rest of the doctor.
"""

import asyncio
import shutil
import time
import uuid
from dataclasses import dataclass
from statistics import median

from unroll.service.core.errors import UnrollError
from unroll.service.sources import SettingsRefused, store_config_of
from unroll.service.store.description import Description, describe
from unroll.service.store.embedded_check import Report, check
from unroll.service.store.embedded_store import EmbeddedStoreConfig
from unroll.service.store.interface import Commit, StoreRefused, Tokens
from unroll.service.store.lmdb_folder import file_system, is_store
from unroll.service.store.opening import StoreConfig, open_store
from unroll.service.store.record import STORED, Origin, pack_last
from unroll.service.store.redis_store import RedisStore
from unroll.service.telemetry import logs

_COMMITS = 20
#: Seconds for which the session of an interrupted trial stays.
_IDLE_SECONDS = "60"


@dataclass(frozen=True, slots=True)
class Folder:
    """The folder of an embedded store.

    Attributes:
        sync: As of the servers that have it open, or had it last.
        file_system: Its kind, if the machine says it.
    """

    exists: bool
    sync: str
    file_system: str | None
    free: int
    report: Report | None = None


@dataclass(slots=True)
class StoreFacts:
    """A store.

    Attributes:
        problem: Why it cannot be used.
        commit_seconds: Median time of a commit.
    """

    problem: str | None = None
    description: Description | None = None
    commit_seconds: float | None = None
    folder: Folder | None = None


def examine(url: str) -> StoreFacts:
    """Collect the facts about the store that `--store` names. What is wrong with it is one of them."""
    logs.configure_embedded()  # on stderr
    facts = StoreFacts()
    try:
        config = store_config_of(url, idle_timeout=_IDLE_SECONDS)
        facts.description = asyncio.run(describe(config))
        if isinstance(config, EmbeddedStoreConfig):
            facts.folder = _folder(config)
            if not facts.folder.exists or (facts.folder.report and facts.folder.report.result == "unreadable"):
                return facts
        facts.commit_seconds = asyncio.run(_commit_seconds(config))
    except (SettingsRefused, StoreRefused, OSError) as error:
        facts.problem = str(error)
    except UnrollError as error:
        facts.problem = error.message
    return facts


def _folder(config: EmbeddedStoreConfig) -> Folder:
    exists = is_store(config.folder)
    nearest = next(path for path in (config.folder, *config.folder.parents) if path.is_dir())
    free = shutil.disk_usage(nearest).free
    return Folder(exists, config.sync, file_system(nearest), free, check(config.folder) if exists else None)


async def _commit_seconds(config: StoreConfig) -> float:
    """The median of some commits of one session, which is then removed. Raises UnrollError, StoreRefused."""
    store, tokens, key = open_store(config), Tokens(), ("unroll doctor", uuid.uuid4().hex)
    origin = Origin("00" * 32, STORED, uuid.uuid4().bytes).to_bytes()
    token, spent = b"", []
    try:
        if isinstance(store, RedisStore):
            await store.check()  # says what its user may not do
        for position in range(_COMMITS):
            before, token = token, tokens.next()
            begun = time.perf_counter()
            commit = Commit(key, before, token, origin, position, bytes(1024), pack_last(1, ()), begins=not before)
            (error,) = await store.commit([commit])
            spent.append(time.perf_counter() - begun)
            if error is not None:
                raise error
        await store.take(key, token)
    finally:
        await store.stop()
    return median(spent)
