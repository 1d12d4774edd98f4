"""Sizes in bytes: what is read, what is refused, and what people see."""

from __future__ import annotations

import pytest

from penstock.bytesize import format_bytes, parse_bytes
from penstock.errors import ConfigError

GIB = 1024**3


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("4GiB", 4 * GIB),
        ("1.5 GiB", 3 * GIB // 2),
        (" 800MB ", 800_000_000),
        ("800mb", 800_000_000),
        ("2tib", 2 * 1024**4),
        ("0.5 KiB", 512),
        ("1 PB", 10**15),
        ("0", 0),
        ("0GiB", 0),
        ("123", 123),
        ("123 B", 123),
        (0, 0),
        (4 * GIB, 4 * GIB),
        (4e9, 4_000_000_000),
        ("0.3GiB", int(0.3 * GIB)),  # the rest of a byte is dropped
        ("0.7 KB", 700),  # and no byte is lost to binary fractions: 0.7 * 1000 is 699.99... in floats
        ("9007199254740993", 9007199254740993),  # more digits than a float has
    ],
)
def test_what_is_read(value: object, expected: int) -> None:
    result = parse_bytes(value)
    assert type(result) is int
    assert result == expected


@pytest.mark.parametrize(
    "value",
    [
        *("", " ", "GiB", "4G", "4 gigs", "-1", "-4GiB", "+4GiB", "4GiB 2", "1e9", "nan", "inf", "1,5GiB", "1.GiB"),
        *("1.5", "0.5B", "0x10", "٤GiB", "1_000", "1" * 5000, "4\nGiB\n4"),
        *(-1, -4.0, 1.5, float("nan"), float("inf"), float("-inf"), True, False, None, [4], b"4GiB"),
    ],
    ids=lambda value: repr(value)[:12],
)
def test_what_is_refused_with_what_is_accepted(value: object) -> None:
    with pytest.raises(ConfigError, match=r"cache=.* is no number of bytes\. Use .* 4GiB, 1.5 GiB or 800MB, or a "):
        parse_bytes(value, "cache")


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1024, "1 KiB"),
        (int(999.4 * 1024), "999 KiB"),
        (int(999.6 * 1024), "0.976 MiB"),  # not 1e+03 KiB
        (13 * GIB // 4, "3.25 GiB"),
        (24 * GIB, "24 GiB"),
        (5000 * 1024**5, "5000 PiB"),
        (-2 * GIB, "-2 GiB"),
    ],
)
def test_what_people_see(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize("num_bytes", [0, 1, 999, 1024, 1536, 3 * GIB, 5 * 1024**5])
def test_what_people_see_is_read_back(num_bytes: int) -> None:
    assert abs(parse_bytes(format_bytes(num_bytes)) - num_bytes) <= num_bytes * 0.005
