"""One part of the GPU benchmark in this process: write the checkpoint, ask the device, or run one system.

    python benchmarks/gpu_systems.py write FOLDER --doubles 19 --singles 38 --heads 24
    python benchmarks/gpu_systems.py facts --device cuda
    python benchmarks/gpu_systems.py run SYSTEM FOLDER --device cuda --output FILE

`benchmarks/gpu.py` starts it and says what the systems are. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from offload_checkpoint import MARKER, POOLED_WIDTH, TEXT_WIDTH, Shape, is_complete, num_weight_bytes, write
from offload_meter import PeakMemory
from safetensors.torch import load_file, save_file

NUM_TEXT_TOKENS = 512
WARM_STEPS = 2


def write_pipeline(folder: Path, shape: Shape) -> None:
    """Save a FluxPipeline: a transformer of this shape, beside the tiny encoders and VAE of the tests."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tests import zoo

    if is_complete(folder):
        return
    shutil.rmtree(folder, ignore_errors=True)
    zoo.folder("flux", folder.parent / "zoo").rename(folder)
    shutil.rmtree(folder / "transformer")
    write(folder / "transformer", shape)
    (folder / MARKER).write_text(json.dumps({"num_bytes": num_weight_bytes(folder / "transformer")}))


def bandwidth(device: torch.device, is_pinned: bool) -> float:
    """Bytes per second from the host to the device: the best of eight copies of 256 MiB."""
    is_cuda = device.type == "cuda"
    source = torch.zeros(2**28, dtype=torch.uint8, pin_memory=is_pinned and is_cuda)
    target = torch.zeros(2**28, dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(8):
        synchronise(device)
        begun_s = time.perf_counter()
        target.copy_(source, non_blocking=True)
        synchronise(device)
        seconds.append(time.perf_counter() - begun_s)
    return source.numel() / min(seconds)


def synchronise(device: torch.device) -> None:
    """Wait for what the device was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def facts_of(device: torch.device) -> dict[str, Any]:
    """What the device and its machine are."""
    facts: dict[str, Any] = {
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "pinned_bytes_per_s": bandwidth(device, True),
        "pageable_bytes_per_s": bandwidth(device, False),
        "cpus": os.cpu_count(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "accelerate")},
    }
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        facts |= {"device_bytes": memory, "cuda": torch.version.cuda}
    return facts


def stock(folder: Path) -> Any:
    """The pipeline as diffusers loads it."""
    from diffusers import FluxPipeline

    return FluxPipeline.from_pretrained(folder, dtype=torch.bfloat16)


def load_plain(folder: Path, device: torch.device) -> Any:
    """Everything on the device."""
    return stock(folder).to(device)


def load_group(folder: Path, device: torch.device, kind: str) -> Any:
    """diffusers' group offload; its copy stream needs CUDA."""
    pipeline = stock(folder)
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    pipeline.transformer.enable_group_offload(
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type=kind,
        use_stream=device.type == "cuda",
        **blocks,
    )
    return pipeline


def load_accelerate(folder: Path, device: torch.device) -> Any:
    """accelerate's hooks, layer by layer."""
    import accelerate

    pipeline = stock(folder)
    accelerate.cpu_offload(pipeline.transformer, execution_device=device)
    return pipeline


def load_ours(folder: Path, device: torch.device, system: str) -> Any:
    """penstock with a share of the weights, `least`, or whole components."""
    import penstock

    mode, _, share = system.partition("-")
    options: dict[str, Any] = {"device": str(device), "dtype": "bfloat16", "offload": mode}
    if share:
        num_bytes = num_weight_bytes(folder)
        options["max_weight_memory"] = share if share == "least" else num_bytes * int(share) // 100 + 2**20
    return penstock.load(folder, **options)


def loader(system: str) -> Callable[[Path, torch.device], Any]:
    """What loads the pipeline of a system."""
    if system.startswith("group-"):
        return lambda folder, device: load_group(folder, device, f"{system.removeprefix('group-')}_level")
    if system in ("plain", "accelerate"):
        return {"plain": load_plain, "accelerate": load_accelerate}[system]
    return lambda folder, device: load_ours(folder, device, system)


class StepClock:
    """Notes when each step ends, on the device's own clock where it has one, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []

    def mark(self, pipeline: Any = None, step: int = 0, timestep: Any = None, values: Any = None) -> dict[str, Any]:
        """A moment; what a pipeline calls when a step has ended."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())
        return values or {}

    def seconds(self) -> list[float]:
        """Between neighbouring moments."""
        synchronise(self._device)
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self._device.type == "cuda":
            return [one.elapsed_time(other) / 1000 for one, other in pairs]
        return [other - one for one, other in pairs]


def denoise(
    pipeline: Any, device: torch.device, options: argparse.Namespace, num_steps: int
) -> tuple[Any, list[float]]:
    """One picture's latents, and the seconds of each step."""
    side = 2 * pipeline.vae_scale_factor * math.isqrt(options.tokens)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randn(1, NUM_TEXT_TOKENS, TEXT_WIDTH, generator=generator).to(device, torch.bfloat16)
    pooled = torch.randn(1, POOLED_WIDTH, generator=generator).to(device, torch.bfloat16)
    clock = StepClock(device)
    clock.mark()
    latents = pipeline(
        prompt_embeds=prompt,
        pooled_prompt_embeds=pooled,
        height=side,
        width=side,
        num_inference_steps=num_steps,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
        callback_on_step_end=clock.mark,
    ).images
    return latents.cpu(), clock.seconds()


def restart_peak(device: torch.device) -> None:
    """Forget the most that was allocated on the device."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_of(device: torch.device, report: Any) -> int:
    """The most bytes that were allocated on the device; where the device is the host, what the report counted."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return int(report.peak_bytes) if report is not None else 0


def compare(latents: torch.Tensor, options: argparse.Namespace) -> float:
    """The largest difference from the plain run's latents, which the plain run leaves.

    Raises:
        ValueError: for latents that are not finite: anything could be compared with them.
    """
    if not latents.isfinite().all():
        raise ValueError(f"{options.system}: the output is not finite.")
    if options.system == "plain":
        save_file({"latents": latents.contiguous()}, options.output)
    reference = load_file(options.output)["latents"]
    return (latents.float() - reference.float()).abs().max().item()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Load and run one system, and say what it cost."""
    from penstock import placed_on

    device = torch.device(options.device)
    synchronise(device)  # the context is there before the clock starts
    peak = PeakMemory()
    begun_s = time.perf_counter()
    pipeline = loader(options.system)(options.folder, device)
    synchronise(device)
    load_s = time.perf_counter() - begun_s
    pipeline.set_progress_bar_config(disable=True)
    gc.collect()
    load_peak = peak.read()
    denoise(pipeline, device, options, WARM_STEPS)
    first_s = time.perf_counter() - begun_s
    placed = placed_on(pipeline)
    before = placed.report() if placed is not None else None
    restart_peak(device)
    latents, seconds = denoise(pipeline, device, options, options.steps)
    after = placed.report() if placed is not None else None
    found = {
        "load_s": load_s,
        "first_s": first_s,
        "step_s": statistics.median(seconds[1:]),
        "steps_s": seconds,
        "weight_bytes": num_weight_bytes(options.folder),
        "peak_device_bytes": peak_of(device, after),
        "load_peak": load_peak,
        "host_peak": peak.read(),
        "difference": compare(latents, options),
    }
    if before is not None and after is not None:
        found |= {
            "moved_bytes_per_step": (after.moved_bytes - before.moved_bytes) / options.steps,
            "wait_s_per_step": (after.exposed_wait_s - before.exposed_wait_s) / options.steps,
            "promised_bytes": after.plan.promised_bytes,
            "least_bytes": after.plan.least_bytes,
            "host_bytes": after.host_bytes,
            "notes": list(after.notes),
        }
        placed.remove()
    return found


def main() -> None:
    """Do what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    writing = verbs.add_parser("write")
    writing.add_argument("folder", type=Path)
    for name in ("doubles", "singles", "heads"):
        writing.add_argument(f"--{name}", type=int, required=True)
    asking = verbs.add_parser("facts")
    running = verbs.add_parser("run")
    running.add_argument("system")
    running.add_argument("folder", type=Path)
    running.add_argument(
        "--output", type=Path, required=True, help="the plain run's latents: written, or compared with"
    )
    running.add_argument("--steps", type=int, default=5)
    running.add_argument("--tokens", type=int, default=4096)
    for part in (asking, running):
        part.add_argument("--device", default="cuda")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.backends.cudnn.deterministic = True
    if options.verb == "write":
        write_pipeline(options.folder, Shape(options.doubles, options.singles, options.heads))
    elif options.verb == "facts":
        print(json.dumps(facts_of(torch.device(options.device))))
    else:
        print(json.dumps(measure(options)))


if __name__ == "__main__":
    main()
