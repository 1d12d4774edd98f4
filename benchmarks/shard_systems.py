"""What one rank of the shard benchmark does: it places a model by one system and runs it, or loads a pipeline.

Systems that run:

    plain          all weights on every rank, each for itself at the same time
    penstock       penstock.apply(offload="sharded"): each rank its part, gathered into slots
    penstock-host  penstock.apply(offload="layerwise") with use_hsdp: each rank's part is read from the files
    fsdp2          penstock.distributed.apply_hsdp_to_model: FSDP2 with exact units, a unit gathered ahead
    fsdp2-alone    the same with nothing ahead
    fsdp2-stock    torch's fully_shard on each block and the root, and no more
    fsdp2-offload  the same with CPUOffloadPolicy
    fsdp2-named    fully_shard on whatever has "transformer_blocks" in its name and a number as its last part

One rank has nobody to share with: there `penstock` is placed with nothing offloaded, and `penstock-host` streams alone.
Systems that load: `penstock` (penstock.load, sharded) and `stock` (from_pretrained, then apply_hsdp_to_model).
"""

from __future__ import annotations

import functools
import gc
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.distributed as dist
import transformers
from diffusers import DiffusionPipeline
from shard_cases import case_of, demo_folder, given, open_pipeline
from shard_ranks import Parent, io_bytes, machine_s, status_bytes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather
from torch.distributed.tensor import DTensor

import penstock
from penstock.distributed import HSDPInferenceConfig, apply_hsdp_to_model
from penstock.distributed.hsdp.shards import shard_group, shard_mesh

MOST_HOOKS = 60
SETTLING_S = 0.15
PROMPT = "a red circle left of a blue square"


@dataclass
class Held:
    """What a system has placed.

    Attributes:
        traffic: collectives and bytes received so far.
        num_units: that a forward should gather.
        slot_bytes: promised besides the parts: places for gathered units, and what is outside of the blocks.
    """

    traffic: Callable[[], tuple[int, int]]
    num_units: int
    slot_bytes: int = 0

    def settled(self) -> tuple[int, int]:
        """The traffic once what is gathered ahead has come."""
        now, then = self.traffic(), None
        while now != then:
            time.sleep(SETTLING_S)
            now, then = self.traffic(), now
        return now


class CountedGather(DefaultAllGather):
    """torch's own all-gather, counted."""

    def __init__(self) -> None:
        self.num_calls = self.received_bytes = 0

    def __call__(self, output_tensor: Any, input_tensor: Any, group: Any, async_op: bool = False) -> Any:
        """Gather."""
        self.num_calls += 1
        self.received_bytes += output_tensor.nbytes - input_tensor.nbytes
        return super().__call__(output_tensor, input_tensor, group, async_op)


def hold_plain(pipeline: Any) -> Held:
    """Copy every weight out of its file."""
    for tensor in (*pipeline.transformer.parameters(), *pipeline.transformer.buffers()):
        tensor.data = tensor.data.clone()
    return Held(lambda: (0, 0), 0)


def hold_penstock(pipeline: Any, offload: str) -> Held:
    """Sharded over all ranks."""
    size = dist.get_world_size()
    parallel = penstock.ParallelConfig(use_hsdp=True, hsdp_shard_size=size) if size > 1 else None
    mode = "none" if parallel is None and offload == "sharded" else offload
    placed = penstock.apply(pipeline, device="cpu", offload=mode, parallel=parallel)
    if mode == "none":
        return hold_plain(pipeline)

    def traffic() -> tuple[int, int]:
        shard = [item for item in placed.report().traffic if item.axis == "shard"]
        return sum(item.num_calls for item in shard), sum(item.received_bytes for item in shard)

    num_units = sum(unit.slot is not None for unit in placed.report().units) if size > 1 else 0
    return Held(traffic, num_units, placed.plan.arena_bytes + placed.plan.fixed_bytes)


def blocks_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Elements of the model's own lists."""
    return [block for part in model.children() if isinstance(part, torch.nn.ModuleList) for block in part]


