"""The KServe example is valid by the schemas of KServe and Kubernetes, and its two files are consistent."""

import re

import pytest
from manifests import ROOT, Manifest, check, check_custom, documents

from unroll.service.settings import Settings

RUNTIME, SERVICE = ROOT / "deploy/kserve/servingruntime.yaml", ROOT / "deploy/kserve/inferenceservice.yaml"


def load(path) -> Manifest:
    [manifest] = documents(path.read_text())
    return manifest


@pytest.mark.parametrize("path", [RUNTIME, SERVICE], ids=lambda path: path.stem)
def test_example_is_valid_by_kserves_definitions(path):
    check_custom(load(path))


def test_its_pod_is_valid():
    """A ServingRuntime embeds part of a pod spec."""
    spec = load(RUNTIME)["spec"]
    pod = {"containers": spec["containers"], "volumes": spec["volumes"]}
    check({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "runtime"}, "spec": pod})


def test_the_service_asks_for_the_runtime():
    runtime, model = load(RUNTIME), load(SERVICE)["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["modelFormat"].items() <= runtime["spec"]["supportedModelFormats"][0].items()
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]


def test_its_container_is_the_image_with_its_settings():
    [container] = load(RUNTIME)["spec"]["containers"]
    variables = {variable["name"] for variable in container["env"]}
    own = set(re.findall(r"\b(HOST|PORT)=", (ROOT / "Dockerfile").read_text()))
    settings = {f"UNROLL_{name.upper()}" for name in Settings.model_fields}
    assert variables <= own | settings


def test_a_replica_has_time_to_drain():
    [container] = load(RUNTIME)["spec"]["containers"]
    [delay] = [variable["value"] for variable in container["env"] if variable["name"] == "UNROLL_DRAIN_DELAY"]
    asleep = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    most = asleep + float(delay) + Settings.model_fields["drain_timeout"].default
    assert load(SERVICE)["spec"]["predictor"]["terminationGracePeriodSeconds"] > most
