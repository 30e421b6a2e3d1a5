"""The client conformance suite: our clients pass, the examples pass what they support, wrong clients are caught."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from waiting import PATIENCE
from wrong_drivers import WRONGS

from unroll.client.conformance import __main__ as suite
from unroll.client.conformance.play import Result
from unroll.client.conformance.script import DEEDS, HTTP_KINDS, STREAM_KINDS, Conversation, read_conversations

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "client-conformance.md"
CONVERSATIONS = {each.name: each for each in read_conversations(sorted(suite.FOLDER.glob("*.yaml")))}
PYTHON = (sys.executable, "-m", "unroll.client.conformance.python_driver")

#: The conversations that the example clients support: they have one session and raise every refusal.
OF_EXAMPLES = (
    *("stream-steps-and-chunks", "stream-what-is-of-a-later-version", "stream-reply-not-kept", "stream-outputs-twice"),
    *("stream-frame-lost", "stream-outputs-lost", "stream-outputs-lost-thrice", "stream-outputs-cut-in-half"),
    *("stream-resume-lost", "stream-closing", "stream-restarted-without-its-sessions", "stream-expired", "stream-gap"),
    *("stream-payload-mismatch", "stream-wrong-values", "stream-message-refused", "stream-message-too-large"),
)

#: Wrong clients that resemble another one, or that are slow because they wait.
LONG = {"never_stops", "rolls_out_the_rest", "yields_at_the_end"}

#: Per wrong client: conversations that catch it, and conversations that it passes.
CAUGHT = {
    "never_retries": (["rest-retry-after", "stream-outputs-lost", "stream-closing"], ["rest-steps-and-chunks"]),
    "retries_without_position": (["rest-answer-lost", "rest-steps-and-chunks"], ["stream-outputs-lost"]),
    "applies_twice": (["rest-answers-lost-thrice", "rest-answer-cut-in-half"], ["rest-request-lost", "rest-gap"]),
    "ignores_retry_after": (["rest-gives-up", "stream-gives-up"], ["rest-several-refusals-for-now"]),
    "drops_a_chunk_at_reconnect": (["stream-frame-lost", "stream-outputs-of-some-lost"], ["rest-answer-lost"]),
    "takes_any_outputs": (["stream-outputs-twice"], ["stream-outputs-lost"]),
    "begins_anew": (["rest-restarted-without-its-sessions", "rest-expired"], ["rest-resume"]),
    "forgets_where_a_rollout_ended": (["rest-rollout", "stream-rollout"], ["rest-rollout-map-invalid"]),
    "yields_steps_again": (["rest-rollout-cut-off", "stream-rollout-cut-off"], ["rest-rollout"]),
    "takes_a_cut_for_the_end": (["rest-rollout-cut-off", "rest-rollout-end-lost"], ["rest-rollout"]),
    "rolls_out_the_rest": (["stream-rollout-cut-off"], ["stream-rollout-request-lost"]),
    "never_stops": (["rest-rollout-ended-early", "stream-rollout-ended-early"], ["rest-rollout"]),
    "yields_at_the_end": (["rest-rollout-and-steps-between"], ["rest-rollout"]),
    "takes_rolled_steps_for_outputs": (["stream-rollout-and-steps-between"], ["rest-rollout-and-steps-between"]),
    "takes_late_steps": (["stream-rollout-ended-early"], ["stream-rollout-cut-off"]),
}


async def played(client: Sequence[object], names: Sequence[str]) -> dict[str, Result]:
    chosen = [CONVERSATIONS[name] for name in names]
    command = shlex.join(map(str, client))
    results = await suite.run(command, chosen, limit=PATIENCE, jobs=1 + len(chosen) // 50, tell=lambda result: None)
    return {result.name: result for result in results}


def not_passed(results: dict[str, Result]) -> dict[str, list[str]]:
    return {name: [result.status, *result.faults] for name, result in results.items() if result.status != "passed"}


@pytest.mark.parametrize(
    "options",
    [pytest.param((), id="sync"), pytest.param(("--asynchronous",), id="async", marks=pytest.mark.long)],
)
async def test_python_clients_pass_every_conversation(options: Sequence[str]) -> None:
    assert not_passed(await played([*PYTHON, *options], list(CONVERSATIONS))) == {}


async def test_async_client_does_not_advance_before_its_caller_receives_the_step() -> None:
    assert not_passed(await played([*PYTHON, "--asynchronous"], ["stream-rollout-ended-too-late"])) == {}


async def test_javascript_client_passes_every_conversation(node: list[str]) -> None:
    results = await played([*node, suite.FOLDER / "driver.mjs"], list(CONVERSATIONS))
    assert not_passed(results) == {
        "rest-a-step-by-its-number": ["unsupported", "step: no operation with a position"],
        "stream-upgrade-retry-after": [
            "unsupported",
            "start: a WebSocket of a browser has no headers of a refusal",
        ],
    }


async def test_steps_in_json_are_judged_like_frames(node: list[str]) -> None:
    names = ("stream-steps-and-chunks", "stream-several-tensors", "stream-outputs-lost", "stream-outputs-cut-in-half")
    names += ("stream-outputs-twice", "stream-deadline-exceeded", "stream-gap", "stream-wrong-values")
    assert not_passed(await played([*node, suite.FOLDER / "driver.mjs", "--json"], names)) == {}


async def test_rollouts_in_json_are_judged_like_frames() -> None:
    names = [f"stream-rollout{name}" for name in ("", "-of-several-tensors", "-in-pieces", "-cut-off", "-ended-early")]
    assert not_passed(await played([sys.executable, HERE / "wrong_drivers.py", "rollouts_in_json"], names)) == {}


async def test_python_example_passes_its_declared_conversations() -> None:
    assert not_passed(await played([sys.executable, HERE / "example_driver.py"], OF_EXAMPLES)) == {}


async def test_javascript_example_passes_its_declared_conversations(node: list[str]) -> None:
    assert not_passed(await played([*node, HERE / "example_driver.mjs"], OF_EXAMPLES)) == {}


@pytest.mark.parametrize(
    "wrong",
    [pytest.param(each, marks=[pytest.mark.long] if each in LONG else []) for each in WRONGS],
)
async def test_wrong_clients_are_caught(wrong: str) -> None:
    by, masters = CAUGHT[wrong]
    results = await played([sys.executable, HERE / "wrong_drivers.py", wrong], [*by, *masters])
    assert {name: result.status for name, result in results.items()} == {
        **dict.fromkeys(by, "failed"),
        **dict.fromkeys(masters, "passed"),
    }


def test_report_shows_expected_and_actual_messages(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    client = shlex.join([sys.executable, str(HERE / "wrong_drivers.py"), "takes_any_outputs"])
    results = tmp_path / "results.json"
    assert suite.main(["--client", client, "--only", "stream-outputs-*e", "--jobs", "1", "--json", str(results)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "failed      stream-outputs-twice",
        "            Duplicate outputs are not mistaken for those of the next step.",
        '            - command 3, {"do": "step", "session": "a", "values": [3, 4]}: '
        "expected outputs [53.5], saw [21.0]",
        "passed      stream-outputs-lost-thrice",
        "1 passed, 1 failed, 0 unsupported",
    ]
    assert [each["status"] for each in json.loads(results.read_text())] == ["failed", "passed"]


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("print('hello'); input()", "it wrote 'hello', which is no outcome"),
        ("raise SystemExit(3)", "the program ended, with status 3"),
        ("import time; time.sleep(600)", "no outcome within 0.5 s"),
    ],
)
def test_program_that_breaks_the_contract_is_reported(
    capsys: pytest.CaptureFixture[str], program: str, says: str
) -> None:
    arguments = ["--client", shlex.join([sys.executable, "-c", program]), "--only", "rest-resume", "--limit", "0.5"]
    if "sleep" not in program:
        arguments[-1] = str(PATIENCE)
    assert suite.main(arguments) == 1
    assert says in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "- {name: a, says: b, client: [], server: [{when: steps, does: explode}]}",
            "a: the server cannot do 'explode'",
        ),
        ("- {name: a, says: b, client: [], server: [{when: stepz, does: late}]}", "a: no exchange is called 'stepz'"),
        ("- {name: a, says: b, client: [], server: [{when: steps, does: late, x: 1}]}", "a: a rule has no member 'x'"),
        ("- {name: a, says: b}", "a: 'client'"),
    ],
)
def test_invalid_conversation_file_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, says: str
) -> None:
    path = tmp_path / "rest.yaml"
    path.write_text(text)
    assert suite.main(["--client", "true", str(path)]) == 2
    assert capsys.readouterr().err == f"{says}\n"


def test_suite_without_its_package_names_the_package_to_install() -> None:
    program = (
        "import runpy, sys; sys.modules['yaml'] = None; runpy.run_module('unroll.client.conformance', alter_sys=True)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, "--list"], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (ran.returncode, ran.stderr) == (
        1,
        "the package yaml is not installed; pip install 'unroll-serve[conformance]'\n",
    )


def test_the_page_explains_every_word_of_the_files() -> None:
    explained = set(re.findall(r"^\| `([a-z_-]+)`", PAGE.read_text(), flags=re.MULTILINE))
    commands = {command["do"] for each in CONVERSATIONS.values() for command in each.client}
    members = set(Conversation.__dataclass_fields__)
    assert explained >= {*DEEDS, *HTTP_KINDS, *STREAM_KINDS, *commands, *members - {"over"}}
    used = {(rule.when, rule.does) for each in CONVERSATIONS.values() for rule in each.server}
    assert {does for _, does in used} == set(DEEDS)
