"""Settings, read once from flags and `UNROLL_*` environment variables, and handed to each layer as its own config."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import unquote, urlsplit

from pydantic import (
    BeforeValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, CliDualFlag, CliToggleFlag, SettingsConfigDict, SettingsError

from unroll.service.api.app_state import ApiLimits
from unroll.service.engine.backend import Cells, EngineOptions, Precision
from unroll.service.models.loading import ModelOptions
from unroll.service.scheduler.limits import SchedulerLimits, SessionLimits
from unroll.service.state.sealed_snapshot import LEAST_KEY_BYTES
from unroll.service.store.embedded_store import EmbeddedStoreConfig
from unroll.service.store.lmdb_folder import Sync, last_host
from unroll.service.store.opening import StoreConfig
from unroll.service.store.record import MEMORY, STORED, current_durability
from unroll.service.store.redis_client import SCHEMES
from unroll.service.store.redis_store import RedisStoreConfig
from unroll.service.telemetry.request_log import LogRequests

_FOLDER = "file://"
_PREFIX = "UNROLL_"
#: Variables that are no settings: those of tests, of workers, and those that Kubernetes sets for a Service `unroll…`.
_NO_SETTING = re.compile(
    r"UNROLL_(WORKER|FAILPOINTS|CRDS|TEST_\w+|(\w+_)?SERVICE_(HOST|PORT\w*)|(\w+_)?PORT_\d+_(TCP|UDP|SCTP)\w*)"
)
#: As browsers send it: without a path, and in lower case.
_ORIGIN = r"^(\*|[a-z][a-z0-9+.-]*://[^/?#@\sA-Z]+)$"
#: Settings whose values are secret, or may hold a password.
_SECRET = frozenset({"snapshot_keys", "store"})


class SettingsRefused(Exception):
    """Flags or variables are wrong; the message has a line about each."""


class Settings(BaseSettings):
    """Serve a repository of bundles."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX, cli_kebab_case=True, cli_prog_name="unroll serve", cli_hide_none_type=True, extra="forbid"
    )

    repository: Annotated[Path, Field(description="bundle repository: a folder of <name>/<version>/")]
    strict: Annotated[
        CliToggleFlag[bool], Field(description="do not start if any bundle cannot be served; else serve the others")
    ] = False
    serve: Annotated[
        dict[str, PositiveInt],
        Field(
            description="version that new sessions of a model begin on, such as co2=1; "
            "otherwise what the file <name>/serve says, else the highest"
        ),
    ] = {}
    host: Annotated[str, Field(description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="port to listen on")] = 8000
    workers: Annotated[
        PositiveInt, Field(description="number of processes that share the port; more than one needs --store")
    ] = 1
    worker_port: Annotated[
        int | None,
        Field(ge=1, le=65535, description="first per-worker port: worker N also listens on this port + N - 1"),
    ] = None
    page: Annotated[
        CliDualFlag[bool],
        Field(description="answer / with a page of the models; by default only on a loopback address"),
    ] = True
    allowed_origins: Annotated[
        tuple[Annotated[str, Field(pattern=_ORIGIN)], ...],
        Field(
            description="origins of the other pages that may use this server from a browser, "
            'such as ["https://app.example"], or ["*"] for all; to pages of its own origin it always answers'
        ),
    ] = ()
    device: Annotated[
        str, Field(description="cpu, cuda:N, a list such as cuda:0,cuda:1, or auto: a GPU if there is one")
    ] = "auto"
    threads: Annotated[PositiveInt, Field(description="onnxruntime threads per model call on a CPU")] = 1
    precision: Annotated[Precision, Field(description="precision of matrix products on a GPU")] = "float32"
    cells: Annotated[Cells, Field(description="kernels for LSTM and GRU layers in single steps on a GPU")] = "fused"
    buckets: Annotated[
        tuple[PositiveInt, ...], Field(description="batch sizes of single steps on a GPU, such as [1,64,256]")
    ] = ()

    session_capacity: Annotated[
        PositiveInt | Literal["auto"],
        Field(description="maximum open sessions per model version and device; auto: as many as fit in memory_share"),
    ] = 65_536
    memory_share: Annotated[
        float, Field(gt=0, le=1, description="fraction of the free memory that auto may use for a model's sessions")
    ] = 0.5
    idle_timeout: Annotated[float, Field(ge=0, description="seconds until an idle session expires; 0: never")] = 900.0
    tombstone_life: Annotated[
        PositiveFloat, Field(description="seconds for which the server remembers why a session ended")
    ] = 3600.0

    store: Annotated[
        str | None,
        Field(
            pattern=rf"^(file:///|({'|'.join(map(re.escape, SCHEMES))})://)",
            description="store of durable sessions: file:///folder (for the processes of one machine), "
            "redis://host:port/db, redis+sentinel://host:port,host:port/service, redis+cluster://host:port, ...",
        ),
    ] = None
    store_prefix: Annotated[
        str,
        Field(
            pattern=r"^[A-Za-z0-9._:-]{1,64}$",
            description="prefix of all keys in Redis; deployments that share a Redis need different ones",
        ),
    ] = "unroll"
    store_sync: Annotated[
        Sync, Field(description="when file:/// is synced to the disk: after every commit, every second, or at the end")
    ] = "everysec"
    durability: Annotated[
        Literal["memory", "stored"] | None,
        BeforeValidator(current_durability),
        Field(description="default durability of new sessions (stored if --store is set, otherwise memory)"),
    ] = None
    store_timeout: Annotated[
        PositiveFloat, Field(description="seconds without an answer after which the store counts as down")
    ] = 0.5
    snapshot_keys: Annotated[
        tuple[SecretStr, ...],
        Field(description='secrets that sign client-held snapshots: ["new","old"]; the first signs, all verify'),
    ] = ()
    spill_bytes: Annotated[
        int, Field(ge=0, description="host memory for idle sessions that do not fit in session_capacity, in bytes")
    ] = 256 * 2**20
    reply_bytes: Annotated[
        int, Field(ge=0, description="memory per model for replies that are kept for retries, in bytes")
    ] = 256 * 2**20
    state_file: Annotated[
        Path | None,
        Field(description="file for memory sessions, also beside a store: written at shutdown, read at startup"),
    ] = None

    max_batch: Annotated[PositiveInt, Field(description="maximum rows per model call")] = 256
    max_batch_steps: Annotated[PositiveInt, Field(description="maximum rows x time steps per model call")] = 2048
    piece_steps: Annotated[PositiveInt, Field(description="time steps of a long request per model call")] = 64
    max_queue: Annotated[PositiveInt, Field(description="maximum waiting requests per model")] = 8192

    request_timeout: Annotated[
        PositiveFloat, Field(description="seconds within which the work on a request must start")
    ] = 30.0
    max_body_bytes: Annotated[PositiveInt, Field(description="maximum request body, in bytes")] = 16 * 2**20
    max_json_bytes: Annotated[PositiveInt, Field(description="maximum JSON in a request, in bytes")] = 2 * 2**20
    max_steps: Annotated[PositiveInt, Field(description="maximum time steps per request")] = 65_536
    max_rollout_steps: Annotated[
        PositiveInt, Field(description="maximum time steps per rollout whose inputs are fed back")
    ] = 4096
    max_sequences: Annotated[PositiveInt, Field(description="maximum whole sequences per request")] = 1024
    drain_delay: Annotated[
        float, Field(ge=0, description="seconds between SIGTERM and the end of listening, for load balancers to notice")
    ] = 0.0
    drain_timeout: Annotated[
        PositiveFloat, Field(description="seconds for connected clients to receive their answers at shutdown")
    ] = 10.0
    admin: Annotated[
        CliToggleFlag[bool],
        Field(description="list sessions at /v1/admin/sessions, to any client: there is no authentication"),
    ] = False
    log_requests: Annotated[
        LogRequests, Field(description="requests that leave a line in the log, at most 100 a second: none, errors, all")
    ] = "errors"
    log_level: Annotated[
        str, Field(pattern="^(debug|info|warning|error)$", description="minimum severity of log lines")
    ] = "info"

    @field_validator("repository", "host", "device", "state_file", mode="before")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if value == "":
            raise ValueError("it is empty; remove it or give it a value")
        return value

    @field_validator("store")
    @classmethod
    def _has_port(cls, store: str | None) -> str | None:
        if store is not None:
            hosts = urlsplit(store).netloc.rpartition("@")[2]
            try:
                for host in hosts.split(","):
                    urlsplit(f"//{host}").port  # noqa: B018 raises ValueError
            except ValueError:
                raise ValueError("its port is not a number from 0 to 65535") from None
        return store

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.durability == "stored" and self.store is None:
            raise ValueError("durability stored needs a store: add --store file:///folder")
        if "store_prefix" in self.model_fields_set and (self.store is None or self.store.startswith(_FOLDER)):
            raise ValueError(
                "--store-prefix is of a Redis: give each deployment its own folder, or add --store redis://…"
            )
        if any(len(key.get_secret_value().encode()) < LEAST_KEY_BYTES for key in self.snapshot_keys):
            raise ValueError(f"a snapshot key needs at least {LEAST_KEY_BYTES} bytes")
        if self.workers > 1 and (self.store is None or self.durability == "memory"):
            raise ValueError(
                f"{self.workers} workers need a store, because any worker may receive a session's next request: "
                "add --store file:///folder and remove --durability memory"
            )
        if self.workers > 1 and self.state_file is not None:
            raise ValueError(
                "a state file holds memory sessions, which several workers do not offer: remove --state-file"
            )
        if self.workers == 1 and self.worker_port is not None:
            raise ValueError("--worker-port needs more than one worker: add --workers")
        return self

    @classmethod
    def from_arguments(cls, argv: list[str]) -> Self:
        """Flags override the environment, which overrides the defaults.

        Raises:
            SettingsRefused: A value is not allowed, or a variable `UNROLL_*` is no setting.
            SystemExit: A flag is unknown; the usage was printed.
        """
        if unknown := [_about_unknown(name) for name in _unknown_variables(os.environ)]:
            raise SettingsRefused("\n".join(unknown))
        try:
            return cls(_cli_parse_args=argv)
        except ValidationError as error:
            problems = error.errors(include_url=False)
            lines = [_about_value(str((*problem["loc"], "")[0]), problem, argv) for problem in problems]
            raise SettingsRefused("\n".join(lines)) from None
        except SettingsError as error:  # of a list or an object, which has to be JSON in a variable
            found = re.search(r'(?:field "|encountered for )(\w+)', str(error))
            name = found[1] if found else ""
            form = 'JSON such as {"co2": 1}, or co2=1 in a flag' if name == "serve" else "a JSON list"
            problem = {"msg": f"it is not {form}"}
            if (variable := os.environ.get(f"{_PREFIX}{name.upper()}")) is not None:
                problem["input"] = variable
            raise SettingsRefused(_about_value(name, problem, argv)) from None

    def model_options(self) -> ModelOptions:
        fill_memory = self.session_capacity == "auto"
        return ModelOptions(
            fill_memory=fill_memory,
            spill_bytes=self.spill_bytes,
            engine=EngineOptions(self.threads, self.precision, self.buckets, self.cells, self.memory_share),
            max_steps=self.max_steps,
            max_sequences=self.max_sequences,
            sessions=SessionLimits(
                capacity=1 if self.session_capacity == "auto" else self.session_capacity,
                idle_timeout=self.idle_timeout or None,
                tombstone_life=self.tombstone_life,
                reply_bytes=self.reply_bytes,
            ),
            scheduler=SchedulerLimits(
                max_batch=self.max_batch,
                max_batch_steps=self.max_batch_steps,
                piece_steps=self.piece_steps,
                max_queue=self.max_queue,
            ),
        )

    @property
    def default_durability(self) -> str:
        """Of new sessions."""
        return self.durability or (MEMORY if self.store is None else STORED)

    def store_config(self) -> StoreConfig | None:
        if self.store is None:
            return None
        times = self.store_timeout, self.idle_timeout or None, self.tombstone_life
        if (folder := store_folder(self.store)) is not None:
            return EmbeddedStoreConfig(folder, self.store_sync, *times)
        return RedisStoreConfig(self.store, *times, self.store_prefix)

    @property
    def shows_page(self) -> bool:
        return self.page and ("page" in self.model_fields_set or _is_loopback(self.host))

    def api_limits(self) -> ApiLimits:
        return ApiLimits(self.request_timeout, self.max_body_bytes, self.max_json_bytes, self.max_rollout_steps)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def store_config_of(url: str, *flags: str) -> StoreConfig:
    """The config of a store for a tool: as of a server with this `--store`, these flags and this environment.

    Raises:
        SettingsRefused: A value is not allowed.
        StoreUnavailable: The folder's description of itself is damaged.
    """
    patient = ["--store-timeout", "5"]
    config = Settings.from_arguments(["--repository", ".", "--store", url, *patient, *flags]).store_config()
    assert config is not None
    if isinstance(config, EmbeddedStoreConfig) and (last := last_host(config.folder)) is not None:
        return replace(config, sync=last["sync"])
    return config


