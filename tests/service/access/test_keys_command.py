"""`unroll keys` writes a file that a server accepts."""

import json
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from unroll import cli
from unroll.service.access.gate import Gate
from unroll.service.access.keys import add_key


def keys(*words: str) -> int:
    return cli.main(["keys", *words])


def test_keys_are_added_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.toml"
    assert keys("new", str(path), "--tenant", "acme") == 0
    first = capsys.readouterr().out.strip()
    path.write_text(path.read_text() + "\n[tenants.acme]\nsessions = 7\n")
    path.chmod(0o640)
    assert keys("new", str(path), "--tenant", "acme", "--name", "scraper", "--scope", "metrics") == 0
    second = capsys.readouterr().out.strip()
    gate = Gate(path)
    assert gate.admit({b"x-api-key": first.encode()}, "infer", changes=True) == "acme"
    assert gate.admit({b"x-api-key": second.encode()}, "metrics", changes=True) == "acme"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert first not in path.read_text()
    assert [each.name for each in tmp_path.iterdir()] == ["keys.toml"]
    assert keys("check", str(path)) == 0
    shown = capsys.readouterr().out
    assert "scraper  tenant acme  metrics" in shown
    assert "tenant acme: sessions 7" in shown
    assert keys("check", str(path), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["keys"][1] == {
        "name": "scraper",
        "tenant": "acme",
        "scopes": ["metrics"],
        "expires": None,
        "expired": False,
    }
    assert found["tenants"]["acme"]["sessions"] == 7


def test_keys_that_are_added_at_once_are_all_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    with ThreadPoolExecutor(8) as pool:
        secrets = [*pool.map(lambda i: add_key(path, f"key {i}", "acme", ["infer"]), range(16))]
    gate = Gate(path)
    assert {gate.admit({b"x-api-key": secret.encode()}, "infer", changes=True) for secret in secrets} == {"acme"}


def test_new_file_is_readable_only_by_its_owner(tmp_path: Path) -> None:
    assert keys("new", str(tmp_path / "keys.toml"), "--tenant", "acme") == 0
    assert stat.S_IMODE((tmp_path / "keys.toml").stat().st_mode) == 0o600


def test_quotas_without_keys_are_for_a_server_that_takes_jwts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys.toml"
    path.write_text("[tenants.acme]\nsessions = 7\n")
    assert keys("check", str(path)) == 0
    assert capsys.readouterr().out.splitlines() == [
        "no keys: for a server with --jwt-keys",
        "tenant acme: sessions 7",
    ]


@pytest.mark.parametrize("content", ["", "keys = [", "[[keys]]\nname = 'x'\n"])
def test_unusable_file_is_not_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(content)
    assert keys("new", str(path), "--tenant", "acme") == 1
    assert keys("check", str(path)) == 1
    assert str(path) in capsys.readouterr().err
    assert path.read_text() == content


def test_invalid_tenant_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert keys("new", str(tmp_path / "keys.toml"), "--tenant", "a/b") == 1
    assert "tenant" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
