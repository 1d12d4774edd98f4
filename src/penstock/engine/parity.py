"""Is the picture the same? Run a pipeline plain and with a configuration, same seed, and compare.

Owns the recording of latents and outputs, the measures, the tolerance (measured: how far a plain run is from another
one whose layers round otherwise), and the negative control: the same run with one damaged weight, which must be told
apart, or the comparison proves nothing.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn

from penstock.config import LoadConfig, ParallelConfig
from penstock.distributed.group import Group
from penstock.engine.arguments import call_arguments
from penstock.engine.build import Prepared, fill, prepare
from penstock.engine.generate import call
from penstock.engine.latents import seen_latents
from penstock.engine.outputs import to_array
from penstock.engine.placement import choose_dtype
from penstock.engine.steps import step_events
from penstock.errors import ConfigError, GenerationError, RequestError
from penstock.models.components import discover
from penstock.models.quiet import quiet_libraries
from penstock.models.sizes import call_parameters
from penstock.models.stacks import find_stacks
from penstock.profile import Role
from penstock.request import GenerationRequest

_FACTOR = 10.0  # times the plain run's difference from one that rounds otherwise, which is one draw of many
_SHORT_FACTOR = 3.0  # in 16 bits, where kernels sum in float32: another order moves a result by less than a unit
_FLOOR_ULPS = 4.0  # parts that ranks merge are rounded also where no layer is

Recording = dict[str, npt.NDArray[Any]]
"""What a run made: `latents` (what the VAE was given), and the arrays of the pipeline's output, by name."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far one recorded array is from its reference.

    Attributes:
        name: of the array.
        shape: of the reference.
        max_difference: largest absolute difference; NaN where shapes differ or a value is not finite.
        relative: the same, divided by the largest absolute value of the reference.
        psnr_db: peak signal-to-noise ratio, the peak being the reference's range; infinite where equal.
    """

    name: str
    shape: tuple[int, ...]
    max_difference: float
    relative: float
    psnr_db: float

    @property
    def is_equal(self) -> bool:
        """Whether no value differs."""
        return self.max_difference == 0

    def is_within(self, tolerance: float) -> bool:
        """Whether the relative difference is at most `tolerance`; 0 asks for equality. NaN never is."""
        return self.relative <= tolerance


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The outcome of `verify`.

    Attributes:
        model: the name that was given.
        configuration: what was compared with the plain run.
        tolerance: largest relative difference that passes; 0 asks for bit equality.
        differences: per recorded array, configuration against plain.
        control: per recorded array, a run with one damaged weight against plain; empty when switched off.
    """

    model: str
    configuration: dict[str, Any]
    tolerance: float
    differences: tuple[Difference, ...]
    control: tuple[Difference, ...]

    @property
    def is_same(self) -> bool:
        """Whether something was compared, and every array is within the tolerance."""
        return bool(self.differences) and all(difference.is_within(self.tolerance) for difference in self.differences)

    @property
    def is_sensitive(self) -> bool:
        """Whether the control was told apart (or switched off)."""
        return not self.control or not all(difference.is_within(self.tolerance) for difference in self.control)

    @property
    def passed(self) -> bool:
        """The same picture, by a comparison that can see a difference."""
        return self.is_same and self.is_sensitive

    def to_json(self) -> str:
        """One line of JSON; values that are not finite are null."""
        told = asdict(self)
        for name in ("differences", "control"):
            told[name] = [{**asdict(item), "is_equal": item.is_equal} for item in getattr(self, name)]
        return json.dumps(_finite({**told, "passed": self.passed}))


def verify(
    model: str | Path,
    request: GenerationRequest,
    *,
    tolerance: float | None = None,
    reference_dtype: str | None = None,
    control: bool = True,
    parallel: ParallelConfig | None = None,
    **options: Any,
) -> Verification:
    """Compare stock diffusers with penstock under a configuration: same model, request and seed.

    Args:
        model: `demo`, `demo-video`, a folder saved by diffusers, or a hub id.
        request: what to generate; a seed of None counts as 0, so that a verification can be repeated.
        tolerance: largest relative difference that passes, such as 1e-4; 0 asks for bit equality. Left out, 0 on one
            rank; on several that make sums in another order it is measured: 10 times (in 16 bits, 3 times) how far a
            plain run is from itself when each layer of the denoiser rounds the other way.
        reference_dtype: dtype of the plain run; None takes that of the configuration.
        control: also run with one damaged weight, which must not pass.
        parallel: how the work is split; each rank makes the plain picture as well, and compares its own with it. With
            tiles of the VAE spread over ranks the plain VAE is tiled too.
        **options: fields of `LoadConfig`: the configuration to verify.

    Raises:
        UsageError: for what cannot work, before weights load.
        ModelError: for files that are missing, truncated or corrupt.
        GenerationError: when a run fails.

    Cost: two runs, or three with the control; one more plain run where the tolerance is measured; one pipeline is in
    memory at a time.
    """
    prepared = _prepared(model, request, tolerance, parallel, options)
    world = prepared.mesh["world"]
    plain_dtype = choose_dtype(LoadConfig(dtype=reference_dtype or "auto"), prepared.device)
    if reference_dtype is None:
        plain_dtype = prepared.dtype
    arguments = call_arguments(request, prepared.skeleton.pipeline, prepared.notes.defaults)
    seed = request.seed or 0
    reference, tolerance = _reference(prepared, plain_dtype, arguments, seed, tolerance)
    gc.collect()
    pipeline = fill(prepared)
    differences = _worst(compare(reference, record(pipeline, arguments, seed)), world)
    damaged: tuple[Difference, ...] = ()
    if control:
        with damaged_weight(pipeline):
            damaged = _worst(compare(reference, record(pipeline, arguments, seed)), world)
    return Verification(
        model=str(model),
        configuration={
            "device": str(prepared.device),
            "dtype": str(prepared.dtype).removeprefix("torch."),
            "reference_dtype": str(plain_dtype).removeprefix("torch."),
            "offload": prepared.plan.offload,
            "promised_bytes": prepared.plan.promised_bytes,
            "split": prepared.parallel.description(),
            "seed": seed,
        },
        tolerance=tolerance,
        differences=differences,
        control=damaged,
    )


