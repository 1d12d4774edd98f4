"""Profile: what a pipeline is. Components, roles, stacks, bytes, dtypes, and where each fact came from.

Nouns only: filled by `penstock.models`, read by the planner and by `penstock inspect`. Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Role = Literal["denoiser", "encoder", "vae", "resident"]
"""denoiser: runs every step. encoder: runs before the steps. vae: runs after them (and on input pictures).
resident: small, or of unknown use: stays on the device."""

Origin = Literal["declared", "diffusers", "structure"]
"""declared: penstock's own class attributes. diffusers: its metadata and classes. structure: inferred."""


@dataclass(frozen=True, kw_only=True)
class Fact:
    """Where something is known from.

    Attributes:
        origin: the kind of source; `declared` beats `diffusers` beats `structure`.
        detail: what exactly was read, such as `FluxTransformer2DModel._repeated_blocks`.
    """

    origin: Origin
    detail: str


@dataclass(frozen=True, kw_only=True)
class StackProfile:
    """A list of blocks that run one after the other.

    Attributes:
        path: from the component, such as `transformer_blocks`.
        block_class: class of the blocks; several are joined by `|`.
        block_bytes: bytes of each block's parameters and buffers, in order.
        fact: why this is a stack.
    """

    path: str
    block_class: str
    block_bytes: tuple[int, ...]
    fact: Fact

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return len(self.block_bytes)

    @property
    def num_bytes(self) -> int:
        """Bytes of all blocks."""
        return sum(self.block_bytes)


@dataclass(frozen=True, kw_only=True)
class ComponentProfile:
    """One module of the pipeline.

    Attributes:
        name: attribute path from the pipeline, such as `transformer` or `pipe.transformer`.
        class_name: its Python class.
        role: what it does in a run.
        fact: why it has that role.
        num_bytes: bytes of its weights, tied ones once: those on disk for a folder, those in memory for an object.
        dtype_bytes: the same by dtype, largest first.
        stacks: its stacks of blocks, in order of execution where that is declared, else of definition.
        declares: which plans its class brings along (`_cp_plan`, `_tp_plan`, `_sp_plan`, ...).
    """

    name: str
    class_name: str
    role: Role
    fact: Fact
    num_bytes: int
    dtype_bytes: Mapping[str, int]
    stacks: tuple[StackProfile, ...] = ()
    declares: tuple[str, ...] = ()

    @property
    def other_bytes(self) -> int:
        """Bytes outside every stack: embedders, heads, norms."""
        return self.num_bytes - sum(stack.num_bytes for stack in self.stacks)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a pipeline is.

    Attributes:
        model: name, folder or hub id it was read from, or `object`.
        pipeline_class: its Python class.
        output: image, video or audio.
        components: its modules, in the order of the pipeline.
        parts: its other parts (schedulers, tokenizers), name to class.
        arguments: what `__call__` takes, name to default, JSON-able.
        size_multiple: width and height must be multiples of this; 1 where nothing is known.
        notes: what a user should know, such as a declared path that is no module.
    """

    model: str
    pipeline_class: str
    output: str
    components: tuple[ComponentProfile, ...]
    parts: Mapping[str, str] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    size_multiple: int = 1
    notes: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes of all components."""
        return sum(component.num_bytes for component in self.components)

    def by_role(self, role: Role) -> tuple[ComponentProfile, ...]:
        """The components of one role, in order."""
        return tuple(component for component in self.components if component.role == role)

    def to_json(self) -> str:
        """One line of JSON; `from_json` reads it back."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Profile:
        """Read what `to_json` wrote."""
        raw = json.loads(text)
        components = tuple(_component(item) for item in raw.pop("components"))
        return cls(**{**raw, "components": components, "notes": tuple(raw["notes"])})


def _component(raw: dict[str, Any]) -> ComponentProfile:
    stacks = tuple(
        StackProfile(**{**item, "block_bytes": tuple(item["block_bytes"]), "fact": Fact(**item["fact"])})
        for item in raw["stacks"]
    )
    return ComponentProfile(
        **{**raw, "stacks": stacks, "fact": Fact(**raw["fact"]), "declares": tuple(raw["declares"])}
    )
