"""Flags, environment variables and dataclass fields are one thing under one name."""

import contextlib
import json

import pytest

from opticnerve import config
from opticnerve.addresses import LOOPBACK, Hosts
from opticnerve.config import command_line
from opticnerve.config.options import (
    Group,
    build,
    format_size,
    options,
    public_view,
    to_command_line,
)
from opticnerve.embeddings.open import open_worker_store
from opticnerve.errors import ConfigError
from opticnerve.local import up
from opticnerve.local.up import child_environment
from opticnerve.media.plan import parse_background
from opticnerve.telemetry import logs

SERVICES = [config.EncoderConfig, config.LLMConfig, config.GatewayConfig, config.UpConfig]


def parse(cls, *argv, environment=None):
    parser = command_line.service_parser("test", "", options(cls))
    return build(cls, vars(parser.parse_args(argv)), environment or {})


@pytest.mark.parametrize("cls", SERVICES)
def test_defaults_need_no_flags(cls):
    assert parse(cls) == cls()


def test_flag_wins_over_environment_wins_over_default():
    environment = {"OPTICNERVE_MAX_NUM_SEQS": "7", "OPTICNERVE_DTYPE": "float32"}
    made = parse(config.LLMConfig, "--max-num-seqs", "9", environment=environment)
    assert made.max_num_seqs == 9
    assert made.model.dtype == "float32"
    assert made.max_num_batched_tokens == config.LLMConfig().max_num_batched_tokens


def test_lists_booleans_and_the_positional_model():
    made = parse(
        config.GatewayConfig,
        "some/model",
        "--encoder-addresses",
        "a:1, b:2",
        "--no-allow-remote-media",
        "--public-models",
    )
    assert made.model.model == "some/model"
    assert made.encoder_addresses == ("a:1", "b:2")
    assert made.allow_remote_media is False
    assert made.public_models is True


def test_negative_flags_are_plain_switches():
    assert parse(config.LLMConfig, "--no-prefix-caching").no_prefix_caching is True
    with pytest.raises(SystemExit):
        parse(config.LLMConfig, "--no-no-prefix-caching")


def test_unknown_flag_and_choice_are_refused(capsys):
    with pytest.raises(SystemExit):
        parse(config.LLMConfig, "--max-num-sequences", "1")
    with pytest.raises(SystemExit):
        parse(config.LLMConfig, "--dtype", "int3")
    assert "float32" in capsys.readouterr().err


def test_bad_variable_names_itself():
    with pytest.raises(ConfigError, match="OPTICNERVE_MAX_NUM_SEQS"):
        parse(config.LLMConfig, environment={"OPTICNERVE_MAX_NUM_SEQS": "many"})


@pytest.mark.parametrize(
    ("cls", "flag", "value"),
    [
        (config.LLMConfig, "--max-num-batched-tokens", "0"),  # No step would ever be made.
        (config.LLMConfig, "--max-num-seqs", "0"),
        (config.LLMConfig, "--kv-cache-tokens", "-1"),
        (config.EncoderConfig, "--threads", "-2"),
        (config.EncoderConfig, "--max-image-pixels", "4095"),  # Smaller than the warm-up's picture.
        (config.GatewayConfig, "--max-image-pixels", "0"),
        (config.EncoderConfig, "--store-ttl-s", "0"),
        (config.GatewayConfig, "--request-timeout-s", "nan"),
        (config.LLMConfig, "--max-num-seqs", "many"),
    ],
)
def test_numbers_out_of_range_are_refused(cls, flag, value, capsys):
    with pytest.raises(SystemExit):
        parse(cls, flag, value)
    assert f"{flag}: expected a " in capsys.readouterr().err
    name = "OPTICNERVE_" + flag[2:].replace("-", "_").upper()
    with pytest.raises(ConfigError, match=name):
        parse(cls, environment={name: value})


def test_the_least_number_is_served():
    assert parse(config.LLMConfig, "--metrics-port", "-1", "--max-num-seqs", "1").max_num_seqs == 1


