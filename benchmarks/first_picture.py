"""Time from the shell to the first picture: penstock's command line against a plain diffusers script.

    python benchmarks/first_picture.py [--repeats 5] [--threads 2]

Both make the same picture of the demo model in a process of their own; the runs alternate, and the ratio is of the
fastest ones, because other work on the machine only ever adds time. Prints a table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.resources import files

from penstock.distributed.launcher import bound

PROMPT = "a red circle left of a blue square"
PLAIN = f"""
import json, torch
from diffusers import DiffusionPipeline
folder = {str(files("penstock") / "demo")!r}
pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
defaults = json.load(open(folder + "/penstock.json"))["defaults"]
pipe({PROMPT!r}, generator=torch.Generator().manual_seed(0), **defaults).images[0].save("out.png")
"""
PROGRAMS = {
    "penstock generate": ["-m", "penstock", "generate", "demo", PROMPT, "--seed", "0"],
    "plain diffusers": ["-c", PLAIN],
    "import penstock": ["-c", "import penstock"],
    "import nothing": ["-c", ""],
}


def seconds(arguments: list[str], threads: int) -> float:
    """Wall time of one Python process in an empty folder."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as folder:
        begun_s = time.perf_counter()
        command = bound([sys.executable, *arguments])
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
        return time.perf_counter() - begun_s


def main() -> None:
    """Run all programs in turn and print their fastest times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for _ in range(options.repeats):
        for name, arguments in PROGRAMS.items():
            times[name].append(seconds(arguments, options.threads))
    fastest = {name: min(values) for name, values in times.items()}
    for name, value in fastest.items():
        print(f"{name:20s} {value:7.2f} s   (slowest {max(times[name]):.2f} s)")
    ratio = fastest["penstock generate"] / fastest["plain diffusers"]
    print(f"penstock / plain     {ratio:7.2f}")
    print(json.dumps({"threads": options.threads, "fastest_s": fastest, "penstock_over_plain": ratio}))


if __name__ == "__main__":
    main()
