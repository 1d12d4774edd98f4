"""The mesh in use, and this process's place in it under the names that users of vLLM and xDiT know.

Owns which mesh is in use: during a call of a split pipeline that pipeline's, else the one that was set for the process.
Does not know how a mesh is built, or what its groups exchange.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from penstock.distributed.group import Group
from penstock.distributed.mesh import Mesh

_of_process: Mesh | None = None
_shard: Group | None = None
_of_call: ContextVar[Mesh | None] = ContextVar("the mesh of the call under way", default=None)


def set_mesh(mesh: Mesh | None) -> None:
    """Put a mesh to use wherever no call brings its own; None leaves none."""
    global _of_process
    _of_process = mesh


@contextmanager
def using(mesh: Mesh) -> Iterator[None]:
    """A context in which a mesh is in use, whatever was set; for the thread that enters it."""
    token = _of_call.set(mesh)
    try:
        yield
    finally:
        _of_call.reset(token)


def is_in_call(mesh: Mesh) -> bool:
    """Whether this thread is within a call that brought this mesh."""
    return _of_call.get() is mesh


def get_mesh() -> Mesh:
    """The mesh in use.

    Raises:
        RuntimeError: where there is none.
    """
    mesh = _of_call.get() or _of_process
    if mesh is None:
        raise RuntimeError(
            "0 meshes are in use in this process: the parallel state is not initialised, so that no rank has a place. "
            "Split a pipeline first, or call set_mesh(build_mesh(config, device_type)) on every rank."
        )
    return mesh


def model_parallel_is_initialized() -> bool:
    """Whether a mesh is in use."""
    return (_of_call.get() or _of_process) is not None


def get_world_group() -> Group:
    """All ranks."""
    return get_mesh()["world"]


def get_world_size() -> int:
    """Number of ranks in all."""
    return get_world_group().size


def get_world_rank() -> int:
    """This process among all ranks."""
    return get_world_group().rank


def get_sp_group() -> Group:
    """The ranks that one sequence is split over: ring and Ulysses together."""
    return get_mesh()["sequence"]


def get_sequence_parallel_world_size() -> int:
    """Number of ranks that one sequence is split over."""
    return get_sp_group().size


def get_sequence_parallel_rank() -> int:
    """Which piece of a sequence this rank holds: `ring_rank * ulysses_degree + ulysses_rank`."""
    return get_sp_group().rank


def get_ulysses_group() -> Group:
    """The ranks that trade parts of the sequence for attention heads."""
    return get_mesh()["ulysses"]


def get_ulysses_world_size() -> int:
    """Number of ranks that trade parts of the sequence for attention heads."""
    return get_ulysses_group().size


def get_ulysses_rank() -> int:
    """This process among the ranks that trade parts of the sequence for attention heads."""
    return get_ulysses_group().rank


def get_ring_group() -> Group:
    """The ranks that pass keys and values around."""
    return get_mesh()["ring"]


def get_ring_world_size() -> int:
    """Number of ranks that pass keys and values around."""
    return get_ring_group().size


def get_ring_rank() -> int:
    """This process among the ranks that pass keys and values around."""
    return get_ring_group().rank


def get_tp_group() -> Group:
    """The ranks that each hold a slice of every layer."""
    return get_mesh()["tensor"]


def get_tensor_model_parallel_world_size() -> int:
    """Number of ranks that each hold a slice of every layer."""
    return get_tp_group().size


def get_tensor_model_parallel_rank() -> int:
    """Which slice of every layer this rank holds."""
    return get_tp_group().rank


def get_cfg_group() -> Group:
    """The ranks that the branches of guidance are split over."""
    return get_mesh()["cfg"]


def get_classifier_free_guidance_world_size() -> int:
    """Number of ranks that the branches of guidance are split over."""
    return get_cfg_group().size


def get_classifier_free_guidance_rank() -> int:
    """This process among the ranks that the branches of guidance are split over."""
    return get_cfg_group().rank


def get_pp_group() -> Group:
    """The ranks that each hold a run of the denoiser's blocks."""
    return get_mesh()["pipeline"]


def get_pipeline_parallel_world_size() -> int:
    """Number of ranks that each hold a run of the denoiser's blocks."""
    return get_pp_group().size


def get_pipeline_parallel_rank() -> int:
    """Which run of the denoiser's blocks this rank holds."""
    return get_pp_group().rank


def is_pipeline_first_stage() -> bool:
    """Whether this rank holds the first blocks."""
    return get_pipeline_parallel_rank() == 0


def is_pipeline_last_stage() -> bool:
    """Whether this rank holds the last blocks."""
    return get_pipeline_parallel_rank() == get_pipeline_parallel_world_size() - 1


def get_dp_group() -> Group:
    """The ranks with the same place in their replicas, each of which makes pictures of its own."""
    return get_mesh()["data"]


def get_data_parallel_world_size() -> int:
    """Number of replicas."""
    return get_dp_group().size


def get_data_parallel_rank() -> int:
    """Which replica this rank belongs to."""
    return get_dp_group().rank


def set_shard_group(group: Group | None) -> None:
    """Remember the ranks that weights are sharded over; None where they are whole again."""
    global _shard
    _shard = group


def get_fully_shard_group() -> Group:
    """The ranks that hold the weights together: those of the mesh in use, or of the model that FSDP2 sharded last.

    Raises:
        RuntimeError: where there is neither.
    """
    if model_parallel_is_initialized() and get_mesh()["shard"].size > 1:
        return get_mesh()["shard"]
    return _shard or get_mesh()["shard"]


def get_fully_shard_world_size() -> int:
    """Number of ranks that weights are sharded over; 1 where they are whole."""
    return get_fully_shard_group().size


def get_fully_shard_rank() -> int:
    """Which shard of every unit this rank holds."""
    return get_fully_shard_group().rank


get_ulysses_parallel_world_size = get_ulysses_world_size
get_ulysses_parallel_rank = get_ulysses_rank
get_ring_parallel_world_size = get_ring_world_size
get_ring_parallel_rank = get_ring_rank
get_tensor_parallel_world_size = get_tensor_model_parallel_world_size
get_tensor_parallel_rank = get_tensor_model_parallel_rank
get_cfg_parallel_world_size = get_classifier_free_guidance_world_size
get_cfg_parallel_rank = get_classifier_free_guidance_rank
