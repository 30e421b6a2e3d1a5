"""The sound example program against a real server."""

import wave
from pathlib import Path

import numpy as np
import pytest

from unroll.examples import sound
from unroll.models.synthesis import RATE


def test_program_prints_the_events_in_the_sound(server: str, capsys: pytest.CaptureFixture[str]):
    assert sound.main(["--url", server]) == 0
    printed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert {kind: said != "nothing" for kind, said in printed.items()} == {
        "whistle": True, "claps": True, "hum": True, "clap": False, "blip": False,
    }  # fmt: skip
    assert printed["claps"].startswith("two claps at ")


def test_it_reads_a_recording_and_refuses_one_of_another_kind(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    frames = sound.synthesised()["hum"]
    for rate in (RATE, 44100):
        with wave.open(str(tmp_path / f"{rate}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes((frames * (2**15 - 1)).astype("<i2").tobytes())
    assert sound.main([str(tmp_path / f"{RATE}.wav"), "--url", server]) == 0
    assert "hum at" in capsys.readouterr().out
    assert sound.main([str(tmp_path / "44100.wav"), "--url", server]) == 1
    assert "has 44100 samples a second" in capsys.readouterr().err
    np.testing.assert_allclose(sound.recorded(tmp_path / f"{RATE}.wav"), frames, atol=1e-4)
