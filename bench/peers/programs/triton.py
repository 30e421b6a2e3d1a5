"""Triton's own server with its Python backend, as the pytriton wheel has them; needs no GPU.

Writes a model repository, starts tritonserver, and tidies up after it. Each model is there twice: under its name with
a sequence batcher, and as NAME-sequences, for whole ones, with dynamic batching.
"""

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

from bench.peers.programs.arguments import Arguments, arguments

#: Open at the same time. Beyond this number, Triton queues a new sequence silently.
_SEQUENCES = 1024
_BATCH = 64
#: `direct` reserves a place in the batch for each open sequence, and rejects further ones.
_PLACES = 256

_MODEL = """\
name: "{name}"
backend: "python"
max_batch_size: {batch}
input [ {{ name: "x" data_type: TYPE_FP32 dims: [ -1, -1 ] }} ]
output [ {{ name: "y" data_type: TYPE_FP32 dims: [ -1, -1 ] }} ]
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
parameters {{ key: "model" value: {{ string_value: "{path}" }} }}
"""
_DYNAMIC = "dynamic_batching { max_queue_delay_microseconds: 0 }\n"
_OLDEST = f"""\
sequence_batching {{
  max_sequence_idle_microseconds: 600000000
  oldest {{ max_candidate_sequences: {_SEQUENCES} max_queue_delay_microseconds: 0 }}
}}
"""
#: Only READY is requested: the requests' own flags have the rest, at a lower cost than tensors.
_DIRECT = """\
sequence_batching {
  max_sequence_idle_microseconds: 600000000
  direct { max_queue_delay_microseconds: 0 }
  control_input { name: "READY" control { kind: CONTROL_SEQUENCE_READY int32_false_true: [ 0, 1 ] } }
}
"""
_BATCHERS = {"oldest": (_OLDEST, _BATCH), "direct": (_DIRECT, _PLACES)}


def write_repository(repository: Path, given: Arguments) -> None:
    batcher, batch = _BATCHERS[given.strategy]
    for name, path in given.models.items():
        _write(repository / name, batcher, path, batch)
        _write(repository / f"{name}-sequences", _DYNAMIC, path, _BATCH)


def _write(folder: Path, batcher: str, path: Path, batch: int) -> None:
    (folder / "1").mkdir(parents=True)
    model = _MODEL.format(name=folder.name, path=path, batch=batch)
    (folder / "config.pbtxt").write_text(model + batcher)
    shutil.copy(Path(__file__).with_name("triton_model.py"), folder / "1" / "model.py")


def copy_backend(triton: Path, folder: Path) -> None:
    """Copy the Python backend, with the stub for this Python, which the wheel keeps elsewhere."""
    shutil.copytree(triton / "backends" / "python", folder / "python")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = folder / "python" / "triton_python_backend_stub"
    shutil.copy(triton / "python_backend_stubs" / version / stub.name, stub)
    stub.chmod(0o755)


def command(triton: Path, given: Arguments, repository: Path, backends: Path, regions: str) -> list[str]:
    """The command line of tritonserver; `regions` is the name prefix of its shared memory."""
    options = {
        "model-repository": repository,
        "backend-directory": backends,
        "backend-config": f"python,shm-region-prefix-name={regions}",
        "http-address": "127.0.0.1",
        "http-port": given.port,
        "allow-grpc": "false",
        "allow-metrics": "false",
        "log-info": "false",
        "exit-timeout-secs": 1,
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    return [str(triton / "bin" / "tritonserver"), *words, "--disable-auto-complete-config"]


def main(given: Arguments) -> int:
    site = Path(sysconfig.get_path("purelib"))
    triton = site / "pytriton" / "tritonserver"
    repository, backends = given.folder / "repository", given.folder / "backends"
    write_repository(repository, given)
    copy_backend(triton, backends)
    # The copied stub no longer finds the wheel's libraries in its own folder, and it needs libpython.
    os.environ["LD_LIBRARY_PATH"] = f"{sysconfig.get_config_var('LIBDIR')}:{site / 'nvidia_pytriton.libs'}"
    # The stub ignores PYTHONPATH and the virtual environment.
    os.environ["BENCH_SITE_PACKAGES"] = str(site)
    regions = f"bench-triton-{os.getpid()}-"
    signal.signal(signal.SIGTERM, lambda number, frame: None)  # sent to the group, and so to tritonserver itself
    try:
        return subprocess.run(command(triton, given, repository, backends, regions)).returncode
    finally:
        # With open sequences it does not end in order, and would leave its shared memory behind.
        for region in Path("/dev/shm").glob(f"{regions}*"):
            region.unlink(missing_ok=True)


if __name__ == "__main__":
    raise SystemExit(main(arguments()))