def hold_fsdp2(pipeline: Any, prefetch: int) -> Held:
    """Sharded by our own use of FSDP2."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*groups of 1 rank")
        apply_hsdp_to_model(pipeline.transformer, HSDPInferenceConfig(enabled=True), prefetch=prefetch)
    counts = shard_group(shard_mesh("cpu", 1, dist.get_world_size())).traffic
    num_blocks = len(blocks_of(pipeline.transformer))
    return Held(
        lambda: (sum(counts.num_calls.values()), sum(counts.received_bytes.values())),
        num_blocks + 1 if dist.get_world_size() > 1 else 0,
    )


def hold_stock(pipeline: Any, is_named: bool = False, **options: Any) -> Held:
    """Sharded by fully_shard as it comes: inner modules first, then the model."""
    model = pipeline.transformer.requires_grad_(False)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    named = [module for name, module in model.named_modules() if _is_numbered(name)]
    units = named if is_named else blocks_of(model)
    gather = CountedGather()
    for module in (*reversed(units), model):
        fully_shard(module, mesh=mesh, **options)
        module.set_custom_all_gather(gather)
    if dist.get_world_size() == 1:  # alone, FSDP2 cannot fill room that it makes in inference mode
        for module in (*units, model):
            module.unshard()
            module.reshard()
    return Held(lambda: (gather.num_calls, gather.received_bytes), len(units) + 1)


def _is_numbered(name: str) -> bool:
    """Whether a name is taken for that of a block."""
    return "transformer_blocks" in name and name.rpartition(".")[2].isdigit()


HOLD: dict[str, Callable[[Any], Held]] = {
    "plain": hold_plain,
    "penstock": functools.partial(hold_penstock, offload="sharded"),
    "penstock-host": functools.partial(hold_penstock, offload="layerwise"),
    "fsdp2": functools.partial(hold_fsdp2, prefetch=1),
    "fsdp2-alone": functools.partial(hold_fsdp2, prefetch=0),
    "fsdp2-stock": hold_stock,
    "fsdp2-offload": functools.partial(hold_stock, offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "fsdp2-named": functools.partial(hold_stock, is_named=True),
}


def living() -> Iterator[torch.Tensor]:
    """All tensors of this process but those that were there before; of a DTensor the one that has its part."""
    for value in gc.get_objects():
        kind = type(value)
        if issubclass(kind, torch.Tensor) and not issubclass(kind, DTensor) and value.device.type == "cpu":
            yield value


def mapped() -> list[tuple[int, int]]:
    """Address ranges of mapped checkpoints."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [line[0].split("-") for line in lines if line[-1].endswith(".safetensors")]
    return [(int(begin, 16), int(end, 16)) for begin, end in spans]


def storage_bytes(tensors: Iterable[torch.Tensor], spans: list[tuple[int, int]]) -> int:
    """Bytes of the storages that tensors refer to, each once, but for those in mapped checkpoints."""
    storages: dict[int, int] = {}
    with torch._C.DisableTorchFunctionSubclass():
        for tensor in tensors:
            storage = tensor.untyped_storage()
            address = storage.data_ptr()
            storages[address] = max(storage.nbytes(), storages.get(address, 0))
    return sum(size for address, size in storages.items() if not any(begin <= address < end for begin, end in spans))


