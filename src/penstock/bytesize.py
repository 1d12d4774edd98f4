"""Sizes in bytes as people write and read them: `4GiB` to 4294967296, and back.

Owns the accepted spellings. Standard library only.
"""

from __future__ import annotations

import re
from fractions import Fraction

from penstock.errors import ConfigError

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_DECIMAL = ("KB", "MB", "GB", "TB", "PB")
_FACTORS = {
    "": 1,
    **{unit.lower(): 1024**power for power, unit in enumerate(_BINARY)},
    **{unit.lower(): 1000**power for power, unit in enumerate(_DECIMAL, start=1)},
}
_TEXT = re.compile(r"([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([A-Za-z]*)")
_CARRY = 999.5  # from here on, three digits round to 1000


def parse_bytes(value: object, name: str = "size") -> int:
    """Read a number of bytes.

    Args:
        value: text such as `4GiB`, `1.5 GiB`, `800MB` or `0`, or a whole number of bytes. Units are binary (KiB,
            MiB, GiB, TiB, PiB) or decimal (KB, MB, GB, TB, PB), in upper or lower case; without one, or with B, it
            is bytes.
        name: of the option, for the message.

    Returns:
        The bytes; a fraction of a byte that a larger unit leaves is dropped.

    Raises:
        ConfigError: for anything else, `4G` among it: it means one thing to some tools and another to others.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        if value >= 0:
            return value
    elif isinstance(value, float):
        if value >= 0 and value.is_integer():
            return int(value)
    elif isinstance(value, str):
        match = _TEXT.fullmatch(value.strip())
        factor = _FACTORS.get(match[2].lower()) if match else None
        if match and factor and (factor > 1 or "." not in match[1]):
            return int(Fraction(match[1]) * factor)
    raise ConfigError(
        f"{name}={value!r} is no number of bytes. Use a number with one of {', '.join(_BINARY)} or "
        f"{', '.join(_DECIMAL)}, such as 4GiB, 1.5 GiB or 800MB, or a whole number of bytes, such as 4096."
    )


def format_bytes(num_bytes: int) -> str:
    """Bytes for people: three digits and a binary unit, such as `3.25 GiB`."""
    value, unit = float(num_bytes), 0
    while abs(value) >= _CARRY and unit < len(_BINARY) - 1:
        value, unit = value / 1024, unit + 1
    digits = ".3g" if abs(value) < _CARRY else ".0f"
    return f"{value:{digits}} {_BINARY[unit]}"
