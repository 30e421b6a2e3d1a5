"""The Helm chart renders valid, hardened manifests with existing settings, and refuses contradictory values."""

import base64
import functools
import os
import re
import shutil
import subprocess

import pytest
from manifests import ROOT, Manifest, check, check_custom, documents

from unroll.service.settings import Settings
from unroll.service.telemetry.metrics import HELP

CHART = ROOT / "deploy" / "helm" / "unroll"
HELM = shutil.which("helm", path=f"{ROOT / '.tools' / 'node_modules' / '.bin'}{os.pathsep}{os.environ['PATH']}")

pytestmark = pytest.mark.skipif(HELM is None, reason="helm is missing: make deploy-tools")

#: One replica with its own store.
SMALL = ["redis.enabled=false", "replicas=1", "store.embedded.enabled=true"]
#: Resources of the Prometheus operator; this repository does not contain their definitions.
CUSTOM = ("ServiceMonitor", "PrometheusRule")
#: By case: the arguments of --set.
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
    "keys": ["auth.keysSecret=keys", "auth.metricsKeySecret=scrape", "serviceMonitor.enabled=true"],
    "tls": ["tls.secret=certificate", "serviceMonitor.enabled=true"],
    "operator": ["adminPort=9090", "tls.secret=certificate", "serviceMonitor.enabled=true"],
    "alerts": ["prometheusRule.enabled=true", "prometheusRule.labels.release=prometheus"],
    "embedded": [*SMALL, "store.embedded.storageClass=fast", "args={--workers,4}", "prometheusRule.enabled=true"],
    "own-password": ["redis.passwordSecret=redis"],
    "patient": ["drainTimeout=60", "preStopSeconds=10"],
    "extended": [
        *("extraVolumes[0].name=cache", "extraVolumes[0].emptyDir.medium=Memory"),
        *("extraVolumeMounts[0].name=cache", "extraVolumeMounts[0].mountPath=/cache"),
        *("initContainers[0].name=fetch", "initContainers[0].image=fetch", "envFrom[0].configMapRef.name=unroll"),
        *("topologySpreadConstraints=null", "strategy.type=Recreate", "terminationGracePeriodSeconds=40"),
    ],
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


def workload(manifests: list[Manifest], component: str = "server") -> Manifest:
    """Return the Deployment or StatefulSet of a component."""
    [found] = [
        manifest
        for manifest in manifests
        if manifest["kind"] in ("Deployment", "StatefulSet")
        and manifest["spec"]["selector"]["matchLabels"]["app.kubernetes.io/component"] == component
    ]
    return found


def pod(manifests: list[Manifest], component: str = "server") -> Manifest:
    return workload(manifests, component)["spec"]["template"]["spec"]


def container(manifests: list[Manifest], component: str = "server") -> Manifest:
    [found] = pod(manifests, component)["containers"]
    return found


def variables(part: Manifest) -> dict[str, Manifest]:
    return {variable["name"]: variable for variable in part["env"]}


def test_the_chart_passes_helms_own_lint():
    linted = helm("lint", "--strict", str(CHART))
    assert linted.returncode == 0, linted.stdout


@pytest.mark.parametrize("case", CASES)
def test_rendered_manifests_are_valid(case: str):
    for manifest in render(case):
        if manifest["kind"] not in CUSTOM:
            check(manifest)


@pytest.mark.parametrize(
    ("case", "kind"), [("monitored", "ServiceMonitor"), ("operator", "ServiceMonitor"), ("alerts", "PrometheusRule")]
)
def test_the_resources_of_the_prometheus_operator_are_valid(case: str, kind: str):
    check_custom(of_kind(render(case), kind))


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
    store = variables(container(manifests))["UNROLL_STORE"]["value"]
    services = {manifest["metadata"]["name"] for manifest in manifests if manifest["kind"] == "Service"}
    assert re.fullmatch(r"redis://:\$\(REDIS_PASSWORD\)@([^:/]+):6379/0", store)[1] in services
    arguments = container(manifests, "redis")["args"]
    assert arguments[arguments.index("--appendonly") + 1] == "yes"
    assert arguments[arguments.index("--maxmemory-policy") + 1] == "noeviction"


@pytest.mark.parametrize(("case", "secret"), [("default", "unroll-redis"), ("own-password", "redis")])
def test_redis_and_the_replicas_have_one_password(case: str, secret: str):
    manifests = render(case)
    redis, server = container(manifests, "redis"), container(manifests)
    assert "--requirepass" in redis["args"]
    of_redis, of_server = variables(redis)["REDISCLI_AUTH"], variables(server)["REDIS_PASSWORD"]
    reference = {"name": secret, "key": "password"}
    assert of_redis["valueFrom"]["secretKeyRef"] == of_server["valueFrom"]["secretKeyRef"] == reference
    made = [manifest for manifest in manifests if manifest["kind"] == "Secret"]
    assert [each["metadata"]["name"] for each in made] == (["unroll-redis"] if case == "default" else [])
    assert all(len(base64.b64decode(each["data"]["password"])) == 32 for each in made)


