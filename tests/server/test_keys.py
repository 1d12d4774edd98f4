"""Keys, and who may ask a server that has none."""

from __future__ import annotations

import hmac
import socket
from pathlib import Path

import pytest

from penstock.errors import ConfigError
from penstock.server.keys import Keys, check_binding, is_loopback
from tests.server.live import serving


def test_owner_is_a_digest_of_the_key() -> None:
    keys = Keys(["sk-ann", "sk-bob"])
    ann, bob = keys.owner_of("Bearer sk-ann"), keys.owner_of("bearer  sk-bob ")
    assert ann and bob and ann != bob and "sk" not in ann
    assert Keys(["sk-ann"]).owner_of("Bearer sk-ann") == ann  # the same after a restart
    assert "sk-ann" not in repr(vars(keys))


@pytest.mark.parametrize("header", [None, "", "sk-ann", "Bearer", "Bearer sk-an", "Bearer sk-annn", "Basic sk-ann"])
def test_what_is_no_key(header: str | None) -> None:
    assert Keys(["sk-ann"]).owner_of(header) is None
    assert Keys([]).owner_of(header) == ""


def test_every_key_is_compared_whichever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: bool(compared.append(b)) or a == b)
    keys = Keys(["one", "two", "three"])
    for header in ("Bearer one", "Bearer three", "Bearer none"):
        compared.clear()
        keys.owner_of(header)
        assert len(compared) == 3


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "127.9.9.9"])
def test_loopback_needs_no_key(host: str) -> None:
    assert is_loopback(host)
    check_binding(host, has_keys=False, no_auth=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org"])
def test_a_network_wants_a_key(host: str) -> None:
    with pytest.raises(ConfigError, match="--api-key"):
        check_binding(host, has_keys=False, no_auth=False)
    check_binding(host, has_keys=True, no_auth=False)
    check_binding(host, has_keys=False, no_auth=True)
    with pytest.raises(ConfigError, match="Give one of them"):
        check_binding(host, has_keys=True, no_auth=True)


def test_another_host_name_is_refused_without_keys(tmp_path: Path) -> None:
    """A stranger's page whose name was made to lead to this machine sends its own name as Host."""
    with serving(tmp_path) as live, live.client() as http:
        port = live.url.rpartition(":")[2]
        for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", ""):
            answer = http.get("/health", headers={"host": host})
            assert answer.status_code in (400, 421), host
        for host in (f"localhost:{port}", "127.0.0.1", f"[::1]:{port}"):
            assert http.get("/health", headers={"host": host}).status_code == 200


def test_a_network_without_keys_answers_to_its_own_names_only(tmp_path: Path) -> None:
    with serving(tmp_path, host="0.0.0.0", no_auth=True, allow_host=["gpu.example.org"]) as live, live.client() as http:
        for host in ("evil.example", "evil.example:80", ""):
            assert http.get("/health", headers={"host": host}).status_code == 421, host
        for host in ("GPU.example.org:80", "192.168.7.8:1", "[fe80::1]:80", "localhost", socket.gethostname()):
            assert http.get("/health", headers={"host": host}).status_code == 200, host
    with serving(tmp_path) as live, live.client() as http:  # on this machine only, an address of a network is strange
        assert http.get("/health", headers={"host": "192.168.7.8"}).status_code == 421


@pytest.mark.parametrize("host", ["[", "[::1", "[1]", "a b", "a:99999", "a/b", "a@b", "::1", "[::1]x"])
def test_a_host_that_cannot_be_read(tmp_path: Path, host: str) -> None:
    for settings in ({"api_key": ["sk-ann"]}, {}):
        with serving(tmp_path, **settings) as live, live.client("sk-ann") as http:
            for path in ("/health", "/nothing"):
                assert http.get(path, headers={"host": host}).status_code == 400


def test_another_sites_page_may_not_change_anything(tmp_path: Path) -> None:
    body = {"prompt": "a red circle"}
    with serving(tmp_path) as live, live.client() as http:
        for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
            answer = http.post("/v1/images/generations", json=body, headers={"origin": origin})
            assert answer.status_code == 403 and answer.json()["error"]["code"] == "foreign_origin"
            assert http.get("/v1/jobs", headers={"origin": origin}).headers.get("access-control-allow-origin") is None
        assert http.post("/v1/images/generations", json=body, headers={"origin": live.url}).status_code == 200
        assert len(live.engine.orders) == 1


def test_what_is_open_and_what_is_not_with_keys(tmp_path: Path) -> None:
    with serving(tmp_path, api_key=["sk-ann"]) as live, live.client() as http:
        for path in ("/", "/health", "/ready", "/v1/files/0"):
            assert http.get(path).status_code in (200, 404), path
        for path in ("/metrics", "/v1/config", "/v1/models", "/v1/jobs", "/openapi.json", "/nothing"):
            answer = http.get(path)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer", path
        good = {"authorization": "Bearer sk-ann", "host": "a-name.example", "origin": "https://any.example"}
        assert http.post("/v1/images/generations", json={"prompt": "x"}, headers=good).status_code == 200