def test_unknown_variable_is_refused():
    command_line.check_environment({"OPTICNERVE_STORE": "memory://", "PATH": "/bin"})
    with pytest.raises(ConfigError, match="OPTICNERVE_STROE"):
        command_line.check_environment({"OPTICNERVE_STROE": "memory://"})


SERVICE_LINKS = {
    "OPTICNERVE_SERVICE_HOST": "10.0.0.1",
    "OPTICNERVE_SERVICE_PORT": "80",
    "OPTICNERVE_SERVICE_PORT_HTTP": "80",
    "OPTICNERVE_PORT": "tcp://10.0.0.1:80",
    "OPTICNERVE_PORT_80_TCP": "tcp://10.0.0.1:80",
    "OPTICNERVE_PORT_80_TCP_PROTO": "tcp",
    "OPTICNERVE_PORT_80_TCP_PORT": "80",
    "OPTICNERVE_PORT_80_TCP_ADDR": "10.0.0.1",
    "OPTICNERVE_GATEWAY_SERVICE_HOST": "fd00::1",
    "OPTICNERVE_GATEWAY_PORT": "tcp://[fd00::1]:8000",
    "OPTICNERVE_GATEWAY_PORT_8000_UDP_ADDR": "fd00::1",
    "OPTICNERVE_METRICS_PORT": "tcp://10.0.0.2:9090",  # Of a Service `opticnerve-metrics`.
}


@pytest.mark.parametrize("cls", SERVICES)
def test_service_links_of_kubernetes_are_ignored_with_one_line(cls, caplog, monkeypatch):
    command_line.check_environment(SERVICE_LINKS)
    monkeypatch.setattr(logs, "configure", lambda level, form: None)
    command_line.start_logs(config.TelemetryConfig(), SERVICE_LINKS)
    (line,) = caplog.messages
    assert all(name in line for name in SERVICE_LINKS)
    assert parse(cls, environment=SERVICE_LINKS) == cls()


def test_no_child_is_told_of_service_links(monkeypatch):
    for name, value in {**SERVICE_LINKS, "OPTICNERVE_METRICS_PORT": "9100"}.items():
        monkeypatch.setenv(name, value)
    ours = {name for name in child_environment(1) if name in SERVICE_LINKS}
    assert ours == {"OPTICNERVE_METRICS_PORT"}


def test_a_port_is_no_service_link(caplog):
    environment = {"OPTICNERVE_PORT": "8080", "OPTICNERVE_METRICS_PORT": "9090"}
    command_line.check_environment(environment)
    made = parse(config.GatewayConfig, environment=environment)
    assert (made.port, made.telemetry.metrics_port) == (8080, 9090)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OPTICNERVE_PROT", "tcp://10.0.0.1:80"),
        ("OPTICNERVE_PORTS", "8000"),
        ("OPTICNERVE_GATEWAY_PORT", "8000"),
        ("OPTICNERVE_PORT_8000_TCP", "8000"),
        ("OPTICNERVE_SERVICE_HOST", "gateway"),
        ("OPTICNERVE_STORE_TTL", "80"),
    ],
)
def test_what_only_resembles_a_service_link_is_unknown(name, value):
    with pytest.raises(ConfigError, match=name):
        command_line.check_environment({**SERVICE_LINKS, name: value})


@pytest.mark.parametrize("value", ["tcp://10.0.0.1", "http://10.0.0.1:80", "tcp://:80", ""])
def test_a_port_that_is_neither_number_nor_service_link_is_refused(value):
    with pytest.raises(ConfigError, match="OPTICNERVE_PORT: expected a whole number"):
        parse(config.GatewayConfig, environment={"OPTICNERVE_PORT": value})


@pytest.mark.parametrize("cls", SERVICES)
def test_arguments_make_the_same_configuration_again(cls):
    values = {
        "model": "dir", "threads": 3, "port": 0, "max_images": 2, "public_models": True,
        "allow_remote_media": False, "no_prefix_caching": True, "encoder_devices": ("0", "1"),
        "drain_timeout_s": 1.5,
    }  # fmt: skip
    given = {item.name: values.get(item.name) for item in options(cls)}
    argv, variables = to_command_line(options(cls), given)
    assert not variables
    assert parse(cls, *argv) == build(cls, given, {})


