"""What is fetched by URL, and above all what is not: against real servers on this machine."""

from __future__ import annotations

import asyncio
import base64
import ipaddress
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from penstock.errors import ConfigError, RequestError
from penstock.server.remote import RemoteError, RemoteMedia, is_public, resolve
from penstock.server.uploads import TooLargeError
from tests.server.site import CONTENT, Site, certificates

MOST = len(CONTENT)


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.close()


def at(*addresses: str) -> Any:
    """A resolver that knows one answer, and counts how often it is asked."""

    async def find(host: str, port: int) -> Sequence[str]:
        find.hosts.append((host, port))  # type: ignore[attr-defined]
        return addresses

    find.hosts = []  # type: ignore[attr-defined]
    return find


def media(*allowed: str, **options: Any) -> RemoteMedia:
    """One that may connect to this machine."""
    given = {"max_bytes": MOST, "resolve": at("127.0.0.1"), "may_connect": lambda address: address.is_loopback}
    return RemoteMedia(allowed, **{**given, **options})


def fetch(remote: RemoteMedia, url: str) -> bytes:
    return asyncio.run(remote.fetch(url, "input_reference"))


# ---- data: URLs


@pytest.mark.parametrize(
    ("url", "content"),
    [
        ("data:image/png;base64,aGVsbG8=", b"hello"),
        ("data:;base64,aGVsbG8%3D", b"hello"),
        ("DATA:text/plain,a%20b", b"a b"),
        ("data:image/png;base64,", b""),
    ],
)
def test_a_data_url_is_read_though_nothing_is_fetched(url: str, content: bytes) -> None:
    assert fetch(RemoteMedia([], max_bytes=10), url) == content


@pytest.mark.parametrize(
    "url", ["data:", "data:image/png;base64", "data:;base64,a", "data:;base64,aGVs*bG8=", "data:;base64,\ud800"]
)
def test_a_data_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(RemoteError, match="^input_reference is a data: URL") as caught:
        fetch(RemoteMedia([], max_bytes=10), url)
    assert isinstance(caught.value, RequestError) and caught.value.param == "input_reference"


def test_a_data_url_has_the_limit_as_well() -> None:
    exact = "data:;base64," + base64.b64encode(bytes(1000)).decode()
    assert len(fetch(RemoteMedia([], max_bytes=1000), exact)) == 1000
    for url in (exact, "data:," + "x" * 10**6):
        with pytest.raises(TooLargeError, match="more than 999 B"):
            fetch(RemoteMedia([], max_bytes=999), url)


# ---- what is fetched


def test_a_picture_comes_from_the_address_that_was_checked_under_the_name_that_was_asked(site: Site) -> None:
    find = at("127.0.0.1")
    remote = media(f"media.test:{site.port}", resolve=find)
    assert fetch(remote, f"http://media.test:{site.port}/picture") == CONTENT
    assert find.hosts == [("media.test", site.port)]  # once: the answer cannot change between check and connection
    ((path, headers),) = site.seen
    assert path == "/picture" and headers["host"] == f"media.test:{site.port}"
    assert headers["accept-encoding"] == "identity" and not {"cookie", "authorization"} & headers.keys()


