"""`unroll bench` against a real server: it counts accepted and refused steps, and reports their cost."""

import json
from typing import Any

import httpx
import pytest
from serving import Running

from unroll import cli


@pytest.fixture
def bench(server: Running, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*words: str) -> dict[str, Any]:
        assert cli.main(["bench", "lstm", "--url", server.url, "--seconds", "0.3", "--json", *words]) == 0
        printed = capsys.readouterr().out
        return json.loads(printed[printed.index("{\n") :])  # after the server's log

    return call


def steps_of(server: Running) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return sum(
        float(line.split()[-1]) for line in lines if line.startswith('unroll_steps_total{device="cpu",model="lstm"')
    )


@pytest.mark.parametrize("over", ["http", "stream"])
@pytest.mark.parametrize("rate", [(), ("--rate", "50")])
def test_accepted_steps_match_the_servers_count(bench: Any, server: Running, over: str, rate: tuple[str, ...]) -> None:
    before = steps_of(server)
    found = bench("--clients", "3", "--steps", "1,4", "--over", over, *rate)
    assert found["accepted"] > 0
    assert found["refused"] == {}
    assert round(found["steps_per_second"] * found["seconds"]) == steps_of(server) - before
    latency = found["latency_ms"]
    assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["max"]
    assert found["machine_cores"] >= 1


def test_refusals_are_counted_by_code(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--seconds", "0.1", "--clients", "2", "--steps", "70000", "--json"]
    assert cli.main(["bench", "lstm", "--url", server.url, *words]) == 1
    printed = capsys.readouterr().out
    found = json.loads(printed[printed.index("{\n") :])
    assert found["accepted"] == 0
    assert list(found["refused"]) == ["invalid_shape"]
    assert found["latency_ms"] is None


def test_several_processes_share_the_clients(bench: Any) -> None:
    found = bench("--clients", "3", "--processes", "2")
    assert found["plan"]["clients"] == 3
    assert found["accepted"] > 0


def test_report_shows_the_cores_of_client_and_server(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "lstm", "--url", server.url, "--seconds", "0.2", "--clients", "2"]) == 0
    printed = capsys.readouterr().out
    for words in ("closed loop", "refused    none", "p50 ", "p99 ", "▁", "█", "cores busy", "shares this machine"):
        assert words in printed


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["nothing"], 1, "unroll bench: model_unknown"),
        (["lstm", "--seconds", "601"], 2, "at most 600"),
        (["lstm", "--steps", "1,x"], 2, "is not a list of numbers"),
        (["lstm", "--processes", "20"], 2, "20 processes need as many clients"),
    ],
)
def test_unmeasurable_runs_are_refused(
    server: Running, words: list[str], status: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *words, "--url", server.url]) == status
    assert says in capsys.readouterr().err