def _prepared(
    model: str | Path,
    request: GenerationRequest,
    tolerance: float | None,
    parallel: ParallelConfig | None,
    options: dict[str, Any],
) -> Prepared:
    """The configuration to verify, once nothing speaks against it."""
    if tolerance is not None and (tolerance < 0 or not math.isfinite(tolerance)):
        raise ConfigError(f"tolerance={tolerance} is not a number from 0 up. 0 asks for bit equality.")
    if request.num_images != 1:
        raise RequestError(f"num_images={request.num_images}: verify compares one picture. Leave it out.")
    prepared = prepare(model, LoadConfig.of(**options), parallel)
    if prepared.parallel.data_parallel_size > 1:
        raise ConfigError(
            f"data_parallel_size={prepared.parallel.data_parallel_size}: verify compares one picture, and each group "
            "makes its own. Leave it out."
        )
    return prepared


def record(pipeline: Any, arguments: dict[str, Any], seed: int) -> Recording:
    """Run a pipeline once and keep its latents and its output, as float arrays where it can give them."""
    if "output_type" in call_parameters(type(pipeline)) and "output_type" not in arguments:
        arguments = {**arguments, "output_type": "np"}
    latents: list[npt.NDArray[Any]] = []
    with step_events(pipeline, 0, None), seen_latents(pipeline, lambda given: latents.append(to_array(given))):
        output = call(pipeline, arguments, seed)
    recording = {f"latents[{i}]" if len(latents) > 1 else "latents": array for i, array in enumerate(latents)}
    recording.update({name: to_array(value) for name, value in output.items() if _is_array(value)})
    if not recording:
        raise GenerationError(
            f"{type(pipeline).__name__} decoded nothing and returned {type(output).__name__} without an array or "
            "picture: there is nothing to compare."
        )
    return recording


def _is_array(value: Any) -> bool:
    """Whether an output's field is an array, a tensor, a picture, or a list of these."""
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return isinstance(value, (np.ndarray, torch.Tensor, Image.Image))


def compare(reference: Recording, candidate: Recording) -> tuple[Difference, ...]:
    """Measure every array that either has; one that the other lacks differs by NaN."""
    names = [*reference, *(name for name in candidate if name not in reference)]
    return tuple(_difference(name, reference.get(name), candidate.get(name)) for name in names)


def _difference(name: str, reference: npt.NDArray[Any] | None, candidate: npt.NDArray[Any] | None) -> Difference:
    shape = () if reference is None else tuple(reference.shape)
    if reference is None or candidate is None or candidate.shape != reference.shape:
        return Difference(name=name, shape=shape, max_difference=math.nan, relative=math.nan, psnr_db=math.nan)
    wide, other = reference.astype(np.float64), candidate.astype(np.float64)
    error = np.abs(wide - other)
    largest = float(error.max(initial=0.0))
    scale = float(np.abs(wide).max(initial=0.0))
    mean_square = float((error**2).mean()) if error.size else 0.0
    peak = float(wide.max() - wide.min()) if wide.size else 0.0
    return Difference(
        name=name,
        shape=shape,
        max_difference=largest,
        relative=largest / scale if scale else largest,
        psnr_db=math.inf if mean_square == 0 else _decibels(peak, mean_square),
    )


def _worst(differences: tuple[Difference, ...], group: Group) -> tuple[Difference, ...]:
    """Of every array, the rank's difference that is largest; NaN is larger than any number."""
    if group.size == 1 or not differences:
        return differences
    own = torch.tensor(
        [(item.max_difference, item.relative, item.psnr_db) for item in differences], dtype=torch.float64
    )
    ranks = torch.stack(group.all_gather(own))
    worst = ranks[:, :, 1].nan_to_num(nan=math.inf, posinf=math.inf).argmax(0).tolist()
    return tuple(
        replace(item, max_difference=found[0], relative=found[1], psnr_db=found[2])
        for index, item in enumerate(differences)
        for found in (ranks[worst[index], index].tolist(),)
    )


