"""One process of the parallel benchmark: builds a model, then runs the systems that stdin names, one after another.

    python benchmarks/parallel_systems.py CASE [--steps 2] [--small]

`benchmarks/parallel.py` starts one without ranks, and one per rank. Each line of stdin is a system:

    plain              the stock model; on several ranks, each for itself, at the same time
    placed             penstock.apply with nothing split
    ulysses, ring, tensor, cfg, tiles    penstock.apply with that degree set to the number of ranks
    diffusers-ulysses, diffusers-ring, diffusers-tensor    diffusers' own, put in place by hand: its
                       `enable_parallelism` divides by the number of accelerators, which is zero on the CPU

Prints one line of JSON when the model is ready, and one for each system.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, AutoencoderKLWan, FluxTransformer2DModel, WanTransformer3DModel
from diffusers.hooks import tensor_parallel
from diffusers.hooks.context_parallel import apply_context_parallel
from diffusers.models import _modeling_parallel as rival
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import penstock
from penstock.distributed.group import Group

CPU = torch.device("cpu")
TIMEOUT = timedelta(seconds=300)
HEAD_DIM = 128
TEXT_WIDTH = 1024
CHANNELS = {"flux": 64, "wan": 16}
DEGREES = {
    "ulysses": "ulysses_degree",
    "ring": "ring_degree",
    "tensor": "tensor_parallel_size",
    "cfg": "cfg_parallel_size",
    "tiles": "vae_patch_parallel_size",
}
RIVAL_FAILURES = (ValueError, RuntimeError, NotImplementedError, AssertionError)


@dataclass(frozen=True)
class Case:
    """A model and what it is given.

    Attributes:
        model: `flux`, `wan`, `picture` (AutoencoderKL) or `video` (AutoencoderKLWan).
        dtype: of weights and latents.
        size: frames, rows and columns of the denoiser's tokens, or of the VAE's latents.
        text: tokens of text.
        heads: of the denoiser, each 128 wide; of the VAE, 16 or 32 channels.
        layers: blocks: of two streams and of one for Flux.
    """

    model: str
    dtype: torch.dtype
    size: tuple[int, int, int]
    text: int = 0
    heads: int = 12
    layers: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        """Of the denoiser."""
        return self.heads * HEAD_DIM

    @property
    def num_tokens(self) -> int:
        """Without text."""
        frames, rows, columns = self.size
        return frames * rows * columns

    def small(self) -> Case:
        """The same at a size that takes no time."""
        frames, rows, columns = self.size
        heads = 2 if self.layers else 1
        return replace(
            self, size=(frames, rows * 3 // 4, columns * 3 // 4), heads=heads, layers=(1,) * len(self.layers)
        )


BF16, FP32 = torch.bfloat16, torch.float32
CASES = {
    "flux-bf16": Case("flux", BF16, (1, 32, 48), text=512, layers=(2, 4)),
    "flux-fp32": Case("flux", FP32, (1, 12, 16), text=64, layers=(2, 4)),
    "wan-bf16": Case("wan", BF16, (5, 16, 24), text=128, layers=(3,)),
    "wan-fp32": Case("wan", FP32, (3, 8, 12), text=128, layers=(4,)),
    "picture-fp32": Case("picture", FP32, (1, 64, 64), heads=1),
    "video-fp32": Case("video", FP32, (2, 28, 28), heads=1),
}


class Denoising:
    """A pipeline around one denoiser; with guidance it calls it twice per step, as Wan's does."""

    def __init__(self, transformer: torch.nn.Module, stream: str) -> None:
        self.transformer = transformer
        self.stream = stream

    def __call__(self, inputs: dict[str, torch.Tensor], num_steps: int, is_guided: bool) -> torch.Tensor:
        """Denoise: each step begins with what the one before has made."""
        sample = inputs[self.stream]
        blank = {"encoder_hidden_states": inputs["encoder_hidden_states"] * 0.5}
        with torch.inference_mode():
            for _ in range(num_steps):
                noise = self.transformer(**{**inputs, self.stream: sample}, return_dict=False)[0]
                if is_guided:
                    free = self.transformer(**{**inputs, **blank, self.stream: sample}, return_dict=False)[0]
                    noise = free + 3.0 * (noise - free)
                sample = sample - 0.5 * noise / noise.std()
        return sample