def store_folder(url: str) -> Path | None:
    """The folder that `--store` names, if it names one."""
    return Path(unquote(url.removeprefix(_FOLDER))) if url.startswith(f"{_FOLDER}/") else None


def _unknown_variables(environment: Mapping[str, str]) -> list[str]:
    known = {name.upper() for name in Settings.model_fields}
    return [
        name
        for name, value in environment.items()
        if name.upper().startswith(_PREFIX)
        and name.upper().removeprefix(_PREFIX) not in known
        and not _NO_SETTING.fullmatch(name.upper())
        and not (name.endswith("_PORT") and "://" in value)
    ]


def _about_unknown(name: str) -> str:
    known = [field.upper() for field in Settings.model_fields]
    nearest = get_close_matches(name.upper().removeprefix(_PREFIX), known, n=1)
    return f"{name}: there is no such setting" + "".join(f"; did you mean {_PREFIX}{other}?" for other in nearest)


def _about_value(name: str, problem: Mapping[str, Any], argv: Sequence[str]) -> str:
    """A line about one wrong value: where it was set, the value unless it is secret, and what is allowed."""
    reason = problem["msg"].removeprefix("Value error, ")
    if name not in Settings.model_fields:
        return reason
    flag = f"--{name.replace('_', '-')}"
    by_flag = any(word.startswith("--") and flag.startswith(word.partition("=")[0]) for word in argv)
    where = flag if by_flag else f"{_PREFIX}{name.upper()}"
    if problem.get("type") == "missing":
        return f"{flag}: give it, or set {where} ({Settings.model_fields[name].description})"
    value = "" if name in _SECRET or "input" not in problem else f" {problem['input']!r:.80}"
    return f"{where}{value}: {reason} ({Settings.model_fields[name].description})"
