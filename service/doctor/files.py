"""Examines a server's certificate and keys: whether it would start with them, and when they expire.

Like `store.py`, this needs the packages of the server.
"""

import ssl
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from unroll.service.access.certificate import TlsFiles, TlsRefused
from unroll.service.access.keys import KeyRing, KeysRefused
from unroll.service.doctor.findings import Finding, Status

#: How long before the expiry of a certificate or key there is a note.
_SOON = timedelta(days=14)
#: More than the number of messages in a handshake.
_MOST_TURNS = 10


def examine(tls: TlsFiles | None, keys: Path | None) -> Iterator[Finding]:
    """Judge the certificate and the keys file, if given."""
    if tls is not None:
        yield _certificate(tls)
    if keys is not None:
        yield _keys(keys)


def _certificate(files: TlsFiles) -> Finding:
    mend = "provide a valid certificate; a running server reads it again at SIGHUP"
    try:
        found = _shake_hands(files)
    except TlsRefused as error:
        return Finding("certificate", Status.BROKEN, str(error), "see `unroll serve --help`, --tls-cert")
    except ssl.SSLCertVerificationError as error:
        return Finding("certificate", Status.BROKEN, f"{files.cert}: {error.verify_message}", mend)
    end = datetime.fromtimestamp(ssl.cert_time_to_seconds(found["notAfter"]), UTC)
    names = ", ".join(name for _, name in found.get("subjectAltName", ())) or "no name"
    status, mend_soon = (Status.NOTE, mend) if end < datetime.now(UTC) + _SOON else (Status.OK, None)
    return Finding("certificate", status, f"for {names}; until {end:%Y-%m-%d}", mend_soon)


def _shake_hands(files: TlsFiles) -> dict[str, Any]:
    """The certificate, as seen by a client that trusts it. Raises TlsRefused, SSLCertVerificationError."""
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname = False
    trusting.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = files.load().wrap_bio(to_server, to_client, server_side=True)
    trusting.load_verify_locations(files.cert)
    client = trusting.wrap_bio(to_client, to_server)
    for _ in range(_MOST_TURNS):
        for side in (client, server):
            with suppress(ssl.SSLWantReadError):
                side.do_handshake()
    return client.getpeercert() or {}


def _keys(path: Path) -> Finding:
    try:
        keys = KeyRing.read(path).keys.values()
    except KeysRefused as error:
        return Finding("keys", Status.BROKEN, str(error), "see docs/security.md, Keys")
    soon = datetime.now(UTC) + _SOON
    ending = sorted(key.name for key in keys if key.expires is not None and key.expires < soon)
    says = f"{len(keys)} of {len({key.tenant for key in keys})} tenants"
    if ending:
        return Finding(
            "keys", Status.NOTE, f"{says}; expired, or soon: {', '.join(ending)}", "`unroll keys new` makes a key"
        )
    return Finding("keys", Status.OK, says)
