"""Examines and judges a store: its kind, whether it answers and accepts writes, and the duration of a commit.

Unlike the rest of the doctor, this needs the packages of the server.
"""

import asyncio
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median

from unroll.service.core.errors import UnrollError
from unroll.service.doctor.findings import Finding, Status
from unroll.service.sources import SettingsRefused, store_config_of
from unroll.service.store.description import Description, describe
from unroll.service.store.embedded_check import Report, check
from unroll.service.store.embedded_store import EmbeddedStoreConfig
from unroll.service.store.interface import Commit, StoreRefused, Tokens
from unroll.service.store.lmdb_folder import file_system, is_store
from unroll.service.store.opening import StoreConfig, open_store
from unroll.service.store.record import STORED, Origin, pack, pack_last
from unroll.service.store.redis_store import RedisStore
from unroll.service.telemetry import logs

_COMMITS = 20
#: Seconds until the session of an interrupted trial expires.
_IDLE_SECONDS = "60"
_GIB = 2**30
#: Free disk space below which there is a note.
_LITTLE = _GIB // 4
_NO_EVICTION = "set maxmemory-policy to noeviction: clients then get 503 instead of losing sessions"


@dataclass(frozen=True, slots=True)
class Folder:
    """The folder of an embedded store.

    Attributes:
        sync: The sync mode of the servers that have or last had it open.
        file_system: Its type, if known.
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
    """Collect the facts about the store at a URL of `--store`, including its problem."""
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
    """The median duration of commits of one session, which is then removed. Raises UnrollError, StoreRefused."""
    store, tokens, key = open_store(config), Tokens(), ("unroll doctor", uuid.uuid4().hex)
    origin = Origin("00" * 32, STORED, uuid.uuid4().bytes).to_bytes()
    token, spent = b"", []
    try:
        if isinstance(store, RedisStore):
            await store.check()  # reports missing permissions
        for position in range(_COMMITS):
            before, token = token, tokens.next()
            begun = time.perf_counter()
            content = pack(origin, position, bytes(1024), pack_last(1, ()))
            commit = Commit(key, before, token, content, begins=not before)
            (error,) = await store.commit([commit])
            spent.append(time.perf_counter() - begun)
            if error is not None:
                raise error
        await store.take(key, token)
    finally:
        await store.stop()
    return median(spent)


def judge(facts: StoreFacts) -> Iterator[Finding]:
    if facts.description is not None:
        says = f"{facts.description.kind}, {facts.description.where}; sessions survive {facts.description.survives}"
        yield Finding("store", Status.OK, says)
        yield from _redis(facts.description.settings)
    if facts.folder is not None:
        yield from _judge_folder(facts.folder)
    if facts.problem is not None:
        yield Finding("store", Status.BROKEN, facts.problem, "see `unroll serve --help`, --store")
    elif facts.commit_seconds is not None:
        yield Finding("commits", Status.OK, f"accepted; one takes {facts.commit_seconds * 1e3:.2f} ms (median of 20)")


def _redis(settings: Mapping[str, str]) -> Iterator[Finding]:
    if not settings:
        return
    settings_text = ", ".join(
        f"{name} {settings[name] or 'off'}" for name in ("appendonly", "appendfsync", "save") if name in settings
    )
    if settings["appendonly"] == "yes":
        yield Finding("persistence", Status.OK, settings_text)
    else:
        yield Finding("persistence", Status.NOTE, settings_text, "to lose at most a second in a crash: appendonly yes")
    policy, limit = settings["maxmemory-policy"], settings["maxmemory"]
    says = f"maxmemory {limit}, maxmemory-policy {policy}"
    if policy == "noeviction":
        yield Finding("eviction", Status.OK, says)
    elif limit == "0":
        yield Finding("eviction", Status.NOTE, f"{says}; nothing is removed, because there is no limit", _NO_EVICTION)
    else:
        yield Finding("eviction", Status.NOTE, f"{says}: when memory is full, open sessions are lost", _NO_EVICTION)


def _judge_folder(folder: Folder) -> Iterator[Finding]:
    disk = f"{folder.free / _GIB:.1f} GiB free" + (f" on {folder.file_system}" if folder.file_system else "")
    yield Finding("disk", *((Status.OK, disk) if folder.free >= _LITTLE else (Status.NOTE, disk, "make room")))
    report = folder.report
    if report is None:
        yield Finding("sessions", Status.NOTE, "no store in the folder yet", "`unroll serve` creates it")
    elif report.result == "unreadable":
        yield Finding("sessions", Status.BROKEN, report.reason, "see `unroll store check --store URL`")
    else:
        says = (
            f"{report.sessions} open, {report.closed} closed, {report.expired} expired, {len(report.damaged)} damaged"
        )
        says += f"; {report.used_bytes} bytes, --store-sync {folder.sync}"
        if report.damaged:
            yield Finding(
                "sessions", Status.BROKEN, says, "`unroll store check --store URL --repair` removes the damaged ones"
            )
        else:
            yield Finding("sessions", Status.OK, says)
