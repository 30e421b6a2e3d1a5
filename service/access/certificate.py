"""TLS: the server's certificate, and the verification of client certificates."""

import ssl
from dataclasses import dataclass
from pathlib import Path

import structlog

_log = structlog.get_logger(__name__)

#: The limit of Python's `ssl`.
_MOST_PASSWORD_BYTES = 1024


class TlsRefused(ValueError):
    """The certificate, its key or the CA cannot be used; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files.

    Attributes:
        key: The certificate's private key; None if it is in the same file.
        password: File with the password of the key.
        client_ca: CAs that must have issued the clients' certificates.
    """

    cert: Path
    key: Path | None = None
    password: Path | None = None
    client_ca: Path | None = None

    def load(self) -> ssl.SSLContext:
        """Raises TlsRefused."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(self.cert, self.key, self._read_password)
        except OSError as error:  # ssl.SSLError is one
            files = f"--tls-cert {self.cert}" + ("" if self.key is None else f", --tls-key {self.key}")
            how = "; if the key is in a separate file, use --tls-key" if self.key is None else ""
            how += "" if self.password is None else "; if it is encrypted, check the password in --tls-password-file"
            raise TlsRefused(f"{files}: no certificate with its key in PEM ({_reason(error)}){how}") from error
        if self.client_ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            try:
                context.load_verify_locations(self.client_ca)
            except OSError as error:
                raise TlsRefused(f"--tls-client-ca {self.client_ca}: no CAs in PEM ({_reason(error)})") from error
        return context

    def _read_password(self) -> bytes:
        if self.password is None:
            raise TlsRefused("the key of --tls-cert is encrypted: add --tls-password-file")
        try:
            password = self.password.read_bytes().strip()
        except OSError as error:
            raise TlsRefused(f"--tls-password-file {self.password}: {_reason(error)}") from error
        if not 0 < len(password) <= _MOST_PASSWORD_BYTES:
            bounds = f"1 to {_MOST_PASSWORD_BYTES} bytes, not {len(password)}"
            raise TlsRefused(f"--tls-password-file {self.password}: a password has {bounds}")
        return password


class Tls:
    def __init__(self, files: TlsFiles) -> None:
        """Raises TlsRefused."""
        self._files = files
        self._context = files.load()
        self._stale = False

    def request_reload(self) -> None:
        """Reload the files for new connections. May be called from a signal handler."""
        self._stale = True

    def context(self) -> ssl.SSLContext:
        if self._stale:
            self._stale = False
            try:
                self._context = self._files.load()
                _log.info("certificate read again", cert=str(self._files.cert))
            except TlsRefused as error:
                _log.error("certificate not read again", reason=str(error))
        return self._context


def _reason(error: OSError) -> str:
    return str(error.strerror or error)
