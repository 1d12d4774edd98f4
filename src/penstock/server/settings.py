"""What a user may ask of a server, range-checked; the command line derives its flags from here.

Owns names, defaults and help texts. Does not know how any of it is carried out.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path

from penstock.bytesize import parse_bytes
from penstock.config import option
from penstock.errors import ConfigError
from penstock.request import is_whole

LOG_FORMATS = ("text", "json")
_STORAGES = ("file", "s3", "memory")
_MOST_PORT = 2**16 - 1
_HOST = re.compile(r"\[[0-9A-Fa-f:.]+\]|[^\[\]\s:/?#@\\,*]+")
_MOST_SIZE = re.compile(r"([1-9][0-9]{0,6})x([1-9][0-9]{0,6})")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Where a server listens, what it keeps, and what it lets in.

    Raises:
        ConfigError: for a value out of range, and for options that contradict each other.
    """

    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 for all, which wants --api-key.", "ADDRESS")
    port: int = option(8000, "Port to listen on; 0 takes a free one.", "N")
    api_key: list[str] = field(  # several keys: their jobs are invisible to each other
        default_factory=list,
        repr=False,
        metadata={
            "help": "Key that clients must send; may be given several times. "
            "Or PENSTOCK_API_KEYS, separated by commas.",
            "metavar": "KEY",
        },
    )
    no_auth: bool = option(False, "Let everybody in who can reach an address that is not this machine's alone.")
    served_model_name: str | None = option(None, "Name of the model in the API; MODEL itself where left out.", "NAME")
    max_queue: int = option(64, "Requests that may wait; more are told to come back later.", "N")
    max_batch_size: int = option(1, "Requests of the same shape that may run as one batch; 1 is off.", "N")
    max_images: int = option(10, "Most pictures of one request (n).", "N")
    max_pixels: str = option("4096x4096", "Most pixels of an input or output picture.", "WIDTHxHEIGHT")
    max_steps: int = option(1000, "Most denoising steps of one request.", "N")
    max_frames: int = option(2000, "Most frames of one video.", "N")
    max_upload: str = option("64MiB", "Most bytes of one request's body.", "BYTES")
    storage: str = option("", "Where files go: file:///folder, s3://bucket/prefix or memory:; a cache folder.", "URL")
    database: str = field(  # which may hold a password
        default="",
        repr=False,
        metadata={
            "help": "Where jobs are recorded: sqlite:///file, postgresql://...; a cache folder.",
            "metavar": "URL",
        },
    )
    max_storage: str = option("20GiB", "Most bytes of files kept; the oldest finished jobs go first.", "BYTES")
    min_free_space: str = option(
        "256MiB", "Least bytes free where files go; with less no work is taken. 0 does not look.", "BYTES"
    )
    ttl_s: int = option(24 * 3600, "Seconds that files and records of finished jobs are kept.", "SECONDS")
    server_name: str = option("penstock", "Name of this server among those that share a database.", "NAME")
    lora_dir: str | None = option(None, "Folder of adapters (NAME.safetensors) that requests may name.", "FOLDER")
    allow_remote_media: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Host whose pictures may be fetched by URL, such as example.org or *.example.org; none else.",
            "metavar": "HOST",
        },
    )
    allow_host: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Name by which this server may be asked without keys, beside its addresses and the machine's name.",
            "metavar": "HOST",
        },
    )
    trusted_proxy: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Address of a proxy whose X-Forwarded-For and X-Forwarded-Proto are believed; nobody else's are.",
            "metavar": "ADDRESS",
        },
    )
    start_timeout_s: float = option(1800.0, "Seconds until a group of ranks must be ready.", "SECONDS")
    step_timeout_s: float = option(1800.0, "Seconds without a step after which ranks count as hung.", "SECONDS")
    rank_timeout_s: float = option(30.0, "Seconds without a sign of life after which a rank counts as hung.", "SECONDS")
    log_format: str = option("text", "text for people, json for machines.", "FORMAT")

    def __post_init__(self) -> None:
        for name in ("api_key", "allow_remote_media", "allow_host", "trusted_proxy"):
            object.__setattr__(self, name, list(getattr(self, name) or ()))
        if not is_whole(self.port, 0, _MOST_PORT):
            raise ConfigError(f"port={self.port!r} is no port. Give a number from 0 to 65535.")
        for name in ("max_queue", "max_batch_size", "max_images", "max_steps", "max_frames", "ttl_s"):
            if not is_whole(getattr(self, name), 1):
                raise ConfigError(f"{name}={getattr(self, name)!r} is not a whole number from 1 up. Give one.")
        for name in ("start_timeout_s", "step_timeout_s", "rank_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)} is no time. Give seconds above 0.")
        for name in ("max_upload", "max_storage", "min_free_space"):
            parse_bytes(getattr(self, name), name)
        if not self.upload_bytes:
            raise ConfigError(f"max_upload={self.max_upload!r} lets no request in. Give a number above 0, as 64MiB.")
        if not _MOST_SIZE.fullmatch(self.max_pixels):
            raise ConfigError(f"max_pixels={self.max_pixels!r} is not WIDTHxHEIGHT. Try 4096x4096.")
        if self.log_format not in LOG_FORMATS:
            raise ConfigError(f"log_format={self.log_format!r} is none. Use {' or '.join(LOG_FORMATS)}.")
        if self.storage and self.storage.partition(":")[0] not in _STORAGES:
            raise ConfigError(f"storage={self.storage!r} is not supported. Use a file:, s3: or memory: URL.")
        for name in ("host", "server_name"):
            if not getattr(self, name).strip():
                raise ConfigError(f"{name} is empty. Give one, or leave it out.")
        if self.lora_dir is not None and not Path(self.lora_dir).expanduser().is_dir():
            raise ConfigError(f"lora_dir={self.lora_dir!r} is no folder. Give the one that holds the adapters.")
        for address in self.trusted_proxy:
            _check_network(address)
        for host in self.allow_host:
            if not _HOST.fullmatch(host):
                raise ConfigError(f"allow_host={host!r} is no name of a host. Give one as example.org, without a port.")
        if any(not key.strip() or not (key.isascii() and key.isprintable()) for key in self.api_key):
            raise ConfigError("an API key is empty, or holds what no header can. Give printable ASCII text.")

    @property
    def most_pixels(self) -> int:
        """`max_pixels` as a number."""
        width, height = self.max_pixels.split("x")
        return int(width) * int(height)

    @property
    def upload_bytes(self) -> int:
        """`max_upload` in bytes."""
        return parse_bytes(self.max_upload, "max_upload")

    @property
    def storage_bytes(self) -> int:
        """`max_storage` in bytes."""
        return parse_bytes(self.max_storage, "max_storage")

    @property
    def least_free_bytes(self) -> int:
        """`min_free_space` in bytes."""
        return parse_bytes(self.min_free_space, "min_free_space")


def _check_network(address: str) -> None:
    try:
        ipaddress.ip_network(address, strict=False)
    except ValueError as error:
        raise ConfigError(
            f"trusted_proxy={address!r} is no address. Try 127.0.0.1, or a network as 10.0.0.0/8."
        ) from error
