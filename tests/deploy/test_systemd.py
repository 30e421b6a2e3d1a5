"""deploy/unroll.service: systemd accepts the unit, and the server accepts its options."""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from waiting import PATIENCE

from unroll import cli

UNIT = (Path(__file__).parents[2] / "deploy" / "unroll.service").read_text()
PROGRAM = "/opt/unroll/bin/unroll"


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    if (analyze := shutil.which("systemd-analyze")) is None:
        pytest.skip("systemd-analyze is not installed")
    path = tmp_path / "unroll.service"
    path.write_text(UNIT.replace(PROGRAM, "/bin/true"))
    verify = [analyze, "verify", "--man=no", str(path)]
    ran = subprocess.run(verify, capture_output=True, text=True, timeout=PATIENCE, check=False)
    complaints = [line for line in ran.stderr.splitlines() if "unroll.service" in line]
    assert complaints == []


def test_server_accepts_the_options_of_the_unit(capsys: pytest.CaptureFixture[str]) -> None:
    _, _, line = UNIT.replace("\\\n", " ").partition(f"ExecStart={PROGRAM} serve ")
    assert cli.main(["config", "show", *shlex.split(line.partition("\n")[0])]) == 0
    assert "/etc/unroll/tls.key" in capsys.readouterr().out
