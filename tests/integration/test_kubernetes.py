"""The Helm chart's manifests and the base for Kustomize: valid for Kubernetes, consistent with each
other, and with command lines that our services take. No cluster is needed."""

import functools
import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from opticnerve import __version__
from opticnerve.cli import health
from opticnerve.config import EncoderConfig, GatewayConfig, LLMConfig
from opticnerve.config.command_line import check_environment, service_parser
from opticnerve.config.options import build, options, parse_size
from tests.images import ROOT, read_stages
from tests.manifests import EXAMPLE, KUBERNETES, NAME, RenderError, kustomize_files, read, render

pytestmark = pytest.mark.process

KUBERNETES_VERSIONS = ("1.30", "1.37")
SCHEMAS = {"keda.sh/v1alpha1": "scaledobject", "monitoring.coreos.com/v1": "servicemonitor"}
CONFIGS = {"gateway": GatewayConfig, "encoder": EncoderConfig, "llm": LLMConfig}
SECRETS = {"rpc-token", "store-key", "store-url", "api-keys", "redis.conf"}  # Of deploy/secrets.sh.
MARGIN_S = 10  # What a service does beside its drain.
STAGES = read_stages()
ELSEWHERE = {
    "redis": {"enabled": False},
    "networkPolicy": {"internet": False, "egress": [{"ports": [{"port": 4317}]}]},
}


class Release:
    """All manifests of one rendering."""

    def __init__(self, templates):
        self.all = [each for manifests in templates.values() for each in manifests]

    def of(self, kind):
        return [each for each in self.all if each["kind"] == kind]

    def pods(self):
        """(Deployment, pod template) of each."""
        return [(each, each["spec"]["template"]) for each in self.of("Deployment")]

    def containers(self):
        for deployment, pod in self.pods():
            (container,) = pod["spec"]["containers"]
            yield deployment["metadata"]["name"], container, pod["spec"]


def needs_helm():
    if importlib.util.find_spec("helm_python") is None:
        pytest.skip("Helm's engine has no wheel for this kind of machine")


def rendered(values):
    needs_helm()
    return Release(render(values))


@pytest.fixture(scope="module", params=["default", "gpu", "elsewhere", "base"])
def release(request):
    values = {"default": {}, "gpu": EXAMPLE, "elsewhere": ELSEWHERE}
    if request.param != "base":
        return rendered(values[request.param])
    files = sorted(KUBERNETES.glob("*/*.yaml"))
    return Release({f.name: read(f.read_text()) for f in files if f.stem != "kustomization"})


def closed(schema):
    """A schema that takes no further fields."""
    if isinstance(schema, dict):
        inside = {name: closed(value) for name, value in schema.items()}
        if "properties" in schema:
            inside.setdefault("additionalProperties", False)
        return inside
    return [closed(each) for each in schema] if isinstance(schema, list) else schema


@functools.cache
def validate(text):
    """Fails for fields that Kubernetes or the operator does not know; each text is read once."""
    manifest = json.loads(text)
    name = SCHEMAS.get(manifest["apiVersion"])
    if name is None:
        for version in KUBERNETES_VERSIONS:
            kubernetes_validate.validate(manifest, version, strict=True)
        return
    schema = closed(json.loads((ROOT / f"tests/fixtures/schemas/{name}.json").read_text()))
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.validate(manifest, schema)


def test_kubernetes_and_the_operators_know_every_field(release):
    for manifest in release.all:
        validate(json.dumps(manifest, sort_keys=True))
    names = [(each["kind"], each["metadata"]["name"]) for each in release.all]
    assert len(set(names)) == len(names)


# ---- command lines


def ours(release):
    for name, container, pod in release.containers():
        target = re.search(r"opticnerve-(\w+):", container["image"])
        if target:
            yield name, target[1], container, pod


