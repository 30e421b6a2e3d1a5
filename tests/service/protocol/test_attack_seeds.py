"""Known attacks on model servers, and mutations of valid bytes: each is decoded or refused with a reason."""

import random
import tracemalloc
from contextlib import suppress

import pytest
from decoder_fuzz.decoders import DECODERS

SEEDS = [(name, seed) for name, decoder in DECODERS.items() for seed in decoder.seeds]


@pytest.mark.parametrize(("name", "seed"), SEEDS)
def test_seed_is_decoded_or_refused_within_bounded_memory(name: str, seed: str) -> None:
    decoder = DECODERS[name]
    content = decoder.seeds[seed]
    tracemalloc.start()
    try:
        decoder.decode(content)
        assert not seed.startswith(("shape", "binary size", "length", "shared memory", "deep"))
    except decoder.refusals as refused:
        assert not seed.startswith("good")
        assert str(refused)
    finally:
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert most < 4_000_000


@pytest.mark.parametrize("name", DECODERS)
def test_mutated_seed_is_decoded_or_refused(name: str) -> None:
    rng, decoder = random.Random(5), DECODERS[name]
    for _ in range(400):
        content = bytearray(rng.choice([*decoder.seeds.values()])[:4000])
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(content) + 1)
            content[place : place + rng.choice([0, 1, 4])] = rng.choice(
                [b"", b"\xff", b"\x00" * 4, b"-", b"9" * 20, b"["]
            )
        with suppress(*decoder.refusals):
            decoder.decode(bytes(content))
