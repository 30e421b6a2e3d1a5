"""The control messages that a stream's client sends, as JSON in text messages."""

from contextlib import suppress
from typing import Annotated, Any, Literal

import orjson
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from unroll.service.api.bodies import MAX_ITEMS, Strict, check_members, first_fault
from unroll.service.api.rollout import RolloutSpec
from unroll.service.core.errors import InvalidRequest
from unroll.service.store.record import current_durability

Handle = Annotated[int, Field(ge=0, lt=2**32)]


class OpenSpec(Strict):
    """One session to open or resume, and the handle to bind it to."""

    handle: Handle
    session_id: str | None = None
    mode: Literal["new", "resume", "either"] = "new"
    durability: Annotated[Literal["memory", "stored"] | None, BeforeValidator(current_durability)] = None
    static: dict[str, Any] | None = None
    depth: Annotated[int, Field(ge=1, le=64)] = 1


class OpenRequest(Strict):
    op: Literal["open"]
    sessions: Annotated[list[OpenSpec], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]


class HandlesRequest(Strict):
    """close: end the sessions. detach: free the handles only."""

    op: Literal["close", "detach"]
    handles: Annotated[list[Handle], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]


class StepsRequest(Strict):
    """One chunk of a session, in JSON instead of a frame. batch_rows: include the chunk's batch size in the answer."""

    op: Literal["steps"]
    handle: Handle
    inputs: Any
    position: Annotated[int | None, Field(ge=0, lt=2**63)] = None
    batch_rows: bool = False


class RolloutRequest(RolloutSpec):
    """values: the encoding of the steps."""

    op: Literal["rollout"]
    handle: Handle
    values: Literal["frames", "json"] = "frames"


class StopRequest(Strict):
    op: Literal["stop"]
    handle: Handle


Request = OpenRequest | HandlesRequest | StepsRequest | RolloutRequest | StopRequest
_REQUEST: TypeAdapter[Request] = TypeAdapter(Annotated[Request, Field(discriminator="op")])


def parse_request(message: bytes) -> Request:
    """Parse a control message. Raises InvalidRequest, which names the first invalid member."""
    check_members(message)
    try:
        with suppress(orjson.JSONDecodeError):  # twice as fast, but limited to 64-bit numbers
            return _REQUEST.validate_python(orjson.loads(message))
        return _REQUEST.validate_json(message)
    except ValidationError as error:
        raise InvalidRequest(first_fault(error)) from error
