"""Settings, read once from flags and `UNROLL_*` environment variables, and handed to each layer as its own config."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from unroll.service.api.app_state import ApiLimits
from unroll.service.engine.backend import Cells, EngineOptions, Precision
from unroll.service.models.loading import ModelOptions
from unroll.service.scheduler.limits import SchedulerLimits, SessionLimits
from unroll.service.state.sealed_snapshot import LEAST_KEY_BYTES
from unroll.service.store.redis_store import StoreConfig


class Settings(BaseSettings):
    """Serve a repository of bundles."""

    model_config = SettingsConfigDict(
        env_prefix="UNROLL_", cli_kebab_case=True, cli_prog_name="unroll serve", cli_hide_none_type=True, extra="forbid"
    )

    repository: Annotated[Path, Field(description="folder of bundles, <name>/<version>/")]
    host: Annotated[str, Field(description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="port to listen on")] = 8000
    workers: Annotated[
        PositiveInt, Field(description="processes that serve on the port; several need a store, for any may be reached")
    ] = 1
    worker_port: Annotated[
        int | None,
        Field(
            ge=1, le=65535, description="each of several workers also listens alone, on this port and those after it"
        ),
    ] = None
    device: Annotated[str, Field(description="cpu, cuda:N, several as in cuda:0,cuda:1, or auto: a GPU if any")] = (
        "auto"
    )
    threads: Annotated[PositiveInt, Field(description="onnxruntime threads for one call of a model, on a CPU")] = 1
    precision: Annotated[Precision, Field(description="of matrix products on a GPU")] = "float32"
    cells: Annotated[Cells, Field(description="what runs LSTM and GRU layers in a GPU's single steps")] = "fused"
    buckets: Annotated[
        tuple[PositiveInt, ...], Field(description="rows of a GPU's calls of single steps, as in [1,64,256]")
    ] = ()

    session_capacity: Annotated[
        PositiveInt | Literal["auto"],
        Field(description="open sessions per model version and device; auto: as many as fit in memory_share"),
    ] = 65_536
    memory_share: Annotated[
        float, Field(gt=0, le=1, description="part of the free memory that auto may fill with a model's sessions")
    ] = 0.5
    idle_timeout: Annotated[float, Field(ge=0, description="seconds until an idle session expires; 0: never")] = 900.0
    tombstone_life: Annotated[PositiveFloat, Field(description="seconds a lost session's cause is remembered")] = 3600.0

    store: Annotated[
        str | None,
        Field(
            pattern=r"^(redis|rediss|unix|redis\+cluster)://",
            description="where durable sessions are: redis://host:port/db, rediss://, unix://, redis+cluster://",
        ),
    ] = None
    durability: Annotated[
        Literal["memory", "redis"] | None,
        Field(description="of sessions that do not say it; redis if there is a store, else memory"),
    ] = None
    store_timeout: Annotated[PositiveFloat, Field(description="seconds until a store that does not answer is down")] = (
        0.5
    )
    snapshot_keys: Annotated[
        tuple[SecretStr, ...],
        Field(
            description='secrets that sign the states clients hold, as in ["new","old"]: the first signs, all verify'
        ),
    ] = ()
    spill_bytes: Annotated[
        int, Field(ge=0, description="host memory for the states of idle sessions when session_capacity is reached")
    ] = 256 * 2**20
    state_file: Annotated[
        Path | None, Field(description="memory sessions are written there at the end, and read at the start")
    ] = None

    max_batch: Annotated[PositiveInt, Field(description="rows in one call of a model")] = 256
    max_batch_steps: Annotated[PositiveInt, Field(description="rows times time steps in one call")] = 2048
    piece_steps: Annotated[PositiveInt, Field(description="time steps run at a time of a long request")] = 64
    max_queue: Annotated[PositiveInt, Field(description="requests waiting per model before others are refused")] = 8192

    request_timeout: Annotated[PositiveFloat, Field(description="seconds until a request must have begun to run")] = (
        30.0
    )
    max_body_bytes: Annotated[PositiveInt, Field(description="largest request body")] = 16 * 2**20
    max_json_bytes: Annotated[PositiveInt, Field(description="largest JSON in a request")] = 2 * 2**20
    max_steps: Annotated[PositiveInt, Field(description="time steps in one request")] = 65_536
    max_sequences: Annotated[PositiveInt, Field(description="whole sequences in one request")] = 1024
    drain_delay: Annotated[
        float, Field(ge=0, description="seconds after SIGTERM in which load balancers may notice that it is not ready")
    ] = 0.0
    drain_timeout: Annotated[
        PositiveFloat, Field(description="seconds that clients then have to take their answers")
    ] = 10.0
    log_level: Annotated[str, Field(pattern="^(debug|info|warning|error)$", description="least severe log line")] = (
        "info"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.durability == "redis" and self.store is None:
            raise ValueError("durability redis needs a store: --store redis://host:port/db")
        if any(len(key.get_secret_value().encode()) < LEAST_KEY_BYTES for key in self.snapshot_keys):
            raise ValueError(f"a snapshot key has at least {LEAST_KEY_BYTES} bytes")
        if self.workers > 1 and (self.store is None or self.durability == "memory"):
            raise ValueError(
                f"{self.workers} workers need a store, since a session's next request may reach any of them: "
                "--store redis://host:port/db, and no --durability memory"
            )
        if self.workers > 1 and self.state_file is not None:
            raise ValueError("a state file is for sessions in memory, which several workers do not have")
        if self.workers == 1 and self.worker_port is not None:
            raise ValueError("a worker port is for several workers: --workers")
        return self

    @classmethod
    def from_arguments(cls, argv: list[str]) -> Self:
        """Flags first, then the environment, then the defaults. Exits with a usage message on a bad flag."""
        return cls(_cli_parse_args=argv)

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
            ),
            scheduler=SchedulerLimits(
                max_batch=self.max_batch,
                max_batch_steps=self.max_batch_steps,
                piece_steps=self.piece_steps,
                max_queue=self.max_queue,
            ),
        )

    def store_config(self) -> StoreConfig | None:
        if self.store is None:
            return None
        return StoreConfig(self.store, self.store_timeout, self.idle_timeout or None, self.tombstone_life)

    def api_limits(self) -> ApiLimits:
        return ApiLimits(self.request_timeout, self.max_body_bytes, self.max_json_bytes)