def test_the_small_installation_keeps_its_sessions_on_a_volume():
    manifests = render("embedded")
    assert workload(manifests)["kind"] == "StatefulSet"
    assert [manifest["kind"] for manifest in manifests].count("StatefulSet") == 1  # no Redis
    [claim] = workload(manifests)["spec"]["volumeClaimTemplates"]
    assert claim["spec"]["storageClassName"] == "fast"
    [mounted] = [each["mountPath"] for each in container(manifests)["volumeMounts"] if each["name"] == "sessions"]
    assert variables(container(manifests))["UNROLL_STORE"]["value"].startswith(f"file://{mounted}/")
    context = pod(manifests)["securityContext"]
    assert context["fsGroup"] == context["runAsGroup"]  # the group may write to the volume


@pytest.mark.parametrize("case", CASES)
def test_a_replica_has_time_to_drain(case: str):
    manifests = render(case)
    asleep = container(manifests)["lifecycle"]["preStop"]["sleep"]["seconds"]
    drains = float(variables(container(manifests))["UNROLL_DRAIN_TIMEOUT"]["value"])
    assert pod(manifests)["terminationGracePeriodSeconds"] > asleep + drains


def test_user_additions_are_in_the_pod():
    manifests = render("extended")
    assert {"name": "cache", "emptyDir": {"medium": "Memory"}} in pod(manifests)["volumes"]
    assert {"name": "cache", "mountPath": "/cache"} in container(manifests)["volumeMounts"]
    assert pod(manifests)["initContainers"] == [{"name": "fetch", "image": "fetch"}]
    assert container(manifests)["envFrom"] == [{"configMapRef": {"name": "unroll"}}]
    assert "topologySpreadConstraints" not in pod(manifests)
    assert workload(manifests)["spec"]["strategy"] == {"type": "Recreate"}
    assert pod(manifests)["terminationGracePeriodSeconds"] == 40


def test_with_a_certificate_probes_and_scrapes_use_tls():
    manifests = render("tls")
    probes = [container(manifests)[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")]
    assert [probe["scheme"] for probe in probes] == ["HTTPS"] * 3
    [endpoint] = of_kind(manifests, "ServiceMonitor")["spec"]["endpoints"]
    assert endpoint["scheme"] == "https"


def test_the_operators_port_is_scraped_and_not_in_the_service():
    manifests = render("operator")
    assert variables(container(manifests))["UNROLL_ADMIN_PORT"]["value"] == "9090"
    assert {"name": "operator", "containerPort": 9090} in container(manifests)["ports"]
    [endpoint] = of_kind(manifests, "ServiceMonitor")["spec"]["endpoints"]
    assert (endpoint["targetPort"], "scheme" in endpoint) == ("operator", False)
    services = [manifest for manifest in manifests if manifest["kind"] == "Service"]
    assert "9090" not in str(services)


def test_replicas_are_spread_by_their_own_labels():
    labels = workload(render("default"))["spec"]["selector"]
    constraints = pod(render("default"))["topologySpreadConstraints"]
    assert [each["topologyKey"] for each in constraints] == ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]
    assert all(each["labelSelector"] == labels for each in constraints)


def test_alerts_are_about_metrics_of_the_server():
    [group] = of_kind(render("alerts"), "PrometheusRule")["spec"]["groups"]
    for rule in group["rules"]:
        metrics = {re.sub(r"_(total|bucket)$", "", name) for name in re.findall(r"unroll_\w+(?=\{)", rule["expr"])}
        assert metrics
        assert metrics <= HELP.keys()
        assert rule["expr"].count('namespace="default",service="unroll"') == rule["expr"].count("unroll_")


@pytest.mark.parametrize(("case", "surge"), [("default", 1), ("gpu", 0)])
def test_rolling_update_needs_no_extra_gpu(case: str, surge: int):
    assert workload(render(case))["spec"]["strategy"]["rollingUpdate"]["maxSurge"] == surge


def test_gpus_are_requested_and_required():
    server = container(render("gpu"))
    assert server["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert "--device=cuda:0,cuda:1" in server["args"]


def test_autoscaler_scales_on_the_queue():
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
        (["replicas=1", "store.embedded.enabled=true"], "set redis.enabled=false"),
        (["redis.enabled=false", "store.embedded.enabled=true"], "set replicas=1"),
        ([*SMALL, "autoscaling.enabled=true"], "autoscaling.enabled=false"),
        (["drainTimeout=30", "terminationGracePeriodSeconds=35"], "are 35 together"),
        (["args={--drain-timeout,60}"], "set drainTimeout"),
        (["env[0].name=UNROLL_DRAIN_TIMEOUT", "env[0].value=60"], "set drainTimeout"),
        (["redis.enabled=false", "replicas=1", "store.durability=redis"], "there is no store"),
        (["store.durability=client"], "durability"),
        (["replica=3"], "replica"),
        (["redis.appendfsync=no"], "appendfsync"),
    ],
)
def test_contradictory_values_are_refused(values: list[str], reason: str):
    flags = [flag for value in values for flag in ("--set", value)]
    refused = helm("template", "unroll", str(CHART), "--kube-version", "1.30.0", *flags)
    assert refused.returncode != 0
    assert reason in refused.stderr
