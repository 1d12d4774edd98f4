"""What a user may ask for when a model is loaded: frozen, keyword-only, range-checked.

Owns the names, defaults and help texts of the options; the command line derives its flags from them.
Does not know torch, files, or how an option is carried out.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field, fields
from typing import Any, Self

from penstock.errors import ConfigError

DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
}
"""Accepted spellings of a dtype, and the name torch gives it."""

_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


def option(default: Any, help_text: str, metavar: str | None = None) -> Any:
    """A dataclass field that is an option of the command line as well."""
    return field(default=default, metadata={"help": help_text, "metavar": metavar})


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Which files of a model are meant; enough to look at it without loading weights."""

    variant: str | None = option(None, "Weight variant of the folder, such as fp16.", "NAME")
    revision: str | None = option(None, "Branch, tag or commit of a hub model.", "NAME")
    trust_remote_code: bool = option(False, "Run Python code that a model folder or hub id brings along.")

    @classmethod
    def of(cls, **options: Any) -> Self:
        """Build a config from keyword options, with an error that names a misspelt one.

        Raises:
            ConfigError: for an unknown option or a value out of range.
        """
        known = [item.name for item in fields(cls)]
        for name in options:
            if name not in known:
                raise ConfigError(f"unknown option {name!r}{suggestion(name, known)}. Options: {', '.join(known)}.")
        return cls(**{name: _spelt(value) for name, value in options.items()})

    def __post_init__(self) -> None:
        for name in ("variant", "revision"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value):
                raise ConfigError(f"{name}={value!r} is no name. Give one, or leave it out.")


@dataclass(frozen=True, kw_only=True)
class LoadConfig(SourceConfig):
    """How a pipeline is loaded.

    Raises:
        ConfigError: for a value that no machine can honour.
    """

    device: str = option("auto", "cuda, cuda:N, mps or cpu; auto takes the first that this machine has.", "NAME")
    dtype: str = option("auto", "float32, bfloat16 or float16; auto is bfloat16 on GPUs, float32 on the CPU.", "NAME")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.device, str) or not _DEVICE.fullmatch(self.device):
            raise ConfigError(f"device={self.device!r} is not a device. Use auto, cuda, cuda:N, mps or cpu.")
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise ConfigError(f"dtype={self.dtype!r} is not supported. Use auto, {', '.join(DTYPES)}.")


def _spelt(value: Any) -> Any:
    """torch's own dtypes and devices by their names; all else as it is."""
    if type(value).__module__.split(".")[0] == "torch":
        return str(value).removeprefix("torch.")
    return value


def suggestion(name: str, known: list[str]) -> str:
    """`" (did you mean 'x'?)"` for the known name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