def test_public_view_hides_the_stores_password():
    made = parse(config.EncoderConfig, "--store", "redis://user:secret@host/0")
    assert "secret" not in str(public_view(made))
    assert public_view(made)["max_batch_patches"] == made.max_batch_patches


@pytest.mark.parametrize(
    ("store", "told"),
    [
        ("redis://user:hush@host/0", True),
        ("rediss://:hush@host", True),
        ("unix://:hush@/run/redis", True),
        ("redis://host/0?password=hush", True),
        ("redis://:hu#sh/1@host/0", True),
        ("redis://:hush@[bad", True),
        ("redis://user@host:6379/0", False),
        ("redis://[::1]:6379/0", False),
        ("shm:///dir?capacity=1M", False),
        ("file:///run/secrets/store", False),
        ("redis://[bad", False),
    ],
)
@pytest.mark.parametrize("command", ["encoder", "up"])
def test_a_password_on_a_command_line_is_warned_of(command, store, told, capsys, monkeypatch):
    def read(argv):
        argv = [*argv, "--log-format", "json"]
        if command == "encoder":
            command_line.read_config(command, "", config.EncoderConfig, argv)
        else:
            up.main(argv)
        lines = capsys.readouterr().err.splitlines()
        return "".join(json.loads(line)["message"] for line in lines)

    async def run(given):
        return 0

    monkeypatch.setattr(up, "run", run)
    text = read(["--store", store])
    assert bool(text) == told and "hush" not in text and "hu#sh" not in text
    if told:
        assert "OPTICNERVE_STORE" in text and "--store file:///PATH" in text
    monkeypatch.setenv("OPTICNERVE_STORE", store)
    assert not read([])


def test_a_file_may_hold_the_stores_url(tmp_path):
    file = tmp_path / "store"
    settings = config.StoreConfig(store=f"file://{file}")
    file.write_text("redis://:hush@host/0\n")
    assert settings.read_url() == "redis://:hush@host/0"
    assert config.StoreConfig(store="redis://host").read_url() == "redis://host"
    for text in (
        "",
        " \n",
        "redis://:hush@host a",
        "redis://:hush@a\nshm://",
        settings.store,
        "\x80",
    ):
        file.write_text(text, encoding="latin-1")
        with pytest.raises(ConfigError, match=str(file)) as refused:
            settings.read_url()
        assert "hush" not in refused.value.message and refused.value.param == "store"
    file.unlink()
    for store in (settings.store, "file://host/store", "file:///", "file:/store", "file://store"):
        with pytest.raises(ConfigError):
            config.StoreConfig(store=store).read_url()


@pytest.mark.parametrize("settings", [config.EncoderConfig, config.LLMConfig])
def test_workers_open_the_store_that_a_file_names(tmp_path, settings):
    file = tmp_path / "store"
    file.write_text(f"shm://{tmp_path}/tier")
    named = settings(store=config.StoreConfig(store=f"file://{file}"))
    with contextlib.ExitStack() as stack:
        store = open_worker_store(named.store, None, stack)
        assert str(store.directory) == f"{tmp_path}/tier"


@pytest.mark.parametrize("settings", [config.EncoderConfig, config.LLMConfig, config.GatewayConfig])
def test_the_registry_is_the_stores_redis_unless_another_is_named(tmp_path, settings):
    file = tmp_path / "store"
    file.write_text("redis://:hush@host/0\n")

    def registry(*flags):
        return parse(settings, *flags).store.read_registry()

    assert registry() is None
    assert registry("--store", "redis://host/0") == "redis://host/0"
    assert registry("--store", f"file://{file}") == "redis://:hush@host/0"
    assert registry("--store", "redis://host/0", "--registry", "none") is None
    assert registry("--store", "shm://", "--registry", "rediss://host/1") == "rediss://host/1"
    assert registry("--registry", f"file://{file}") == "redis://:hush@host/0"
    file.write_text("shm://\n")
    assert registry("--store", f"file://{file}") is None
    for flags in (
        ("--registry", f"file://{file}"),
        ("--registry", f"file://{file}x"),
        ("--registry", "redis://[bad"),
        ("--store", "redis://[bad"),
    ):
        with pytest.raises(ConfigError) as refused:
            registry(*flags)
        assert refused.value.param == flags[0][2:] and "hush" not in refused.value.message
    with pytest.raises(SystemExit):
        registry("--registry", "http://host")
    assert public_view(parse(settings, "--registry", "redis://:hush@h"))["registry"] == "***"


