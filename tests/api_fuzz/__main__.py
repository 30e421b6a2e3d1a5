"""`make api-fuzz`: run Schemathesis, with every check but one, on a server of small models with keys.

    python -m api_fuzz --schemathesis PROGRAM [--seconds 60] [--seed N]

The omitted check is that every request allowed by the document is accepted, as a model's manifest restricts it
further. The exit status is 1 if any check fails or the server does not shut down cleanly.
"""

import argparse
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from served_models import models

from unroll.service.access.keys import SCOPES, new_key

_CONFIG = """
[parameters]
model = "gru"
version = "1"
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m api_fuzz")
    parser.add_argument("--schemathesis", required=True, help="path of the Schemathesis program")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        return _run(Path(name), options)


def _run(folder: Path, options: argparse.Namespace) -> int:
    (folder / "repository").mkdir()
    repository = models.link(folder / "repository", "gru", "lstm")
    key, entry = new_key("fuzz", "acme", SCOPES)
    (folder / "keys.toml").write_text(entry)
    (folder / "schemathesis.toml").write_text(_CONFIG)
    (folder / "snapshot-keys").write_text("of nobody but this server\n")
    flags = [
        *("--repository", str(repository), "--device", "cpu", "--port", "0", "--admin"),
        *("--keys", str(folder / "keys.toml"), "--snapshot-keys", f"@{folder / 'snapshot-keys'}"),
        *("--store", f"file://{folder / 'store'}", "--log-requests", "none"),
    ]
    with subprocess.Popen(
        [sys.executable, "-m", "unroll", "serve", *flags], stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            failed = _fuzz(_address(server), key, folder, options)
        finally:
            server.send_signal(signal.SIGTERM)
            server.communicate()
    return int(failed or server.returncode != 0)


def _address(server: subprocess.Popen[str]) -> str:
    assert server.stderr is not None
    for line in server.stderr:
        if "running on http" in line:
            return line.partition("running on ")[2].split()[0]
    raise SystemExit("the server did not start")


def _fuzz(url: str, key: str, folder: Path, options: argparse.Namespace) -> bool:
    command = [
        *(options.schemathesis, "--config-file", str(folder / "schemathesis.toml"), "run", f"{url}/openapi.json"),
        *("-H", f"X-API-Key: {key}", "--max-time", str(options.seconds), "--continue-on-failure"),
        *("--exclude-checks", "positive_data_acceptance", "--exclude-path", "/v1/admin/drain"),
        *("--exclude-path", "/v2/repository/models/{model}/unload"),
        *(() if options.seed is None else ("--seed", str(options.seed))),
    ]
    return subprocess.run(command, cwd=folder).returncode != 0


if __name__ == "__main__":
    sys.exit(main())
