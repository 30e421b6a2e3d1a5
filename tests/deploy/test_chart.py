"""The Helm chart: manifests are valid, hardened and use existing settings; contradictory values are refused."""

import functools
import os
import re
import shutil
import subprocess

import pytest
from manifests import ROOT, Manifest, check, check_custom, documents

from unroll.service.settings import Settings

CHART = ROOT / "deploy" / "helm" / "unroll"
HELM = shutil.which("helm", path=f"{ROOT / '.tools' / 'node_modules' / '.bin'}{os.pathsep}{os.environ['PATH']}")

pytestmark = pytest.mark.skipif(HELM is None, reason="helm is missing: make deploy-tools")

#: Arguments of --set, by case.
CASES = {
    "default": [],
    "one-replica": ["redis.enabled=false", "replicas=1"],
    "own-redis": ["redis.enabled=false", "store.secret=store", "store.durability=memory"],
    "client-held": ["redis.enabled=false", "store.snapshotKeysSecret=keys"],
    "gpu": ["gpus=2", "image=unroll:gpu", "nodeSelector.pool=gpu", "tolerations[0].operator=Exists"],
    "scaled": ["autoscaling.enabled=true", "autoscaling.chunksInFlight=64", "redis.storageClass=fast"],
    "reachable": ["ingress.enabled=true", "ingress.tls[0].secretName=tls", "service.sessionAffinity=ClientIP"],
    "bundles": ["repository.persistentVolumeClaim.claimName=bundles", "args={--max-batch,64}", "env[0].name=A"],
    "monitored": ["serviceMonitor.enabled=true", "serviceMonitor.labels.release=prometheus", "podAnnotations.a=b"],
}


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(HELM), *arguments], capture_output=True, text=True)


@functools.cache
def render(case: str) -> list[Manifest]:
    values = CASES[case]
    flags = [flag for value in values for flag in ("--set", value)]
    rendered = helm("template", "unroll", str(CHART), "--kube-version", "1.30.0", *flags)
    assert rendered.returncode == 0, rendered.stderr
    return documents(rendered.stdout)


def of_kind(manifests: list[Manifest], kind: str) -> Manifest:
    [found] = [manifest for manifest in manifests if manifest["kind"] == kind]
    return found


def container(manifests: list[Manifest], kind: str = "Deployment") -> Manifest:
    [found] = of_kind(manifests, kind)["spec"]["template"]["spec"]["containers"]
    return found


def test_the_chart_passes_helms_own_lint():
    linted = helm("lint", "--strict", str(CHART))
    assert linted.returncode == 0, linted.stdout


@pytest.mark.parametrize("case", CASES)
def test_what_it_renders_is_valid(case: str):
    for manifest in render(case):
        if manifest["kind"] != "ServiceMonitor":
            check(manifest)


def test_the_service_monitor_is_valid():
    check_custom(of_kind(render("monitored"), "ServiceMonitor"))


@pytest.mark.parametrize("case", CASES)
def test_every_pod_is_hardened(case: str):
    for manifest in render(case):
        if manifest["kind"] in ("Deployment", "StatefulSet"):
            pod = manifest["spec"]["template"]["spec"]
            assert pod["automountServiceAccountToken"] is False
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            for part in pod["containers"]:
                context = part["securityContext"]
                assert (context["readOnlyRootFilesystem"], context["allowPrivilegeEscalation"]) == (True, False)
                assert context["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("case", CASES)
def test_its_flags_and_variables_are_settings_of_the_server(case: str):
    server = container(render(case))
    flags = [argument.partition("=")[0] for argument in server.get("args", []) if argument.startswith("--")]
    names = [variable["name"] for variable in server["env"] if variable["name"].startswith("UNROLL_")]
    settings = set(Settings.model_fields)
    assert {flag.removeprefix("--").replace("-", "_") for flag in flags} <= settings
    assert {name.removeprefix("UNROLL_").lower() for name in names} <= settings


def test_replicas_find_the_redis_of_the_chart():
    manifests = render("default")
    [store] = [variable["value"] for variable in container(manifests)["env"] if variable["name"] == "UNROLL_STORE"]
    services = {manifest["metadata"]["name"] for manifest in manifests if manifest["kind"] == "Service"}
    assert re.fullmatch(r"redis://([^:/]+):6379/0", store)[1] in services
    arguments = container(manifests, "StatefulSet")["args"]
    assert arguments[arguments.index("--appendonly") + 1] == "yes"
    assert arguments[arguments.index("--maxmemory-policy") + 1] == "noeviction"


def test_a_replica_has_time_to_drain():
    pod = of_kind(render("default"), "Deployment")["spec"]["template"]["spec"]
    asleep = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > asleep + Settings.model_fields["drain_timeout"].default


def test_gpus_are_asked_for_and_insisted_on():
    server = container(render("gpu"))
    assert server["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert "--device=cuda:0,cuda:1" in server["args"]


def test_it_scales_on_the_queue():
    metrics = of_kind(render("scaled"), "HorizontalPodAutoscaler")["spec"]["metrics"]
    [queue] = [metric["pods"]["metric"]["name"] for metric in metrics if metric["type"] == "Pods"]
    assert f'"{queue}"' in (ROOT / "service/telemetry/metrics.py").read_text()
    assert "replicas" not in of_kind(render("scaled"), "Deployment")["spec"]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (["redis.enabled=false"], "unknown to the others"),
        (["redis.enabled=false", "replicas=1", "autoscaling.enabled=true"], "unknown to the others"),
        (["store.secret=store"], "set only one of them"),
        (["redis.enabled=false", "replicas=1", "store.durability=redis"], "there is no store"),
        (["store.durability=client"], "durability"),
        (["replica=3"], "replica"),
        (["redis.appendfsync=no"], "appendfsync"),
    ],
)
def test_values_that_cannot_be_are_refused(values: list[str], reason: str):
    flags = [flag for value in values for flag in ("--set", value)]
    refused = helm("template", "unroll", str(CHART), "--kube-version", "1.30.0", *flags)
    assert refused.returncode != 0
    assert reason in refused.stderr
