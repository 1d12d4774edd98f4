"""Pictures that a request names by URL: `data:` ones are read, those of hosts on the allow-list are fetched.

Owns which addresses may be spoken to. A name is resolved once, every address it has is checked, and the checked address
is the one that is connected to; each redirect is checked as if it were the first. Does not know what is in a picture.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import ipaddress
import re
import ssl
from collections.abc import Awaitable, Callable, Sequence
from socket import SOCK_STREAM
from urllib.parse import unquote_to_bytes

import httpx

from penstock.bytesize import format_bytes
from penstock.errors import ConfigError, RequestError
from penstock.server.threads import CODING
from penstock.server.uploads import TooLargeError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

MAX_REDIRECTS = 3
TIMEOUT_S = 30.0

_PORTS = {"http": 80, "https": 443}
_MOST_PORT = 2**16 - 1
_LONGEST_URL = 8192
_HOST = re.compile(r"[0-9a-z_-]([0-9a-z._-]*[0-9a-z_-])?\.?|[0-9a-f:.]+", re.IGNORECASE)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_REDIRECTS = (301, 302, 303, 307, 308)
_HEADERS = {"accept": "image/*, video/mp4", "accept-encoding": "identity", "user-agent": "penstock"}


class RemoteError(RequestError):
    """A picture that was named by URL cannot be had."""


async def resolve(host: str, port: int) -> list[str]:
    """All addresses of a name, as this machine knows them.

    Raises:
        OSError: where it has none.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def is_public(address: Address) -> bool:
    """Whether an address is one of the public internet; an IPv4 address within an IPv6 one must be as well."""
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not address.is_multicast
    if address.ipv4_mapped is not None:
        return is_public(address.ipv4_mapped)
    if address in _NAT64:
        return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    if address.is_multicast or not address.is_global or address.is_site_local or address.is_reserved:
        return False
    inner = [address.sixtofour, *(address.teredo or ())]
    return all(is_public(one) for one in inner if one is not None)


