"""`unroll doctor`."""

import json
import re
from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from unroll.commands.options import Json


def _device(word: str) -> str:
    if not re.fullmatch(r"cpu|auto|cuda:\d+(,cuda:\d+)*", word):
        raise typer.BadParameter("use cpu, auto, or GPUs as in cuda:0 or cuda:0,cuda:1")
    return word


@dataclass(frozen=True)
class Doctor:
    """Check this machine and its installation, and suggest fixes.

    The exit status is 0 if the requested device and store work.
    """

    device: Annotated[
        str,
        typer.Option(
            metavar="DEVICE",
            envvar="UNROLL_DEVICE",
            callback=_device,
            help="device that must work: cpu, cuda:N, several as in cuda:0,cuda:1, or auto",
        ),
    ] = "auto"
    store: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            envvar="UNROLL_STORE",
            help="store that must work, as for `unroll serve`: what it is, what it survives, and how long a commit "
            "takes",
        ),
    ] = None
    json: Json = False

    def run(self) -> int:
        from unroll.service.doctor.report import lines, report

        findings, facts = report(self.device, self.store)
        works = not any(finding.fault for finding in findings)
        if self.json:
            found = {"works": works, "device": self.device, "findings": list(map(asdict, findings))}
            print(json.dumps(found | {"facts": facts}, indent=2))
        else:
            print(*lines(findings), sep="\n")
        return int(not works)
