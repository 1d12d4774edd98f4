"""One process of the parallel benchmark: builds a model, then runs the systems that stdin names, one after another.

    python benchmarks/parallel_systems.py CASE [--steps 2] [--small]

`benchmarks/parallel.py` starts one without ranks, and one per rank. Each line of stdin is a system:

    plain              the stock model; on several ranks, each for itself, at the same time
    placed             penstock.apply with nothing split
    ulysses, ring, tensor, cfg, rows, tiles    penstock.apply with that degree set to the number of ranks
    diffusers-ulysses, diffusers-ring, diffusers-tensor    diffusers' own, put in place by hand: its
                       `enable_parallelism` divides by the number of accelerators, which is zero on the CPU

A system named again is timed again, without being put in place anew. Prints one line of JSON when the model is ready,
and one for each line of stdin.
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
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import torch.distributed as dist
from diffusers.hooks import tensor_parallel
from diffusers.hooks.context_parallel import apply_context_parallel
from diffusers.models import _modeling_parallel as rival
from parallel_cases import CASES, Case, Denoising, build_pipeline, formula_bytes, inputs_of
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import penstock
from penstock.distributed.group import Group

CPU = torch.device("cpu")
TIMEOUT = timedelta(seconds=300)
DEGREES = {
    "ulysses": "ulysses_degree",
    "ring": "ring_degree",
    "tensor": "tensor_parallel_size",
    "cfg": "cfg_parallel_size",
    "rows": "vae_patch_parallel_size",
    "tiles": "vae_patch_parallel_size",  # of a VAE that is tiled already
}
RIVAL_FAILURES = (ValueError, RuntimeError, NotImplementedError, AssertionError)


class ExchangeClock:
    """Seconds that this rank spends in penstock's exchanges, waiting for slower ranks included."""

    def __init__(self) -> None:
        self.seconds = 0.0
        for name in ("all_gather", "all_to_all", "all_reduce", "broadcast", "trade"):
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
        self.system = ""  # the one that the pipeline is split by
        self.undo = ExitStack()
        self.held: tuple[Any, Any] = self.pipeline, None

    def facts(self) -> dict[str, Any]:
        """The model's size, and a digest of its output that all processes must have."""
        (model,) = (part for part in vars(self.pipeline).values() if isinstance(part, torch.nn.Module))
        return {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "digest": hashlib.sha256(self.expected.float().numpy().tobytes()).hexdigest()[:16],
            "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        }

    def hold(self, system: str) -> None:
        """Split the pipeline by a system, and warm it up; nothing where it is split so."""
        if system != self.system:
            self.undo.close()
            self.system = ""
            self.held = self.undo.enter_context(split(self.pipeline, system))
            self.held[0](self.inputs, 1, self.is_guided)
            self.system = system

    def run(self, system: str) -> dict[str, Any]:
        """Seconds and bytes per step, and how far the output is from the plain one."""
        self.hold(system)
        pipeline, placed = self.held
        before, exchanged_s = received(placed), self.clock.seconds
        if self.num_ranks > 1:
            dist.barrier()
        busy_s, begun_s, begun_cpu_s = machine_s(), time.perf_counter(), time.process_time()
        output = pipeline(self.inputs, self.num_steps, self.is_guided)
        wall_s, cpu_s = time.perf_counter() - begun_s, time.process_time() - begun_cpu_s
        busy_s = machine_s() - busy_s
        exchange_s = self.clock.seconds - exchanged_s
        bytes_by_axis = received(placed) - before
        difference = (output.float() - self.expected.float()).abs().max() / self.expected.float().abs().max()
        result = {
            "wall_s": wall_s / self.num_steps,
            "cpu_s": cpu_s / self.num_steps,
            "machine_s": busy_s / self.num_steps,
            "exchange_s": exchange_s / self.num_steps,
            "received_bytes": sum(bytes_by_axis.values()) / self.num_steps,
            "difference": difference.item(),
        }
        formula = formula_bytes(system, self.case, self.num_ranks)
        return result | ({"formula_share": bytes_by_axis[system] / self.num_steps / formula} if formula else {})


def machine_s() -> float:
    """CPU seconds that all processes of this machine have had so far, in steps of a hundredth."""
    user, nice, system, _idle, _waiting, *interrupts = map(
        int, Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    )
    return (user + nice + system + sum(interrupts[:2])) / os.sysconf("SC_CLK_TCK")


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
