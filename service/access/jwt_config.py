"""What the server takes JWTs of, apart from what needs PyJWT."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class JwtConfig:
    """keys: the JWK set, a file's path or a URL. tenant, scope: the claims that have them."""

    keys: str
    issuer: str
    audience: str
    tenant: str
    scope: str

    @property
    def is_url(self) -> bool:
        return self.keys.startswith(("http://", "https://"))
