"""The progress messages of `unroll export` on stderr."""

import io
from contextlib import nullcontext

import pytest

from unroll.export import stages


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_long_stages_show_their_time_and_a_mark_on_a_terminal(
    kind: type[io.StringIO], error: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", out := kind())
    monkeypatch.setattr(stages, "_SHORT", 0.0)
    with pytest.raises(ValueError, match="no model") if error else nullcontext(), stages.stages() as begin:
        begin("tracing")
        begin("comparing")
        if error:
            raise ValueError("no model")
    if kind is Terminal:
        *_, first, last, _end = out.getvalue().split("\n")
        assert "✓ tracing" in first
        assert first.endswith("0.0 s\x1b[0m")
        assert ("✓" in last) is not error
        assert "comparing" in last
    else:
        assert out.getvalue() == "tracing ... 0.0 s\ncomparing ... 0.0 s\n"
