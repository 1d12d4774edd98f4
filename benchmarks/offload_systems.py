"""One system of the offload benchmark in this process: load, attach, run some steps; prints one line of JSON.

    python benchmarks/offload_systems.py SYSTEM CHECKPOINT --scratch FOLDER --output FILE [...]

`benchmarks/offload.py` starts it once per system and round. The systems:

    plain         every weight in memory of its own: what the steps cost without any offload
    plain-capped  the weights mapped from their files, as diffusers loads them: the kernel pages
    penstock      penstock.apply(..., offload="layerwise")
    accelerate    accelerate.disk_offload
    diffusers     enable_group_offload, a block at a time, with offload_to_disk_path, from and to the CPU
"""

from __future__ import annotations

import argparse
import gc
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import accelerate
import torch
from diffusers import FluxTransformer2DModel
from offload_checkpoint import CHANNELS, POOLED_WIDTH, TEXT_WIDTH, weight_files
from offload_meter import Meter, PeakMemory, evict
from safetensors.torch import load_file, save_file

CPU = torch.device("cpu")
SUMS = ("read_bytes", "moved_bytes", "exposed_wait_s", "fill_s", "num_fills", "num_demanded")
"""Counters of a placement's report that grow with every step."""
STATES = ("peak_bytes", "host_bytes", "written_bytes")
"""What a placement's report says of the moment."""


def attach_plain(pipeline: Any, options: argparse.Namespace) -> None:
    """Copy every weight out of its file."""
    for parameter in pipeline.transformer.parameters():
        parameter.data = parameter.data.clone()


def attach_nothing(pipeline: Any, options: argparse.Namespace) -> None:
    """Leave the weights where diffusers put them: mapped."""


def attach_penstock(pipeline: Any, options: argparse.Namespace) -> Any:
    """Stream the blocks from the checkpoint's own files."""
    import penstock

    return penstock.apply(
        pipeline,
        device="cpu",
        offload="layerwise",
        max_weight_memory=options.budget_bytes,
        prefetch=options.prefetch,
    )


def attach_accelerate(pipeline: Any, options: argparse.Namespace) -> None:
    """Write every tensor into a file of its own, read back whenever its module runs."""
    accelerate.disk_offload(pipeline.transformer, options.scratch, execution_device=CPU)


def attach_diffusers(pipeline: Any, options: argparse.Namespace) -> None:
    """Write every block into a file of its own, read back whenever it runs."""
    pipeline.transformer.enable_group_offload(
        onload_device=CPU,
        offload_device=CPU,
        offload_type="block_level",
        num_blocks_per_group=1,
        offload_to_disk_path=str(options.scratch),
    )


ATTACH: dict[str, Callable[[Any, argparse.Namespace], Any]] = {
    "plain": attach_plain,
    "plain-capped": attach_nothing,
    "penstock": attach_penstock,
    "accelerate": attach_accelerate,
    "diffusers": attach_diffusers,
}


def counters(placed: Any) -> dict[str, float]:
    """What a placement says of itself; nothing where a system has no report, or a report lacks a name."""
    report = placed.report() if hasattr(placed, "report") else None
    return {name: getattr(report, name) for name in (*SUMS, *STATES) if hasattr(report, name)}


class Pipeline:
    """The smallest thing that can be placed."""

    def __init__(self, transformer: Any) -> None:
        self.transformer = transformer


class Denoising:
    """Steps of a model on fixed random inputs; each step begins with what the one before has made."""

    def __init__(self, num_tokens: int, num_steps: int) -> None:
        """Share the tokens between a square or nearly square picture (three quarters of them) and a text."""
        generator = torch.Generator().manual_seed(0)
        rows = math.isqrt(num_tokens * 3 // 4)
        num_picture = rows * rows
        num_text = num_tokens - num_picture
        self.num_steps = num_steps
        self.latents = torch.randn(1, num_picture, CHANNELS, generator=generator).bfloat16()
        grid = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(rows)).float()
        self._inputs = {
            "encoder_hidden_states": torch.randn(1, num_text, TEXT_WIDTH, generator=generator).bfloat16(),
            "pooled_projections": torch.randn(1, POOLED_WIDTH, generator=generator).bfloat16(),
            "img_ids": grid,
            "txt_ids": torch.zeros(num_text, 3),
        }

    def step(self, model: Any, number: int) -> None:
        """Call the model once and move the latents."""
        time = torch.tensor([1 - number / self.num_steps]).bfloat16()
        velocity = model(hidden_states=self.latents, timestep=time, return_dict=False, **self._inputs)[0]
        self.latents = self.latents - velocity / self.num_steps


def run_steps(pipeline: Any, placed: Any, options: argparse.Namespace) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Run all steps; returns the latents and what each step cost."""
    denoising = Denoising(options.tokens, options.steps)
    copies = [file for file in options.scratch.rglob("*") if file.is_file()]
    evict(copies)
    steps = []
    for number in range(options.steps):
        if options.drop_cache and number:
            evict([*copies, *weight_files(options.checkpoint)])
        before = counters(placed)
        with Meter() as meter:
            denoising.step(pipeline.transformer, number)
        after = counters(placed)
        sums = {f"placement_{name}": after[name] - before[name] for name in SUMS if name in after}
        steps.append({**asdict(meter.cost), "placement": sums})
    return denoising.latents, steps


def compare(latents: torch.Tensor, options: argparse.Namespace) -> float:
    """The largest difference from the plain run's latents, which the plain run itself leaves; NaN never passes.

    Raises:
        ValueError: for plain latents that are not finite, with which any output could be compared.
    """
    if options.system == "plain":
        if not latents.isfinite().all():
            raise ValueError("The plain run's output is not finite: nothing can be compared with it.")
        if not options.output.exists():
            save_file({"latents": latents}, options.output)
    reference = load_file(options.output)["latents"]
    return (latents.float() - reference.float()).abs().max().item()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Load, attach and run one system, and say what it cost."""
    peak = PeakMemory()
    with Meter() as load:
        model = FluxTransformer2DModel.from_pretrained(options.checkpoint, dtype=torch.bfloat16).eval()
    pipeline = Pipeline(model)
    with Meter() as attach:
        placed = ATTACH[options.system](pipeline, options)
    gc.collect()  # so that no cycle keeps the original weights
    attach_peak = peak.read()
    peak.restart()
    latents, steps = run_steps(pipeline, placed, options)
    steps_peak = peak.read()
    state = counters(placed)
    if hasattr(placed, "remove"):
        placed.remove()
    return {
        "system": options.system,
        "load": asdict(load.cost),
        "attach": asdict(attach.cost),
        "steps": steps,
        "attach_peak": attach_peak,
        "steps_peak": steps_peak,
        "placement": {name: state[name] for name in STATES if name in state},
        "difference": compare(latents, options),
        "versions": {name: version(name) for name in ("torch", "diffusers", "accelerate")},
    }


def main() -> None:
    """Run the system that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=ATTACH)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--scratch", type=Path, required=True, help="an empty folder for copies of the weights")
    parser.add_argument("--output", type=Path, required=True, help="the plain run's latents: written, or compared with")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget-bytes", type=int, default=2**30)
    parser.add_argument("--prefetch", type=int, default=1)
    parser.add_argument("--drop-cache", action="store_true", help="before every later step, outside of its time")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    print(json.dumps(measure(options)))


if __name__ == "__main__":
    main()
