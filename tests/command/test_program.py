"""The command line as a whole: help, wrong arguments, completion, and what they import."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import PATIENCE

from unroll import cli
from unroll.commands import reference
from unroll.commands.reference import commands

REFERENCE = Path(__file__).parents[2] / "docs" / "command-line.md"

#: Slow to import, or not installed everywhere.
HEAVY = ("aiohttp", "fastapi", "lmdb", "numpy", "onnx", "onnxruntime", "onnxscript", "redis")
HEAVY += ("safetensors", "starlette", "torch", "uvicorn", "websockets")

#: Runs each of several command lines, and prints their statuses and which modules have been imported after each.
LINES = """
import contextlib, io, json, sys
from unroll import cli
found = []
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        status = cli.main(words)
    found.append([status, sorted(set(sys.argv[2:]) & set(sys.modules))])
print(json.dumps(found))
"""


def test_help_and_wrong_arguments_wait_for_no_heavy_import() -> None:
    lines = [[*command, flag] for command in commands() for flag in ("--help", "--no-such-option")]
    lines += [["serve", "--repository", "none", "--max-batch", "abc"], ["config", "show", "--store", "no-url"]]
    run = [sys.executable, "-c", LINES, json.dumps(lines), *HEAVY]
    done = subprocess.run(run, capture_output=True, text=True, timeout=PATIENCE, check=True)
    for words, (status, heavy) in zip(lines, json.loads(done.stdout), strict=True):
        assert (status, heavy) == (0 if words[-1] == "--help" else 2, []), words


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["steam"], "unroll: no such command 'steam'; did you mean 'stream'"),
        (["sessions", "lst"], "unroll sessions: no such command 'lst'; did you mean 'list'?"),
        (["sessions"], "unroll sessions: missing command"),
        (["serve", "--max-bathc", "3"], "unroll serve: there is no option '--max-bathc'; did you mean '--max-batch'?"),
        (["stream", "co2", "--formats=csv"], "unroll stream: there is no option '--formats'; did you mean '--format'?"),
        (["stream"], "unroll stream: missing argument 'MODEL'"),
        (["stream", "co2", "--format", "xml"], "unroll stream: invalid value for '--format': 'xml' is none of csv"),
        (["stream", "co2", "--rate", "0"], "unroll stream: invalid value for '--rate': 0.0 is not a number above 0"),
        (["sessions", "list", "--limit", "x"], "unroll sessions list: invalid value for '--limit': "),
    ],
)
def test_a_wrong_argument_is_named_with_the_nearest_one(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    first, usage = printed.err.splitlines()
    assert first.startswith(says)
    assert usage.startswith("usage: unroll ")
    assert "--help lists the " in usage


def test_without_a_command_help_is_printed_with_the_status_of_wrong_arguments(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main([]) == 2
    assert capsys.readouterr().out.startswith("usage: unroll [OPTIONS] COMMAND ...\n")


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("unroll 0.")


def test_help_says_nothing_in_the_words_of_python(capsys: pytest.CaptureFixture[str]) -> None:
    for command in commands():
        assert cli.main([*command, "--help"]) == 0
        printed = capsys.readouterr().out
        assert max(map(len, printed.splitlines())) <= 100
        for word in ("tuple[", "dict[", "list[", "None", "<str>", "Path ", "\x1b"):
            assert word not in printed, (command, word)


def test_a_shell_completes_commands_and_options() -> None:
    for words, completed in (("unroll st", ["stream", "store"]), ("unroll serve --max-b", ["--max-batch"])):
        environment = {"_UNROLL_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        run = [sys.executable, "-m", "unroll"]
        done = subprocess.run(run, env=os.environ | environment, capture_output=True, text=True, timeout=PATIENCE)
        assert set(completed) <= set(done.stdout.split()), done


def test_the_reference_is_the_help() -> None:
    """If not: `python -m unroll.commands.reference docs/command-line.md` writes it anew."""
    head, _, written = REFERENCE.read_text(encoding="utf-8").partition(reference.MARK)
    assert head
    assert written == reference.sections()
