"""The README is executed: its commands, its programs, and the answers it shows."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest
import torch
from waiting import PATIENCE

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = ["README.md", "CONTRIBUTING.md"]

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def block(language: str, containing: str) -> str:
    """The only fenced block of the language that contains the text."""
    [found] = [text for kind, text in _BLOCK.findall(README) if kind == language and containing in text]
    return found


def at(server: str, text: str) -> str:
    """The text, with the address of the README's server replaced by the test's."""
    return text.replace("127.0.0.1:8000", urlsplit(server).netloc)


def rounded(text: str) -> str:
    """Forecasts rounded to two places, because the last digits depend on the CPU."""
    return re.sub(r"\d+\.\d{2,}", lambda number: f"{float(number[0]):.2f}", text)


@pytest.mark.usefixtures("_curl")
def test_the_curl_session_answers_as_shown(server: str):
    script, shown = at(server, block("bash", "curl")), block("text", "outputs").splitlines()
    for _ in range(2):  # it closes its session, so it can be repeated
        pasted = subprocess.run(["bash", "-e"], input=script, capture_output=True, text=True, check=True)
        answers = pasted.stdout.splitlines()
        assert len(answers) == len(shown)
        for answer, expected in zip(answers, shown, strict=True):
            pattern = ".*".join(re.escape(part) for part in rounded(expected).split("…"))
            assert re.fullmatch(pattern, rounded(answer)), f"{answer}\nis not as shown:\n{expected}"


def test_the_tritonclient_session_works(server: str, environment: dict[str, str]):
    program = at(server, block("python", "tritonclient"))
    ran = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert ran.returncode == 0, ran.stderr
    assert re.findall(r"\d+\.\d", ran.stdout) == ["371.1", "371.4"]


def test_a_model_of_ones_own_is_exported_and_served(
    tmp_path: Path,
    serve: Callable,
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    module = block("python", "# my_model.py")
    (tmp_path / "my_model.py").write_text(module)
    scope: dict = {}
    exec(module, scope)
    torch.save(scope["Classifier"]().state_dict(), tmp_path / "classifier.pt")

    command = block("bash", "unroll export").splitlines()[0]
    ran = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert ran.returncode == 0, ran.stderr
    assert "streaming yes" in ran.stdout
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    exec(block("python", "unroll.export"), {"__name__": "__main__"})
    assert "streaming yes" in capsys.readouterr().out
    with serve(tmp_path / "bundles") as url, urlopen(f"{url}/v1/models") as models:
        [served] = json.load(models)
    assert (served["name"], served["version"], served["streamable"]) == ("classifier", "2", True)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_exists(page: str):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([\w-]+)", (ROOT / page).read_text(), re.MULTILINE))
    assert named
    assert named <= targets


def test_every_code_in_the_table_is_a_code():
    codes = set(re.findall(r'code = "(\w+)"', (ROOT / "service" / "core" / "errors.py").read_text()))
    rows = re.findall(r"^\| \d+ \| ([^|]+) \|", README, re.MULTILINE)
    assert len(rows) >= 10
    assert {code for row in rows for code in re.findall(r"`(\w+)`", row)} <= codes
