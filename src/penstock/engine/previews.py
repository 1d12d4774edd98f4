"""Pictures of unfinished latents, for any pipeline with a scheduler: by the pipeline itself.

What a pipeline does with its last latents stands in the middle of its `__call__`, and differs in each. So a copy of it
is called with the same arguments, a denoiser that predicts nothing and a scheduler whose every step gives the latents
of the moment: it unpacks, scales and decodes them as it would at the end. The prompt is not encoded again.

What is shown is where the prediction of the last step leads, where the scheduler tells: the noise of the steps to come
is not in it. Owns that trick; does not know what becomes of the pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor
from torch.utils._pytree import tree_map_only

from penstock.distributed.guidance.futures import wait
from penstock.engine.generate import call
from penstock.engine.outputs import read_output
from penstock.engine.standin import stand_in
from penstock.models.components import discover
from penstock.models.sizes import output_kind

_ENCODE = "encode_prompt"


def can_preview(pipeline: Any) -> bool:
    """Whether pictures can be made from this pipeline's unfinished latents: it makes pictures, with a scheduler."""
    has_steps = callable(getattr(getattr(pipeline, "scheduler", None), "step", None))
    return has_steps and output_kind(type(pipeline)) == "image"


def preview_steps(num_partials: int, num_steps: int) -> tuple[int, ...]:
    """After which steps, counted from 1, pictures are made: evenly spread, and never after the last."""
    count = max(0, min(num_partials, num_steps - 1))
    return tuple((place + 1) * num_steps // (count + 1) for place in range(count))


class Previews:
    """Sees the latents of running calls, and makes pictures of them.

    Args:
        pipeline: the pipeline that runs.
        arguments: of its calls.

    Attributes:
        latents: where the prediction of the last step leads; None before the first.
    """

    def __init__(self, pipeline: Any, arguments: Mapping[str, Any]) -> None:
        self._pipeline = pipeline
        self._arguments = arguments
        self._encoded: list[Any] = []
        self._is_encoding = True
        self.latents: Tensor | None = None

    @contextmanager
    def seeing(self) -> Iterator[None]:
        """Inside, the steps of the pipeline's scheduler and the results of its encoder are seen."""
        scheduler = self._pipeline.scheduler
        with stand_in(scheduler, "step", self._seeing_step(scheduler, scheduler.step)):
            if not hasattr(self._pipeline, _ENCODE):
                yield
                return
            with stand_in(self._pipeline, _ENCODE, self._seeing_encode(self._pipeline.encode_prompt)):
                yield

    def picture(self) -> Image.Image:
        """The picture of the latents as they are.

        Raises:
            GenerationError: where the pipeline cannot be called so.

        Cost: one pass of the VAE's decoder; on an offloaded pipeline it has to come to the device for it.
        """
        shown: Any = object.__new__(type(self._pipeline))
        own = vars(shown)  # what is set there is registered nowhere
        own.update(vars(self._pipeline))
        own.pop("progress_bar", None)
        for component in discover(self._pipeline).by_role("denoiser"):
            own[component.name] = _Still(component.module)
        own["scheduler"] = _still_scheduler(self._pipeline.scheduler, self.latents)
        if self._encoded:
            results = iter(self._encoded)
            own[_ENCODE] = lambda *args, **kwargs: next(results)
        shown.set_progress_bar_config(disable=True)
        return read_output(shown, call(shown, self._arguments, seed=0)).images[0]

    def _seeing_step(self, scheduler: Any, step: Callable[..., Any]) -> Callable[..., Any]:
        def seeing(model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
            result = step(model_output, timestep, sample, *args, **kwargs)
            after = result[0] if isinstance(result, tuple) else result.prev_sample
            clean = result[1] if isinstance(result, tuple) and len(result) > 1 else None  # predicted by the scheduler
            clean = getattr(result, "pred_original_sample", clean)
            sigma = _sigma(scheduler)
            if sigma is not None:
                clean = wait(sample) - sigma * wait(model_output)
            self.latents = after if clean is None else clean.to(after.dtype)
            self._is_encoding = False
            return result

        return seeing

    def _seeing_encode(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        def seeing(*args: Any, **kwargs: Any) -> Any:
            if not self._is_encoding:  # another call of the pipeline
                self._encoded.clear()
                self._is_encoding = True
            self._encoded.append(encode(*args, **kwargs))
            return self._encoded[-1]

        return seeing


class _Still:
    """A denoiser that predicts nothing; all else is asked of the real one."""

    def __init__(self, denoiser: Any) -> None:
        self._denoiser = denoiser

    def __getattr__(self, name: str) -> Any:
        return getattr(self._denoiser, name)

    def __call__(self, *args: Any, **kwargs: Any) -> _Nothing:
        sample = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
        return _Nothing((tree_map_only(Tensor, torch.zeros_like, sample),))


class _Nothing(tuple[Any]):
    """A prediction in both forms that pipelines read: the first of a tuple, and `sample`."""

    @property
    def sample(self) -> Any:
        """The prediction."""
        return self[0]


def _still_scheduler(scheduler: Any, latents: Any) -> Any:
    """A copy of a scheduler whose steps all give these latents."""

    def step(*args: Any, **kwargs: Any) -> _Step:
        return _Step((latents,))

    still = type(scheduler).from_config(scheduler.config)
    vars(still)["step"] = step  # a function of nobody: copies of the scheduler have it as well
    return still


class _Step(tuple[Any]):
    """What a step gives in both forms that pipelines read: the first of a tuple, and `prev_sample`."""

    @property
    def prev_sample(self) -> Any:
        """The latents."""
        return self[0]


def _sigma(scheduler: Any) -> Any:
    """How much noise a flow-matching scheduler's sample had before its last step; None for other schedulers."""
    is_flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    scheduler = cast(Any, scheduler)
    if not is_flow or not scheduler.step_index:
        return None
    return scheduler.sigmas[scheduler.step_index - 1]
