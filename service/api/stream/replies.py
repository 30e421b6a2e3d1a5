"""Encodes and sends the answers of one connection; coalesces those of one turn of the event loop into a frame."""

from collections.abc import Callable
from typing import Any

from unroll.service.api.stream.flow import FlowControl
from unroll.service.api.stream.link import Link
from unroll.service.core.errors import Overloaded, UnrollError
from unroll.service.protocol import json
from unroll.service.protocol.frames import (
    NO_POSITION,
    Frame,
    SingleEntryFrame,
    encode,
    encode_single,
    encode_step,
    pack_entries,
    with_positions,
)
from unroll.service.scheduler.chunk import GroupReply
from unroll.service.scheduler.reply import Reply

CallSoon = Callable[[Callable[[], None]], object]
#: Called with an error, and the handle, position and session id that it concerns.
OnRefused = Callable[[UnrollError, int | None, int | None, str | None], None]


class Replies:
    """Sends the answers to entries and to control messages.

    Attributes:
        closed: The connection has ended; nothing more is sent.
    """

    __slots__ = ("_call_soon", "_coalesced", "_release", "closed", "on_refused", "send_frame", "send_text")

    def __init__(self, link: Link, flow: FlowControl, call_soon: CallSoon, on_refused: OnRefused) -> None:
        self.on_refused = on_refused
        self.send_frame, self.send_text = link.send_binary, link.send_text
        self._release = flow.release
        self._call_soon = call_soon
        self._coalesced: list[tuple[int, int, int, list[bytes], bool]] = []  # handle, steps, position, outputs, kept
        self.closed = False

    def send(self, document: dict[str, Any]) -> None:
        self.send_text(json.dump(document))

    def send_error(self, error: UnrollError) -> None:
        """Answer a message that was refused as a whole."""
        self.on_refused(error, None, None, None)
        self.send({"op": "error", **error_members(error)})

    def answer(self, entry: SingleEntryFrame, reply: Reply) -> None:
        """Answer immediately, in a separate frame."""
        if self._coalesced:
            self.flush()  # it may contain an earlier chunk of the session
        self.send_frame(encode_single(entry.handle, entry.steps, reply.position, reply.outputs, kept=reply.kept))
        self._release(1, entry.steps)

    def answer_step(self, handle: int, position: int, values: bytes) -> None:
        """Answer one step immediately, in a separate frame. values: its outputs, concatenated."""
        if self._coalesced:
            self.flush()
        self.send_frame(encode_step(handle, position, values))
        self._release(1, 1)

    def answer_text(self, entry: SingleEntryFrame, document: dict[str, Any]) -> None:
        self.flush()
        self.send(document)
        self._release(1, entry.steps)

    def coalesce(self, entry: SingleEntryFrame, reply: Reply) -> None:
        """Answer in one frame with the other answers of this turn of the event loop."""
        if not self._coalesced:
            self._call_soon(self.flush)
        values = [output.tobytes() for output in reply.outputs]
        self._coalesced.append((entry.handle, entry.steps, reply.position, values, reply.kept))

    def answer_group(self, frame: Frame, rows: list[int] | None, reply: GroupReply) -> None:
        """Answer a group in one frame, and its failed rows separately.

        Args:
            rows: The rows of the frame that were submitted; None for all.
            reply: The answer to all or some of these rows.
        """
        answered = reply.rows if rows is None or isinstance(reply.rows, slice) else [rows[row] for row in reply.rows]
        entries, positions, outputs = frame.entries[answered], reply.positions, reply.outputs
        if reply.errors:
            for i, error in reply.errors.items():
                handle, steps, position = entries[i].tolist()
                self.refuse(handle, steps, None if position == NO_POSITION else position, error)
            good = [i for i in range(len(entries)) if i not in reply.errors]
            entries, positions = entries[good], positions[good]
            outputs = tuple(output[good] for output in outputs)
        self.flush()
        if len(entries):
            values = [output.data for output in outputs]
            self.send_frame(encode(with_positions(entries, positions), values, kept=reply.kept))
            self._release(len(entries), len(entries) * int(entries[0]["steps"]))

    def refuse(self, handle: int, steps: int, position: int | None, error: UnrollError, **members: bool) -> None:
        """Answer an entry with an error. members: further members of the message."""
        self.on_refused(error, handle, position, None)
        self.send({"op": "error", **error_members(error), "handle": handle, "position": position, **members})
        self._release(1, steps)

    def flush(self) -> None:
        """Send the coalesced answers, if any."""
        if not self._coalesced:
            return
        handles, steps, positions, values, kept = zip(*self._coalesced, strict=True)
        self._coalesced = []
        in_order = (entry for output in zip(*values, strict=True) for entry in output)
        self.send_frame(encode(pack_entries(handles, steps, positions), in_order, kept=all(kept)))
        self._release(len(handles), sum(steps))

    def close(self) -> None:
        self.closed = True
        self._coalesced.clear()


def error_members(error: UnrollError) -> dict[str, Any]:
    members: dict[str, Any] = {**error.details, "code": error.code, "detail": error.message}
    if isinstance(error, Overloaded):
        members["retry_after"] = error.retry_after
    return members