def peak_bytes(pipeline: Any, forward: Callable[[], Any]) -> tuple[int, int]:
    """The most bytes alive, and of anonymous memory, during a forward.

    Sampled before and after modules that own a weight matrix, evenly chosen where they are many.
    """
    samples: list[tuple[int, int]] = []
    spans, known = mapped(), [weakref.ref(tensor) for tensor in living()]
    gc.freeze()  # from here on only new objects are walked

    def sample(*_: Any) -> None:
        still = (tensor for reference in known if (tensor := reference()) is not None)
        samples.append((storage_bytes(chain(still, living()), spans), status_bytes("RssAnon")))

    owners = [
        module
        for module in pipeline.transformer.modules()
        if any(weight is not None and weight.dim() > 1 for weight in module._parameters.values())
    ]
    chosen = owners[:: -(-len(owners) // MOST_HOOKS)]
    handles = [module.register_forward_hook(sample) for module in chosen]
    handles += [module.register_forward_pre_hook(sample) for module in chosen]
    forward()
    for handle in handles:
        handle.remove()
    return max(live for live, _ in samples), max(anonymous for _, anonymous in samples)


def run(parent: Parent, system: str, case_name: str, folder: Path, num_steps: int, is_small: bool) -> dict[str, Any]:
    """Place a model by a system, and say what its forwards cost.

    Args:
        parent: where to wait for the others.
        system: of `HOLD`.
        case_name: of `shard_cases.CASES`.
        folder: with `CASE`, its checkpoint; `CASE.pt`, the plain output, is written by the first system.
        num_steps: forwards that are timed.
        is_small: the small size of the case.
    """
    case = case_of(case_name, is_small)
    gc.collect()
    gc.freeze()  # what was there before is not walked
    anonymous = status_bytes("RssAnon")
    pipeline = open_pipeline(case, folder / case_name)
    inputs = given(case)
    weight_bytes = sum(weight.nbytes for weight in pipeline.transformer.parameters())
    held = HOLD[system](pipeline)
    gc.collect()
    live = storage_bytes(living(), mapped())

    forward = functools.partial(pipeline, inputs, 1, False)
    output = forward()  # warms up
    parent.stage("warm")
    counted, steps = held.settled(), []
    for _ in range(num_steps):
        busy_s, begun_s, begun_cpu_s = machine_s(), time.perf_counter(), time.process_time()
        output = forward()
        wall_s, cpu_s = time.perf_counter() - begun_s, time.process_time() - begun_cpu_s
        steps.append({"wall_s": wall_s, "cpu_s": cpu_s, "machine_s": machine_s() - busy_s})
    calls, received = ((now - then) / num_steps for now, then in zip(held.settled(), counted, strict=True))
    parent.stage("timed")
    peak, resident = peak_bytes(pipeline, forward)
    plain = folder / f"{case_name}.pt"
    if dist.get_rank() == 0 and not plain.exists():
        torch.save(output, plain)
    parent.stage("left")
    return {
        "steps": steps,
        "collectives": calls,
        "received_bytes": received,
        "num_units": held.num_units,
        "weight_bytes": weight_bytes,
        "slot_bytes": held.slot_bytes,
        "live_bytes": live,
        "peak_bytes": peak,
        "resident_bytes": resident - anonymous,
        "difference": _difference(output, torch.load(plain)),
    }


def _difference(output: torch.Tensor, plain: torch.Tensor) -> float:
    """The largest difference to the plain output, relative to its largest value; NaN where there is one."""
    if not plain.isfinite().all():
        raise ValueError("The plain output is not finite: nothing can be compared with it.")
    return ((output.float() - plain.float()).abs().max() / plain.float().abs().max()).item()


def load_penstock(folder: Path) -> Any:
    """Each rank reads its part."""
    size = dist.get_world_size()
    if size == 1:
        return penstock.load(folder, device="cpu", dtype="bfloat16", offload="none")
    parallel = penstock.ParallelConfig(use_hsdp=True, hsdp_shard_size=size)
    return penstock.load(folder, device="cpu", dtype="bfloat16", offload="sharded", parallel=parallel)


def load_stock(folder: Path) -> Any:
    """Each rank loads all, and keeps its part."""
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    hold_fsdp2(pipeline, prefetch=1)
    return pipeline


LOAD: dict[str, Callable[[Path], Any]] = {"stock": load_stock, "penstock": load_penstock}


def load(parent: Parent, system: str, folder: Path) -> dict[str, Any]:
    """Load a pipeline and make a first step, and say what both cost.

    Args:
        parent: where to wait for the others.
        system: of `LOAD`.
        folder: of the pipeline.
    """
    diffusers.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    first_step(DiffusionPipeline.from_pretrained(demo_folder(), dtype=torch.bfloat16))  # imports what a run imports
    first_step(penstock.load("demo", device="cpu", offload="layerwise"))
    gc.collect()
    parent.stage("ready")
    before, begun_s = io_bytes(), time.perf_counter()
    busy_s, begun_cpu_s = machine_s(), time.process_time()
    pipeline = LOAD[system](folder)
    load_s = time.perf_counter() - begun_s
    gc.collect()
    parent.stage("loaded")
    begun_s = time.perf_counter()
    latents = first_step(pipeline)
    step_s, stepped = time.perf_counter() - begun_s, io_bytes()
    cpu_s, busy_s = time.process_time() - begun_cpu_s, machine_s() - busy_s
    parent.stage("stepped")
    placed = penstock.placed_on(pipeline)
    report = placed.report() if placed is not None else None
    return {
        "load_s": load_s,
        "step_s": step_s,
        "cpu_s": cpu_s,
        "machine_s": busy_s,
        "called_bytes": stepped["rchar"] - before["rchar"],
        "disk_bytes": stepped["read_bytes"] - before["read_bytes"],
        "reported_bytes": report.read_bytes if report else 0,
        "slot_bytes": report.plan.arena_bytes + report.plan.fixed_bytes if report else 0,
        "latents": [round(value, 4) for value in latents.float().flatten().tolist()],
    }


def first_step(pipeline: Any) -> torch.Tensor:
    """One step towards a picture of 64 x 64: as latents."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    sizes = {"height": 64, "width": 64, "max_sequence_length": 64}
    result = pipeline(PROMPT, num_inference_steps=1, generator=generator, output_type="latent", **sizes)
    latents: torch.Tensor = result.images
    return latents
