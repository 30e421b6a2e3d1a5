"""`unroll doctor --tls-cert --keys`: files a server would accept, and files it would refuse."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trustme

from unroll import cli
from unroll.service.access.keys import new_key
from unroll.service.doctor import ask
from unroll.service.doctor.facts import Runtime


@pytest.fixture(autouse=True)
def no_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """A working device, without a child process."""
    monkeypatch.setattr(ask, "runtime", lambda: Runtime("1", "", ("CPUExecutionProvider",), ("cpu",), "no GPU"))
    monkeypatch.setattr(ask, "session", lambda device: None)


def examined(capsys: pytest.CaptureFixture[str], *flags: object) -> tuple[int, dict[str, Any]]:
    """Return the exit status and the last finding."""
    status = cli.main(["doctor", "--device", "cpu", "--json", *map(str, flags)])
    return status, json.loads(capsys.readouterr().out)["findings"][-1]


@pytest.mark.parametrize(
    ("days", "status", "says"),
    [(90, "ok", "localhost"), (3, "note", "until"), (-1, "broken", "expired")],
    ids=["good", "about to end", "ended"],
)
def test_a_certificate(tmp_path: Path, capsys: pytest.CaptureFixture[str], days: int, status: str, says: str) -> None:
    cert, key, end = tmp_path / "cert.pem", tmp_path / "key.pem", datetime.now(UTC) + timedelta(days=days)
    made = trustme.CA().issue_cert("localhost", not_before=end - timedelta(days=100), not_after=end)
    cert.write_bytes(b"".join(part.bytes() for part in made.cert_chain_pems))
    made.private_key_pem.write_to_path(str(key))
    code, found = examined(capsys, "--tls-cert", cert, "--tls-key", key)
    assert (found["name"], found["status"], code) == ("certificate", status, int(status == "broken"))
    assert says in found["says"]
    assert (found["mend"] is None) == (status == "ok")
    if status == "ok":
        code, found = examined(capsys, "--tls-cert", cert)  # without the key
        assert (code, found["status"]) == (1, "broken")
        assert "no certificate with its key" in found["says"]


def test_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, entry = tmp_path / "keys.toml", new_key("edge", "acme", ["infer"])[1]
    file.write_text(entry)
    assert examined(capsys, "--keys", file)[1]["says"] == "1 of 1 tenants"
    file.write_text(f"{entry}expires = 2020-01-01T00:00:00Z\n")
    code, found = examined(capsys, "--keys", file)
    assert (code, found["status"], "edge" in found["says"]) == (0, "note", True)
    file.write_text(entry + entry)
    code, found = examined(capsys, "--keys", file)
    assert (code, found["status"]) == (1, "broken")
    assert "the same sha256" in found["says"]