def environment(target, container):
    given = dict(STAGES[target].environment)
    for variable in container["env"]:
        given[variable["name"]] = variable.get("value", "10.0.0.1")
    return {name: value for name, value in given.items() if name.startswith("OPTICNERVE_")}


def test_our_services_take_every_command_line(release):
    for name, target, container, _ in ours(release):
        cls, variables = CONFIGS[target], environment(target, container)
        words = [word.replace("$(POD_IP)", "10.0.0.1") for word in container["args"]]
        given = vars(service_parser(target, "", list(options(cls))).parse_args(words))
        check_environment(variables)
        settings = build(cls, given, variables)
        assert container["image"].endswith(f":{__version__}"), name
        assert settings.store.store.startswith("file:///"), "no registry"
        if target != "gateway":
            assert settings.rpc.advertise == "10.0.0.1:7000" and settings.rpc.host == "0.0.0.0"


def test_probes_ask_ports_that_are_there_by_commands_that_exist(release):
    for _, container, _ in release.containers():
        named = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert "readinessProbe" in container and "livenessProbe" in container
        for probe in (container[name] for name in container if name.endswith("Probe")):
            if "exec" in probe:
                program, command, *words = probe["exec"]["command"]
                asked = health.parser().parse_args(words)
                assert (program, command) == ("opticnerve", "health")
                assert asked.address == f"127.0.0.1:{named['grpc']}"
                assert asked.timeout < probe["timeoutSeconds"]
                continue
            (how,) = probe.keys() & {"grpc", "httpGet", "tcpSocket"}
            assert probe[how]["port"] in {*named, *named.values()}


def test_services_with_certificates_are_asked_over_tls(release):
    for name, target, container, _ in ours(release):
        tls = "OPTICNERVE_TLS_CERTIFICATE" in environment(target, container)
        https = "--https-certificate" in " ".join(container["args"])
        ready = container["readinessProbe"]
        if target == "gateway":
            assert ready["httpGet"]["scheme"] == ("HTTPS" if https else "HTTP")
        else:
            assert ("exec" in ready) == tls, name


# ---- what refers to what


def matches(selector, labels):
    return selector.items() <= labels.items()


def test_mounts_volumes_and_secrets_are_there(release):
    accounts = {each["metadata"]["name"] for each in release.of("ServiceAccount")}
    for name, container, pod in release.containers():
        mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
        volumes = {each["name"]: each for each in pod["volumes"]}
        assert mounts.keys() == volumes.keys(), name
        assert pod["serviceAccountName"] in accounts
        files = {item["path"] for item in volumes["secrets"]["secret"]["items"]}
        assert files <= SECRETS
        variables = [each.get("value", "") for each in container.get("env", [])]
        words = " ".join([*container["args"], *variables])
        assert set(re.findall(r"/etc/opticnerve/secrets/([\w.-]+)", words)) == files, name
        assert ("/etc/opticnerve/tls/" in words) == ("tls" in volumes)
        assert ("/etc/opticnerve/https/" in words) == ("https" in volumes)
    script = (ROOT / "deploy" / "secrets.sh").read_text()
    assert set(re.findall(r"^ *write ([\w.-]+) ", script, re.MULTILINE)) == {
        *SECRETS, "grafana-password",
    }  # fmt: skip


