"""Who may ask: API keys, and for a server without keys, whether a browser of this very machine asks.

Owns the comparison of keys, the owner that a key stands for, and the checks of Host and Origin that keep strange web
pages from using a server without keys. Keys are kept as digests only. Does not know jobs or routes.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import socket
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from penstock.errors import ConfigError
from penstock.server.failures import ApiError

_OPEN_PATHS = ("/", "/live", "/health", "/ready", "/favicon.ico")
_OPEN_FOLDERS = ("/page/", "/v1/files/")
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]\s:/?#@\\]*)(:[0-9]{0,5})?", re.IGNORECASE)
_MOST_PORT = 2**16 - 1
_OWNER_LENGTH = 16


class Keys:
    """The keys of a server, as digests.

    Args:
        keys: as the user gave them; none lets everybody in.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def owner_of(self, authorization: str | None) -> str | None:
        """The owner that an `Authorization` header stands for; "" for everybody's; None where it has no good key.

        Cost: the same whichever key it is, and however much of one is right.
        """
        if not self._digests:
            return ""
        scheme, _, key = (authorization or "").partition(" ")
        asked = _digest(key.strip())
        matches = [hmac.compare_digest(asked, digest) for digest in self._digests]
        return asked.hex()[:_OWNER_LENGTH] if any(matches) and scheme.lower() == "bearer" else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(b"penstock-key:" + key.encode("utf-8", "surrogateescape")).digest()


def is_loopback(host: str) -> bool:
    """Whether an address to listen on can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def check_binding(host: str, has_keys: bool, no_auth: bool) -> None:
    """Refuse to be open to a network by accident.

    Raises:
        ConfigError: saying what to give.
    """
    if no_auth and has_keys:
        raise ConfigError("no_auth lets everybody in, and api_key does not. Give one of them.")
    if not is_loopback(host) and not has_keys and not no_auth:
        raise ConfigError(
            f"host={host!r} can be reached by other machines, and no key is asked for: anybody there could use this "
            "one. Give --api-key (or PENSTOCK_API_KEYS), or --no-auth where the network is trusted."
        )


class Guard:
    """ASGI: lets a request in, or answers 401, 403 or 421 before any of its body is read.

    What it lets in has `scope["state"]["owner"]`. Without keys the Host must be this machine: a name that a stranger's
    DNS turned to one of its addresses is not. What changes something must not come from another site's page.

    Args:
        app: what is guarded.
        keys: of the server.
        host: that it listens on.
        names: further ones that it goes by.
    """

    def __init__(self, app: ASGIApp, *, keys: Keys, host: str, names: Sequence[str] = ()) -> None:
        self._app = app
        self._keys = keys
        own = f"[{host}]" if ":" in host and not host.startswith("[") else host
        self._is_local = is_loopback(host)
        machine = [] if self._is_local else [socket.gethostname()]
        self._hosts = {name.lower() for name in (*_LOOPBACK_NAMES, own, *machine, *names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let in or answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        error = self._error(scope)
        if error is None:
            await self._app(scope, receive, send)
        else:
            await error.response()(scope, receive, send)

    def _error(self, scope: Scope) -> ApiError | None:
        headers, path = Headers(scope=scope), scope["path"]
        if not _is_host(headers.get("host", "")):
            return ApiError(
                400, "the Host of the request is none. Send the name that the server goes by.", code="wrong_host"
            )
        owner = self._keys.owner_of(headers.get("authorization"))
        scope.setdefault("state", {})["owner"] = owner or ""
        if not self._keys:
            return self._stranger(scope["method"], headers)
        if owner is None and path not in _OPEN_PATHS and not path.startswith(_OPEN_FOLDERS):
            said = "no API key came with" if headers.get("authorization") is None else "the API key is wrong in"
            return ApiError(
                401,
                f"{said} the request. Send a key of this server as `Authorization: Bearer KEY`.",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return None

    def _stranger(self, method: str, headers: Headers) -> ApiError | None:
        host = headers.get("host", "").lower()
        if not self._goes_by(_name(host)):
            return ApiError(
                421,
                f"this server is {', '.join(sorted(self._hosts))}, and not {host[:80]!r}. Ask it by its own name, or "
                "start it with --allow-host and that name.",
                code="wrong_host",
            )
        origin = headers.get("origin")
        if method not in _SAFE_METHODS and origin is not None and origin.partition("://")[2].lower() != host:
            return ApiError(
                403,
                f"a page of {origin[:80]!r} may not use this server, which asks for no key. Give the server an "
                "--api-key, and let that page's own server ask.",
                code="foreign_origin",
            )
        return None

    def _goes_by(self, name: str) -> bool:
        """Whether a name can only be meant for this server: an address of a network cannot be another's DNS."""
        return name in self._hosts or (not self._is_local and _is_address(name))


def _is_host(host: str) -> bool:
    """Whether a Host header can be read: a name or an address, and perhaps a port."""
    found = _HOST.fullmatch(host)
    if found is None or int((found[2] or ":0")[1:] or "0") > _MOST_PORT:
        return False
    return not host.startswith("[") or _is_address(found[1])


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _name(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]
