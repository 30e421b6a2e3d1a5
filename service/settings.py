"""The settings of a server with their types, limits and defaults. Each layer gets its own config.

The layers are imported where their configs are created, so that a wrong setting is reported without loading them.
"""

import re
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self
from urllib.parse import unquote, urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    field_validator,
    model_validator,
)

from unroll.service.core.choices import SCHEMES, Cells, LogRequests, Precision, Sync
from unroll.service.store.record import MEMORY, STORED, current_durability

if TYPE_CHECKING:
    from unroll.service.access.certificate import TlsFiles
    from unroll.service.access.gate import Gate
    from unroll.service.access.jwt_config import JwtConfig
    from unroll.service.api.app_state import ApiLimits
    from unroll.service.models.loading import ModelOptions
    from unroll.service.store.opening import StoreConfig

_FOLDER = "file://"
_LOCAL = frozenset({"localhost"})
_LEAST_KEY_BYTES = 16
#: An origin as browsers send it: without a path, and in lower case.
_ORIGIN = r"^(\*|[a-z][a-z0-9+.-]*://[^/?#@\sA-Z]+)$"


class Settings(BaseModel):
    """The settings that `descriptions.py` describes; `sources.py` reads them."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    repository: Path
    strict: bool = False
    bundle_memory: PositiveInt = 4 * 2**30
    bundle_time: PositiveFloat = 30.0
    allow_operators: tuple[str, ...] = ()
    trusted_keys: Path | None = None
    serve: dict[str, PositiveInt] = {}
    host: str = "127.0.0.1"
    auth: Literal["keys", "none"] | None = None
    keys: Path | None = None
    jwt_keys: str | None = None
    jwt_issuer: str | None = None
    jwt_audience: str | None = None
    jwt_tenant_claim: str = "tenant"
    jwt_scope_claim: str = "scope"
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_password_file: Path | None = None
    tls_client_ca: Path | None = None
    allowed_hosts: tuple[str, ...] = ()
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    workers: PositiveInt = 1
    worker_port: Annotated[int | None, Field(ge=1, le=65535)] = None
    page: bool = True
    allowed_origins: tuple[Annotated[str, Field(pattern=_ORIGIN)], ...] = ()
    device: str = "auto"
    threads: PositiveInt = 1
    precision: Precision = "float32"
    cells: Cells = "fused"
    buckets: tuple[PositiveInt, ...] = ()

    session_capacity: PositiveInt | Literal["auto"] = 65_536
    memory_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    idle_timeout: Annotated[float, Field(ge=0)] = 900.0
    tombstone_life: PositiveFloat = 3600.0

    store: Annotated[str | None, Field(pattern=rf"^(file:///|({'|'.join(map(re.escape, SCHEMES))})://)")] = None
    store_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,64}$")] = "unroll"
    store_sync: Sync = "everysec"
    durability: Annotated[Literal["memory", "stored"] | None, BeforeValidator(current_durability)] = None
    store_timeout: PositiveFloat = 0.5
    snapshot_keys: tuple[SecretStr, ...] = ()
    spill_bytes: Annotated[int, Field(ge=0)] = 256 * 2**20
    reply_bytes: Annotated[int, Field(ge=0)] = 256 * 2**20
    state_file: Path | None = None

    max_batch: PositiveInt = 256
    max_batch_steps: PositiveInt = 2048
    piece_steps: PositiveInt = 64
    max_queue: PositiveInt = 8192
    overload_wait: Annotated[float, Field(ge=0)] = 0.02

    request_timeout: PositiveFloat = 30.0
    max_connections: PositiveInt | Literal["auto"] = "auto"
    max_connections_per_address: PositiveInt | None = None
    head_timeout: PositiveFloat = 20.0
    keep_alive: PositiveFloat = 75.0
    min_rate: PositiveInt = 1024
    max_header_bytes: PositiveInt = 65_536
    max_body_bytes: PositiveInt = 16 * 2**20
    max_json_bytes: PositiveInt = 2 * 2**20
    max_held_bytes: PositiveInt = 512 * 2**20
    max_steps: PositiveInt = 65_536
    max_rollout_steps: PositiveInt = 4096
    max_sequences: PositiveInt = 1024
    drain_delay: Annotated[float, Field(ge=0)] = 0.0
    drain_timeout: PositiveFloat = 10.0
    admin: bool = False
    admin_port: Annotated[int | None, Field(ge=0, le=65535)] = None
    admin_host: str = "127.0.0.1"
    log_requests: LogRequests = "errors"
    log_level: Annotated[str, Field(pattern="^(debug|info|warning|error)$")] = "info"

    @field_validator(
        *("repository", "host", "admin_host", "device", "state_file", "keys"),
        *("jwt_keys", "jwt_issuer", "jwt_audience", "jwt_tenant_claim", "jwt_scope_claim"),
        mode="before",
    )
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if value == "":
            raise ValueError("it is empty; remove it or give it a value")
        return value

    @field_validator("jwt_keys")
    @classmethod
    def _is_safe(cls, place: str | None) -> str | None:
        url = urlsplit(place or "")
        if url.scheme in ("http", "https") and "@" in url.netloc:
            raise ValueError("a URL with a password is not accepted: a JWK set is public")
        if url.scheme == "http" and not _is_loopback(url.hostname or ""):
            raise ValueError("an attacker on the network could replace the keys: use https://, or a file")
        return place

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
                "--store-prefix is only for Redis: give each deployment its own folder, or add --store redis://…"
            )
        if any(len(key.get_secret_value().encode()) < _LEAST_KEY_BYTES for key in self.snapshot_keys):
            raise ValueError(f"a snapshot key needs at least {_LEAST_KEY_BYTES} bytes")
        if self.workers > 1 and (self.store is None or self.durability == "memory"):
            raise ValueError(
                f"{self.workers} workers need a store, because any worker may receive a session's next request: "
                "add --store file:///folder and remove --durability memory"
            )
        if self.workers > 1 and self.state_file is not None:
            raise ValueError(
                "a state file is for memory sessions, which several workers do not support: remove --state-file"
            )
        self._check_access()
        if self.tls_cert is None and (self.tls_key or self.tls_password_file or self.tls_client_ca):
            raise ValueError("--tls-key, --tls-password-file and --tls-client-ca need a certificate: add --tls-cert")
        if self.admin_port is None and "admin_host" in self.model_fields_set:
            raise ValueError("--admin-host needs a port: add --admin-port")
        if self.workers == 1 and self.worker_port is not None:
            raise ValueError("--worker-port needs more than one worker: add --workers")
        return self

    @property
    def offers_operations(self) -> bool:
        """Whether administration that changes the server is available, which needs keys or a separate port."""
        return self.admin and (self.admin_port is not None or self.keys is not None or self.jwt_keys is not None)

    def _check_access(self) -> None:
        """Raises ValueError."""
        if self.jwt_keys is not None and (self.jwt_issuer is None or self.jwt_audience is None):
            raise ValueError(
                "--jwt-keys needs --jwt-issuer and --jwt-audience: the provider's other JWTs must not open this server"
            )
        if self.jwt_keys is None and (self.jwt_issuer is not None or self.jwt_audience is not None):
            raise ValueError("--jwt-issuer and --jwt-audience need the provider's JWK set: add --jwt-keys")
        has_keys = self.keys is not None or self.jwt_keys is not None
        if self.auth == "none" and has_keys:
            flag = "--jwt-keys" if self.keys is None else "--keys"
            raise ValueError(f"--auth none and {flag} contradict each other: remove one of them")
        if self.auth == "keys" and not has_keys:
            raise ValueError("--auth keys needs a keys file: add --keys FILE; `unroll keys new` writes an entry")
        hosts = [self.host] if self.admin_port is None else [self.host, self.admin_host]
        open_hosts = [host for host in hosts if not _is_loopback(host)]
        if self.auth is None and not has_keys and open_hosts:
            raise ValueError(
                f"everyone who can reach {open_hosts[0]} could use the models and close other clients' sessions: add "
                "--keys FILE (`unroll keys new` writes an entry), or --auth none if a "
                "proxy or the network restricts access"
            )

    def model_options(self) -> "ModelOptions":
        from unroll.bundle.signature import TrustedKeys
        from unroll.service.engine.backend import EngineOptions
        from unroll.service.models.loading import ModelOptions
        from unroll.service.models.trial_process import TrialLimits
        from unroll.service.scheduler.limits import SchedulerLimits, SessionLimits

        fill_memory = self.session_capacity == "auto"
        return ModelOptions(
            fill_memory=fill_memory,
            spill_bytes=self.spill_bytes,
            trusted_keys=None if self.trusted_keys is None else TrustedKeys.read(self.trusted_keys),
            trial=TrialLimits(self.bundle_memory, self.bundle_time, self.allow_operators),
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
                overload_wait=self.overload_wait,
            ),
        )

    @property
    def default_durability(self) -> str:
        return self.durability or (MEMORY if self.store is None else STORED)

    def store_config(self) -> "StoreConfig | None":
        from unroll.service.store.embedded_store import EmbeddedStoreConfig

        if self.store is None:
            return None
        times = self.store_timeout, self.idle_timeout or None, self.tombstone_life
        if (folder := store_folder(self.store)) is not None:
            return EmbeddedStoreConfig(folder, self.store_sync, *times)
        from unroll.service.store.redis_store import RedisStoreConfig

        return RedisStoreConfig(self.store, *times, self.store_prefix)

    @property
    def shows_page(self) -> bool:
        return self.page and ("page" in self.model_fields_set or _is_loopback(self.host))

    def gate(self, ticket_secret: bytes | None = None) -> "Gate":
        """Create the gate. ticket_secret: used without `snapshot_keys`. Raises KeysRefused."""
        from unroll.service.access.gate import Gate

        hosts = frozenset(name.lower() for name in self.allowed_hosts)
        if not hosts and self.auth is None and self.keys is None and self.jwt_keys is None:
            hosts = _LOCAL
        if self.snapshot_keys:
            ticket_secret = self.snapshot_keys[0].get_secret_value().encode()
        return Gate(self.keys, hosts or None, self.allowed_origins, ticket_secret, self._jwt_config())

    def tls_files(self) -> "TlsFiles | None":
        from unroll.service.access.certificate import TlsFiles

        if self.tls_cert is None:
            return None
        return TlsFiles(self.tls_cert, self.tls_key, self.tls_password_file, self.tls_client_ca)

    def _jwt_config(self) -> "JwtConfig | None":
        from unroll.service.access.jwt_config import JwtConfig

        if self.jwt_keys is None or self.jwt_issuer is None or self.jwt_audience is None:
            return None
        claims = self.jwt_tenant_claim, self.jwt_scope_claim
        return JwtConfig(self.jwt_keys, self.jwt_issuer, self.jwt_audience, *claims)

    def api_limits(self) -> "ApiLimits":
        from unroll.service.api.app_state import ApiLimits

        return ApiLimits(
            self.request_timeout,
            self.max_body_bytes,
            self.max_json_bytes,
            self.max_rollout_steps,
            self.max_held_bytes,
        )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() in _LOCAL


def store_folder(url: str) -> Path | None:
    return Path(unquote(url.removeprefix(_FOLDER))) if url.startswith(f"{_FOLDER}/") else None
