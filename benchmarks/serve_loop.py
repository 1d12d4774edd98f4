"""The rival of benchmarks/serve.py: plain diffusers in a loop, in a process of its own.

    python benchmarks/serve_loop.py [--once]

Loads the demo model as its card says, says that it is ready, and for each line `COUNT STEPS` on stdin makes pictures of
the seeds 0, 1, ... one after the other; answers with one line of JSON. `--once` ends after the first step instead.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from importlib.resources import files
from typing import Any

import torch
from diffusers import DiffusionPipeline

PROMPT = "a red circle left of a blue square"
NUM_SEEDS = 8
"""Seeds are taken in turn, so that every picture is one of a few that are known."""


class FirstStep(Exception):
    """The first step is done."""


def load() -> tuple[Any, dict[str, Any]]:
    """The pipeline, and the arguments that its maker recommends."""
    folder = files("penstock") / "demo"
    pipe = DiffusionPipeline.from_pretrained(str(folder), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe, json.loads((folder / "penstock.json").read_text("utf-8"))["defaults"]


def digest(picture: Any) -> str:
    """What tells one picture from another: its pixels."""
    return hashlib.sha256(picture.convert("RGB").tobytes()).hexdigest()


def make(pipe: Any, defaults: dict[str, Any], count: int, steps: int) -> dict[str, Any]:
    """Pictures in a loop: the seconds they took, and what they look like."""
    arguments = {**defaults, "num_inference_steps": steps}
    begun_s, begun_cpu_s = time.perf_counter(), time.process_time()
    pictures = [
        pipe(PROMPT, generator=torch.Generator().manual_seed(number % NUM_SEEDS), **arguments).images[0]
        for number in range(count)
    ]
    wall_s, cpu_s = time.perf_counter() - begun_s, time.process_time() - begun_cpu_s
    return {"wall_s": wall_s, "cpu_s": cpu_s, "digests": [digest(picture) for picture in pictures[:NUM_SEEDS]]}


def first_step(pipe: Any, defaults: dict[str, Any]) -> None:
    """Run until the first step is done."""

    def stop(*_: Any) -> dict[str, Any]:
        raise FirstStep

    try:
        pipe(PROMPT, callback_on_step_end=stop, **defaults)
    except FirstStep:
        return


def main() -> None:
    """Answer each line of stdin."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--once", action="store_true", help="load, make one step, and leave")
    options = parser.parse_args()
    pipe, defaults = load()
    if options.once:
        first_step(pipe, defaults)
        print(json.dumps({"at_s": time.time()}), flush=True)
        os._exit(0)  # what follows is not timed
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        count, steps = map(int, line.split())
        print(json.dumps(make(pipe, defaults, count, steps)), flush=True)


if __name__ == "__main__":
    main()
