"""The key file, and how the gate reads headers."""

import asyncio
import hashlib
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path

import pytest
from waiting import PATIENCE

from unroll.service.access.gate import Gate
from unroll.service.access.keys import KeyRing, KeysRefused, new_key
from unroll.service.core.errors import Forbidden, HostRefused, OriginRefused, Unauthenticated
from unroll.service.core.session_ids import new_id, owned, shown, tenant_of

ENTRY = '[[keys]]\nname = "one"\ntenant = "acme"\nscopes = ["infer"]\nsha256 = "{}"\n'
DIGEST = hashlib.sha256(b"secret").hexdigest()
NOW = datetime.now(UTC)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    return path


def bearer(secret: str) -> dict[bytes, bytes]:
    return {b"authorization": b"Bearer " + secret.encode()}


def test_new_key_grants_the_scopes_of_its_entry(tmp_path: Path) -> None:
    secret, entry = new_key('the "edge"', "acme", ["infer", "metrics"])
    assert secret not in entry
    gate = Gate(written(tmp_path, entry))
    for headers in (
        bearer(secret),
        {b"x-api-key": secret.encode()},
        {b"authorization": b"bearer   " + secret.encode()},
    ):
        assert gate.admit(headers, "infer", changes=True) == "acme"
        assert gate.admit(headers, "metrics", changes=False) == "acme"
        with pytest.raises(Forbidden, match="sessions:admin"):
            gate.admit(headers, "sessions:admin", changes=False)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer(""),
        bearer("secret "),
        bearer("Secret"),
        bearer(DIGEST),
        {b"authorization": b"secret"},
        {b"authorization": b"Basic secret"},
        {b"x-api-key": b"Bearer secret"},
        {b"x-api-key": b""},
        {b"x-api-key": b"\xff" * 9000},
        {b"x-api-key": b"wrong", b"authorization": b"Bearer secret"},
    ],
    ids=str,
)
def test_invalid_key_is_refused(tmp_path: Path, headers: dict[bytes, bytes]) -> None:
    gate = Gate(written(tmp_path, ENTRY.format(DIGEST)))
    assert gate.admit({b"x-api-key": b"secret"}, "infer", changes=True) == "acme"
    if headers == bearer("secret "):
        assert gate.admit(headers, "infer", changes=True) == "acme"  # white space around a header's value is ignored
        return
    with pytest.raises(Unauthenticated) as refused:
        gate.admit(headers, "infer", changes=True)
    assert "secret" not in refused.value.message


async def test_a_head_is_admitted_once_until_the_keys_change_unless_its_key_expires(tmp_path: Path) -> None:
    path, later = written(tmp_path, ENTRY.format(DIGEST)), (NOW + timedelta(hours=1)).isoformat()
    gate = Gate(path)
    assert gate.admit_head(bearer("secret"), "infer").edition is gate.edition
    path.write_text(ENTRY.format(DIGEST) + f"expires = {later}\n")
    before = gate.edition
    await gate.reload()
    assert gate.edition is not before
    assert gate.admit_head(bearer("secret"), "infer").edition is None


def test_a_key_expires(tmp_path: Path) -> None:
    later = (NOW + timedelta(hours=1)).isoformat()
    before = (NOW - timedelta(seconds=1)).isoformat()
    assert Gate(written(tmp_path, ENTRY.format(DIGEST) + f"expires = {later}\n")).admit(
        bearer("secret"), "infer", changes=True
    )
    with pytest.raises(Unauthenticated, match="expired"):
        Gate(written(tmp_path, ENTRY.format(DIGEST) + f"expires = {before}\n")).admit(
            bearer("secret"), "infer", changes=True
        )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "keys: Field required"),
        ("keys = []", "at least 1 item"),
        ("keys = [", "keys.toml"),
        (ENTRY.format("abc"), "keys.0.sha256"),
        (ENTRY.format(DIGEST.upper()), "keys.0.sha256"),
        (ENTRY.format(DIGEST).replace("acme", "a/b"), "keys.0.tenant"),
        (ENTRY.format(DIGEST).replace("acme", ""), "keys.0.tenant"),
        (ENTRY.format(DIGEST).replace("infer", "everything"), "keys.0.scopes"),
        (ENTRY.format(DIGEST) + 'key = "secret"\n', "keys.0.key: Extra inputs"),
        (ENTRY.format(DIGEST) + "expires = 2027-01-01\n", "keys.0.expires"),
        (ENTRY.format(DIGEST) + "expires = 2027-01-01T00:00:00\n", "keys.0.expires"),
        (ENTRY.format(DIGEST) * 2, "two keys have the same sha256"),
        (ENTRY.format(DIGEST) + "[tenants.other]\nsessions = 3\n", "no key belongs to the tenant 'other'"),
        (ENTRY.format(DIGEST) + "[tenants.acme]\nsessions = 0\n", "tenants.acme.sessions"),
        ("keys = " + "[" * 100_000, "keys.toml"),
        ("keys = " + "9" * 5_000, "keys.toml"),
    ],
)
def test_a_file_that_is_refused_says_where(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(KeysRefused) as refused:
        KeyRing.read(written(tmp_path, text))
    assert reason in str(refused.value)
    assert "secret" not in str(refused.value)


def test_missing_key_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeysRefused, match="No such file"):
        KeyRing.read(tmp_path / "none.toml")


