"""``deploy/compose.yaml``: what it says, and every service's command line started here."""

import json
import re
import subprocess
from collections.abc import Iterator

import httpx2
import pytest
import yaml
from compose_spec import PyCompose

from opticnerve.demo.chats import TURNS
from tests.compose import DEPLOY, LocalStack, read_compose, read_services
from tests.images import ROOT
from tests.prometheus import Prometheus, find_prometheus
from tests.redis import find_redis_server
from tests.system import wait_for

SERVICES = read_services()
OURS = [name for name, service in SERVICES.items() if service.stage]
MARGIN_S = 10  # What a service does beside its drain.


def seconds(text: str) -> int:
    match = re.fullmatch(r"(\d+)s", text)
    assert match
    return int(match[1])


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_the_compose_specification_knows_every_field(name):
    PyCompose.from_yaml(yaml.safe_dump(read_compose(name)))


def test_each_worker_can_have_a_gpu_of_its_own():
    given = {"LLM_GPU": "0", "ENCODER_1_GPU": "1", "ENCODER_2_GPU": "GPU-8f"}
    services = read_compose("compose.gpu.yaml", given)["services"]
    devices = {
        name: service["deploy"]["resources"]["reservations"]["devices"]
        for name, service in services.items()
    }
    asked = {name: each["device_ids"] for name, (each,) in devices.items()}
    assert asked == {"llm": ["0"], "encoder-1": ["1"], "encoder-2": ["GPU-8f"]}


def test_only_the_gateway_and_grafana_are_reached_and_from_this_machine_alone():
    published = {name: s.settings["ports"] for name, s in SERVICES.items() if "ports" in s.settings}
    assert published == {"gateway": ["127.0.0.1:8000:8000"], "grafana": ["127.0.0.1:3000:3000"]}
    networks = read_compose()["networks"]
    inside = [name for name, s in SERVICES.items() if s.settings["networks"] == ["services"]]
    assert networks["services"]["internal"] and {"redis", "prometheus"} == set(inside)


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_cannot_write_to_its_image_or_gain_rights(name):
    settings = SERVICES[name].settings
    assert settings["read_only"] and settings["cap_drop"] == ["ALL"]
    assert settings["security_opt"] == ["no-new-privileges:true"]
    assert settings["restart"] == "unless-stopped" and settings["init"]
    assert SERVICES[name].check, "no health check"


@pytest.mark.process
def test_every_secret_is_a_file_that_the_script_makes(tmp_path):
    stack, compose = LocalStack(tmp_path), read_compose()
    made = {f"./secrets/{path.name}" for path in (stack.deploy / "secrets").iterdir()}
    assert {secret["file"] for secret in compose["secrets"].values()} == made
    for name, service in SERVICES.items():
        words = " ".join([*service.command, *service.environment.values()]) if service.stage else ""
        named = set(re.findall(r"/run/secrets/([\w.-]+)", words))
        assert named <= set(service.settings.get("secrets", [])) <= set(compose["secrets"]), name
    secrets = [path.read_text() for path in (stack.deploy / "secrets").iterdir()]
    assert len(set(secrets)) == len(secrets) == len(made)
    env = stack.deploy / ".env"
    env.write_text(f"{env.read_text()}OPTICNERVE_MODEL=mine\n")
    written = env.read_text()
    subprocess.run(["sh", str(stack.deploy / "secrets.sh")], check=True, capture_output=True)
    assert env.read_text() == written
    assert [path.read_text() for path in (stack.deploy / "secrets").iterdir()] == secrets
    with pytest.raises(KeyError, match=r"OPTICNERVE_SECRETS_GID: run deploy/secrets.sh first"):
        read_compose(variables={})


@pytest.mark.parametrize("name", OURS)
def test_a_stop_waits_for_the_drain(name):
    service = SERVICES[name]
    drain = int(service.environment["OPTICNERVE_DRAIN_TIMEOUT_S"])
    assert seconds(service.settings["stop_grace_period"]) >= drain + MARGIN_S


def test_redis_is_a_cache_of_bounded_memory():
    words = SERVICES["redis"].command
    given = dict(zip(words[2::2], words[3::2], strict=True))
    assert given["--maxmemory"] == "1gb" and given["--maxmemory-policy"] == "allkeys-lru"
    assert given["--save"] == "" and given["--appendonly"] == "no"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """Every service of which this machine has the program; Grafana is not among them."""
    if find_redis_server() is None:
        pytest.skip("redis-server is not installed")
    names = ["redis", "encoder-1", "encoder-2", "llm", "gateway"]
    names += ["prometheus"] if find_prometheus() else []
    with LocalStack(tmp_path_factory.mktemp("compose")).running(*names) as stack:
        yield stack


