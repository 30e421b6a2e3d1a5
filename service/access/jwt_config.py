"""The settings for JWTs, in a module that does not need PyJWT."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class JwtConfig:
    """keys: path or URL of the JWK set. tenant, scope: names of the claims."""

    keys: str
    issuer: str
    audience: str
    tenant: str
    scope: str

    @property
    def is_url(self) -> bool:
        return self.keys.startswith(("http://", "https://"))
