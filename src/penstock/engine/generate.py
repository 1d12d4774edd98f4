"""Run a request on a pipeline: GenerationRequest -> StepEvent* -> GenerationResult, one per picture.

Owns seeds and the call itself. Does not know files or terminals.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from penstock.engine.arguments import call_arguments, shown_arguments
from penstock.engine.build import notes_of
from penstock.engine.latents import require_finite, seen_latents
from penstock.engine.outputs import read_output
from penstock.engine.placed import placed_on
from penstock.engine.steps import OnStep, step_events
from penstock.errors import GenerationError, PenstockError
from penstock.models.sizes import call_parameters, frame_rate
from penstock.request import GenerationRequest, GenerationResult

_SEED_LIMIT = 2**32  # drawn seeds stay short enough to type


def generate(
    pipeline: Any,
    request: GenerationRequest,
    *,
    on_step: OnStep | None = None,
) -> Iterator[GenerationResult]:
    """Make what is asked for, one picture (video, sound) after the other.

    Picture i is made with seed `seed + i` by a call of its own: it equals the picture that this seed makes alone,
    and memory does not grow with their number. With `data_parallel_size` N, group i % N makes picture i: each rank
    yields those of its group.

    Args:
        pipeline: any diffusers pipeline.
        request: what is asked for; what it leaves open is the default of the model's maker for a pipeline that
            `penstock.load` made, else the pipeline's own.
        on_step: called after each denoising step; what it raises ends the run and is raised again.

    Yields:
        Each result as soon as it is done.

    Raises:
        RequestError: at once, for what this pipeline cannot do.
        GenerationError: when the pipeline fails while it runs.
    """
    arguments = call_arguments(request, pipeline, notes_of(pipeline).defaults)
    seed = secrets.randbelow(_SEED_LIMIT) if request.seed is None else request.seed
    items = range(request.num_images)
    placed = placed_on(pipeline)
    if placed is not None:
        seed = int(placed.mesh["world"].broadcast(torch.tensor([seed]), 0))
        items = items[placed.mesh["data"].rank :: placed.mesh["data"].size]
    results = (_run(pipeline, arguments, seed + item, item, on_step) for item in items)
    if request.frame_rate is None:
        return results
    return (replace(result, frame_rate=request.frame_rate) for result in results)


def _run(pipeline: Any, arguments: dict[str, Any], seed: int, item: int, on_step: OnStep | None) -> GenerationResult:
    begun_s = time.perf_counter()
    with step_events(pipeline, item, on_step) as watch, seen_latents(pipeline, require_finite):
        try:
            output = read_output(pipeline, call(pipeline, arguments, seed))
        except GenerationError as error:
            if watch.in_callback and error.__cause__ is not None:
                raise error.__cause__ from None
            raise
    return GenerationResult(
        kind=output.kind,
        seed=seed,
        images=output.images,
        audio=output.audio,
        sampling_rate_hz=output.sampling_rate_hz,
        frame_rate=frame_rate(pipeline, arguments) if output.kind == "video" else None,
        arguments=shown_arguments(arguments),
        elapsed_s=time.perf_counter() - begun_s,
    )


def call(pipeline: Any, arguments: Mapping[str, Any], seed: int | Sequence[int]) -> Any:
    """Call the stock pipeline once, in inference mode, with a CPU generator of this seed; one of each for a batch.

    Raises:
        GenerationError: for any failure inside the pipeline; its cause is chained.
    """
    extra: dict[str, Any] = {}
    if "generator" in call_parameters(type(pipeline)):
        extra["generator"] = _generator(seed) if isinstance(seed, int) else [_generator(one) for one in seed]
    try:
        with torch.inference_mode():
            return pipeline(**arguments, **extra)
    except PenstockError:
        raise
    except torch.OutOfMemoryError as error:
        raise GenerationError(
            f"{type(pipeline).__name__} ran out of device memory. Ask for a smaller size or fewer frames."
        ) from error
    except Exception as error:  # whatever a stock pipeline raises, the caller gets one typed error
        reason = str(error).strip().splitlines()
        raise GenerationError(
            f"{type(pipeline).__name__} failed while it ran: {type(error).__name__}: "
            f"{reason[0] if reason else 'no message'}"
        ) from error


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)