@pytest.mark.process
@pytest.mark.redis
@pytest.mark.slow
def test_a_question_about_a_picture_goes_through_every_service(stack):
    assert all(stack.healthy(name) for name in (*OURS, "redis"))
    assert stack.ask() == TURNS[0].answer
    unknown = httpx2.get(f"{stack.url('gateway', 8000)}/v1/models", trust_env=False)
    assert unknown.status_code == 401


# ---- what Prometheus and Grafana show of it

# Counters that have no series before their first event: faults, and what is full.
EVENTS = (
    "opticnerve_errors_total",
    "opticnerve_embedding_evictions_total",
    "opticnerve_retries_total",
    "opticnerve_reencodes_total",
    "opticnerve_store_failures_total",
    "opticnerve_embeddings_refused_total",
    "opticnerve_batches_split_total",
    "opticnerve_decodes_ended_total",
)
INTERVAL_S = 20  # Of rates: Grafana's $__rate_interval.


@pytest.fixture(scope="module")
def prometheus(stack: LocalStack) -> Prometheus:
    """Prometheus, after requests that every service has counted and that it has scraped twice."""
    if "prometheus" not in stack.processes:
        pytest.skip("prometheus is not installed")
    prometheus = Prometheus(stack.url("prometheus", 9090))
    for turn in (TURNS[0], TURNS[0], TURNS[1]):
        stack.ask(turn)
    counted = (
        "count(rate(opticnerve_tokens_total[1m])) and count(rate(opticnerve_llm_tokens_total[1m]))"
    )
    wait_for("the counters of all services", lambda: prometheus.query(counted))
    return prometheus


def expressions() -> list[str]:
    """The query of every panel of the dashboard, with Grafana's variables filled in."""
    panels = json.loads((DEPLOY / "grafana/dashboards/opticnerve.json").read_text())["panels"]
    found = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    variables = {"$namespace": ".*", "$__rate_interval": f"{INTERVAL_S}s"}
    for name, value in variables.items():
        found = [each.replace(name, value) for each in found]
    return found


def alerts() -> list[dict[str, str]]:
    (group,) = yaml.safe_load((DEPLOY / "prometheus/alerts.yaml").read_text())["groups"]
    rules: list[dict[str, str]] = group["rules"]
    return rules


@pytest.mark.process
@pytest.mark.redis
@pytest.mark.slow
def test_every_panel_shows_something(prometheus):
    for expression in ("count(up == 1) == 4", *expressions()):
        if not re.search("|".join(EVENTS), expression):
            # A scrape that failed leaves a gap.
            wait_for(expression, lambda expression=expression: prometheus.query(expression))
        prometheus.query(expression)


@pytest.mark.process
@pytest.mark.redis
@pytest.mark.slow
def test_panels_and_alerts_name_metrics_that_services_export(prometheus):
    exported = prometheus.get("metadata")
    texts = [*expressions(), *(alert["expr"] for alert in alerts())]
    named = set(re.findall(r"opticnerve_\w+", " ".join(texts)))
    families = {re.sub("_(bucket|sum|count|total)$", "", name): name for name in named}
    assert {
        name for family, name in families.items() if not {family, name} & exported.keys()
    } == set()


@pytest.mark.process
@pytest.mark.redis
@pytest.mark.slow
def test_no_alert_fires_while_all_is_well(prometheus):
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert [rule["name"] for rule in rules] == [alert["alert"] for alert in alerts()]
    assert [rule["name"] for rule in rules if rule["health"] == "err"] == []
    assert [alert["alert"] for alert in alerts() if prometheus.query(alert["expr"])] == []
    assert all(alert["annotations"]["action"] for alert in alerts())


def test_operations_describes_every_alert_that_pages_somebody():
    severities = {alert["alert"]: alert["labels"]["severity"] for alert in alerts()}
    assert set(severities.values()) == {"critical", "warning"}
    text = (ROOT / "docs/operations.md").read_text().partition("\n## Where")[0]
    described = re.findall(r"^\| `(OpticNerve\w+)`", text, re.MULTILINE)
    assert sorted(described) == sorted(n for n, level in severities.items() if level == "critical")
    assert set(re.findall(r"OpticNerve[A-Z]\w+", text)) <= severities.keys()


def test_grafana_finds_prometheus_and_the_dashboards():
    grafana, mounts = DEPLOY / "grafana", SERVICES["grafana"].settings["volumes"]
    (source,) = yaml.safe_load((grafana / "provisioning/datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((grafana / "provisioning/dashboards/opticnerve.yaml").read_text())[
        "providers"
    ]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in mounts
