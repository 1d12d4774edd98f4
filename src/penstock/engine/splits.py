"""Splitting a pipeline over ranks, in the one order in which splits go together.

    stages -> slices -> (weights are placed) -> sequences -> guidance -> the VAE -> the pipeline's call

Weights first, so that what is placed is only this rank's; then hooks, from the blocks outwards. Owns this order, what
each split is applied to, and what is refused before weights load. Does not know how a split works.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from penstock.config import ParallelConfig
from penstock.distributed import parallel_state
from penstock.distributed.guidance.calls import apply_guidance
from penstock.distributed.guidance.rounds import Rounds, rounds_of
from penstock.distributed.mesh import Mesh
from penstock.distributed.patch.autoencoder import VAE_CALLS, apply_patches, check_patches
from penstock.distributed.sequence.knowledge import apply_sequences
from penstock.distributed.stages import apply_stages
from penstock.distributed.tensor import apply_tensor
from penstock.distributed.tiles import apply_tiles, check_tiles
from penstock.distributed.whole import refuse_while_split
from penstock.engine.attachments import requirement
from penstock.engine.companions import AXES, check_denoisers, denoisers_of, is_split
from penstock.engine.together import Meeting, apply_agreement, apply_together, shares_weights
from penstock.errors import ConfigError
from penstock.models.components import discover
from penstock.models.rows.table import row_of
from penstock.offload.stage import entries
from penstock.profile import Role
from penstock.undo import Undo
from penstock.weights.maps import MappedFiles

Tell = Callable[[str], None]


def check_splits(pipeline: Any, parallel: ParallelConfig) -> None:
    """Refuse what a pipeline's classes cannot do.

    Args:
        pipeline: with weights, or on the meta device.
        parallel: the degrees.

    Raises:
        ConfigError: with the class, the reason, and what to do instead.
    """
    if (parallel.denoiser_size > 1 or parallel.use_hsdp) and not denoisers_of(pipeline):
        raise ConfigError(
            f"{parallel.equation()}: {type(pipeline).__name__} has no denoiser that could be found, so that there is "
            "nothing to split. Declare _dit_modules on its class, or leave the degrees at 1."
        )
    check_denoisers(pipeline, parallel)
    if parallel.vae_patch_parallel_size > 1:
        _split_vaes(pipeline, parallel)


def _split_vaes(pipeline: Any, parallel: ParallelConfig) -> list[nn.Module]:
    """The VAEs that can be spread as asked; in tiles, one of sound beside one of pictures may have none.

    Raises:
        ConfigError: where no VAE can.
    """
    refused: list[ConfigError] = []
    found = []
    for vae in _modules(pipeline, "vae"):
        try:
            (check_tiles if parallel.vae_parallel_mode == "tile" else check_patches)(vae)
            found.append(vae)
        except ConfigError as error:
            refused.append(error)
    if found:
        return found
    if refused:
        raise refused[0]
    raise ConfigError(
        f"vae_patch_parallel_size({parallel.vae_patch_parallel_size}): {type(pipeline).__name__} has no VAE. Leave it "
        "at 1."
    )


def _has_tiles(vae: nn.Module) -> bool:
    try:
        check_tiles(vae)
    except ConfigError:
        return False
    return True


def split_weights(pipeline: Any, mesh: Mesh) -> Undo:
    """Leave on this rank the weights that are its own.

    Args:
        pipeline: on the CPU or the meta device, before its weights are placed.
        mesh: whose `pipeline` and `tensor` axes are used.

    Returns:
        What puts all weights back; all ranks of the mesh run it together.
    """
    files = MappedFiles()

    def is_mapped(weight: Tensor) -> bool:
        if weight.device.type != "cpu":
            return weight.device.type == "meta"
        return files.locate(weight.data_ptr(), weight.nbytes, weight.dtype) is not None

    def is_free(block: nn.Module) -> bool:
        return all(map(is_mapped, (*block.parameters(), *block.buffers())))

    with Undo() as undo:
        if mesh["pipeline"].size * mesh["tensor"].size > 1:
            refuse_while_split(pipeline, f"({mesh.config.equation()})", undo)
        for denoiser in _modules(pipeline, "denoiser"):
            if mesh["pipeline"].size > 1 and is_split(denoiser, "pipeline"):
                undo.add(apply_stages(denoiser, row_of(denoiser), mesh["pipeline"], is_free).run)
            if mesh["tensor"].size > 1 and is_split(denoiser, "tensor"):
                undo.add(apply_tensor(denoiser, mesh["tensor"], is_mapped).run)
    return undo


def split_work(
    pipeline: Any, mesh: Mesh, meeting: Meeting | None = None, *, tell: Tell, is_streaming: bool = False
) -> Undo:
    """Split what a placed pipeline computes.

    Args:
        pipeline: whose weights are where they will be.
        mesh: all other axes.
        meeting: of the ranks that share its weights.
        tell: takes notes for the user, now and after calls.
        is_streaming: whether its weights stream.

    Returns:
        What takes it back.
    """
    with Undo() as undo:
        if mesh["world"].size == 1:
            return undo
        undo.add(_use(mesh))
        denoisers = _modules(pipeline, "denoiser")
        for denoiser in denoisers:
            axes = [axis for axis in AXES if mesh[axis].size > 1 and is_split(denoiser, axis)]
            if "sequence" in axes:
                undo.add(apply_sequences(denoiser, mesh, [other for other in denoisers if other is not denoiser]).run)
            require = requirement(pipeline, denoiser, mesh, is_streaming)
            undo.add(apply_guidance(denoiser, mesh["cfg"], lockstep=shares_weights(mesh), require=require).run)
            if axes or mesh["shard"].size > 1:
                undo.add(apply_agreement(denoiser, mesh).run)
        if shares_weights(mesh):
            undo.add(_close_rounds(pipeline, rounds_of(mesh["cfg"])).run)
        if mesh["vae"].size > 1:
            for vae in _split_vaes(pipeline, mesh.config):
                undo.add(_split_vae(vae, mesh, tell).run)
        undo.add(apply_together(pipeline, mesh, meeting).run)
    return undo


def _split_vae(vae: nn.Module, mesh: Mesh, tell: Tell) -> Undo:
    """Spread a VAE over its ranks: by its tiles where it is tiled, else by rows."""
    name, group, is_tiled = type(vae).__name__, mesh["vae"], mesh.config.vae_parallel_mode == "tile"
    with Undo() as undo:
        has_tiles = is_tiled or _has_tiles(vae)
        if has_tiles:
            undo.add(apply_tiles(vae, group, is_switched_on=is_tiled).run)
        if is_tiled:
            tell(f"{name}: in tiles, over {group.size} ranks; the picture is that of a tiled VAE.")
        else:
            undo.add(apply_patches(vae, group, tell).run)
            is_tiled = has_tiles and getattr(vae, "use_tiling", False)
            parts = "its tiles, as it is tiled" if is_tiled else "rows of the plain picture"
            tell(f"{name}: by {parts}, over {group.size} ranks.")
        undo.add(apply_agreement(vae, mesh, [method for method in VAE_CALLS if hasattr(vae, method)]).run)
    return undo


def _close_rounds(pipeline: Any, rounds: Rounds) -> Undo:
    """Have the open round closed before a component runs that is no denoiser, and gathers what only it needs.

    It then runs, and gathers, at the same place on all ranks: whose turn it was, and who only got futures.
    """

    def close(*_: Any) -> None:
        if rounds.is_running:
            rounds.close()

    with Undo() as undo:
        for component in discover(pipeline).components:
            if component.role != "denoiser":
                for module in entries(component.module):
                    undo.add(module.register_forward_pre_hook(close, prepend=True).remove)
    return undo


def _use(mesh: Mesh) -> Callable[[], None]:
    """Put a mesh to use; what is returned gives back the one before, unless another came after."""
    before = parallel_state.get_mesh() if parallel_state.model_parallel_is_initialized() else None
    parallel_state.set_mesh(mesh)

    def put_back() -> None:
        if parallel_state.model_parallel_is_initialized() and parallel_state.get_mesh() is mesh:
            parallel_state.set_mesh(before)

    return put_back


def _modules(pipeline: Any, role: Role) -> list[nn.Module]:
    return [component.module for component in discover(pipeline).by_role(role)]