def test_a_worker_that_others_cannot_reach_joins_no_registry_elsewhere(caplog):
    elsewhere, here = "redis://cache:6379/0", "redis://127.0.0.1:6379/0"

    def joins(*flags):
        made = parse(config.EncoderConfig, "--insecure", *flags)
        return made.store.registry_of_worker(made.rpc)

    advertised = ("--host", "0.0.0.0", "--advertise", "encoder-1:7001")
    assert joins("--registry", elsewhere, *advertised) == elsewhere
    assert joins("--registry", elsewhere, "--host", "10.0.0.5") == elsewhere
    assert joins("--registry", here) == here
    for flags in ((), ("--host", "0.0.0.0"), ("--advertise", "localhost:7001")):
        with pytest.raises(ConfigError, match="--advertise HOST:PORT"):
            joins("--registry", elsewhere, *flags)
        assert not caplog.records
        assert joins("--store", elsewhere, *flags) is None
        assert "--advertise HOST:PORT" in caplog.text
        caplog.clear()


def test_an_option_of_one_name_means_one_thing_everywhere():
    """`up` hands a flag to every service that knows it, so their types must agree."""
    seen = {}
    for cls in SERVICES:
        for item in options(cls):
            assert seen.setdefault(item.name, item.annotation) == item.annotation, item.name


def test_an_error_names_the_place_the_value_and_what_is_expected(capsys):
    expected = "expected a whole number from 0 to 65535, got 'abc'"
    with pytest.raises(ConfigError) as caught:
        parse(config.GatewayConfig, environment={"OPTICNERVE_PORT": "abc"})
    assert caught.value.message == f"OPTICNERVE_PORT: {expected}"
    with pytest.raises(SystemExit) as exit:
        parse(config.GatewayConfig, "--port", "abc")
    assert exit.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        f"opticnerve test: --port: {expected}",
        "See `opticnerve test --help`.",
    ]


@pytest.mark.parametrize(
    ("cls", "name", "value", "expected"),
    [
        (config.GatewayConfig, "port", "65536", "a whole number from 0 to 65535"),
        (config.GatewayConfig, "max_media_bytes", "20 apples", "a size such as"),
        (config.GatewayConfig, "media_timeout_s", "inf", "a number from 0 up"),
        (config.GatewayConfig, "llm_addresses", "a:1,localhost", "HOST:PORT"),
        (config.GatewayConfig, "encoder_addresses", "dns:///encoder", "HOST:PORT"),
        (config.EncoderConfig, "advertise", "encoder-1", "HOST:PORT"),
        (config.EncoderConfig, "advertise", "encoder-1:0", "HOST:PORT"),
        (config.EncoderConfig, "advertise", "http://encoder-1:7001", "HOST:PORT"),
        *(
            (cls, "advertise", value, "HOST:PORT that the other services call, such as 10.0.0.5:")
            for cls in (config.EncoderConfig, config.LLMConfig)
            for value in (
                "0.0.0.0:7001",
                "[::]:7001",
                "[::0]:7001",
                "[::ffff:0.0.0.0]:7001",
                "0:7001",
                "0x0:7001",
                "*:7001",
                "10.0.0.5:0",
                "10.0.0.5:00000",
            )
        ),
        (config.EncoderConfig, "log_level", "loud", "one of debug, info, warning, error"),
        (config.GatewayConfig, "public_models", "maybe", "true or false"),
        *(
            (config.GatewayConfig, "image_background", value, "an opaque colour such as white")
            for value in ("blurple", "", "#fff8", "transparent", "rgb(0, 0, 256)")
        ),
    ],
)
def test_what_is_expected_of_every_kind_of_value(cls, name, value, expected):
    variable = f"OPTICNERVE_{name.upper()}"
    with pytest.raises(ConfigError) as caught:
        parse(cls, environment={variable: value})
    assert caught.value.message.startswith(f"{variable}: expected {expected}")
    assert caught.value.message.endswith(f", got {value!r}")