def _reference(
    prepared: Prepared, dtype: torch.dtype, arguments: dict[str, Any], seed: int, tolerance: float | None
) -> tuple[Recording, float]:
    """What the plain pipeline makes, and the tolerance: the given one, 0, or what is measured on it."""
    pipeline = _plain(prepared, dtype)
    recording = record(pipeline, arguments, seed)
    parallel = prepared.parallel
    roles: list[Role] = []  # whose sums are made in another order; pictures, stages, shards and tiles change none
    if parallel.cfg_parallel_size * parallel.sequence_size * parallel.tensor_parallel_size > 1:
        roles.append("denoiser")
    if parallel.vae_patch_parallel_size > 1 and parallel.vae_parallel_mode == "patch":
        roles.append("vae")
    if tolerance is not None or not roles:
        return recording, tolerance or 0.0
    with rounded_otherwise(pipeline, roles):
        moved = _worst(compare(recording, record(pipeline, arguments, seed)), prepared.mesh["world"])
    return recording, allowed(moved, dtype)


def allowed(moved: tuple[Difference, ...], dtype: torch.dtype) -> float:
    """The largest relative difference of a right result, from how far rounding alone moves the plain one."""
    eps = torch.finfo(dtype).eps
    far = max((difference.relative for difference in moved if math.isfinite(difference.relative)), default=0.0)
    return max((_FACTOR if dtype == torch.float32 else _SHORT_FACTOR) * far, _FLOOR_ULPS * eps)


@contextmanager
def rounded_otherwise(pipeline: Any, roles: Sequence[Role] = ("denoiser",)) -> Iterator[None]:
    """Move what each layer of some components returns by a unit in its last place inside, up or down at random.

    A sum in another order does about that to a layer; how much of it reaches the picture depends on the model. The
    draws have a seed of their own. Source: Monte Carlo arithmetic (Parker, 1997).
    """
    generators: dict[torch.device, torch.Generator] = {}

    def move(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, torch.Tensor) or not output.is_floating_point():
            return None
        if output.device not in generators:
            generators[output.device] = torch.Generator(output.device).manual_seed(0)
        ups = torch.empty_like(output).bernoulli_(0.5, generator=generators[output.device])
        return torch.addcmul(output, output, ups.mul_(2).sub_(1), value=0.6 * torch.finfo(output.dtype).eps)

    parts = [component.module for role in roles for component in discover(pipeline).by_role(role)]
    layers = [
        layer for part in parts for layer in part.modules() if next(layer.parameters(recurse=False), None) is not None
    ]
    hooks = [layer.register_forward_hook(move) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _decibels(peak: float, mean_square: float) -> float:
    if not math.isfinite(mean_square):
        return math.nan
    return 10 * math.log10(peak**2 / mean_square) if peak > 0 else -math.inf


def _plain(prepared: Prepared, dtype: torch.dtype) -> Any:
    """Stock diffusers, as its documentation says: the reference."""
    config = prepared.config
    with quiet_libraries():
        pipeline = DiffusionPipeline.from_pretrained(
            prepared.skeleton.folder.path,
            dtype=dtype,
            variant=config.variant,
            trust_remote_code=config.trust_remote_code,
        )
    if prepared.parallel.vae_patch_parallel_size > 1 and prepared.parallel.vae_parallel_mode == "tile":
        vaes: list[Any] = [component.module for component in discover(pipeline).by_role("vae")]
        for vae in vaes:
            if hasattr(vae, "enable_tiling"):
                vae.enable_tiling()  # the tiles are the picture's: on one rank it would be made of the same
    return pipeline.to(prepared.device)


@contextmanager
def damaged_weight(pipeline: Any) -> Iterator[str]:
    """Shift the rows of the largest weight matrix in a denoiser's first block by one inside; yields its name.

    Shifted and not scaled: a norm behind the layer would take a factor out again. The first block that has any: a rank
    that holds only later ones damages one of these.

    Raises:
        ConfigError: for a pipeline without a denoiser that has blocks.
    """
    name, layer = _first_block_layer(pipeline)
    weight = layer.weight
    layer.weight = nn.Parameter(weight.detach().roll(1, dims=0), requires_grad=False)
    try:
        yield name
    finally:
        layer.weight = weight


def _first_block_layer(pipeline: Any) -> tuple[str, nn.Linear]:
    for component in discover(pipeline).by_role("denoiser"):
        for stack in find_stacks(component.module):
            for index, block in enumerate(stack.blocks):
                layers = {name: inner for name, inner in block.named_modules() if isinstance(inner, nn.Linear)}
                if layers:
                    name, layer = max(layers.items(), key=lambda item: item[1].weight.numel())
                    return f"{component.name}.{stack.path}.{index}.{name}.weight", layer
    raise ConfigError(
        f"{type(pipeline).__name__} has no denoiser with blocks whose weight could be damaged for the control. "
        "Switch the control off."
    )


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
