"""The Compose file: every service is hardened, the server's variables are settings, and it has time to drain."""

import pytest
from manifests import ROOT, documents

from unroll.service.settings import Settings

[FILE] = documents((ROOT / "docker-compose.yml").read_text())
SERVICES = FILE["services"]
SERVERS = ["unroll", "unroll-folder", "unroll-gpu"]


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_hardened(name: str):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


@pytest.mark.parametrize("name", SERVERS)
def test_the_servers_variables_are_settings(name: str):
    names = {variable.removeprefix("UNROLL_").lower() for variable in SERVICES[name]["environment"]}
    assert names <= set(Settings.model_fields)


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_has_time_to_drain(name: str):
    delay = float(SERVICES[name]["environment"].get("UNROLL_DRAIN_DELAY", 0))
    most = Settings.model_fields["drain_timeout"].default
    assert float(SERVICES[name]["stop_grace_period"].removesuffix("s")) > delay + most


def test_only_requested_services_listen_and_only_on_the_loopback():
    ports = {name: service.get("ports", []) for name, service in SERVICES.items()}
    assert [name for name in ports if ports[name]] == ["proxy", "unroll-folder", "unroll-gpu"]
    assert all(port.startswith("${ADDRESS:-127.0.0.1}:") for each in ports.values() for port in each)


def test_redis_persists_its_data():
    command = SERVICES["redis"]["command"].split()
    assert command[command.index("--appendonly") + 1] == "yes"
    assert command[command.index("--maxmemory-policy") + 1] == "noeviction"
    assert SERVICES["redis"]["volumes"] == ["redis:/data"]


def test_the_server_with_a_folder_needs_nothing_else():
    service = SERVICES["unroll-folder"]
    assert service["depends_on"] == {}
    named, folder = service["volumes"][-1].split(":")
    assert named in FILE["volumes"]
    assert service["environment"]["UNROLL_STORE"].startswith(f"file://{folder}/")
    assert (
        f"install -d -o 10001 -g 10001 {folder}\n" in (ROOT / "Dockerfile").read_text()
    )  # the user may write to the volume
