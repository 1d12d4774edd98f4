"""Weight streaming against its rivals: a Flux-shaped model from disk, in less memory than it has weights.

    python benchmarks/offload.py [--gib 4.7] [--rounds 3] [--cap-mib 2500] [--out results.json]

RAM plays the device, the disk is the reservoir. Every system runs in a process of its own with the same inputs
(see offload_systems.py), and its output has to be the plain one's, bit for bit. Rounds are interleaved, the
checkpoint is dropped from the page cache before every run, and numbers are medians over rounds. All systems but
`plain`, which gives the cost of pure compute, run under a hard memory cap (cgroup v1, as root): mapped pages and
page cache count, so that what does not fit is really read again. Without a cap the page cache is dropped before
every step instead. Linux only. Prints tables, then one line of JSON; leaves the checkpoint for the next time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from offload_checkpoint import Shape, is_complete, num_weight_bytes, weight_files
from offload_meter import MemoryGroup, evict, read_ahead_bytes, read_bandwidth
from offload_verdict import medians, print_aims, print_systems, summary

from penstock.distributed.launcher import bound

SYSTEMS = ("plain", "plain-capped", "penstock", "accelerate", "diffusers")
RECORDED = ("tokens", "steps", "rounds", "threads", "gib", "heads", "budget_share", "prefetch")
HERE = Path(__file__).parent


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = Path(tempfile.gettempdir()) / "penstock-bench"
    parser.add_argument("--folder", type=Path, default=folder, help="where the checkpoint is written and used again")
    parser.add_argument("--gib", type=float, default=4.7, help="size, in steps of one double and two single blocks")
    parser.add_argument("--heads", type=int, default=24, help="12, not 24 as Flux: smaller blocks, four times as many")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3, help="of which the first is counted apart")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="that compute")
    parser.add_argument("--cap-mib", type=int, default=2500, help="memory of a capped process; 0: no cap")
    parser.add_argument("--budget-share", type=float, default=0.15, help="of the weights that penstock may hold")
    parser.add_argument("--prefetch", type=int, default=1, help="blocks that penstock reads ahead")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--timeout-s", type=float, default=1200, help="for one process")
    parser.add_argument("--out", type=Path, help="also write the line of JSON here")
    options = parser.parse_args()
    if options.steps < 2 or options.rounds < 1:
        parser.error("needs at least 2 steps and 1 round")
    if "plain" not in options.systems:
        options.systems.insert(0, "plain")  # what every other output is compared with
    return options


def ready_checkpoint(options: argparse.Namespace) -> Path:
    """The folder of the checkpoint, written now if this is the first time."""
    shape = Shape.of_size(options.gib, options.heads)
    folder: Path = options.folder / shape.name
    if not is_complete(folder):
        print(f"writing a checkpoint of {shape.doubles} double and {shape.singles} single blocks", flush=True)
        sizes = [f"--doubles={shape.doubles}", f"--singles={shape.singles}", f"--heads={shape.heads}"]
        script = HERE / "offload_checkpoint.py"
        subprocess.run(bound([sys.executable, str(script), str(folder), *sizes]), check=True, stdout=subprocess.DEVNULL)
    return folder


@contextlib.contextmanager
def memory_cap(system: str, cap_bytes: int) -> Iterator[MemoryGroup | None]:
    """A group for one process, or None for the system that is the measure, and where no cap is wanted."""
    group = MemoryGroup(cap_bytes) if cap_bytes and system != "plain" else None
    try:
        yield group
    finally:
        if group:
            group.remove()


def cap_problem(cap_bytes: int) -> str:
    """Why no process can be capped here; empty where one can."""
    if not cap_bytes:
        return "not wanted"
    try:
        MemoryGroup(cap_bytes).remove()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def run(system: str, checkpoint: Path, output: Path, cap_bytes: int, options: argparse.Namespace) -> dict[str, Any]:
    """One process with one system: what it measured, or `failed` with the reason."""
    evict(weight_files(checkpoint))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(options.threads)}
    with (
        tempfile.TemporaryDirectory(dir=options.folder, prefix="copies-") as scratch,
        memory_cap(system, cap_bytes) as group,
    ):
        command = [sys.executable, str(HERE / "offload_systems.py"), system, str(checkpoint)]
        command += [f"--scratch={scratch}", f"--output={output}", f"--tokens={options.tokens}"]
        command += [f"--steps={options.steps}", f"--threads={options.threads}"]
        command += [f"--budget-bytes={int(num_weight_bytes(checkpoint) * options.budget_share)}"]
        command += [f"--prefetch={options.prefetch}"]
        command += [] if cap_bytes or system == "plain" else ["--drop-cache"]
        try:
            done = subprocess.run(
                bound(group.wrap(command) if group else command),
                env=environment,
                capture_output=True,
                text=True,
                timeout=options.timeout_s,
            )
        except subprocess.TimeoutExpired:
            return {"system": system, "failed": f"not done after {options.timeout_s:g} s"}
        charged = group.read() if group else {}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"system": system, "failed": "killed by the memory cap" if charged.get("oom_kills") else last}
    return {**json.loads(done.stdout.splitlines()[-1]), "group": charged, "load_average": os.getloadavg()[0]}


def run_round(checkpoint: Path, output: Path, cap_bytes: int, options: argparse.Namespace) -> dict[str, Any]:
    """Every system once, and the disk just before penstock; what gave no result has the reason under `failed`."""
    order = [system for system in options.systems if cap_bytes or system != "plain-capped"]
    order.insert(order.index("penstock") if "penstock" in order else len(order), "disk")
    results: dict[str, Any] = {}
    for name in order:
        if name == "disk":
            evict(weight_files(checkpoint))
            results[name] = read_bandwidth(weight_files(checkpoint))
            print(f"  {name:13s} {results[name]['bytes_per_s'] / 2**30:8.2f} GiB/s", flush=True)
            continue
        result = run(name, checkpoint, output, cap_bytes, options)
        results[name] = result if "failed" in result else summary(result, num_weight_bytes(checkpoint))
        print(f"  {name:13s} {result.get('failed') or outcome(results[name])}", flush=True)
    return results


def outcome(row: dict[str, Any]) -> str:
    """A run in a few words."""
    return f"{row['step_wall_s']:8.2f} s per step, {row['step_cpu_s']:.2f} of CPU"


def main() -> None:
    """Run all rounds, print what came out, and fail if an output was not the plain one's."""
    options = parse()
    options.systems.sort(key=SYSTEMS.index)
    options.folder.mkdir(parents=True, exist_ok=True)
    checkpoint = ready_checkpoint(options)
    weights = num_weight_bytes(checkpoint)
    problem = cap_problem(options.cap_mib * 2**20)
    cap_bytes = 0 if problem else options.cap_mib * 2**20
    print(f"weights {weights / 2**30:.2f} GiB, of which penstock may hold {options.budget_share:.0%}")
    print(f"memory cap {options.cap_mib} MiB" if cap_bytes else f"NO MEMORY CAP ({problem}), no plain-capped")
    rounds = []
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="output-") as folder:
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", flush=True)
            rounds.append(run_round(checkpoint, Path(folder) / "latents.safetensors", cap_bytes, options))
    table = medians(rounds)
    print_systems(table)
    facts = {
        "weight_bytes": weights,
        "cap_bytes": cap_bytes,
        "no_cap_because": problem,
        "cpus": os.cpu_count(),
        "read_ahead_bytes": read_ahead_bytes(checkpoint),
        **{name: getattr(options, name) for name in RECORDED},
    }
    aims = print_aims(rounds, table, facts)
    line = json.dumps({"facts": facts, "aims": aims, "medians": table, "rounds": rounds})
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(line + "\n")
    print(line)
    wrong = [name for name, values in table.items() if values.get("difference", 0) != 0]
    if wrong:
        sys.exit(f"WRONG OUTPUT: {', '.join(wrong)}")
    broken = [name for name in ("plain", "penstock") if "failed" in table.get(name, {})]
    if broken:
        sys.exit(f"FAILED: {', '.join(broken)}")


if __name__ == "__main__":
    main()