async def test_expiry_of_a_key_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told, other = asyncio.Event(), asyncio.Event()
    later = NOW + timedelta(hours=1)
    entries = ENTRY.format(DIGEST) + f"expires = {later}\n" + ENTRY.format(hashlib.sha256(b"other").hexdigest())
    gate = Gate(written(tmp_path, entries))
    keys = [gate.key_of(bearer(secret)) for secret in ("secret", "other")]
    monkeypatch.setattr("unroll.service.access.gate.datetime", _clock_at(later - timedelta(milliseconds=20)))
    with gate.watching(keys[0], told.set), gate.watching(keys[1], other.set):
        monkeypatch.setattr("unroll.service.access.keys.datetime", _clock_at(later))
        async with asyncio.timeout(PATIENCE):
            await told.wait()
        await gate.reload()
    assert not other.is_set()


def _clock_at(time: datetime) -> type[datetime]:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return time

    return Clock


async def test_keys_are_reloaded_and_a_bad_file_changes_nothing(tmp_path: Path) -> None:
    path = written(tmp_path, ENTRY.format(DIGEST))
    gate = Gate(path)
    assert gate.admit(bearer("secret"), "infer", changes=True) == "acme"
    path.write_text("keys = [")
    reloaded = asyncio.ensure_future(gate.reload())
    await asyncio.sleep(0)
    assert not reloaded.done(), "the file is read in a thread, because a long one takes time"
    await reloaded
    assert gate.admit(bearer("secret"), "infer", changes=True) == "acme"
    path.write_text(ENTRY.format(hashlib.sha256(b"other").hexdigest()))
    await gate.reload()
    with pytest.raises(Unauthenticated):
        gate.admit(bearer("secret"), "infer", changes=True)
    assert gate.admit(bearer("other"), "infer", changes=True) == "acme"


async def test_tickets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, ENTRY.format(DIGEST))
    gate, twin, stranger = Gate(path, None, (), b"s" * 32), Gate(path, None, (), b"s" * 32), Gate(path)
    key = gate.key_of(bearer("secret"))
    ticket, seconds = gate.ticket(key)
    assert seconds == 30
    assert gate.admit_ticket(ticket, "infer") == twin.admit_ticket(ticket, "infer") == key
    with pytest.raises(Forbidden):
        gate.admit_ticket(ticket, "metrics")
    with pytest.raises(Unauthenticated):
        stranger.admit_ticket(ticket, "infer")
    for damaged in ("", "?", "é", ticket[:-4], ticket + "AAAA", *(_other(ticket, i) for i in range(len(ticket) - 1))):
        with pytest.raises(Unauthenticated):
            gate.admit_ticket(damaged, "infer")
    real = datetime.now(UTC).timestamp()
    monkeypatch.setattr("time.time", lambda: real + 31)
    with pytest.raises(Unauthenticated, match="expired"):
        gate.admit_ticket(ticket, "infer")
    monkeypatch.undo()
    path.write_text(ENTRY.format(hashlib.sha256(b"other").hexdigest()))
    await gate.reload()
    with pytest.raises(Unauthenticated):
        gate.admit_ticket(ticket, "infer")


def _other(ticket: str, place: int) -> str:
    return ticket[:place] + ("B" if ticket[place] != "B" else "C") + ticket[place + 1 :]


@pytest.mark.parametrize(
    ("host", "is_known"),
    [
        ("localhost", True),
        ("LOCALHOST:8000", True),
        ("localhost.:80", True),
        ("127.0.0.1:8000", True),
        ("[::1]:8000", True),
        ("10.1.2.3", True),
        ("", True),
        ("evil.example", False),
        ("localhost.evil.example:8000", False),
        ("127.0.0.1.evil.example", False),
        ("0x7f.1", False),
        ("[::1].evil.example", False),
        ("[evil.example]", False),
        ("é", False),
    ],
)
def test_hosts(host: str, is_known: bool) -> None:
    gate = Gate(hosts=frozenset({"localhost"}))
    for _ in range(2):  # valid keys are cached
        if is_known:
            gate.check_host({b"host": host.encode()})
        else:
            with pytest.raises(HostRefused, match="--allowed-hosts"):
                gate.check_host({b"host": host.encode()})


@pytest.mark.parametrize(
    ("origin", "is_accepted"),
    [
        (None, True),
        (b"http://localhost:8000", True),
        (b"https://app.example", True),
        (b"https://evil.example", False),
        (b"http://localhost:8001", False),
        (b"null", False),
        (b"", False),
    ],
)
def test_pages(origin: bytes | None, is_accepted: bool) -> None:
    gate = Gate(origins=("https://app.example",))
    headers = {b"host": b"localhost:8000"} | ({} if origin is None else {b"origin": origin})
    assert gate.admit(headers, "infer", changes=False) == ""  # a browser does not show the answer to the page
    if is_accepted:
        assert gate.admit(headers, "infer", changes=True) == ""
    else:
        with pytest.raises(OriginRefused, match="--allowed-origins"):
            gate.admit(headers, "infer", changes=True)


def test_null_origin_does_not_match_an_empty_host() -> None:
    assert not Gate().accepts_page({b"host": b"", b"origin": b"null"})


def test_ids_of_tenants() -> None:
    ids = {owned(tenant, name) for tenant in ("", "a", "ab") for name in ("x", "b", "a", "\x1d"[1:] + "a\x1dx")}
    assert len(ids) == 12
    for tenant in ("", "acme"):
        own = owned(tenant, "x\x1dy")
        assert (shown(own), tenant_of(own)) == ("x\x1dy", tenant)
        assert new_id(tenant, "x").requested == owned(tenant, "x")
        random = new_id(tenant, None)
        assert (random.requested, tenant_of(random.id)) == (None, tenant)
        with pytest.raises(Exception, match="U\\+001D"):
            owned(tenant, "\x1dacme\x1dx")
