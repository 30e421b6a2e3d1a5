"""The bodies of the native API, for FastAPI's routes and for the OpenAPI document."""

from typing import Any, Literal

from pydantic import Base64Bytes, BaseModel, ConfigDict, Field


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class OpenSession(_Body):
    session_id: str | None = Field(
        None, description="1 to 128 letters, digits or . _ ~ : -; made by the server if absent"
    )
    state: list[float] | None = Field(None, description="state row to begin from, state_size values")
    snapshot: Base64Bytes | None = Field(None, description="a snapshot to begin from, Base64")
    static: dict[str, Any] | None = Field(None, description="a model's static inputs, {name: value}, if it has some")
    durability: Literal["memory", "redis", "client"] | None = Field(
        None, description="what keeps the state: the process, the store, or the client; the server's default if absent"
    )


class ForkSession(_Body):
    session_id: str | None = Field(None, description="id of the new session; made by the server if absent")


class SessionInfo(BaseModel):
    session_id: str
    position: int = Field(description="time steps consumed")
    model: str
    model_version: str
    model_digest: str = Field(description="SHA-256 of the model the session runs on, for its whole life")
    durability: str = Field(
        description="memory: lost with the process, and then reported as unknown; redis: any replica can continue it; "
        "client: in the snapshot, which every step sends and receives"
    )
    idle_timeout: float | None = Field(description="seconds without use until the session expires; null: never")


class HeldSession(SessionInfo):
    """A session of durability client."""

    snapshot: str = Field(description="the sealed state, Base64; send it with the first step")


class Steps(_Body):
    inputs: list[Any] | dict[str, list[Any]] = Field(description="[step, ...], or {input: [step, ...]}; T >= 1 steps")
    position: int | None = Field(None, ge=0, description="the position that the client expects the session at")
    snapshot: Base64Bytes | None = Field(
        None, description="with durability client: the latest snapshot of the session, Base64"
    )


class StepsReply(BaseModel):
    outputs: list[Any] | dict[str, list[Any]] = Field(description="[step, ...], or {output: [step, ...]}")
    position: int = Field(description="time steps consumed, these included")
    snapshot: str | None = Field(None, description="with durability client: send it with the next step")


class Sequences(_Body):
    inputs: list[Any] | dict[str, list[Any]] = Field(
        description="[sequence, ...], or {input: [sequence, ...]}; the sequences' lengths may differ"
    )
    static: dict[str, list[Any]] | None = Field(None, description="{static input: [value of each sequence, ...]}")


class SequencesReply(BaseModel):
    outputs: list[Any] | dict[str, list[Any]] = Field(description="one entry per sequence, as in the request")


class Tensor(BaseModel):
    name: str
    dtype: str
    shape: list[int] = Field(description="of one time step")
    time: bool = Field(description="one value per time step; false: only the last")


class StaticTensor(BaseModel):
    name: str
    dtype: str
    shape: list[int]


class ModelInfo(BaseModel):
    name: str
    version: str
    digest: str
    inputs: list[Tensor]
    outputs: list[Tensor]
    static: list[StaticTensor] = Field(description="given once, when a session opens or a sequence begins")
    state_size: int = Field(description="float32 values in a session's state row")
    streamable: bool
    not_streamable_because: str | None
    bit_exact: bool = Field(description="chunking and batching do not change a bit on the CPU")
    device: str = Field(description="where it is served; with several devices, one of them")
    provider: str = Field(description="onnxruntime's")
    precision: str = Field(description="of matrix products: float32, tf32, float16 or int8")
    parity: dict[str, float] = Field(
        description="largest absolute difference from PyTorch in float64, by output and state_out, measured at load"
    )
    stability: float = Field(
        description="largest absolute difference of a row's results between batches of other sizes or company, "
        "measured at load; 0: not a bit"
    )
    sessions: int = Field(description="open now")


class Problem(BaseModel):
    """RFC 9457 problem details."""

    type: str
    title: str
    status: int
    detail: str
    code: str = Field(description="stable; see the list of codes")
    expected: int | None = Field(None, description="with position_gap, position_too_old and payload_mismatch")
    position: int | None = Field(None, description="with session_exists")
