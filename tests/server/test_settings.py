"""What a server may be asked for: defaults that work, values that are refused by name, and secrets that stay secret."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from penstock.errors import ConfigError
from penstock.server.settings import ServeConfig


def test_the_defaults_are_safe() -> None:
    config = ServeConfig()
    assert config.host == "127.0.0.1" and config.allow_remote_media == [] and config.api_key == []
    assert config.max_batch_size == 1 and not config.lora_dir
    assert config.most_pixels == 4096 * 4096
    assert config.upload_bytes == 64 * 1024**2 and config.storage_bytes == 20 * 1024**3


def test_every_option_has_a_help_text() -> None:
    assert all(item.metadata["help"].endswith((".", "none else.")) for item in fields(ServeConfig))


def test_secrets_are_not_shown() -> None:
    config = ServeConfig(api_key=["hunter2"], database="postgresql://user:hunter2@host/name")
    assert "hunter2" not in repr(config) and "hunter2" not in str(config)
    assert replace(config, port=1).api_key == ["hunter2"]


def test_lists_are_copies_and_none_is_an_empty_one() -> None:
    keys = ["a", "b"]
    config = ServeConfig(api_key=keys, allow_remote_media=None)  # type: ignore[arg-type]
    keys.append("c")
    assert config.api_key == ["a", "b"] and config.allow_remote_media == []


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("port", [-1, 65536, "8000", True, 1.5]),
        *((name, [0, -1, "4", True, 1.0]) for name in ("max_queue", "max_batch_size", "max_images", "ttl_s")),
        ("start_timeout_s", [0, -1.0, float("nan")]),
        ("step_timeout_s", [0.0]),
        ("rank_timeout_s", [0.0, -2.0]),
        ("max_upload", ["4G", "-1", "0"]),
        ("allow_host", [["a b"], [""], ["example.org:80"], ["http://example.org"], ["good.org", "::1"]]),
        ("max_storage", ["lots"]),
        ("lora_dir", ["/nowhere/at/all", __file__]),
        ("max_pixels", ["", "4096", "0x10", "10x0", "4096X4096", "4096x4096x3", "9" * 5000 + "x1", "-1x4"]),
        ("log_format", ["", "xml"]),
        ("trusted_proxy", [["proxy"], ["127.0.0.1", "*"]]),
        ("storage", ["/folder", "gs://bucket", "http://host"]),
        ("host", ["", " "]),
        ("server_name", [""]),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_its_name(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=f"^{name}"):
            ServeConfig(**{name: value})


@pytest.mark.parametrize("key", ["", " ", "line\nbreak", "caf\u00e9", "nul\x00"])
def test_a_key_that_no_header_can_hold_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(ConfigError, match="an API key is empty, or holds") as caught:
        ServeConfig(api_key=["good", key])
    assert "good" not in str(caught.value)


def test_names_of_hosts_are_taken() -> None:
    assert ServeConfig(allow_host=["example.org", "studio", "[::1]", "10.0.0.7"]).allow_host[1] == "studio"


def test_no_size_that_cannot_work_is_suggested() -> None:
    with pytest.raises(ConfigError) as caught:
        ServeConfig(max_upload="-1")
    assert "such as 0" not in str(caught.value)


@pytest.mark.parametrize("storage", ["", "file:///folder", "s3://bucket/prefix", "memory:"])
def test_every_kind_of_storage_is_taken(storage: str) -> None:
    assert ServeConfig(storage=storage, port=0, max_pixels="1x1").most_pixels == 1
