"""`make fuzz`: run Atheris on every decoder for a given time; any error but a refusal stops it and prints the bytes.

python -m decoder_fuzz [--seconds 60] [DECODER ...]
"""

import argparse
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m decoder_fuzz")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--one", action="store_true", help="fuzz in this process, which Atheris terminates")
    parser.add_argument("decoders", nargs="*")
    options = parser.parse_args()
    if options.one:
        _fuzz(options.decoders[0], options.seconds)
    from decoder_fuzz.decoders import DECODERS

    failed = []
    for name in options.decoders or DECODERS:
        command = [sys.executable, "-m", "decoder_fuzz", "--one", "--seconds", str(options.seconds), name]
        ran = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        last = [line for line in ran.stderr.splitlines() if line.startswith(("Done", "#"))][-1:]
        print(f"{name}: {last[0] if last and not ran.returncode else ran.stderr[-4000:]}", flush=True)
        failed += [name] if ran.returncode else []
    return int(bool(failed))


def _fuzz(name: str, seconds: int) -> None:
    import atheris

    with atheris.instrument_imports(include=["unroll"]):
        from decoder_fuzz.decoders import DECODERS
    decoder = DECODERS[name]

    @atheris.instrument_func
    def one(content: bytes) -> None:
        with suppress(*decoder.refusals):
            decoder.decode(content)

    with tempfile.TemporaryDirectory() as folder:
        for i, seed in enumerate(decoder.seeds.values()):
            (Path(folder) / str(i)).write_bytes(seed)
        found = f"-artifact_prefix={tempfile.gettempdir()}/decoder-fuzz-"
        limits = [
            found,
            f"-max_total_time={seconds}",
            "-max_len=20000",
            "-rss_limit_mb=2048",
            "-timeout=10",
            "-verbosity=1",
        ]
        atheris.Setup([sys.argv[0], folder, *limits], one)
        atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
