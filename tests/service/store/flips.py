"""A program that damages copies of a store at random places, checks them, and compares the readable records.

    python flips.py FOLDER SCRATCH SEED COUNT

Prints a line of JSON per copy. Each copy is checked in a separate process, as a damaged file may kill it.
"""

import json
import os
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb

from unroll.service.store.embedded_check import examine

_PAGE = os.sysconf("SC_PAGE_SIZE")


def damage(chance: random.Random, content: bytes) -> bytes:
    """Flip one bit in the meta pages, in a page header or anywhere, or truncate the file."""
    kind = chance.choice(("meta", "head", "anywhere", "cut"))
    if kind == "cut":
        return content[: chance.randrange(len(content))]
    page = chance.randrange(len(content) // _PAGE) * _PAGE
    at = {"meta": chance.randrange(2) * _PAGE + chance.randrange(152), "head": page + chance.randrange(64)}
    flipped = bytearray(content)
    flipped[at.get(kind, chance.randrange(len(content)))] ^= 1 << chance.randrange(8)
    return bytes(flipped)


def entries(folder: Path) -> dict[bytes, bytes]:
    with lmdb.open(str(folder), readonly=True, lock=False) as environment, environment.begin() as transaction:
        return dict(transaction.cursor())


def verdict(folder: Path, expected: dict[bytes, bytes]) -> dict[str, Any]:
    """wrong: places with changed content that are not reported as damaged."""
    report = examine(folder)
    if report.result == "unreadable":
        return {"result": report.result}
    damaged = {bytes.fromhex(damage.place) for damage in report.damaged}
    found = entries(folder)
    wrong = [place.hex() for place in {*expected, *found} - damaged if found.get(place) != expected.get(place)]
    return {"result": report.result, "wrong": wrong}


def examined(folder: Path, expected: dict[bytes, bytes]) -> dict[str, Any]:
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.write(writer, json.dumps(verdict(folder, expected)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reader) as file:
        content = file.read()
    if content:
        return json.loads(content)
    return {"result": "unreadable"} if os.WIFSIGNALED(status) else {"result": "failed"}


def outcomes(folder: Path, scratch: Path, seed: int, count: int) -> Iterator[dict[str, Any]]:
    expected, content = entries(folder), (folder / "data.mdb").read_bytes()
    shutil.copytree(folder, scratch)
    for number in range(seed, seed + count):
        (scratch / "data.mdb").write_bytes(damage(random.Random(number), content))
        yield {"seed": number, **examined(scratch, expected)}


if __name__ == "__main__":
    for outcome in outcomes(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])):
        print(json.dumps(outcome), flush=True)
