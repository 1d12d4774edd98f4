"""What a pipeline class may declare about itself; discovery believes it before anything else.

Source: the seed interface of the project, which other serving systems' pipelines already carry.
"""

from __future__ import annotations

from typing import ClassVar, Protocol, runtime_checkable


@runtime_checkable
class SupportsModuleOffload(Protocol):
    """A pipeline that says which of its modules play which role.

    The paths lead from the pipeline to an `nn.Module` and may be dotted (`"pipe.transformer"`). A fourth
    attribute is optional, and so no member of the protocol: `_resident_modules: list[str] = []`, small
    modules that every forward needs and no block contains (`"bagel.time_embedder"`).
    """

    _dit_modules: ClassVar[list[str]]
    _encoder_modules: ClassVar[list[str]]
    _vae_modules: ClassVar[list[str]]


SupportsComponentDiscovery = SupportsModuleOffload
"""The other name under which the same declaration is known."""
