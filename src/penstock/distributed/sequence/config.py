"""How one sequence is split: the degrees of Ulysses and Ring, bound to the ranks that run.

Owns the check that the degrees are those of the mesh in use. Does not know tensors or models.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from penstock.distributed import parallel_state
from penstock.distributed.group import Group
from penstock.distributed.mesh import Mesh


@dataclass
class SequenceParallelConfig:
    """Degrees of sequence parallelism; both above 1 is the hybrid, rings of Ulysses groups.

    A mesh in use that has these degrees answers for it; `setup` says why one does not.

    Attributes:
        ulysses_degree: ranks that trade parts of the sequence for attention heads.
        ring_degree: ranks that pass keys and values around.
        convert_to_fp32: merge the parts of ring attention in float32, whatever the dtype of the model.

    Raises:
        ValueError: for a degree below 1, and for convert_to_fp32=False, which is not supported.
    """

    ulysses_degree: int = 1
    ring_degree: int = 1
    convert_to_fp32: bool = True
    _mesh: Mesh | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.convert_to_fp32 is not True:
            raise ValueError(
                f"convert_to_fp32={self.convert_to_fp32!r}: the parts of a ring are always merged in float32, because "
                "sums in 16 bits would change the picture. Leave it out."
            )
        for name in ("ulysses_degree", "ring_degree"):
            degree = getattr(self, name)
            if type(degree) is not int or degree < 1:
                raise ValueError(
                    f"{name}={degree!r} is not a whole number from 1 up: a sequence has at least one piece. 1 is off."
                )

    @property
    def sequence_parallel_size(self) -> int:
        """Ranks that one sequence is split over."""
        return self.ulysses_degree * self.ring_degree

    def setup(self, rank: int, world_size: int, device: torch.device | str) -> None:
        """Bind to the groups that run.

        Args:
            rank: of this process, among all ranks or among those that share a sequence.
            world_size: number of those ranks.
            device: this rank's own.

        Raises:
            ValueError: where the degrees, the rank or the device are not those of the mesh in use.
            RuntimeError: where no mesh is in use.
        """
        mesh = parallel_state.get_mesh()
        mismatch = self._mismatch(mesh)
        if mismatch:
            raise ValueError(mismatch)
        places = {name: (mesh[name].rank, mesh[name].size) for name in ("world", "sequence")}
        if (rank, world_size) not in places.values():
            told = " and ".join(f"{place} of {size} in its {name}" for name, (place, size) in places.items())
            raise ValueError(
                f"rank {rank} of {world_size} is not this process: it is rank {told}. Pass either of these."
            )
        kind = mesh.device_mesh.device_type if mesh.device_mesh is not None else torch.device(device).type
        if torch.device(device).type != kind:
            raise ValueError(f"device {device} is not a {kind} device, which the mesh in use is for. Pass {kind!r}.")
        self._mesh = mesh

    def is_initialized(self) -> bool:
        """Whether a mesh of these degrees is in use; once it was bound, whether that one still is."""
        if not parallel_state.model_parallel_is_initialized():
            return False
        mesh = parallel_state.get_mesh()
        return mesh is self._mesh if self._mesh is not None else self._mismatch(mesh) == ""

    def get_rank(self) -> int:
        """This process among the ranks that share its sequence; RuntimeError where no mesh of these degrees is."""
        return self._group("sequence").rank

    def get_world_size(self) -> int:
        """Number of ranks that share a sequence; RuntimeError where no mesh of these degrees is in use."""
        return self._group("sequence").size

    def get_ulysses_rank(self) -> int:
        """This process in its Ulysses group; RuntimeError where no mesh of these degrees is in use."""
        return self._group("ulysses").rank

    def get_ulysses_world_size(self) -> int:
        """Size of the Ulysses group; RuntimeError where no mesh of these degrees is in use."""
        return self._group("ulysses").size

    def get_ring_rank(self) -> int:
        """This process in its ring; RuntimeError where no mesh of these degrees is in use."""
        return self._group("ring").rank

    def get_ring_world_size(self) -> int:
        """Size of the ring; RuntimeError where no mesh of these degrees is in use."""
        return self._group("ring").size

    def _group(self, axis: str) -> Group:
        mesh = parallel_state.get_mesh()
        mismatch = self._mismatch(mesh)
        if mismatch:
            raise RuntimeError(mismatch)
        return mesh[axis]

    def _mismatch(self, mesh: Mesh) -> str:
        """What keeps a mesh from being this one's; empty where nothing does."""
        for name, degree in (("ulysses", self.ulysses_degree), ("ring", self.ring_degree)):
            if mesh[name].size != degree:
                return (
                    f"{name}_degree({degree}) is not the {mesh[name].size} of the mesh in use, "
                    f"{mesh.config.equation()}: the groups exist already. Try {name}_degree={mesh[name].size}."
                )
        return ""
