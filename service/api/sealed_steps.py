"""Steps of client-held sessions: each request carries a sealed snapshot, and each reply returns the next one.

Any replica with the same keys can run any step. The same request always gets the same reply.
"""

import base64
import binascii
from functools import partial

from unroll.service.api.app_state import AppState
from unroll.service.api.error_responses import problem
from unroll.service.api.parameters import POSITION, STEPS, position_of, split_reference, timeout_of
from unroll.service.api.request import RAW, Answer, Answering, Cancel, Request, Respond, json_answer
from unroll.service.core.errors import DurabilityUnavailable, InvalidRequest, PositionGap, SnapshotInvalid
from unroll.service.protocol.tensors import Codec
from unroll.service.scheduler.chunk import Chunk
from unroll.service.scheduler.reply import Reply
from unroll.service.state.sealed_snapshot import SnapshotKeys
from unroll.service.state.snapshot import Snapshot

#: Header with the length of the snapshot at the start of a raw body.
LENGTH = b"unroll-snapshot-length"


def keys_of(app: AppState) -> SnapshotKeys:
    """Raises DurabilityUnavailable."""
    if app.snapshot_keys is None:
        raise DurabilityUnavailable(
            "durability client needs keys that sign snapshots: start the server with --snapshot-keys"
        )
    return app.snapshot_keys


def sealed_steps(
    app: AppState, model: str, session_id: str, request: Request, respond: Respond, document: dict | None = None
) -> Cancel:
    """Run T >= 1 time steps from the snapshot in the request. document: the JSON body; None for a raw body."""
    sealed, values = _from_raw(request) if document is None else (_from_json(document), b"")
    keys = keys_of(app)
    content = keys.open(session_id, sealed)
    served = app.models.of_snapshot(*split_reference(model), Snapshot.model_of(content))
    snapshot = served.read_snapshot(content)
    position = request.position = request.whole_number(POSITION)
    if document is None:
        inputs = served.codec.from_raw(values, request.whole_number(STEPS))
    else:
        position = request.position = position_of(document, position)
        inputs = served.codec.from_json(document["inputs"])
    if position not in (None, snapshot.position):
        raise PositionGap(
            f"the snapshot is at {snapshot.position}, the chunk begins at {position}", expected=snapshot.position
        )
    chunk = Chunk(inputs, position=snapshot.position, state_row=snapshot.row)
    chunk.tenant = request.tenant
    raw = document is None

    def encode(codec: Codec, reply: Reply) -> Answer:
        assert chunk.state_row is not None  # the loop has stored the new state there
        sealed = keys.seal(session_id, Snapshot(served.manifest.digest, reply.position, chunk.state_row))
        position = b"unroll-position: %d\r\n" % reply.position
        if raw:
            fields = position + b"unroll-snapshot-length: %d\r\n" % len(sealed)
            return Answer(200, RAW, sealed + codec.to_raw(reply.outputs), fields)
        body = {"outputs": codec.to_json(reply.outputs), "position": reply.position, "snapshot": base64_text(sealed)}
        return json_answer(body, sum(array.size for array in reply.outputs), position)

    settled = Answering(respond, problem, encode, served.codec)
    app.meter.take(request.tenant, len(inputs[0]))
    served.loop.submit(chunk, timeout_of(app, request), settled)
    return partial(served.loop.leave, chunk, settled)


def base64_text(sealed: bytes) -> str:
    return base64.b64encode(sealed).decode()


def _from_raw(request: Request) -> tuple[bytes, bytes]:
    length = request.whole_number(LENGTH)
    assert length is not None
    if length > len(request.body):
        raise InvalidRequest(
            f"the header says that the snapshot has {length} bytes, but the body has {len(request.body)}"
        )
    return request.body[:length], request.body[length:]


def _from_json(document: dict) -> bytes:
    try:
        return base64.b64decode(document["snapshot"], validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise SnapshotInvalid("'snapshot' is not Base64") from error
