"""Bundles can be signed, and a server can require a trusted signature."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from served_models import models
from serving import Running

from unroll import bundle, cli
from unroll.bundle import BundleError
from unroll.bundle.signature import KeyUnusable, Signer, TrustedKeys
from unroll.service.settings import Settings

pytest.importorskip("cryptography", reason="the package cryptography is not installed")

GOOD = models.BUNDLES / "gru" / "1"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two key pairs; the folder `trusted` contains only the first public key."""
    path = tmp_path_factory.mktemp("keys")
    (path / "trusted").mkdir()
    for name in ("ours", "theirs"):
        assert cli.main(["keys", "pair", str(path / f"{name}.pem")]) == 0
    shutil.copy(path / "ours.pub.pem", path / "trusted")
    return path


def signed(folder: Path, name: str, key: Path | None) -> Path:
    found = bundle.read(GOOD)
    manifest = bundle.Manifest.from_json(found.manifest.to_json().replace(b'"gru"', f'"{name}"'.encode()))
    sign = None if key is None else Signer.read(key).sign
    return bundle.write(folder, manifest, found.model, found.golden, sign=sign)


def edited(path: Path, **members: object) -> None:
    file = path / "signature.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | members))


def swapped(path: Path) -> None:
    shutil.copy(path.parents[1] / "ours" / "1" / "signature.json", path)


#: By model: the signing key, a later change, and the code of the refusal, if any.
CASES: dict[str, tuple[str | None, Callable[[Path], object], str]] = {
    "ours": ("ours", lambda path: None, ""),
    "theirs": ("theirs", lambda path: None, "bundle_signature"),
    "unsigned": (None, lambda path: None, "bundle_unsigned"),
    "of-another": ("ours", swapped, "bundle_signature"),
    "not-json": ("ours", lambda path: (path / "signature.json").write_bytes(b"\xff{"), "bundle_signature"),
    "nested": ("ours", lambda path: (path / "signature.json").write_text("[" * 4000), "bundle_signature"),
    "too-long": ("ours", lambda path: (path / "signature.json").write_text(" " * 5000), "bundle_too_large"),
    "a-number": ("ours", lambda path: edited(path, signature=5), "bundle_signature"),
    "short": ("ours", lambda path: edited(path, signature="00"), "bundle_signature"),
    "no-key": ("ours", lambda path: edited(path, public_key="00"), "bundle_signature"),
    "other-algorithm": ("ours", lambda path: edited(path, algorithm="none"), "bundle_signature"),
    "key-swapped": ("theirs", lambda path: edited(path, public_key=next(iter(ours(path).keys))), "bundle_signature"),
}


def ours(path: Path) -> TrustedKeys:
    return TrustedKeys.read(path.parents[1] / ".trusted")


@pytest.fixture(scope="module")
def running(keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    shelf = tmp_path_factory.mktemp("signed")
    shutil.copytree(keys / "trusted", shelf / ".trusted")
    for name, (signer, change, _) in CASES.items():
        change(signed(shelf, name, None if signer is None else keys / f"{signer}.pem"))
    running = Running(Settings(repository=shelf, trusted_keys=keys / "trusted"))
    yield running
    running.stop()


@pytest.mark.parametrize("name", CASES)
def test_only_bundles_that_a_trusted_key_has_signed_are_served(running: Running, name: str) -> None:
    code = CASES[name][2]
    found = running.server.models.refused.get((name, "1"), "")
    assert found.startswith(f"{code}: " if code else ""), found
    assert (name in running.server.models.names()) == (not code)


def test_signature_is_ignored_unless_required(keys: Path, tmp_path: Path) -> None:
    path = signed(tmp_path, "gru", keys / "theirs.pem")
    assert bundle.read(path).manifest.name == "gru"


def test_inspect_names_the_signer(keys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = signed(tmp_path, "gru", keys / "ours.pem")
    [key] = TrustedKeys.read(keys / "ours.pub.pem").keys
    assert cli.main(["inspect", str(path)]) == 0
    assert f"signed by  {key}" in capsys.readouterr().out
    assert cli.main(["inspect", str(GOOD)]) == 0
    assert "signed by  nobody" in capsys.readouterr().out
    edited(path, signature="00" * 64)
    assert cli.main(["inspect", str(path)]) == 1
    assert "bundle_signature" in capsys.readouterr().err


def test_new_key_pair_overwrites_no_file_and_is_private(keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (keys / "ours.pem").read_bytes()
    assert (keys / "ours.pem").stat().st_mode & 0o777 == 0o600
    assert cli.main(["keys", "pair", str(keys / "ours.pem")]) == 1
    assert "exists" in capsys.readouterr().err
    assert (keys / "ours.pem").read_bytes() == before


@pytest.mark.parametrize("content", ["", "-----BEGIN PUBLIC KEY-----\nx\n-----END PUBLIC KEY-----\n", "\0"])
def test_invalid_key_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "key.pem").write_text(content)
    with pytest.raises(KeyUnusable):
        TrustedKeys.read(tmp_path / "key.pem")
    with pytest.raises(KeyUnusable):
        Signer.read(tmp_path / "key.pem")


def test_a_folder_without_keys_is_refused_at_the_start(tmp_path: Path) -> None:
    settings = Settings(repository=models.BUNDLES, trusted_keys=tmp_path)
    with pytest.raises(KeyUnusable, match=r"has no public key: add files \*\.pem from"):
        settings.model_options()


def test_private_key_is_not_a_trusted_key(keys: Path) -> None:
    with pytest.raises(KeyUnusable):
        TrustedKeys.read(keys / "ours.pem")
    with pytest.raises(BundleError, match="bundle_unsigned"):
        TrustedKeys.read(keys / "trusted").check(bundle.read_content(GOOD))
