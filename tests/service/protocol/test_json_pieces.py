"""Long JSON is written in pieces: the bytes are the same, and no piece takes long."""

import numpy as np
import pytest

from unroll.service.core.errors import BodyTooLarge
from unroll.service.protocol import json

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    "document",
    [
        {},
        [],
        {"outputs": RNG.random((30_001, 3), np.float32), "position": 7},
        {"outputs": RNG.random((3, 30_001), np.float32)[:, ::2]},
        {"outputs": [RNG.random((n, 2, 9000), np.float32) for n in (1, 2)], "id": 'a "quoted" one'},
        {"a": np.arange(100_000), "b": {"c": np.ones(9, bool), "d": []}},
    ],
)
def test_pieces_are_the_document(document: object) -> None:
    pieces = [*json.pieces(document)]
    assert json.parse_object(b'{"it":%b}' % b"".join(pieces), 2**31)["it"] == _plain(document)
    assert max(map(len, pieces)) < 400_000


def _plain(document: object) -> object:
    if isinstance(document, dict):
        return {name: _plain(value) for name, value in document.items()}
    if isinstance(document, list):
        return [*map(_plain, document)]
    return (
        json.orjson.loads(json.dump(np.ascontiguousarray(document))) if isinstance(document, np.ndarray) else document
    )


def test_text_of_too_many_values_is_refused_before_it_is_parsed() -> None:
    json.check_size(b"0," * (json.MAX_VALUES // 2), 2**30)
    with pytest.raises(BodyTooLarge, match="send raw bytes"):
        json.check_size(b"0," * (json.MAX_VALUES + 1), 2**30)
