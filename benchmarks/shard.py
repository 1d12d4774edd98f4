"""Sharded weights: penstock's own, against FSDP2 in several ways, on gloo ranks of one thread each.

    python benchmarks/shard.py [--cases flux ltx2] [--ranks 1 2 4] [--steps 5] [--small] [--out results.json]

Running: models of random weights, of Flux's shape (8 blocks of two streams, 24 of one) and of LTX-2's (48 blocks of
video and sound). Each system (see shard_systems.py) has fresh processes. `live` is what storages hold after placing,
`peak` the most during a forward, `resident` the same of anonymous memory, which tells what libraries hold besides;
each of the rank that has most, in MiB, mapped checkpoints not counted. Times are medians of forwards, each that of its
slowest rank; every output is compared with the plain one. Ranks are as many on however few CPUs there are: seconds
compare within one number of ranks only. `others` is the share of the machine that other processes had.

Loading: a pipeline of about 1 GiB whose pages are dropped from the page cache before. `peak memory` is that of all
ranks together, relative to the weights; pages that ranks share, and those of mapped files, count once. `read` is what
calls read, `mapped` the most that came through mapped files, `disk` what came from the disk, where ranks of one machine
share a page cache. Linux only. Prints tables, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from offload_meter import evict
from shard_ranks import PeakMemory, preload, run_ranks

from penstock.distributed.launcher import bound

ALL = ("plain", "penstock", "penstock-host", "fsdp2", "fsdp2-alone", "fsdp2-stock", "fsdp2-offload", "fsdp2-named")
SYSTEMS = {"flux": ALL, "ltx2": ("plain", "penstock", "fsdp2", "fsdp2-stock", "fsdp2-named")}
LOADERS = ("stock", "penstock")
OURS = ("plain", "penstock", "penstock-host", "fsdp2", "fsdp2-alone")
"""Systems that must not fail, and whose outputs must be the plain one's."""
EXACT_UNITS = ("penstock", "penstock-host", "fsdp2", "fsdp2-alone")
TOLERANCE = 0.05
MOST_LIVE = 1.1
MOST_READ = 1.05
MOST_HELD = 1.15
MIB = 2**20
COLUMNS = (
    ("live", "live_bytes", MIB, "8.1f"),
    ("share", "live_share", 1, "6.3f"),
    ("peak", "peak_bytes", MIB, "8.1f"),
    ("resident", "resident_bytes", MIB, "9.1f"),
    ("units", "num_units", 1, "6.0f"),
    ("gathers", "collectives", 1, "8.1f"),
    ("received", "received_bytes", MIB, "9.1f"),
    ("s/step", "wall_s", 1, "8.3f"),
    ("CPU s", "cpu_s", 1, "8.3f"),
    ("to plain", "slowdown", 1, "9.2f"),
    ("differs", "difference", 1, "8.1g"),
    ("others", "disturbance", 1, "7.2f"),
)
LOAD_COLUMNS = (
    ("load s", "load_s", 1, "8.2f"),
    ("step s", "step_s", 1, "8.2f"),
    ("read", "called_bytes", MIB, "9.1f"),
    ("mapped", "mapped_bytes", MIB, "9.1f"),
    ("reported", "reported_bytes", MIB, "9.1f"),
    ("disk", "disk_bytes", MIB, "9.1f"),
    ("peak loading", "held_loading", 1, "13.3f"),
    ("peak, step too", "held", 1, "15.3f"),
    ("differs", "difference", 1, "8.1g"),
    ("others", "disturbance", 1, "7.2f"),
)


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--systems", nargs="+", choices=ALL, default=list(ALL), help="besides plain")
    parser.add_argument("--ranks", nargs="+", type=int, help="1 2 4, or 2 where small")
    parser.add_argument("--steps", type=int, help="timed, after one that warms up; 5, or 2 where small")
    parser.add_argument("--skip-loading", action="store_true")
    parser.add_argument("--small", action="store_true", help="models that take no time: to see that all runs")
    parser.add_argument("--scratch", type=Path, help="on a disk, where checkpoints are written for the time of the run")
    parser.add_argument("--out", type=Path, help="also write the line of JSON here")
    options = parser.parse_args()
    options.steps = options.steps or (2 if options.small else 5)
    options.ranks = options.ranks or ([2] if options.small else [1, 2, 4])
    if min(options.ranks) < 1 or options.steps < 1:
        parser.error("needs at least 1 rank and 1 step")
    return options