def test_the_environments_proxy_is_not_used(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    assert fetch(media(f"media.test:{site.port}"), f"http://media.test:{site.port}/picture") == CONTENT


def test_the_next_address_is_tried_where_one_does_not_answer(site: Site) -> None:
    remote = media(f"media.test:{site.port}", resolve=at("127.0.0.9", "127.0.0.1"))
    assert fetch(remote, f"http://media.test:{site.port}/picture") == CONTENT


def test_redirects_are_followed_three_times(site: Site) -> None:
    find = at("127.0.0.1")
    remote = media(f"media.test:{site.port}", f"*.media.test:{site.port}", resolve=find)
    start = f"http://media.test:{site.port}"
    there = f"http://cdn.media.test:{site.port}/picture"
    assert fetch(remote, f"{start}/to//to//to/{there}") == CONTENT
    assert len(find.hosts) == 4 and find.hosts[-1][0] == "cdn.media.test"
    with pytest.raises(RemoteError, match="redirects more than 3 times"):
        fetch(remote, f"{start}/to//to//to//to/{there}")


def test_tls_is_checked_against_the_name_and_not_the_address(tmp_path: Path) -> None:
    server, trust = certificates(tmp_path, "media.test")
    site = Site(server)
    try:
        for name in ("media.test", "other.test"):
            remote = media(f"{name}:{site.port}", tls=trust)
            if name == "media.test":
                assert fetch(remote, f"https://{name}:{site.port}/picture") == CONTENT
                with pytest.raises(RemoteError, match="redirects from https to http"):
                    fetch(remote, f"https://{name}:{site.port}/to/http://{name}:{site.port}/picture")
            else:
                with pytest.raises(RemoteError, match="cannot be fetched: ConnectError"):
                    fetch(remote, f"https://{name}:{site.port}/picture")
        with pytest.raises(RemoteError, match="cannot be fetched"):
            fetch(media(f"media.test:{site.port}"), f"https://media.test:{site.port}/picture")  # nobody vouches for it
    finally:
        site.close()


# ---- what is not


def test_nothing_is_fetched_where_nobody_allowed_it(site: Site) -> None:
    with pytest.raises(RemoteError, match="fetches none. .*--allow-remote-media"):
        fetch(media(), f"http://127.0.0.1:{site.port}/picture")
    assert not site.seen


@pytest.mark.parametrize(
    "host", ["other.test", "media.test.evil.test", "evilmedia.test", "media.test.", "127.0.0.1", "cdn.media.test:81"]
)
def test_other_hosts_are_not_asked(site: Site, host: str) -> None:
    find = at("127.0.0.1")
    port = "" if ":" in host else f":{site.port}"
    allowed = (f"cdn.media.test:{site.port}", f"*.sub.media.test:{site.port}", "media.test")
    with pytest.raises(RemoteError, match="not among the hosts"):
        fetch(media(*allowed, resolve=find), f"http://{host}{port}/picture")
    assert not site.seen and not find.hosts


def test_a_star_means_what_is_below_and_case_does_not_matter(site: Site) -> None:
    remote = media(f"*.Media.test:{site.port}")
    assert fetch(remote, f"http://a.b.MEDIA.test:{site.port}/picture") == CONTENT
    assert fetch(remote, f"http://a.media.test.:{site.port}/picture") == CONTENT
    for host in ("media.test", "amedia.test", ".media.test"):
        with pytest.raises(RemoteError):
            fetch(remote, f"http://{host}:{site.port}/picture")


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f.1", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]"]
)
def test_this_machine_is_refused_by_default_however_it_is_spelt(site: Site, host: str) -> None:
    remote = RemoteMedia([f"{host}:{site.port}"], max_bytes=MOST)
    with pytest.raises(RemoteError, match="public internet|cannot be resolved|not among"):
        fetch(remote, f"http://{host}:{site.port}/picture")
    assert not site.seen


def test_one_private_address_among_public_ones_is_one_too_many(site: Site) -> None:
    remote = RemoteMedia([f"media.test:{site.port}"], max_bytes=MOST, resolve=at("93.184.216.34", "127.0.0.1"))
    with pytest.raises(RemoteError, match="not \\(only\\) on the public internet"):
        fetch(remote, f"http://media.test:{site.port}/picture")
    assert not site.seen


