"""What a block's call costs more with offload hooks on it: penstock, accelerate and diffusers on one tiny model.

    python benchmarks/hooks.py [--blocks 8] [--linears 16] [--repeats 300]

A block has as many parameters as one of Flux's (two per linear layer) and next to no arithmetic. The models take
turns, and the blocks' calls are timed one by one inside the model's forward.

Resident: every weight stays on the device, which is the CPU, so that a hook has nothing to move. Streamed: half of
the weights fit; before every call there is a pause, outside of its time, in which the block's weights arrive, so
that the call finds them in their slot. It is compared with plain calls after the same pause.
Prints a table, then one line of JSON, all in microseconds per block.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import accelerate
import torch
from diffusers.hooks import apply_group_offloading
from safetensors.torch import load_file, save_file
from torch import nn

import penstock

CPU = torch.device("cpu")
WIDTH = 16
WARM_CALLS = 5
WANTED_US = 30


class Block(nn.Module):
    """Linear layers, one after the other."""

    def __init__(self, num_linears: int) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(num_linears))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run them."""
        for linear in self.linears:
            hidden = linear(hidden)
        return hidden


class Stack(nn.Module):
    """Blocks, each call of which is timed, after a pause."""

    def __init__(self, num_blocks: int, num_linears: int, pause_s: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(num_linears) for _ in range(num_blocks))
        self.pause_s = pause_s
        self.held: object = None  # what the hooks need to stay alive
        self.spare = [Block(num_linears)]  # in a list: no part of the model
        self.call_s: list[float] = []

    def forward(self, hidden: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Run and time them."""
        for block in self.blocks:
            if self.pause_s:
                time.sleep(self.pause_s)
                for _ in range(WARM_CALLS):  # the sleep has cooled the processor's caches
                    self.spare[0](hidden)
            begun_s = time.perf_counter()
            hidden = block(hidden)
            self.call_s.append(time.perf_counter() - begun_s)
        return hidden


class Pipeline:
    """The smallest thing that can be placed."""

    def __init__(self, transformer: Stack) -> None:
        self.transformer = transformer


def hook_nothing(pipeline: Any, budget_bytes: int) -> None:
    """The plain call."""


def hook_penstock(pipeline: Any, budget_bytes: int) -> Any:
    """Layerwise offload within a budget; with room for everything nothing streams."""
    return penstock.apply(pipeline, device="cpu", offload="layerwise", max_weight_memory=budget_bytes, prefetch=1)


def hook_accelerate(pipeline: Any, budget_bytes: int) -> None:
    """The hooks of a device map that keeps every block where it is."""
    places: dict[str, Any] = {f"blocks.{number}": "cpu" for number in range(len(pipeline.transformer.blocks))}
    accelerate.dispatch_model(pipeline.transformer, places, main_device="cpu", force_hooks=True)


def hook_diffusers(pipeline: Any, budget_bytes: int) -> None:
    """Group offload of single blocks, from and to the same device."""
    apply_group_offloading(
        pipeline.transformer,
        onload_device=CPU,
        offload_device=CPU,
        offload_type="block_level",
        num_blocks_per_group=1,
    )


HOOKS = {
    "plain": hook_nothing,
    "penstock": hook_penstock,
    "accelerate": hook_accelerate,
    "diffusers": hook_diffusers,
}


def models(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, Stack]]:
    """The two halves of the table: one hooked model per row, all with the same weights, mapped from one file."""
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file(Stack(options.blocks, options.linears, 0).state_dict(), file)
    num_bytes = sum(tensor.nbytes for tensor in load_file(file).values())

    def hooked(system: str, pause_s: float, budget_bytes: int) -> Stack:
        model = Stack(options.blocks, options.linears, pause_s).eval()
        model.load_state_dict(load_file(file), assign=True)
        pipeline = Pipeline(model)
        model.held = pipeline, HOOKS[system](pipeline, budget_bytes)
        return model

    return {
        "resident": {system: hooked(system, 0, 2 * num_bytes) for system in HOOKS},
        "streamed": {
            system: hooked(system, options.pause_us / 1e6, num_bytes // 2) for system in ("plain", "penstock")
        },
    }


def call_seconds(stacks: dict[str, Stack], num_repeats: int) -> dict[str, float]:
    """The median call of a block, for each model; they take turns.

    Raises:
        ValueError: for a model whose output is not the plain one's.
    """
    hidden, timestep = torch.randn(1, WIDTH), torch.zeros(1)
    expected = stacks["plain"](hidden, timestep)
    for system, stack in stacks.items():
        if not torch.equal(stack(hidden, timestep), expected):
            raise ValueError(f"{system}: the output is not the plain model's.")
        stack.call_s.clear()  # the first calls build what later ones use
    for _ in range(num_repeats):
        for stack in stacks.values():
            stack(hidden, timestep)
    return {system: statistics.median(stack.call_s) for system, stack in stacks.items()}


def main() -> None:
    """Time all models in turn and print what their hooks cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--linears", type=int, default=16, help="in a block; each has two parameters")
    parser.add_argument("--repeats", type=int, default=300, help="calls of each model")
    parser.add_argument("--pause-us", type=float, default=1000, help="before a streamed block's call")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as folder:
        halves = models(options, Path(folder))
        times = {half: call_seconds(stacks, options.repeats) for half, stacks in halves.items()}
    print(f"{'per block':22s} {'call us':>8s} {'over plain us':>14s}")
    call_us, over_us = {}, {}
    for half, seconds in times.items():
        for system, value in seconds.items():
            row = f"{system}, {half}"
            call_us[row] = round(value * 1e6, 2)
            over_us[row] = round((value - seconds["plain"]) * 1e6, 2)
            print(f"{row:22s} {call_us[row]:8.1f} {over_us[row]:14.1f}")
    reached = all(value < WANTED_US for row, value in over_us.items() if row.startswith("penstock"))
    print(f"penstock under {WANTED_US} us: {'yes' if reached else 'NO'}")
    print(json.dumps({"parameters": 2 * options.linears, "call_us": call_us, "over_plain_us": over_us}))


if __name__ == "__main__":
    main()