def write(folder: Path, case: str, options: argparse.Namespace) -> None:
    """A checkpoint, written by another process: this one stays small."""
    script = Path(__file__).with_name("shard_cases.py")
    command = [sys.executable, str(script), str(folder / case), case, *["--small"] * options.small]
    subprocess.run(bound(command), check=True)


def run_case(case: str, folder: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All systems on all numbers of ranks: `2 penstock` and so on."""
    rows: dict[str, dict[str, Any]] = {}
    for size in options.ranks:
        begun_s = time.perf_counter()
        for system in SYSTEMS[case]:
            if system != "plain" and system not in options.systems:
                continue
            found = run_ranks(
                "forkserver", size, "shard_systems.run", system, case, folder, options.steps, options.small
            )
            row = {"failed": found} if isinstance(found, str) else summed(found)
            plain = rows.get(f"{size} plain", row)
            if "failed" not in row and "failed" not in plain:
                row["slowdown"] = row["wall_s"] / plain["wall_s"]
            rows[f"{size} {system}"] = row
        tell(f"{case} on {size} ranks", begun_s)
    return rows


def tell(what: str, begun_s: float) -> None:
    """How far we are."""
    took_s = time.perf_counter() - begun_s
    print(f"{what}: {took_s:.0f} s, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)


def summed(found: list[dict[str, Any]]) -> dict[str, Any]:
    """One row: the rank that has most of everything, and medians of the slowest rank's times."""
    steps = list(zip(*(one["steps"] for one in found), strict=True))
    row = {name: max(one[name] for one in found) for name in found[0] if name != "steps"}
    for name in ("wall_s", "cpu_s"):
        row[name] = statistics.median(max(rank[name] for rank in step) for step in steps)
    row["live_share"] = row["live_bytes"] / row["weight_bytes"]
    machine_s = max(sum(step["machine_s"] for step in one["steps"]) for one in found)
    own_s = sum(step["cpu_s"] for one in found for step in one["steps"])
    wall_s = max(sum(step["wall_s"] for step in one["steps"]) for one in found)
    row["disturbance"] = max(0.0, (machine_s - own_s) / wall_s / (os.cpu_count() or 1))
    row["all_steps"] = [[rank["wall_s"] for rank in step] for step in steps]
    return row


def run_loading(folder: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Both ways to load on all numbers of ranks."""
    files = sorted(folder.rglob("*.safetensors"))
    stored = sum(file.stat().st_size for file in files)
    rows: dict[str, dict[str, Any]] = {}
    latents: list[float] = []
    for size in options.ranks:
        begun_s = time.perf_counter()
        for system in LOADERS:
            evict(files)
            memory = PeakMemory()
            found = run_ranks("spawn", size, "shard_systems.load", system, folder, watch=memory)
            row = {"failed": found} if isinstance(found, str) else loaded(found, memory, stored)
            if not isinstance(found, str):
                latents = latents or found[0]["latents"]
                row["difference"] = max(difference(one["latents"], latents) for one in found)
            rows[f"{size} {system}"] = row
        tell(f"loading on {size} ranks", begun_s)
    return rows


def difference(latents: list[float], others: list[float]) -> float:
    """The largest difference, relative to the largest value."""
    return max(abs(one - other) for one, other in zip(latents, others, strict=True)) / max(map(abs, others))


def loaded(found: list[dict[str, Any]], memory: PeakMemory, stored: int) -> dict[str, Any]:
    """One row: sums over the ranks, the slowest one's times, and the memory of all."""
    row: dict[str, Any] = {name: max(one[name] for one in found) for name in ("load_s", "step_s", "slot_bytes")}
    for name in ("called_bytes", "disk_bytes", "reported_bytes", "cpu_s"):
        row[name] = sum(one[name] for one in found)
    start = memory.starts["loaded"]
    loading, stepping = memory.stages["loaded"], memory.stages["stepped"]
    row["held_loading"] = (loading["all"] - start["all"]) / stored
    row["held"] = max(row["held_loading"], (stepping["all"] - start["all"]) / stored)
    row["mapped_bytes"] = loading["file"] - start["file"]
    row["slot_share"] = len(found) * row["slot_bytes"] / stored
    row["read_share"] = row["reported_bytes"] / stored
    row["stages"], row["num_samples"], row["stored_bytes"] = memory.stages, memory.num_samples, stored
    others_s = max(one["machine_s"] for one in found) - row["cpu_s"] - memory.sampling_s
    wall_s = row["load_s"] + row["step_s"]
    row["disturbance"] = max(0.0, others_s / wall_s / (os.cpu_count() or 1))
    return row


def show(title: str, rows: dict[str, dict[str, Any]], columns: tuple[tuple[str, str, int, str], ...]) -> None:
    """One table."""
    print(f"\n{title}")
    print(f"{'':16s}" + " ".join(f"{name:>{wide(form)}s}" for name, _, _, form in columns))
    for name, row in rows.items():
        if "failed" in row:
            print(f"{name:16s}FAILED: {row['failed']}")
            continue
        cells = [f"{row[key] / unit:{form}}" if key in row else " " * wide(form) for _, key, unit, form in columns]
        print(f"{name:16s}" + " ".join(cells))


def wide(form: str) -> int:
    """Characters of a format."""
    return int(form.split(".")[0])


def aims_of_case(case: str, rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What a rank may hold, and how often it may gather."""
    found = {}
    for name, row in rows.items():
        size, system = name.split()
        if size == "1" or system not in EXACT_UNITS or "failed" in row:
            continue
        if system.startswith("penstock"):
            most = MOST_LIVE / int(size) + row["slot_bytes"] / row["weight_bytes"]
            found[f"{case} {name}: live after placing"] = aim(row["live_share"], most)
        found[f"{case} {name}: collectives per unit"] = aim(row["collectives"] / row["num_units"], 1.0, is_exact=True)
    return found


def aims_of_loading(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What all ranks together may read, and hold."""
    found = {}
    for name, row in rows.items():
        size, system = name.split()
        if size == "1" or system != "penstock" or "failed" in row:
            continue
        found[f"loading {name}: read of checkpoint"] = aim(row["read_share"], MOST_READ)
        if size == "4":
            found[f"loading {name}: peak memory"] = aim(row["held_loading"], MOST_HELD)
            found[f"loading {name}: peak, step too, slots"] = aim(row["held"], MOST_HELD + row["slot_share"])
    return found


def aim(measured: float, wanted: float, is_exact: bool = False) -> dict[str, Any]:
    """Whether it is reached."""
    reached = measured == wanted if is_exact else 0 < measured <= wanted
    return {"measured": measured, "wanted": f"{'==' if is_exact else '<='} {wanted:.3f}", "reached": reached}


def mistakes(cases: dict[str, dict[str, dict[str, Any]]], loading: dict[str, dict[str, Any]]) -> list[str]:
    """What failed, and outputs that are not the plain one's."""
    found = []
    for case, rows in {**cases, "loading": loading}.items():
        for name, row in rows.items():
            is_ours = case == "loading" or name.split()[1] in OURS
            if "failed" in row:
                found += [f"{case} {name}: {row['failed']}"] * is_ours
            elif is_ours and not row["difference"] <= TOLERANCE:
                found.append(f"{case} {name} differs by {row['difference']:.2g}, more than {TOLERANCE:g}")
    return found


def main() -> None:
    """Run all, print what came out, and fail where an output is not the plain one's."""
    options = parse()
    preload(["shard_systems", "penstock.engine.placed"])
    facts = {"cpus": os.cpu_count(), "ranks": options.ranks, "steps": options.steps, "small": options.small}
    cases: dict[str, dict[str, dict[str, Any]]] = {}
    loading: dict[str, dict[str, Any]] = {}
    aims: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="penstock-shard-", dir=options.scratch) as name:
        folder = Path(name)
        for case in options.cases:
            write(folder, case, options)
            cases[case] = run_case(case, folder, options)
            aims |= aims_of_case(case, cases[case])
            size = next((row["weight_bytes"] for row in cases[case].values() if "weight_bytes" in row), 0)
            show(f"{case}, {size / MIB:.0f} MiB of weights; sizes in MiB, of one rank", cases[case], COLUMNS)
        if not options.skip_loading:
            write(folder, "pipeline", options)
            loading = run_loading(folder / "pipeline", options)
            aims |= aims_of_loading(loading)
            size = next((row["stored_bytes"] for row in loading.values() if "stored_bytes" in row), 0)
            show(f"loading {size / MIB:.0f} MiB; MiB of all ranks; peaks by the weights", loading, LOAD_COLUMNS)
    print()
    for what, one in aims.items():
        print(f"{what:44s} {one['measured']:8.3f}  {one['wanted']:9s} {'yes' if one['reached'] else 'NO'}")
    line = json.dumps({"facts": facts, "aims": aims, "cases": cases, "loading": loading})
    print(line)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(line + "\n")
    wrong = mistakes(cases, loading)
    if wrong:
        sys.exit("WRONG: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