class RemoteMedia:
    """What may be fetched, and how.

    Args:
        allowed: hosts: `example.org`, `*.example.org` (all below it), either with `:port` where it is not the usual.
        max_bytes: of one picture.
        timeout_s: for all of it, redirects included.
        resolve: addresses of a name.
        may_connect: which of them may be connected to.
        tls: who is trusted; the system's own where left out.

    Raises:
        ConfigError: for an entry that is no host.
    """

    def __init__(
        self,
        allowed: Sequence[str],
        *,
        max_bytes: int,
        timeout_s: float = TIMEOUT_S,
        resolve: Resolve = resolve,
        may_connect: Callable[[Address], bool] = is_public,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._allowed = [_entry(text) for text in allowed]
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._resolve = resolve
        self._may_connect = may_connect
        self._tls = tls or (httpx.create_ssl_context(trust_env=False) if self._allowed else None)

    async def fetch(self, url: str, param: str = "image") -> bytes:
        """The bytes behind a URL.

        Args:
            url: as the client wrote it: `data:`, `http:` or `https:`.
            param: the request's field, for the message.

        Raises:
            TooLargeError: for more than `max_bytes`.
            RemoteError: for everything else that keeps it from being had.

        Cost: holds the bytes in memory; reads no more than `max_bytes` of them.
        """
        if url[:5].lower() == "data:":
            return await CODING.run(self._inline, url, param)  # megabytes of text to decode
        if not self._allowed:
            raise RemoteError(
                f"{param} is a URL, and this server fetches none. Send the picture itself, or a data: URL, or start "
                "the server with --allow-remote-media HOST.",
                param,
            )
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._follow(_parsed(url, param), param)
        except TimeoutError as error:
            raise RemoteError(
                f"{param} did not arrive within {self._timeout_s:g} seconds. Try again, or send the picture itself.",
                param,
            ) from error
        except (httpx.HTTPError, httpx.InvalidURL, ssl.SSLError, OSError) as error:
            raise RemoteError(
                f"{param} cannot be fetched: {type(error).__name__}. Check the URL, or send the picture itself.", param
            ) from error

    def _inline(self, url: str, param: str) -> bytes:
        header, comma, body = url[5:].partition(",")
        if not comma:
            raise RemoteError(f"{param} is a data: URL without a comma. Write data:image/png;base64,...", param)
        is_base64 = header.strip().lower().endswith(";base64")
        if len(body) > self._max_bytes * 4 + 64:
            raise self._too_large(param)  # however it is written
        try:
            data = unquote_to_bytes(body)
            if is_base64:
                data = base64.b64decode(data, validate=True)
        except (binascii.Error, UnicodeEncodeError) as error:
            raise RemoteError(f"{param} is a data: URL that is no valid base64. Encode it anew.", param) from error
        if len(data) > self._max_bytes:
            raise self._too_large(param)
        return data

    async def _follow(self, url: httpx.URL, param: str) -> bytes:
        # No proxies or passwords of this machine's environment, and no connection that another request has opened.
        async with httpx.AsyncClient(
            verify=self._tls or True,
            trust_env=False,
            follow_redirects=False,
            timeout=self._timeout_s,
            limits=httpx.Limits(max_keepalive_connections=0),
        ) as client:
            for _ in range(MAX_REDIRECTS + 1):
                response = await self._open(client, url, param)
                try:
                    if response.status_code not in _REDIRECTS or "location" not in response.headers:
                        return await self._read(response, param)
                finally:
                    await response.aclose()
                following = _parsed(response.headers["location"], param, base=url)
                if url.scheme == "https" and following.scheme != "https":
                    raise RemoteError(f"{param} redirects from https to http. Give the URL it ends at.", param)
                url = following
        raise RemoteError(f"{param} redirects more than {MAX_REDIRECTS} times. Give the URL it ends at.", param)

    async def _open(self, client: httpx.AsyncClient, url: httpx.URL, param: str) -> httpx.Response:
        """The beginning of an answer from an address that was checked."""
        host, port = url.raw_host.decode("ascii"), url.port or _PORTS[url.scheme]
        if not any(_fits(host, port, url.scheme, entry) for entry in self._allowed):
            raise RemoteError(
                f"{param} is on {host}:{port}, which is not among the hosts that this server fetches from. "
                "Send the picture itself.",
                param,
            )
        headers = {**_HEADERS, "host": url.netloc.decode("ascii")}
        addresses = await self._addresses(host, port, param)
        for number, address in enumerate(addresses, start=1):
            there = url.copy_with(host=str(address), port=port)
            request = client.build_request("GET", there, headers=headers, extensions={"sni_hostname": host})
            try:
                return await client.send(request, stream=True)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                if number == len(addresses):
                    raise
        raise RemoteError(f"{param} is on a host without addresses. Check the URL.", param)

    async def _addresses(self, host: str, port: int, param: str) -> list[Address]:
        try:
            found = [ipaddress.ip_address(text.partition("%")[0]) for text in await self._resolve(host, port)]
        except (OSError, UnicodeError, ValueError) as error:
            raise RemoteError(f"{param} is on a host that cannot be resolved: {host}. Check the URL.", param) from error
        if not all(self._may_connect(address) for address in found):
            raise RemoteError(
                f"{param} is on {host}, which is not (only) on the public internet. Send the picture itself.", param
            )
        return found

    async def _read(self, response: httpx.Response, param: str) -> bytes:
        if response.status_code != 200:
            raise RemoteError(
                f"{param} was answered {response.status_code} by its host. Check the URL, or send the picture itself.",
                param,
            )
        if response.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
            raise RemoteError(f"{param} comes compressed, though it was not asked for so. Send it itself.", param)
        length = response.headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._max_bytes:
            raise self._too_large(param)
        data = bytearray()
        async for chunk in response.aiter_raw():
            data += chunk
            if len(data) > self._max_bytes:
                raise self._too_large(param)
        return bytes(data)

    def _too_large(self, param: str) -> TooLargeError:
        return TooLargeError(
            f"{param} has more than {format_bytes(self._max_bytes)}, the most that this server takes. "
            "Send a smaller file.",
            param,
        )


def _entry(text: str) -> tuple[str, int | None]:
    """Host and port of an entry of the allow-list."""
    star = "*." if text.startswith("*.") else ""
    url = rest = httpx.URL("http://x")
    host = ""
    try:
        url = httpx.URL(f"http://{text.removeprefix('*.')}")
        host, rest = url.raw_host.decode("ascii").lower().rstrip("."), url.copy_with(host="x", port=None)
    except (httpx.InvalidURL, UnicodeError):
        host = ""
    if not _HOST.fullmatch(host) or (url.port or 0) > _MOST_PORT or str(rest).rstrip("/") != "http://x":
        raise ConfigError(
            f"--allow-remote-media {text!r} is no host. Give example.org, *.example.org or example.org:8080."
        )
    return star + host, url.port


def _fits(host: str, port: int, scheme: str, entry: tuple[str, int | None]) -> bool:
    name, its_port = entry
    if port != (its_port or _PORTS[scheme]):
        return False
    host = host.lower().rstrip(".")
    return host.endswith(name[1:]) and len(host) >= len(name) if name.startswith("*.") else host == name


def _parsed(url: str, param: str, base: httpx.URL | None = None) -> httpx.URL:
    """A URL of a client, or of a redirect, which may leave out what the one before has."""
    try:
        parsed = (base or httpx.URL()).join(url) if len(url) <= _LONGEST_URL else httpx.URL()
    except (httpx.InvalidURL, UnicodeError) as error:
        raise RemoteError(f"{param} is no URL that can be read. Give http://, https:// or data:.", param) from error
    is_host = _HOST.fullmatch(parsed.raw_host.decode("ascii")) and (parsed.port or 0) <= _MOST_PORT
    if parsed.scheme not in _PORTS or not is_host or parsed.userinfo:
        raise RemoteError(
            f"{param} is no URL of the kind http://host/path or https://host/path, without a user in it, of at most "
            f"{_LONGEST_URL} characters. Give one, or a data: URL.",
            param,
        )
    return parsed
