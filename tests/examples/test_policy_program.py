"""The maze example program against a real server."""

import re

import pytest

from unroll.examples import policy


def left(server: str, capsys: pytest.CaptureFixture[str], *flags: str) -> int:
    """Return how many of 32 mazes the policy leaves."""
    assert policy.main(["--episodes", "32", "--url", server, *flags]) == 0
    printed = re.fullmatch(r"(\d+) of 32 mazes left, in \d+ steps\n", capsys.readouterr().out)
    assert printed
    return int(printed[1])


def test_policy_leaves_every_maze_only_with_its_state(server: str, capsys: pytest.CaptureFixture[str]):
    assert left(server, capsys) == 32
    assert left(server, capsys, "--forget") <= 16  # one of the four ways, on average 8


def test_number_of_concurrent_episodes_changes_no_result(server: str, capsys: pytest.CaptureFixture[str]):
    assert left(server, capsys, "--at-once", "32") == 32
