"""The calls of one denoising step share each streamed block: they are put off, and then advance together.

Owns what this asks of a pipeline while it is placed, and what the user is told of it. Does not know how calls are put
off (`penstock.distributed.guidance.deferral`) or advance (`penstock.offload.convoy`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from penstock.config import OffloadConfig, ParallelConfig
from penstock.distributed.guidance.deferral import Deferral, apply_deferral
from penstock.distributed.guidance.futures import wait
from penstock.distributed.mesh import Mesh
from penstock.errors import ConfigError
from penstock.interception import intercept
from penstock.offload.streamer import Streamer
from penstock.undo import Undo


def check_sharing(config: OffloadConfig, parallel: ParallelConfig | None) -> None:
    """Refuse to share blocks where a rank has no two calls, or where calls of several ranks would wait in a circle.

    Raises:
        ConfigError: saying what to leave out.
    """
    if not config.share_blocks or parallel is None:
        return
    if parallel.cfg_parallel_size > 1:
        raise ConfigError(
            f"share_blocks has nothing to act on with cfg({parallel.cfg_parallel_size}): the calls of a step run on "
            "different ranks already. Leave one of them out."
        )
    if parallel.pipeline_parallel_size > 1:
        raise ConfigError(
            f"share_blocks cannot go with pipeline({parallel.pipeline_parallel_size}): a call that waits for another "
            "at a block of this rank would keep other ranks waiting. Leave one of them out."
        )


class Sharing:
    """Calls that share blocks on one placed pipeline.

    Args:
        pipeline: that is placed.
        streamer: of its weights; None where nothing streams.
        mesh: the ranks that it is split over.
    """

    def __init__(self, pipeline: Any, streamer: Streamer | None, mesh: Mesh) -> None:
        self._pipeline = pipeline
        self._streamer = streamer if streamer is not None and streamer.shares_blocks else None
        self._must_match = mesh["sequence"].size > 1  # which keeps lengths of streams, once per denoiser
        self._deferral: Deferral | None = None

    def install(self) -> Undo:
        """Have calls put off, where that is asked for and can save anything; what takes it back."""
        streamer, pipeline = self._streamer, self._pipeline
        if streamer is None or not callable(pipeline) or not streamer.streamed_denoisers:
            return Undo()
        self._deferral = Deferral(streamer.run_together, self._must_match)
        with Undo() as undo:
            for name, denoiser in streamer.streamed_denoisers.items():
                undo.add(apply_deferral(denoiser, self._deferral, partial(streamer.announce, name)).run)
            undo.add(intercept(pipeline, "__call__", self._defer).run)
        return undo

    def _defer(self, execute: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Makes a call of the pipeline, within which calls of its denoisers are put off."""
        assert self._deferral is not None  # installed
        with schedulers_that_wait(self._pipeline), self._deferral.run():
            result = execute(*args, **kwargs)
        return wait(result)

    def notes(self) -> tuple[str, ...]:
        """Where sharing was asked for and does nothing, or not for all calls, the reason."""
        streamer, deferral = self._streamer, self._deferral
        if streamer is None:
            return ()
        if not streamer.streamed_denoisers:
            return ("share_blocks has nothing to act on: no denoiser has blocks that stream",)
        if not callable(self._pipeline):
            return (f"share_blocks acts within a pipeline's call, and {type(self._pipeline).__name__} has none",)
        notes = [
            f"share_blocks: {count} calls of the denoiser were made one by one: {reason}"
            for reason, count in (deferral.single.items() if deferral is not None else ())
        ]
        if streamer.has_run and not streamer.convoy.num_together and not notes:
            notes.append("share_blocks has saved nothing so far: no step made two calls that could wait for each other")
        return tuple(notes)


@contextmanager
def schedulers_that_wait(pipeline: Any) -> Iterator[None]:
    """Inside, a scheduler gets predictions that are there: when a step is counted, it has been computed.

    So do the copies of a scheduler that a pipeline makes.
    """
    with ExitStack() as stack:
        for part in list(vars(pipeline).values()):
            if callable(getattr(part, "step", None)) and hasattr(part, "timesteps"):
                stack.callback(intercept(part, "step", _waiting, with_copies=True).run)
        yield


def _waiting(step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return step(*wait(args), **wait(kwargs))
