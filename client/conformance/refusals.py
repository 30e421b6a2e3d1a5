"""Refusals of the scripted server, with the codes and statuses of a real one."""

from typing import Any

STATUS = {
    "malformed_request": 400,
    **dict.fromkeys(("model_unknown", "session_unknown"), 404),
    **dict.fromkeys(("session_exists", "position_gap", "position_too_old", "payload_mismatch", "model_changed"), 409),
    **dict.fromkeys(("session_closed", "session_expired", "session_evicted"), 410),
    **dict.fromkeys(
        ("invalid_shape", "non_finite_input", "input_out_of_range", "snapshot_invalid", "map_invalid"), 422
    ),
    "body_too_large": 413,
    "engine_failed": 500,
    **dict.fromkeys(("queue_full", "capacity_exhausted", "draining", "store_unavailable", "model_unavailable"), 503),
    "deadline_exceeded": 504,
}


class Refusal(Exception):
    """An error with a stable code, and further `members` of the error document."""

    def __init__(self, code: str, detail: str, **members: Any) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.document = {"code": code, "detail": detail, **members}