def test_selectors_find_pods_and_ports(release):
    pods = [(pod["metadata"]["labels"], pod["spec"]["containers"][0]) for _, pod in release.pods()]
    for deployment, pod in release.pods():
        assert matches(deployment["spec"]["selector"]["matchLabels"], pod["metadata"]["labels"])
        (spread,) = pod["spec"]["topologySpreadConstraints"]
        assert matches(spread["labelSelector"]["matchLabels"], pod["metadata"]["labels"])
    for service in release.of("Service"):
        (container,) = [c for labels, c in pods if matches(service["spec"]["selector"], labels)]
        ports = {port["name"] for port in container["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    budgets = release.of("PodDisruptionBudget")
    assert len(budgets) == len(list(ours(release)))
    for budget in budgets:
        selector = budget["spec"]["selector"]["matchLabels"]
        assert len([1 for labels, _ in pods if matches(selector, labels)]) == 1


def test_the_network_admits_what_services_call_and_nothing_else(release):
    pods = {d["metadata"]["name"]: pod for d, pod in release.pods()}
    policies = release.of("NetworkPolicy")

    def admitted(caller, callee, port):
        """Whether an ingress rule of the callee and an egress rule of the caller allow it."""
        container = pods[callee]["spec"]["containers"][0]
        names = {p["containerPort"]: p["name"] for p in container["ports"]}
        return allows(callee, "ingress", "from", caller, names[port]) and allows(
            caller, "egress", "to", callee, port
        )

    def allows(pod, direction, peers, other, port):
        labels = pods[pod]["metadata"]["labels"]
        (policy,) = [
            p for p in policies if matches(p["spec"]["podSelector"]["matchLabels"], labels)
        ]
        theirs = pods[other]["metadata"]["labels"]
        return any(
            port in [each["port"] for each in rule["ports"]]
            and any(
                "namespaceSelector" not in peer
                and matches(peer.get("podSelector", {}).get("matchLabels", {"no": ""}), theirs)
                for peer in rule.get(peers, [])
            )
            for rule in policy["spec"].get(direction, [])
        )

    kinds = {name: target for name, target, _, _ in ours(release)}
    calls = {("gateway", "encoder"), ("gateway", "llm"), ("llm", "encoder")}
    for caller, kind in kinds.items():
        for callee, called in kinds.items():
            if called != "gateway":
                assert admitted(caller, callee, 7000) == ((kind, called) in calls), (caller, callee)
        if f"{NAME}-redis" in pods:
            assert admitted(caller, f"{NAME}-redis", 6379)


def test_pods_reach_what_the_operator_adds():
    policies = rendered(ELSEWHERE).of("NetworkPolicy")
    assert len(policies) == len(CONFIGS)
    for policy in policies:
        assert {"ports": [{"port": 4317}]} in policy["spec"]["egress"]


def test_operators_find_what_they_scrape_and_scale(release):
    for monitor in release.of("ServiceMonitor"):
        selector = monitor["spec"]["selector"]["matchLabels"]
        found = [s for s in release.of("Service") if matches(selector, s["metadata"]["labels"])]
        (endpoint,) = monitor["spec"]["endpoints"]
        scraped = [s for s in found for p in s["spec"]["ports"] if p["name"] == endpoint["port"]]
        assert {s["metadata"]["name"] for s in scraped} == {name for name, *_ in ours(release)}
        assert all(monitor["spec"]["jobLabel"] in s["metadata"]["labels"] for s in scraped)
    deployments = {d["metadata"]["name"]: d for d in release.of("Deployment")}
    for scaled in release.of("ScaledObject"):
        assert scaled["spec"]["scaleTargetRef"]["name"] in deployments
        assert scaled["spec"]["minReplicaCount"] <= scaled["spec"]["maxReplicaCount"]


# ---- stops, memory, rights


def test_a_pod_may_stop_for_as_long_as_it_drains(release):
    for name, target, container, pod in ours(release):
        flags = dict(word.removeprefix("--").split("=", 1) for word in container["args"])
        waits = [flags["drain-timeout-s"], flags.get("shutdown-delay-s", 0)]
        if target != "gateway":
            waits.append(container["lifecycle"]["preStop"]["sleep"]["seconds"])
        total = sum(float(wait) for wait in waits)
        assert pod["terminationGracePeriodSeconds"] >= total + MARGIN_S, name


def test_shared_memory_is_sized_and_within_the_limit(release):
    for name, target, container, pod in ours(release):
        volumes = {each["name"]: each for each in pod["volumes"]}
        if target != "gateway":
            memory = volumes["shared-memory"]["emptyDir"]
            limit = parse_size(container["resources"]["limits"]["memory"])
            assert memory["medium"] == "Memory" and parse_size(memory["sizeLimit"]) < limit, name
            assert {"name": "shared-memory", "mountPath": "/dev/shm"} in container["volumeMounts"]


def test_pods_are_restricted(release):
    """As the Pod Security Standard "restricted" asks, and with a read-only root."""
    for name, container, pod in release.containers():
        assert not pod["automountServiceAccountToken"] and not pod["enableServiceLinks"], name
        context = pod["securityContext"]
        assert context["runAsNonRoot"] and context["runAsUser"] == 10001
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}


# ---- values, and the base for Kustomize


def test_pools_of_one_model_differ_in_what_they_set():
    release = rendered(EXAMPLE)
    found = {name: container for name, _, container, _ in ours(release)}
    assert found.keys() == {f"{NAME}-{n}" for n in ("gateway", "encoder", "llm", "llm-large")}
    assert "--max-num-seqs=256" in found[f"{NAME}-llm-large"]["args"]
    assert "--max-num-seqs=256" not in found[f"{NAME}-llm"]["args"]
    models = {environment("llm", container)["OPTICNERVE_MODEL"] for container in found.values()}
    assert models == {EXAMPLE["model"]["name"]}
    nodes = {d["metadata"]["name"]: p["spec"].get("nodeSelector") for d, p in release.pods()}
    assert nodes[f"{NAME}-llm"] != nodes[f"{NAME}-llm-large"]
    scaled = {each["metadata"]["name"] for each in release.of("ScaledObject")}
    fixed = {d["metadata"]["name"] for d, _ in release.pods() if "replicas" in d["spec"]}
    assert scaled == found.keys() - fixed == found.keys() - {f"{NAME}-gateway"}


def test_gateways_wait_for_encoders_only_where_there_are_always_some():
    def asked(values):
        containers = {name: container for name, _, container, _ in ours(rendered(values))}
        return containers[f"{NAME}-gateway"]["readinessProbe"]["httpGet"]["path"]

    assert asked({}) == "/ready"
    assert asked(EXAMPLE) == "/ready?pictures=false"
    always = {"always": {"autoscaling": {"minReplicas": 1}}}
    assert asked(EXAMPLE | {"encoders": always}) == "/ready"
    assert asked({"encoders": {"encoder": None}}) == "/ready?pictures=false"


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"encoders": {"llm": {}}}, "two pools are called llm"),
        ({"llms": {"llm": {"sharedmemory": "1Gi"}}}, "sharedmemory"),
        ({"llms": {"gateway": {}}}, "gateway"),
        ({"gatway": {}}, "gatway"),
    ],
)
def test_wrong_values_are_refused(values, fault):
    needs_helm()
    with pytest.raises(RenderError, match=fault):
        render(values)


def test_the_base_is_what_the_chart_renders():
    needs_helm()
    for path, text in kustomize_files().items():
        assert (KUBERNETES / path).read_text() == text, "run python -m tests.manifests"


def kustomization(name):
    return yaml.safe_load((KUBERNETES / name / "kustomization.yaml").read_text())


def test_kustomizations_name_every_file():
    for name in ("base", "autoscaled"):
        files = {path.name for path in (KUBERNETES / name).glob("*.yaml")}
        named = {Path(each).name for each in kustomization(name)["resources"] if each != "../base"}
        assert named == files - {"kustomization.yaml"}


def test_kustomize_builds_the_base_and_leaves_replicas_to_keda():
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run(
        ["kubectl", "kustomize", str(KUBERNETES / "autoscaled")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    release = Release({"": read(done.stdout)})
    scaled = {each["metadata"]["name"] for each in release.of("ScaledObject")}
    with_replicas = {d["metadata"]["name"] for d, _ in release.pods() if "replicas" in d["spec"]}
    assert scaled and not scaled & with_replicas
    assert len(release.of("Deployment")) == len(scaled | with_replicas)