@pytest.mark.parametrize(
    ("value", "background"),
    [
        ("white", 0xFFFFFF),
        ("Black", 0),
        ("#f80", 0xFF8800),
        ("#102030", 0x102030),
        ("rgb(1, 2, 3)", 0x010203),
        ("#ff8800ff", 0xFF8800),
        ("none", None),
        ("None", None),
    ],
)
def test_backgrounds(value, background):
    made = parse(config.GatewayConfig, "--image-background", value)
    assert parse_background(made.image_background) == background


def test_sizes_have_units():
    made = parse(config.GatewayConfig, "--max-media-bytes", "512M", "--max-request-bytes", "2 GB")
    assert (made.max_media_bytes, made.max_request_bytes) == (512 * 2**20, 2 * 10**9)
    assert parse(config.GatewayConfig, "--max-media-bytes", "1000").max_media_bytes == 1000
    assert [format_size(n) for n in (0, 1000, 20 * 2**20, 2**30)] == ["0", "1000", "20MiB", "1GiB"]


def test_addresses():
    text = "10.0.0.1:7001,[::1]:7002,dns:///llm.default:7003"
    made = parse(config.GatewayConfig, "--llm-addresses", text)
    assert made.llm_addresses == tuple(text.split(","))


@pytest.mark.parametrize("text", ["10.0.0.5:7001", "[fd00::1]:7001", "encoder-0.encoders:7001"])
def test_an_address_that_others_can_call_is_advertised(text):
    assert parse(config.EncoderConfig, "--advertise", text).rpc.advertise == text


def test_the_nearest_known_name_is_offered(capsys):
    with pytest.raises(SystemExit):
        parse(config.LLMConfig, "--max-num-sequences", "1")
    assert "unknown flag --max-num-sequences, did you mean --max-num-seqs?" in (
        capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        parse(config.LLMConfig, "--max-num", "1")  # A flag is not cut short.
    with pytest.raises(ConfigError, match=r"did you mean OPTICNERVE_STORE\?"):
        command_line.check_environment({"OPTICNERVE_STROE": "memory://"})


@pytest.mark.parametrize("cls", SERVICES)
def test_every_option_has_its_place_in_help(cls):
    for item in options(cls):
        spec = item.spec
        assert spec.group in Group, item.name
        assert spec.help, item.name
        named = item.metavar or spec.choices or item.kind is bool or item.name == "model"
        assert named, f"{item.name} needs a metavar"


def test_internal_flags_work_and_are_not_shown():
    assert parse(config.LLMConfig, "--parent-pid", "7").rpc.parent_pid == 7
    parser = command_line.service_parser("llm", "", options(config.LLMConfig))
    assert "--parent-pid" not in parser.format_help()
    assert "parent_pid" not in public_view(config.LLMConfig())


def test_hosts_are_names_all_below_a_name_addresses_and_networks():
    hosts = Hosts(["encoder-1", "*.eyes.svc", "10.0.0.0/8", "192.0.2.7", "[2001:db8::]/32"])
    for host in ("encoder-1", "Encoder-1.", "a.eyes.svc", "a.b.eyes.svc", "10.2.3.4", "192.0.2.7",
                 "[2001:db8::5]", "2001:db8::5", "::ffff:10.0.0.1"):  # fmt: skip
        assert host in hosts, host
    for host in ("encoder-2", "eyes.svc", "evileyes.svc", "11.0.0.1", "192.0.2.8", "10.1", "",
                 "a%2f.eyes.svc", "a/b.eyes.svc", "2001:db9::5", "127.0.0.1"):  # fmt: skip
        assert host not in hosts, host
    for host in ("127.0.0.1", "127.9.9.9", "localhost", "::1"):
        assert host in Hosts(LOOPBACK)
    for text in ("", "a b", "10.0.0.0/99", "http://x", "*", "a:1"):
        with pytest.raises(ValueError):
            Hosts([text])
