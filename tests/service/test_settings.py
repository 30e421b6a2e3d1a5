"""Flags and `UNROLL_*` variables: whatever is wrong with one ends the start with a line about it."""

from pathlib import Path

import pytest

from unroll import cli
from unroll.service.serve import main
from unroll.service.settings import Settings, SettingsRefused

FLAGS = ["--repository", "bundles"]


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [
        ("UNROLL_MAX_BATHC", "; did you mean UNROLL_MAX_BATCH?"),
        ("UNROLL_MAXBATCH", "; did you mean UNROLL_MAX_BATCH?"),
        ("unroll_repository_", "; did you mean UNROLL_REPOSITORY?"),
        ("UNROLL_STATEFILE", "; did you mean UNROLL_STATE_FILE?"),
        ("UNROLL_ZZZ", ""),
        ("UNROLL_", ""),
    ],
)
def test_a_variable_that_is_no_setting_is_refused_with_the_nearest_name(
    variable: str, nearest: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, "3")
    assert main(FLAGS) == 2
    assert capsys.readouterr().err == f"unroll serve: {variable}: there is no such setting{nearest}\n"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("UNROLL_TEST_SEEDS", "1"),
        ("UNROLL_FAILPOINTS", "ran=kill:1"),
        ("UNROLL_SERVICE_HOST", "10.0.0.1"),
        ("UNROLL_SERVICE_PORT_HTTP", "8000"),
        ("UNROLL_PORT_8000_TCP_ADDR", "10.0.0.1"),
        ("UNROLL_GRU_SERVICE_PORT", "8000"),
        ("UNROLL_GRU_PORT", "tcp://10.0.0.1:8000"),
        ("unroll_max_batch", "7"),
    ],
)
def test_variables_of_tests_and_of_kubernetes_are_none_of_its_business(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    assert Settings.from_arguments(FLAGS).max_batch == (7 if variable == "unroll_max_batch" else 256)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("MAX_BATCH", "abc", "'abc': Input should be a valid integer"),
        ("MAX_BATCH", "", "'': Input should be a valid integer"),
        ("MAX_BATCH", "-1", "'-1': Input should be greater than 0"),
        ("MAX_BATCH", "1.5", "'1.5': Input should be a valid integer"),
        ("MAX_BATCH", "9" * 5000, "maximum rows per model call"),
        ("PORT", "70000", "less than or equal to 65535"),
        ("IDLE_TIMEOUT", "nan", "greater than or equal to 0"),
        ("DRAIN_TIMEOUT", "soon", "valid number"),
        ("HOST", "", "it is empty"),
        ("REPOSITORY", "", "it is empty"),
        ("STATE_FILE", "", "it is empty"),
        ("DEVICE", "", "it is empty"),
        ("STORE", "", "redis|rediss"),
        ("STORE", "redis://host:port", "its port is not a number"),
        ("STORE", "redis+sentinel://host:26379,host:port/main", "its port is not a number"),
        ("STORE_PREFIX", "a{b}", "String should match pattern"),
        ("DURABILITY", "disk", "'memory' or 'stored'"),
        ("SESSION_CAPACITY", "many", "'auto'"),
        ("STRICT", "perhaps", "valid boolean"),
        ("BUCKETS", "1,64", "'1,64': it is not a JSON list (batch sizes"),
        ("BUCKETS", "[0]", "greater than 0"),
        ("SERVE", "co2=1", """'co2=1': it is not JSON such as {"co2": 1}, or co2=1 in a flag"""),
        ("SERVE", '{"co2": 0}', "greater than 0"),
        ("LOG_LEVEL", "LOUD", "debug|info|warning|error"),
    ],
)
def test_a_wrong_value_names_the_variable_the_value_and_what_is_allowed(
    name: str, value: str, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(f"UNROLL_{name}", value)
    assert main([] if name == "REPOSITORY" else FLAGS) == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith(f"unroll serve: UNROLL_{name}") and len(line) < 400 for line in lines)
    assert reason in "\n".join(lines)


@pytest.mark.parametrize("flag", [["--max-batch", "abc"], ["--max-batch=abc"]])
def test_a_wrong_flag_is_named_as_a_flag(flag: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FLAGS, *flag]) == 2
    assert "unroll serve: --max-batch 'abc': Input should be" in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "reason"), [("--serve", "it is not JSON"), ("--buckets", "it is not a JSON list")])
def test_a_flag_that_is_not_json_is_named(flag: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FLAGS, flag, "[1"]) == 2
    assert f"unroll serve: {flag}: {reason}" in capsys.readouterr().err


def test_a_prefix_is_of_a_redis(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FLAGS, "--store", "file:///sessions", "--store-prefix", "b"]) == 2
    assert "give each deployment its own folder" in capsys.readouterr().err


def test_versions_by_flag_and_by_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--serve", "co2=1", "--serve", "gru=12"]
    assert Settings.from_arguments([*FLAGS, *flags]).serve == {"co2": 1, "gru": 12}
    monkeypatch.setenv("UNROLL_SERVE", '{"co2": 2}')
    assert Settings.from_arguments(FLAGS).serve == {"co2": 2}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("STORE", "http://user:hunter2@host"),
        ("SNAPSHOT_KEYS", '["hunter2"]'),
        ("SNAPSHOT_KEYS", "hunter2"),
        ("SNAPSHOT_KEYS", '[["hunter2"]]'),
    ],
)
def test_a_secret_is_not_printed(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"UNROLL_{name}", value)
    with pytest.raises(SettingsRefused) as refused:
        Settings.from_arguments(FLAGS)
    assert "hunter2" not in str(refused.value)


def test_what_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "--repository: give it, or set UNROLL_REPOSITORY (bundle repository" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "models.example"])
def test_a_server_that_others_can_reach_needs_keys_or_a_word(host: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsRefused, match=r"--keys FILE.*--auth none"):
        Settings.from_arguments([*FLAGS, "--host", host])
    assert Settings.from_arguments([*FLAGS, "--host", host, "--auth", "none"]).gate().has_keys is False
    path = tmp_path / "keys.toml"
    assert cli.main(["keys", "new", str(path), "--tenant", "acme"]) == 0
    assert Settings.from_arguments([*FLAGS, "--host", host, "--keys", str(path)]).gate().has_keys is True


def test_keys_and_their_absence_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(SettingsRefused, match="contradict"):
        Settings.from_arguments([*FLAGS, "--auth", "none", "--keys", "keys.toml"])
    with pytest.raises(SettingsRefused, match="--auth keys needs a file"):
        Settings.from_arguments([*FLAGS, "--auth", "keys"])
    assert main([*FLAGS, "--keys", str(tmp_path / "none.toml")]) == 1
