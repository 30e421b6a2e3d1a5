"""Flags, `UNROLL_*` variables and the settings file: an invalid setting ends the start with a line that names it."""

import json
from pathlib import Path

import pytest

from unroll import cli
from unroll.service.descriptions import SETTINGS
from unroll.service.settings import Settings
from unroll.service.sources import SettingsRefused, exposed, gather

FLAGS = ["--repository", "bundles"]
GIVEN = {"repository": "bundles"}
FRACTIONS = [name.upper() for name, setting in SETTINGS.items() if setting.metavar in {"SECONDS", "SHARE"}]


def main(flags: list[str]) -> int:
    return cli.main(["serve", *flags])


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
def test_unknown_variable_is_refused_with_the_nearest_name(
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
def test_variables_of_tests_and_kubernetes_are_ignored(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    assert gather(GIVEN).settings.max_batch == (7 if variable == "unroll_max_batch" else 256)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("MAX_BATCH", "abc", "'abc': it is not a whole number above 0 (maximum rows per model call)"),
        ("MAX_BATCH", "", "'': it is not a whole number"),
        ("MAX_BATCH", "-1", "'-1': it is not a whole number above 0"),
        ("MAX_BATCH", "0", "'0': it is not a whole number above 0"),
        ("MAX_BATCH", "1.5", "'1.5': it is not a whole number"),
        ("MAX_BATCH", "9" * 5000, "maximum rows per model call"),
        ("PORT", "70000", "less than or equal to 65535"),
        ("PORT", "eighty", "a whole number from 0 to 65535"),
        ("DRAIN_TIMEOUT", "soon", "it is not a finite number of seconds, 0 or more"),
        ("DRAIN_TIMEOUT", "0", "greater than 0"),
        ("SPILL_BYTES", "1GB", "it is not a whole number of bytes"),
        ("MEMORY_SHARE", "2", "less than or equal to 1"),
        *((name, value, "it is not a") for name in FRACTIONS for value in ("nan", "inf", "-inf", "1e999")),
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
        ("LOG_LEVEL", "LOUD", "it is not one of debug, info, warning, error"),
    ],
)
def test_wrong_value_names_the_variable_the_value_and_the_allowed_values(
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
    assert "unroll serve: --max-batch 'abc': it is not a whole number" in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "reason"), [("--serve", "it is not JSON"), ("--buckets", "it is not a JSON list")])
def test_a_flag_that_is_not_json_is_named(flag: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FLAGS, flag, "[1"]) == 2
    assert f"unroll serve: {flag}: {reason}" in capsys.readouterr().err


def test_list_is_not_a_model_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FLAGS, "--serve", '[["co2", 1]]']) == 2
    assert "unroll serve: --serve ['co2', 1]: it is not JSON such as" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("store", "shown"),
    [
        ("redis://user:a@hunter2@host:1/0", "redis://***@host:1/0"),
        (
            "redis+sentinel://h:1,h:2/main?sentinel_password=hunter2&db=1",
            "redis+sentinel://h:1,h:2/main?sentinel_password=***&db=1",
        ),
        ("unix:///run/redis.sock?password=hunter2", "unix:///run/redis.sock?password=***"),
        ("file:///sessions@home", "file:///sessions@home"),
    ],
)
def test_config_shows_a_store_without_its_passwords(store: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "show", *FLAGS, "--store", store, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["store"]["value"] == shown


def test_a_prefix_is_of_a_redis(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FLAGS, "--store", "file:///sessions", "--store-prefix", "b"]) == 2
    assert "give each deployment its own folder" in capsys.readouterr().err


def test_versions_by_flag_and_by_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for words in (["co2=1", "gru=12"], ["co2=1,gru=12"], ['{"co2": 1, "gru": 12}']):
        assert gather(GIVEN | {"serve": words}).settings.serve == {"co2": 1, "gru": 12}
    monkeypatch.setenv("UNROLL_SERVE", '{"co2": 2}')
    assert gather(GIVEN).settings.serve == {"co2": 2}


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
        gather(GIVEN)
    assert "hunter2" not in str(refused.value)