def test_a_redirect_to_a_private_address_or_another_host_is_refused(site: Site) -> None:
    answers = {"media.test": "127.0.0.1", "inside.media.test": "127.0.0.2"}

    async def find(host: str, port: int) -> Sequence[str]:
        return [answers[host]]

    is_first = lambda address: str(address) == "127.0.0.1"  # noqa: E731
    remote = media(f"media.test:{site.port}", f"*.media.test:{site.port}", resolve=find, may_connect=is_first)
    start = f"http://media.test:{site.port}/to/"
    with pytest.raises(RemoteError, match="public internet"):
        fetch(remote, f"{start}http://inside.media.test:{site.port}/picture")
    with pytest.raises(RemoteError, match="not among the hosts"):
        fetch(remote, f"{start}http://169.254.169.254/latest/meta-data")
    for other in ("file:///etc/passwd", "ftp://media.test/x", "data:,x", "http://user:password@media.test/"):
        with pytest.raises(RemoteError, match="is no URL|InvalidURL"):
            fetch(remote, start + other)
    assert all(path.startswith("/to/") for path, _ in site.seen)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "picture.png",
        "file:///etc/passwd",
        "http://",
        "http:///x",
        "http://a b/",
        "gopher://x",
        "http://\ud800/",
        "http://u:p@media.test/",
        "http://[::1",
        "http://" + "x" * 9000,
    ],
)
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(RemoteError, match="^input_reference is no URL"):
        fetch(media("media.test"), url)


def test_the_limit_holds_while_it_arrives(site: Site) -> None:
    remote = media(f"media.test:{site.port}", max_bytes=MOST - 1)
    with pytest.raises(TooLargeError, match="more than 10 KiB"):
        fetch(remote, f"http://media.test:{site.port}/picture")
    with pytest.raises(TooLargeError):
        fetch(remote, f"http://media.test:{site.port}/endless")
    site.leave.set()
    assert site.num_bytes < 64 * 1024**2


def test_who_is_slow_is_left(site: Site) -> None:
    with pytest.raises(RemoteError, match="did not arrive within 0.2 seconds"):
        fetch(media(f"media.test:{site.port}", timeout_s=0.2), f"http://media.test:{site.port}/slow")


def test_an_answer_that_is_no_picture_is_refused(site: Site) -> None:
    remote = media(f"media.test:{site.port}")
    with pytest.raises(RemoteError, match="was answered 404"):
        fetch(remote, f"http://media.test:{site.port}/nothing")
    with pytest.raises(RemoteError, match="comes compressed"):
        fetch(remote, f"http://media.test:{site.port}/zipped")
    with pytest.raises(RemoteError, match="cannot be fetched: ConnectError"):
        fetch(media("media.test:1"), "http://media.test:1/picture")


def test_a_name_that_leads_nowhere_is_refused() -> None:
    async def find(host: str, port: int) -> Sequence[str]:
        raise OSError("no such name")

    with pytest.raises(RemoteError, match="cannot be resolved: media.test"):
        fetch(media("media.test", resolve=find), "http://media.test/picture")
    with pytest.raises(RemoteError, match="without addresses"):
        fetch(media("media.test", resolve=at()), "http://media.test/picture")


def test_names_are_resolved_as_the_machine_does() -> None:
    assert "127.0.0.1" in asyncio.run(resolve("127.1", 80))


@pytest.mark.parametrize("text", ["93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946", "::ffff:93.184.216.34"])
def test_public_addresses(text: str) -> None:
    assert is_public(ipaddress.ip_address(text))


@pytest.mark.parametrize(
    "text",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1"),
        *("224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1"),
        *("::", "::1", "fe80::1", "fc00::1", "fec0::1", "ff02::1", "2001:db8::1", "::127.0.0.1"),
        *(
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "64:ff9b::7f00:1",
            "64:ff9b::a9fe:a9fe",
            "2002:7f00:1::",
            "2002:a9fe:a9fe::1",
        ),
        "2001:0:7f00:1::1",
    ],
)
def test_addresses_that_are_not_public(text: str) -> None:
    assert not is_public(ipaddress.ip_address(text))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "*",
        "*.",
        "http://example.org",
        "example.org/path",
        "user@example.org",
        "a b",
        "*.*.org",
        "x:99999",
        "example.org?x",
    ],
)
def test_an_entry_that_is_no_host_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no host. Give example.org"):
        RemoteMedia([text], max_bytes=1)