class Decoding:
    """A pipeline around one VAE, tiled; a step is one decode."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae

    def __call__(self, inputs: dict[str, torch.Tensor], num_steps: int, is_guided: bool) -> torch.Tensor:
        """Decode the latents so many times."""
        with torch.inference_mode():
            pictures = [self.vae.decode(inputs["latents"], return_dict=False)[0] for _ in range(num_steps)]
        return pictures[-1]


def build_model(case: Case) -> torch.nn.Module:
    """The model, with random weights that are the same in every process."""
    torch.manual_seed(0)
    if case.model == "flux":
        model = FluxTransformer2DModel(
            in_channels=CHANNELS["flux"],
            num_layers=case.layers[0],
            num_single_layers=case.layers[1],
            attention_head_dim=HEAD_DIM,
            num_attention_heads=case.heads,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
            axes_dims_rope=(16, 56, 56),
        )
    elif case.model == "wan":
        model = WanTransformer3DModel(
            num_attention_heads=case.heads,
            attention_head_dim=HEAD_DIM,
            text_dim=TEXT_WIDTH,
            ffn_dim=case.width // 6 * 35,  # Wan 1.3B: 8960 for 1536
            num_layers=case.layers[0],
        )
    elif case.model == "picture":
        wide = 32 * case.heads
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(wide, 2 * wide, 4 * wide, 4 * wide),
            layers_per_block=2,
            latent_channels=16,
            sample_size=256,  # tiles of 32 x 32 latents
        )
        model.enable_tiling()
    else:
        model = AutoencoderKLWan(base_dim=16 * case.heads)
        model.enable_tiling(128, 128, 96, 96)  # tiles of 16 x 16 latents
    return cast(model, case.dtype).eval()


def cast(model: Any, dtype: torch.dtype) -> Any:
    """The model with weights of a dtype, but for those that its class keeps in float32."""
    kept = set(model._keep_in_fp32_modules or ())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and kept.isdisjoint(name.split(".")):
            tensor.data = tensor.data.to(dtype)
    return model


def build_pipeline(case: Case) -> Any:
    """The smallest thing that can be placed."""
    model = build_model(case)
    return Denoising(model, "hidden_states") if case.layers else Decoding(model)


def inputs_of(case: Case) -> dict[str, torch.Tensor]:
    """Random latents and texts, the same in every process."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(case.dtype)

    frames, rows, columns = case.size
    text = noise(1, case.text, TEXT_WIDTH)
    if case.model == "flux":
        grid = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns))
        return {
            "hidden_states": noise(1, case.num_tokens, CHANNELS["flux"]),
            "encoder_hidden_states": text,
            "pooled_projections": noise(1, TEXT_WIDTH),
            "timestep": torch.full((1,), 0.5, dtype=case.dtype),
            "img_ids": grid.to(case.dtype),
            "txt_ids": torch.zeros(case.text, 3, dtype=case.dtype),
        }
    if case.model == "wan":
        return {
            "hidden_states": noise(1, CHANNELS["wan"], frames, 2 * rows, 2 * columns),  # 2 x 2 latents are a token
            "encoder_hidden_states": text,
            "timestep": torch.full((1,), 500.0),
        }
    return {"latents": noise(1, 16, rows, columns) if case.model == "picture" else noise(1, 16, frames, rows, columns)}


def formula_bytes(system: str, case: Case, num_ranks: int) -> float | None:
    """Bytes that a rank receives per step while blocks run, by the formulas; None where there is none.

    For n ranks, per layer of S tokens of a width: Ulysses 4 (n - 1) / n^2, Ring 2 (n - 1) / n, and tensor parallelism
    2 (n - 1) / n for each layer whose outputs are summed; for CFG a prediction for each other rank.
    """
    others = (num_ranks - 1) / num_ranks
    calls = 2 if case.model == "wan" else 1
    tokens = case.num_tokens + (case.text if case.model == "flux" else 0)
    whole = tokens * case.width * case.dtype.itemsize * calls
    if system == "ulysses":
        return sum(case.layers) * 4 * others / num_ranks * whole
    if system == "ring":
        return sum(case.layers) * 2 * others * whole
    if system == "tensor" and case.model == "flux":
        return (2 * case.layers[0] + case.layers[1]) * 2 * others * whole
    if system == "tensor":
        squares = (3 * tokens + case.text) * 4 * calls  # of norms across heads, in float32
        return case.layers[0] * 2 * others * (3 * whole + squares)
    if system == "cfg":
        return (num_ranks - 1) * CHANNELS["wan"] * 4 * tokens * case.dtype.itemsize
    return None


class ExchangeClock:
    """Seconds that this rank spends in penstock's exchanges, waiting for slower ranks included."""

    def __init__(self) -> None:
        self.seconds = 0.0
        for name in ("all_gather", "all_to_all", "all_reduce", "broadcast"):
            setattr(Group, name, self._timed(getattr(Group, name)))
        shift = self._timed(Group.shift)

        def shifted(group: Group, tensor: torch.Tensor) -> Any:
            received, works = shift(group, tensor)
            return received, [SimpleNamespace(wait=self._timed(work.wait)) for work in works]

        Group.shift = shifted  # type: ignore[method-assign]

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            begun_s = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds += time.perf_counter() - begun_s
            return result

        return timed


