"""The declaration protocol is recognised on classes that carry the three required lists."""

from __future__ import annotations

from typing import ClassVar

from penstock import SupportsComponentDiscovery, SupportsModuleOffload


class Three:
    _dit_modules: ClassVar[list[str]] = []
    _encoder_modules: ClassVar[list[str]] = []
    _vae_modules: ClassVar[list[str]] = []


class Four(Three):
    _resident_modules: ClassVar[list[str]] = []


class Two:
    _dit_modules: ClassVar[list[str]] = []
    _encoder_modules: ClassVar[list[str]] = []


def test_three_lists_are_enough_and_two_are_not() -> None:
    assert isinstance(Three(), SupportsModuleOffload)
    assert isinstance(Four(), SupportsModuleOffload)
    assert not isinstance(Two(), SupportsModuleOffload)


def test_both_names_are_the_same() -> None:
    assert SupportsComponentDiscovery is SupportsModuleOffload
