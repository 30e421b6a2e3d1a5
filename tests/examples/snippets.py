"""The fenced blocks of the pages, and a runner that pastes them in order."""

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from waiting import PATIENCE

from unroll import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
#: The languages that can run. Blocks in any other language show a message, an output or a table.
PROGRAMS = {"bash", "python", "js"}

#: A block, with an optional comment: why it is not run, which test runs it, or that it ends with an error.
_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>not run|run by|fails)(?:: (?P<note>[^\n]+))? -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
#: Several pages export this model. The export takes seconds, so it runs once.
MODULE = "my_model.py"
EXPORT = (
    "unroll export my_model:Classifier --weights classifier.pt --input x:float32:64 "
    "--name classifier --repository bundles"
)
_FILE = re.compile(r"# (\w+\.py)\n")
#: Commands that run in this process, because it has imported torch already; the import takes seconds.
_IN_PROCESS = re.compile(r"unroll (export|inspect|verify) ")
_ADDRESS = "127.0.0.1:8000"


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block; `mark` and `note` come from the comment before it."""

    language: str
    text: str
    mark: str | None
    note: str | None

    @property
    def is_program(self) -> bool:
        return self.language in PROGRAMS

    @property
    def runs(self) -> bool:
        return self.is_program and self.mark in (None, "fails")


def blocks(page: Path) -> list[Block]:
    return [
        Block(found["language"], found["text"], found["mark"], found["note"])
        for found in _BLOCK.finditer(page.read_text())
    ]


def train(folder: Path) -> None:
    """Create `classifier.pt` in place of a training, the bundle that EXPORT writes, and its output."""
    [module] = [block.text for block in blocks(PAGES[0]) if block.text.startswith(f"# {MODULE}")]
    (folder / MODULE).write_text(module)
    scope: dict[str, Any] = {}
    exec(module, scope)
    torch.save(scope["Classifier"]().state_dict(), folder / "classifier.pt")
    with contextlib.chdir(folder):
        status, printed = command(EXPORT)
    assert status == 0, printed
    (folder / "printed.txt").write_text(printed)


def command(line: str) -> tuple[int, str]:
    """Run an `unroll` command in this process; return exit status and output."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(printed):
        return cli.main(shlex.split(line, comments=True)[1:]), printed.getvalue()


def rounded(text: str) -> str:
    """Normalize whitespace, and round numbers to two places because the last digits depend on the CPU."""
    return re.sub(r"\d+\.\d{2,}", lambda number: f"{float(number[0]):.2f}", " ".join(text.split()))


class Reader:
    """Pastes the blocks of one page in a separate folder and Python process."""

    def __init__(
        self, folder: Path, trained: Path, environment: dict[str, str], serve: Callable, server: Callable[[], str]
    ) -> None:
        self.folder = folder
        self._trained = trained
        self._environment = environment
        self._serve = serve
        self._shared_server = server
        self._url: str | None = None
        self._names: dict[str, Any] = {"__name__": "__main__"}
        self._servers = contextlib.ExitStack()

    def close(self) -> None:
        self._servers.close()
        for name, module in [*sys.modules.items()]:
            if str(getattr(module, "__file__", None)).startswith(str(self.folder)):
                del sys.modules[name]

    def paste(self, block: Block) -> str:
        """Run the block and return its output."""
        if block.language == "python":
            return self._python(block.text)
        if block.language == "js":
            return self._javascript(block.text)
        text = re.sub(r"\\\n\s*", "", block.text)
        served = re.match(r"(?P<before>.*?)^unroll serve (?P<flags>[^\n]*)\n\Z", text, re.MULTILINE | re.DOTALL)
        if served and block.mark != "fails":
            printed = self._commands(served["before"], fails=False)
            self._start(shlex.split(served["flags"], comments=True))
            return printed
        return self._commands(text, fails=block.mark == "fails")

    def _at_server(self, text: str) -> str:
        if _ADDRESS not in text and "unroll stream" not in text and "unroll demo" not in text:
            return text
        url = self._url or self._shared_server()
        text = re.sub(r"unroll (stream|demo)\b", rf"unroll \1 --url {url}", text)
        return text.replace(_ADDRESS, urlsplit(url).netloc)

    def _start(self, flags: list[str]) -> None:
        """Start the server that the page starts, in place of the previous one."""
        repository = self.folder / flags[flags.index("--repository") + 1]
        at = flags.index("--repository")
        self._servers.close()
        self._url = self._servers.enter_context(self._serve(repository, *flags[:at], *flags[at + 2 :]))

    def _python(self, text: str) -> str:
        if named := _FILE.match(text):
            (self.folder / named[1]).write_text(text)
            if named[1] == MODULE:
                shutil.copy(self._trained / "classifier.pt", self.folder)
            return ""
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(self._at_server(text), "<page>", "exec"), self._names)
        return printed.getvalue()

    def _javascript(self, text: str) -> str:
        if shutil.which("node") is None:
            pytest.skip("node is not installed")
        shutil.copy(ROOT / "client" / "unroll.mjs", self.folder)
        (self.folder / "page.mjs").write_text(self._at_server(text) + "\nprocess.exit();\n")
        return self._run(["node", "--experimental-websocket", "page.mjs"], fails=False)

    def _commands(self, text: str, *, fails: bool) -> str:
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        if lines and all(_IN_PROCESS.match(line) for line in lines):
            return "".join(self._in_process(line, fails=fails) for line in lines)
        if re.search(r"^\s*curl ", text, re.MULTILINE) and shutil.which("curl") is None:
            pytest.skip("curl is not installed")
        return self._run(["bash", "-e", "-c", self._at_server(text)], fails=fails) if lines else ""

    def _in_process(self, line: str, *, fails: bool) -> str:
        if line == EXPORT and not fails:
            shutil.copytree(self._trained / "bundles", self.folder / "bundles")
            return (self._trained / "printed.txt").read_text()
        status, printed = command(line)
        assert bool(status) == fails, f"{line}\nended with {status}:\n{printed}"
        return printed

    def _run(self, command: list[str], *, fails: bool) -> str:
        ran = subprocess.run(
            command,
            cwd=self.folder,
            env=self._environment | {"PWD": os.fspath(self.folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
        )
        assert bool(ran.returncode) == fails, f"{command[-1]}\nended with {ran.returncode}:\n{ran.stdout}"
        return ran.stdout
