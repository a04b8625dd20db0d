"""Flags, environment variables and dataclass fields are one thing under one name."""

import argparse

import pytest

from opticnerve import config
from opticnerve.errors import ConfigError

SERVICES = [config.EncoderConfig, config.LLMConfig, config.GatewayConfig, config.UpConfig]


def parse(cls, *argv, environment=None):
    parser = argparse.ArgumentParser()
    config.add_arguments(parser, cls)
    return config.build(cls, vars(parser.parse_args(argv)), environment or {})


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
        (config.EncoderConfig, "--store-ttl-s", "0"),
        (config.GatewayConfig, "--request-timeout-s", "nan"),
        (config.LLMConfig, "--max-num-seqs", "many"),
    ],
)
def test_numbers_out_of_range_are_refused(cls, flag, value, capsys):
    with pytest.raises(SystemExit):
        parse(cls, flag, value)
    assert f"argument {flag}: " in capsys.readouterr().err
    name = "OPTICNERVE_" + flag[2:].replace("-", "_").upper()
    with pytest.raises(ConfigError, match=name):
        parse(cls, environment={name: value})


def test_the_least_number_is_served():
    assert parse(config.LLMConfig, "--metrics-port", "-1", "--max-num-seqs", "1").max_num_seqs == 1


def test_unknown_variable_is_refused():
    config.check_environment({"OPTICNERVE_STORE": "memory://", "PATH": "/bin"})
    with pytest.raises(ConfigError, match="OPTICNERVE_STROE"):
        config.check_environment({"OPTICNERVE_STROE": "memory://"})


@pytest.mark.parametrize("cls", SERVICES)
def test_arguments_make_the_same_configuration_again(cls):
    values = {
        "model": "dir", "threads": 3, "port": 0, "max_images": 2, "public_models": True,
        "allow_remote_media": False, "no_prefix_caching": True, "encoder_devices": ("0", "1"),
        "drain_timeout_s": 1.5,
    }  # fmt: skip
    given = {item.name: values.get(item.name) for item in config.options(cls)}
    argv = []
    for item in config.options(cls):
        value = given[item.name]
        if value is not None:
            argv += [value] if item.name == "model" else item.to_arguments(value)
    assert parse(cls, *argv) == config.build(cls, given, {})


def test_public_view_hides_the_stores_password():
    made = parse(config.EncoderConfig, "--store", "redis://user:secret@host/0")
    assert "secret" not in str(config.public_view(made))
    assert config.public_view(made)["max_batch_patches"] == made.max_batch_patches


def test_an_option_of_one_name_means_one_thing_everywhere():
    """`up` hands a flag to every service that knows it, so their types must agree."""
    seen = {}
    for cls in SERVICES:
        for item in config.options(cls):
            assert seen.setdefault(item.name, item.annotation) == item.annotation, item.name
