"""What docs/rollout.md shows, against a server of the examples."""

import ast
import json
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import httpx
import pytest

from unroll import Client

PAGE = (Path(__file__).parents[2] / "docs" / "rollout.md").read_text()


def test_the_request_in_curl(server: str) -> None:
    (body,) = re.findall(r"-d '(\{.*\})'", PAGE)
    shown = [json.loads(line) for line in re.findall(r"^data: (.*)$", PAGE, re.MULTILINE)]
    with Client(server) as client, client.session("co2") as session:
        session.steps([[371.2], [371.5]])
        answer = httpx.post(f"{server}/v1/models/co2/sessions/{session.id}/rollout", json=json.loads(body))
    events = [json.loads(line) for line in re.findall(r"^data: (.*)$", answer.text, re.MULTILINE)]
    assert len(events) == 4
    assert events[0]["position"] == shown[0]["position"]
    for member in ("inputs", "outputs"):
        assert events[0][member][0] == pytest.approx(shown[0][member][0], abs=0.01)
    assert events[-1] == shown[-1]


def test_the_tokens_in_python(server: str) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    with Client(server) as client, redirect_stdout(StringIO()) as printed:
        exec(code, {"client": client})
    text = ast.literal_eval(printed.getvalue())
    assert isinstance(text, bytes)
    assert len(text) == 200