def test_a_secret_is_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("the first of the two\nthe second of the two\n")
    (tmp_path / "store").write_text("redis://:hunter2@host:1/0\n")
    by_flag = {"snapshot_keys": [f"@{tmp_path}/keys"], "store": f"@{tmp_path}/store"}
    settings = gather(GIVEN | by_flag).settings
    assert [key.get_secret_value() for key in settings.snapshot_keys] == [
        "the first of the two",
        "the second of the two",
    ]
    assert settings.store == "redis://:hunter2@host:1/0"
    assert exposed(by_flag) == []
    (tmp_path / "keys").write_text("\n")
    for wrong, reason in ((f"@{tmp_path}/none", "No such file"), (f"@{tmp_path}/keys", "is empty")):
        with pytest.raises(SettingsRefused, match=f"--snapshot-keys: .*{reason}"):
            gather(GIVEN | {"snapshot_keys": [wrong]})


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ({"snapshot_keys": ["hunter2hunter2hunter2"]}, ["--snapshot-keys"]),
        ({"store": "redis://:hunter2@host:1/0"}, ["--store"]),
        ({"store": "redis+sentinel://h:1/main?sentinel_password=hunter2"}, ["--store"]),
        ({"store": "redis://host:1/0"}, []),
        ({"store": "file:///sessions"}, []),
        ({}, []),
    ],
)
def test_a_secret_in_a_flag_is_noticed(flags: dict, found: list[str]) -> None:
    assert exposed(flags) == found


def test_missing_setting_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert (
        "--repository: required; use the flag, or set UNROLL_REPOSITORY (bundle repository" in capsys.readouterr().err
    )


@pytest.mark.parametrize("words", [["[1,64]"], ["1,64"], ["1", "64"]])
def test_a_list_is_json_or_words(words: list[str]) -> None:
    assert gather(GIVEN | {"buckets": words}).settings.buckets == (1, 64)


def test_a_flag_comes_before_a_variable_before_the_file_before_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "unroll.toml"
    file.write_text('repository = "bundles"\nmax_batch = 1\nport = 1\nthreads = 1\nserve = {co2 = 3}\n')
    monkeypatch.setenv("UNROLL_CONFIG", str(file))
    monkeypatch.setenv("UNROLL_MAX_BATCH", "2")
    monkeypatch.setenv("UNROLL_PORT", "2")
    monkeypatch.setenv("UNROLL_SNAPSHOT_KEYS", '["a key of the tests"]')
    monkeypatch.setenv("UNROLL_STORE", "redis://user:hunter2@host")
    assert cli.main(["config", "show", "--max-batch", "3", "--json"]) == 0
    printed = capsys.readouterr().out
    shown = json.loads(printed)
    assert shown["max_batch"] == {"value": 3, "origin": "--max-batch"}
    assert shown["port"] == {"value": 2, "origin": "UNROLL_PORT"}
    assert shown["serve"] == {"value": {"co2": 3}, "origin": f"{file}: serve"}
    assert shown["host"] == {"value": "127.0.0.1", "origin": "default"}
    assert shown["store"] == {"value": "redis://***@host", "origin": "UNROLL_STORE"}
    assert "a key" not in printed
    assert cli.main(["config", "show", "--config", str(file)]) == 0
    assert f"  1  ({file}: threads)\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("max_bathc = 1", "there is no setting 'max_bathc'; did you mean max_batch?"),
        ("max-batch = 1", "there is no setting 'max-batch'; did you mean max_batch?"),
        ('max_batch = "many"', "max_batch 'many': it is not a whole number above 0"),
        ("idle_timeout = inf", "idle_timeout inf: it is not a finite number of seconds"),
        ("memory_share = nan", "memory_share nan: it is not a number above 0, at most 1"),
        ("max_batch", "cannot be read as a settings file"),
        (None, "cannot be read as a settings file"),
    ],
)
def test_a_wrong_file_is_named_with_its_setting(
    content: str | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "unroll.toml"
    if content is not None:
        file.write_text(content)
    assert main([*FLAGS, "--config", str(file)]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"unroll serve: {file}")
    assert says in line


def test_each_setting_is_described_with_its_default() -> None:
    assert SETTINGS.keys() == Settings.model_fields.keys()
    for name, field in Settings.model_fields.items():
        if stated := SETTINGS[name].default:
            assert type(field.default)(stated) == field.default, name
        else:  # `page` depends on the address
            assert field.is_required() or not field.default or name == "page", name


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "models.example"])
def test_reachable_server_requires_keys_or_an_explicit_flag(host: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsRefused, match=r"--keys FILE.*--auth none"):
        gather(GIVEN | {"host": host})
    assert gather(GIVEN | {"host": host, "auth": "none"}).settings.gate().has_keys is False
    path = tmp_path / "keys.toml"
    assert cli.main(["keys", "new", str(path), "--tenant", "acme"]) == 0
    assert gather(GIVEN | {"host": host, "keys": str(path)}).settings.gate().has_keys is True


def test_keys_contradict_the_flag_for_no_keys(tmp_path: Path) -> None:
    with pytest.raises(SettingsRefused, match="contradict"):
        gather(GIVEN | {"auth": "none", "keys": "keys.toml"})
    with pytest.raises(SettingsRefused, match="--auth keys needs a keys file"):
        gather(GIVEN | {"auth": "keys"})
    assert main([*FLAGS, "--keys", str(tmp_path / "none.toml")]) == 1
