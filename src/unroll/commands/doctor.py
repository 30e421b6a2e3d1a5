"""`unroll doctor`."""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from unroll.commands.options import Json, option


def _device(word: str) -> None:
    if not re.fullmatch(r"cpu|auto|cuda:\d+(,cuda:\d+)*", word):
        raise ValueError("use cpu, auto, or GPUs such as cuda:0 or cuda:0,cuda:1")


@dataclass(frozen=True)
class Doctor:
    """Check this machine and its installation, and suggest fixes.

    The exit status is 0 if the requested device, store and files work.
    """

    device: Annotated[
        str,
        option(
            "--device",
            "DEVICE",
            "device that must work: cpu, cuda:N, several such as cuda:0,cuda:1, or auto",
            _device,
            envvar="UNROLL_DEVICE",
        ),
    ] = "auto"
    store: Annotated[
        str | None,
        option(
            "--store",
            "URL",
            "store that must work, as for `unroll serve`; also shows what it survives, and the time of a commit",
            envvar="UNROLL_STORE",
        ),
    ] = None
    tls_cert: Annotated[
        Path | None,
        option("--tls-cert", "FILE", "certificate that must work, as for `unroll serve`", envvar="UNROLL_TLS_CERT"),
    ] = None
    tls_key: Annotated[Path | None, option("--tls-key", "FILE", "its key", envvar="UNROLL_TLS_KEY")] = None
    tls_password_file: Annotated[
        Path | None,
        option("--tls-password-file", "FILE", "the key's password", envvar="UNROLL_TLS_PASSWORD_FILE"),
    ] = None
    keys: Annotated[Path | None, option("--keys", "FILE", "file of API keys that must work", envvar="UNROLL_KEYS")] = (
        None
    )
    json: Json = False

    def run(self) -> int:
        from unroll.service.doctor.report import lines, report

        findings, facts = report(self)
        works = not any(finding.fault for finding in findings)
        if self.json:
            found = {"works": works, "device": self.device, "findings": list(map(asdict, findings))}
            print(json.dumps(found | {"facts": facts}, indent=2))
        else:
            print(*lines(findings), sep="\n")
        return int(not works)
