"""`python -m unroll.service.doctor.trial [DEVICE]`: the part of `unroll doctor` that may crash; `ask.py` runs it.

Without a device it describes onnxruntime. With one it loads a small model there, as the server does. The result is a
JSON object in the last line on stdout; libraries may print lines before it.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from unroll.service.core.clock import MonotonicClock
from unroll.service.engine.runner import DeviceUnavailable, installed, resolve_devices
from unroll.service.models.loading import ModelLoader, ModelOptions, ModelRefused
from unroll.service.scheduler.limits import SchedulerLimits, SessionLimits
from unroll.service.telemetry import logs

#: A small LSTM; `make bundles` writes it.
_BUNDLE = Path(__file__).parent / "tiny" / "1"


def main(argv: list[str]) -> int:
    logs.configure("error")
    print(json.dumps(session(*argv) if argv else runtime()))
    return 0


def runtime() -> dict[str, Any]:
    """Return the fields of `facts.Runtime`."""
    auto, why = resolve_devices("auto")
    return installed() | {"auto": auto, "auto_why": why}


def session(device: str) -> dict[str, str | None]:
    """Return `problem`: why the server cannot load a model on `cpu` or `cuda:N`, or None."""
    options = ModelOptions(sessions=SessionLimits(capacity=64), scheduler=SchedulerLimits(max_batch=16))
    try:
        resolve_devices(device)
        with ThreadPoolExecutor(1) as executor:
            ModelLoader(options, MonotonicClock(), [(device, executor)]).load(_BUNDLE)
    except (DeviceUnavailable, ModelRefused) as error:
        return {"problem": " ".join(str(error).split())}
    return {"problem": None}


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
