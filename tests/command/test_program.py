"""The command line as a whole: help, wrong arguments, completion, and what they import."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from waiting import PATIENCE

from unroll import cli
from unroll.bundle.manifest import Dtype
from unroll.commands import keys, reference
from unroll.commands.reference import commands
from unroll.export.loading import input_specs
from unroll.service.access.keys import SCOPES

REFERENCE = Path(__file__).parents[2] / "docs" / "command-line.md"

#: Packages that are slow to import, or not installed everywhere.
HEAVY = ("aiohttp", "fastapi", "lmdb", "numpy", "onnx", "onnxruntime", "onnxscript", "redis")
HEAVY += ("pydantic", "safetensors", "starlette", "torch", "uvicorn", "websockets")
#: Packages that only help imports.
FOR_HELP = "rich"
#: Wrong options and values of every kind: unknown, missing, of the wrong type, not allowed, and conflicting.
WRONG = """
serve
serve --repository none --max-batch abc
serve --repository none --idle-timeout nan
serve --repository none --log-level loud
serve --repository none --config none
config show --port -1
export m:f --repository none --input x
export m:f --repository none --precision int4
export m:f
verify none --precision int8
stream m --rate inf
stream m --durability disk
rollout m --steps 0
rollout m --steps 3 --seed 3
rollout m --steps 3 --map {
bench m --clients 0
bench m --clients 1 --processes 2
bench m --seconds nan
doctor --device tpu
store check --store redis://host
sessions list
sessions list --store file:///none --limit x
sessions list --store file:///none --min-idle nan
keys new none --tenant a --scope all
steam
"""

#: Runs command lines in order; prints each status and the modules imported by then.
LINES = """
import contextlib, io, json, sys
from unroll import cli
found = []
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        status = cli.main(words)
    found.append([status, sorted(set(sys.argv[2:]) & set(sys.modules))])
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        del sys.modules[name]
print(json.dumps(found))
"""


def test_help_and_wrong_arguments_import_nothing_heavy() -> None:
    wrong = [line.split() for line in WRONG.split("\n") if line]
    wrong += [[*command, "--no-such-option"] for command in commands()]
    shown = [["--version"], ["--help"], *([*command, "--help"] for command in commands())]
    run = [sys.executable, "-c", LINES, json.dumps([*wrong, *shown]), *HEAVY, FOR_HELP]
    done = subprocess.run(run, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE, check=True)
    found = json.loads(done.stdout)
    for words, got in zip([*wrong, *shown], found, strict=True):
        assert got == ([0, [FOR_HELP] * ("--help" in words)] if words in shown else [2, []]), words


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["steam"], "unroll: no such command 'steam'; did you mean 'stream'"),
        (["sessions", "lst"], "unroll sessions: no such command 'lst'; did you mean 'list'?"),
        (["sessions"], "unroll sessions: missing command"),
        (["serve", "--max-bathc", "3"], "unroll serve: there is no option '--max-bathc'; did you mean --max-batch?"),
        (["stream", "co2", "--formats=csv"], "unroll stream: there is no option '--formats'; did you mean --format?"),
        (["sessions", "list"], "unroll sessions list: missing option '--store', or set UNROLL_STORE\n"),
        (["verify", "none"], "unroll verify: invalid value for 'BUNDLE': none is not a bundle: give the folder"),
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
    assert f"{first}\n".startswith(says)
    assert usage.startswith("usage: unroll ")
    assert "--help lists the " in usage


def test_missing_command_prints_help_and_fails(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main([]) == 2
    assert capsys.readouterr().out.startswith("usage: unroll [OPTIONS] COMMAND ...\n")


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("unroll 0.")


def test_no_name_is_cut_on_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    for command in commands():
        assert cli.main([*command, "--help"]) == 0
        assert "…" not in capsys.readouterr().out


def test_help_contains_no_python_terms(capsys: pytest.CaptureFixture[str]) -> None:
    for command in commands():
        assert cli.main([*command, "--help"]) == 0
        printed = capsys.readouterr().out
        assert max(map(len, printed.splitlines())) <= 100
        for word in ("tuple[", "dict[", "list[", "None", "<str>", "Path ", "\x1b"):
            assert word not in printed, (command, word)


def test_a_shell_completes_commands_and_options() -> None:
    for words, completed in (("unroll st", ["stream", "store"]), ("unroll serve --max-b", ["--max-batch"])):
        environment = {"_UNROLL_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        run = [sys.executable, "-m", "unroll"]
        done = subprocess.run(
            run,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert {f"plain,{one}" for one in completed} <= set(done.stdout.split()), done


def test_completion_is_installed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", "/usr/bin/bash")
    (tmp_path / ".bashrc").write_text("alias ll='ls -l'")
    line = 'eval "$(_UNROLL_COMPLETE=bash_source unroll)"\n'
    assert [cli.main([f"--{what}-completion"]) for what in ("show", "install", "install")] == [0, 0, 0]
    assert capsys.readouterr().out.startswith(line)
    assert (tmp_path / ".bashrc").read_text() == f"alias ll='ls -l'\n{line}"
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    assert cli.main(["--show-completion"]) == 1
    assert "$SHELL is none of bash, zsh, fish" in capsys.readouterr().err


def test_the_reference_is_the_help() -> None:
    """If this fails, run `python -m unroll.commands.reference docs/command-line.md`."""
    head, _, written = REFERENCE.read_text(encoding="utf-8").partition(reference.MARK)
    assert head
    assert written == reference.sections()


def test_argument_choices_match_the_lazily_imported_code() -> None:
    assert set(get_args(Dtype)) == set(input_specs._DTYPES)
    assert set(keys._SCOPES) == set(SCOPES)
