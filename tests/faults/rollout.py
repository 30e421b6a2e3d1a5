"""`make rollout-test`: roll out one model version after another over three replicas while clients step.

Each replica has its own repository, and a request may go to any replica. The first replica gets the new version and
opens sessions on it before the others have it. The second gets it with a rescan, the third without one. Once every
replica's pointer names the new version, new sessions open on any replica, the old sessions end, and the old version is
removed. No step may fail for a client that retries, and every session gets the outputs of the version it began on.
"""

import argparse
import asyncio
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
import uvloop
from faults import report
from faults.client import Tally
from faults.crowd import Crowd
from faults.history import Verdict
from faults.replica import Replica, tiny_repository
from faults.wires import Wires
from oracle import Oracle
from served_models import models
from waiting import reached

import unroll


@dataclass
class Result:
    """rolled: How many versions were rolled out. tally: Replies to the sessions opened early, in the last round."""

    rolled: int = 0
    verdict: Verdict = field(default_factory=lambda: Verdict(0, Counter(), []))
    tally: Tally = field(default_factory=Tally)

    def add(self, verdict: Verdict) -> None:
        whole = self.verdict
        self.verdict = Verdict(
            whole.steps + verdict.steps, whole.counts + verdict.counts, whole.findings + verdict.findings
        )

    def __str__(self) -> str:
        return f"{self.rolled} versions rolled out, {self.verdict}"

    def waits(self) -> str:
        return f"a step took {self.tally.percentile(50):.1f} ms at p50, {self.tally.percentile(99):.0f} ms at p99"


class Site:
    """A replica and its repository."""

    def __init__(self, number: int, folder: Path, versions: Path, *options: str) -> None:
        self._versions = versions
        self._model = folder / f"repository-{number}" / "tiny"
        self._model.mkdir(parents=True)
        self.add("1")
        self.replica = Replica(f"replica-{number}", self._model.parent, folder, *options)
        self._wires = Wires("tiny", ("x", "y"))

    def add(self, version: str) -> None:
        shutil.copytree(self._versions / "tiny" / version, self._model / ".coming")
        (self._model / ".coming").rename(self._model / version)

    def point(self, version: str) -> None:
        (self._model / "serve").write_text(version)

    def remove(self, version: str) -> None:
        shutil.rmtree(self._model / version)

    async def serves(self, version: str, *, named: bool = True, status: int = 200) -> None:
        """Wait until a request for the version, or for none if not `named`, gets that version or that status."""

        async def does() -> bool:
            path = f"/v1/models/tiny:{version}" if named else "/v1/models/tiny"
            got, _, body = await self._wires.ask(self.replica.port, "GET", path)
            return got == status and (got != 200 or json.loads(body)["version"] == version)

        await reached(does, f"{status} for version {version} at {self.replica.name}")

    def close(self) -> None:
        self._wires.close()
        self.replica.kill()


def export_versions(folder: Path, count: int) -> Path:
    """Write a repository with versions 1 to `count` of the tiny LSTM, each with different weights."""
    repository = tiny_repository(folder)
    shutil.copytree(models.BUNDLES / "tiny" / "2", repository / "tiny" / "2")
    for version in range(3, count + 1):
        torch.manual_seed(version)
        module, example, _ = models.tiny()
        unroll.export(module, example, name="tiny", version=str(version), repository=repository)
    return repository


async def run(folder: Path, seed: int, *, versions: int = 2, sessions: int = 10, steps: int = 50) -> Result:
    """Roll out versions 2 to `versions`. sessions: Per crowd, of three. steps: Minimum per crowd and phase."""
    source = export_versions(folder / "versions", versions)
    options = ("--store", f"file://{folder}/store")
    sites = [Site(number, folder, source, *options) for number in range(3)]
    result = Result()
    try:
        await asyncio.gather(*(site.replica.start() for site in sites))
        for version in range(1, versions):
            old, new = str(version), str(version + 1)
            chance = random.Random(f"{seed} {version}")
            await _roll(sites, source, (old, new), _Crowds(sites, chance, sessions, steps, new), result)
            result.rolled += 1
    finally:
        for site in sites:
            site.close()
    return result


@dataclass
class _Crowds:
    """Makes the crowds of one round."""

    sites: Sequence[Site]
    chance: random.Random
    sessions: int
    steps: int
    round: str

    def crowd(self, name: str, ports: Sequence[int]) -> Crowd:
        prefix = f"{name}-{self.round}"
        return Crowd(ports, self.chance.getrandbits(32), self.sessions, pause=0.02, prefix=prefix)

    @property
    def ports(self) -> list[int]:
        return [site.replica.port for site in self.sites]


async def _roll(
    sites: Sequence[Site], source: Path, versions: tuple[str, str], crowds: _Crowds, result: Result
) -> None:
    """Roll out the second of `versions` in place of the first."""
    old, new = versions
    first, second, third = sites
    for site in sites:
        site.point(old)
    to_old, to_new = Oracle(source, "tiny", old), Oracle(source, "tiny", new)
    async with AsyncExitStack() as stack:
        before = await stack.enter_async_context(crowds.crowd("before", crowds.ports))
        async with before.stepping():
            await before.acknowledged(crowds.steps)
            first.add(new)
            first.point(new)
            first.replica.rescan()
            await first.serves(new, named=False)
            ports = [first.replica.port]
            early = await stack.enter_async_context(crowds.crowd("early", ports))
            ports += crowds.ports[1:]
            async with early.stepping():
                await early.hears("version_unavailable")
                second.add(new)
                second.replica.rescan()
                await second.serves(new)
                third.add(new)
                await third.serves(new)
                await early.acknowledged(crowds.steps)
                await before.acknowledged(crowds.steps)
        result.add(await before.verdict(to_old))
        for site in sites:
            site.point(new)
            site.replica.rescan()
            await site.serves(new, named=False)
        after = await stack.enter_async_context(crowds.crowd("after", crowds.ports))
        async with after.stepping(), early.stepping():
            await before.close_sessions()
            for site in sites:
                site.remove(old)
                site.replica.rescan()
                await site.serves(old, status=404)
            await after.acknowledged(crowds.steps)
            await early.acknowledged(crowds.steps)
        for crowd in (early, after):
            result.add(await crowd.verdict(to_new))
            await crowd.close_sessions()
        result.tally = early.tally


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m faults.rollout", description=__doc__)
    parser.add_argument("--versions", type=int, default=10)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--sessions", type=int, default=60, help="sessions per crowd; there are three crowds")
    arguments = parser.parse_args(argv)
    print(f"seed {arguments.seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="rollout-test-"))
    rolled = run(folder, arguments.seed, versions=arguments.versions, sessions=arguments.sessions, steps=1000)
    result = uvloop.run(rolled)
    return report.end(result, folder, good=result.rolled == arguments.versions - 1)


if __name__ == "__main__":
    sys.exit(main())
