"""A server of the golden bundles."""

from formats.files import KEYS, REPOSITORY
from serving import Running

from unroll.service.settings import Settings


def start() -> Running:
    keys = [key.decode() for key in KEYS]
    return Running(
        Settings.model_validate({"repository": REPOSITORY, "device": "cpu", "snapshot_keys": keys, "admin": True})
    )
