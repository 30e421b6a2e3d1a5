"""The values in the golden files of one value each, and the code that writes them. Nothing is random."""

import math
from pathlib import Path

import numpy as np

from unroll.service.state.sealed_snapshot import SnapshotKeys
from unroll.service.state.snapshot import Snapshot
from unroll.service.store import embedded_entry
from unroll.service.store.embedded_entry import pack_entry
from unroll.service.store.interface import Key
from unroll.service.store.record import Gone, Kept, Origin, Record, pack_last
from unroll.service.store.state_file import StateFile

GOLDEN = Path(__file__).parent / "golden"
REPOSITORY = GOLDEN / "repository"

KEYS = (b"the first golden key", b"the second golden key")
SESSION = "pump-7"
KEY: Key = ("steps", SESSION)
NAME = b"steps/pump-7"

SNAPSHOT = Snapshot("ab" * 32, 42, np.array([0.5, -1.25, 3e-39, 1e30], np.float32))

ORIGIN = Origin("ab" * 32, "stored", b"b" * 16, b"o" * 16)
KEPT = (Kept(38, 3, b"c" * 16, b"outputs of three"), Kept(41, 1, b"d" * 16, b"outputs"))
RECORD = Record(ORIGIN, 42, SNAPSHOT.row.tobytes(), KEPT, 4, b"t" * 16)
#: A memory session at its model's initial state.
UNTOUCHED = Record(Origin("cd" * 32, "memory", b"e" * 16), 0, b"")

CLOSED = Gone("session_closed", ORIGIN, KEPT)
EXPIRED = Gone("session_expired", ORIGIN)

SESSIONS: list[tuple[Key, Record, float]] = [
    (KEY, Record(ORIGIN, 42, SNAPSHOT.row.tobytes(), KEPT, 4), 1.5),
    (("mixed", "ümlaut"), UNTOUCHED, 0.0),
]


def write(folder: Path) -> None:
    """Write all files that this version writes; `folder_*_1` are of 0.2.0.

    Those that only Redis writes are assembled from the table in `store/redis_store.py`.
    """
    keys = SnapshotKeys(KEYS)
    position, origin, last = (42).to_bytes(8, "little"), ORIGIN.to_bytes(), pack_last(RECORD.depth, KEPT)
    for name, content in {
        "snapshot": SNAPSHOT.to_bytes(),
        "sealed_snapshot": keys.seal(SESSION, SNAPSHOT),
        "sealed_snapshot_second_key": SnapshotKeys(KEYS[::-1]).seal(SESSION, SNAPSHOT),
        "origin": origin,
        "last": last,
        "record": RECORD.to_bytes(),
        "record_untouched": UNTOUCHED.to_bytes(),
        "redis_state": RECORD.token + RECORD.to_bytes()[:-16],
        "redis_gone_closed": b"c" + b"u" * 16 + position + origin + last,
        "redis_gone_expired": b"e" + bytes(24) + origin,
        "folder_session": pack_entry(NAME, embedded_entry.SESSION, math.inf, RECORD.token, RECORD.packed()),
        "folder_closed": pack_entry(NAME, embedded_entry.CLOSED, math.inf, b"u" * 16, position + origin + last),
    }.items():
        (folder / f"{name}.bin").write_bytes(content)
    StateFile(folder / "sessions.bin").write(SESSIONS)
