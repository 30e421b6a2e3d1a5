"""`unroll verify`."""

import json
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from unroll.commands.options import Bundle, Failed, Json, option, positive


@dataclass(frozen=True)
class Verify:
    """Run a bundle on a device of this machine, and compare it with PyTorch's outputs and with itself.

    PyTorch is not needed: the bundle holds its outputs in float64.
    """

    bundle: Bundle
    device: Annotated[
        str,
        option(
            "--device",
            "DEVICE",
            "cpu, cuda:N, several such as cuda:0,cuda:1, or auto: a GPU if there is one",
            envvar="UNROLL_DEVICE",
        ),
    ] = "cpu"
    precision: Annotated[
        Literal["float32", "tf32", "float16"],
        option("--precision", "float32|tf32|float16", "precision of matrix products on a GPU"),
    ] = "float32"
    seed: Annotated[int, option("--seed", "N", "seed of the random chunks and batches")] = 0
    bundle_memory: Annotated[
        int, option("--bundle-memory", "BYTES", "memory limit for the trial of the bundle", positive)
    ] = 4 * 2**30
    bundle_time: Annotated[
        float, option("--bundle-time", "SECONDS", "processor time limit for the trial of the bundle", positive)
    ] = 30.0
    allow_operators: Annotated[
        list[str] | None,
        option("--allow-operators", "OPERATOR", "allow an operator in the graph; may be repeated"),
    ] = None
    json: Json = False

    def run(self) -> int:
        from unroll.service import verify
        from unroll.service.models.trial import ANY
        from unroll.service.models.trial_process import TrialLimits

        # The answers are compared below, on each device.
        limits = TrialLimits(self.bundle_memory, self.bundle_time, tuple(self.allow_operators or ()), slack=ANY)
        try:
            found, results = verify.report(self.bundle, self.device, self.precision, self.seed, limits)
        except verify.CannotVerify as error:
            raise Failed(str(error)) from error
        holds = all(check.holds for checks in results.values() for check in checks)
        if self.json:
            devices = {device: [asdict(check) for check in checks] for device, checks in results.items()}
            print(json.dumps({"bundle": str(found.path), "holds": holds, "devices": devices}, indent=2))
            return int(not holds)
        print(f"{found.manifest.name} version {found.manifest.version}: {found.path}")
        for device, checks in results.items():
            print("", *verify.lines(device, checks), sep="\n")
        return int(not holds)