@functools.cache
def rival_mesh(**sizes: int) -> DeviceMesh:
    """A mesh as diffusers wants it; made once."""
    return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def split_by_diffusers(transformer: Any, kind: str) -> None:
    """What `enable_parallelism` does once it has divided the rank by the number of accelerators."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if kind == "tensor":
        if "cpu" not in tensor_parallel._SUPPORTED_TP_DEVICES:
            tensor_parallel._SUPPORTED_TP_DEVICES += ("cpu",)
        config = rival.ParallelConfig(tensor_parallel_config=rival.TensorParallelConfig(tp_degree=size))
        config.setup(rank, size, CPU, mesh=rival_mesh(tensor=size))
        tensor_parallel.apply_tensor_parallel(transformer, config.tensor_parallel_config, transformer._tp_plan)
        return
    degrees = {"ring": 1, "ulysses": 1, kind: size}
    context = rival.ContextParallelConfig(ring_degree=degrees["ring"], ulysses_degree=degrees["ulysses"])
    config = rival.ParallelConfig(context_parallel_config=context)
    config.setup(rank, size, CPU, mesh=rival_mesh(**degrees))
    for module in transformer.modules():
        processor = getattr(module, "processor", None)
        if hasattr(processor, "_parallel_config"):
            processor._parallel_config = config
    apply_context_parallel(transformer, context, transformer._cp_plan)


@contextmanager
def split(pipeline: Any, system: str) -> Iterator[tuple[Any, Any]]:
    """The pipeline as a system runs it, and what penstock has placed; put back afterwards."""
    if system == "plain":
        yield pipeline, None
    elif system.startswith("diffusers-"):
        rival_pipeline = Denoising(copy.deepcopy(pipeline.transformer), pipeline.stream)
        split_by_diffusers(rival_pipeline.transformer, system.removeprefix("diffusers-"))
        yield rival_pipeline, None
    else:
        degrees = {DEGREES[system]: dist.get_world_size()} if system in DEGREES else {}
        parallel = penstock.ParallelConfig(**degrees)
        with penstock.apply(pipeline, device="cpu", offload="none", parallel=parallel) as placed:
            yield pipeline, placed


def received(placed: Any) -> Counter[str]:
    """Bytes that this rank received so far, by axis."""
    total: Counter[str] = Counter()
    for item in placed.report().traffic if placed else ():
        total[item.axis] += item.received_bytes
    return total


class Bench:
    """One model in this process, and what it has to give."""

    def __init__(self, case: Case, num_steps: int) -> None:
        self.case = case
        self.num_steps = num_steps
        self.num_ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.clock = ExchangeClock()
        self.pipeline = build_pipeline(case)
        self.inputs = inputs_of(case)
        self.is_guided = case.model == "wan"
        self.expected = self.pipeline(self.inputs, num_steps, self.is_guided)

    def facts(self) -> dict[str, Any]:
        """The model's size, and a digest of its output that all processes must have."""
        (model,) = (part for part in vars(self.pipeline).values() if isinstance(part, torch.nn.Module))
        return {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "digest": hashlib.sha256(self.expected.float().numpy().tobytes()).hexdigest()[:16],
            "versions": {"torch": torch.__version__},
        }

    def run(self, system: str) -> dict[str, Any]:
        """Warm up, then time: seconds and bytes per step, and how far the output is from the plain one."""
        with split(self.pipeline, system) as (pipeline, placed):
            pipeline(self.inputs, 1, self.is_guided)
            before, exchanged_s = received(placed), self.clock.seconds
            if self.num_ranks > 1:
                dist.barrier()
            begun_s, begun_cpu_s = time.perf_counter(), time.process_time()
            output = pipeline(self.inputs, self.num_steps, self.is_guided)
            wall_s, cpu_s = time.perf_counter() - begun_s, time.process_time() - begun_cpu_s
            exchange_s = self.clock.seconds - exchanged_s
            bytes_by_axis = received(placed) - before
        blocks = bytes_by_axis["vae" if system == "tiles" else system]
        difference = (output.float() - self.expected.float()).abs().max() / self.expected.float().abs().max()
        result = {
            "wall_s": wall_s / self.num_steps,
            "cpu_s": cpu_s / self.num_steps,
            "exchange_s": exchange_s / self.num_steps,
            "received_bytes": sum(bytes_by_axis.values()) / self.num_steps,
            "difference": difference.item(),
        }
        formula = formula_bytes(system, self.case, self.num_ranks)
        return result | ({"formula_share": blocks / self.num_steps / formula} if formula else {})


def main() -> None:
    """Serve until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    case = CASES[options.case]
    bench = Bench(case.small() if options.small else case, options.steps)
    print(json.dumps(bench.facts()), flush=True)
    for line in sys.stdin:
        system = line.strip()
        try:
            answer = bench.run(system)
        except RIVAL_FAILURES as error:
            if not system.startswith("diffusers-"):
                raise
            answer = {"failed": str(error).splitlines()[0]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
