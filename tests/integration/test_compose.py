"""``deploy/compose.yaml``: what it says, and every service's command line started here."""

import base64
import contextlib
import re
import shutil
from collections.abc import Iterator

import httpx2
import pytest
import yaml
from compose_spec import PyCompose

from opticnerve.demo.chats import PICTURES, TURNS, Turn
from tests.compose import LocalStack, read_compose, read_services
from tests.redis import find_redis_server
from tests.system import wait_for

SERVICES = read_services()
OURS = [name for name, service in SERVICES.items() if service.stage]
PICTURES_SERVED = "/ready?pictures=true"
START_S = 250.0
MARGIN_S = 10  # What a service does beside its drain.


def seconds(text: str) -> int:
    match = re.fullmatch(r"(\d+)s", text)
    assert match
    return int(match[1])


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_the_compose_specification_knows_every_field(name):
    PyCompose.from_yaml(yaml.safe_dump(read_compose(name)))


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
    names += ["prometheus"] if shutil.which("prometheus") else []
    with LocalStack(tmp_path_factory.mktemp("compose")).running(*names) as stack:
        wait_for("pictures to be served", lambda: answers(stack, PICTURES_SERVED), START_S)
        yield stack


def answers(stack: LocalStack, path: str) -> bool:
    """Whether the gateway answers with 200. Fails if a process has ended."""
    stack.check_running()
    with contextlib.suppress(httpx2.TransportError):
        return httpx2.get(f"{stack.url('gateway', 8000)}{path}", trust_env=False).status_code == 200
    return False


def ask(stack: LocalStack, turn: Turn = TURNS[0]) -> str:
    """The answer to a question about a picture."""
    data = base64.b64encode((PICTURES / turn.pictures[0]).read_bytes()).decode()
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    content = [picture, {"type": "text", "text": turn.question}]
    messages = [{"role": "user", "content": content}]
    key = stack.secret("api-keys").removeprefix("admin: ")
    answer = httpx2.post(
        f"{stack.url('gateway', 8000)}/v1/chat/completions",
        headers={"Authorization": f"Bearer {key}"},
        json={"model": "model", "temperature": 0, "messages": messages},
        timeout=100,
        trust_env=False,
    )
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


@pytest.mark.process
@pytest.mark.redis
@pytest.mark.slow
def test_a_question_about_a_picture_goes_through_every_service(stack):
    assert all(stack.healthy(name) for name in (*OURS, "redis"))
    assert ask(stack) == TURNS[0].answer
    unknown = httpx2.get(f"{stack.url('gateway', 8000)}/v1/models", trust_env=False)
    assert unknown.status_code == 401
