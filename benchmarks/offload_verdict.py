"""What the runs of the offload benchmark say: one row per run, medians over rounds, tables, aims.

Knows neither processes nor torch: it takes what they printed.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

Finding = tuple[str, float, str]
"""What was found: its name, a number, and what was wanted of it, such as "<= 1.10"; nothing where it only informs."""

RIVALS = ("accelerate", "diffusers")
GIB, MIB = 2**30, 2**20
COLUMNS = (
    ("s/step", "step_wall_s", 1, "8.2f"),
    ("CPU s", "step_cpu_s", 1, "7.2f"),
    ("read GiB", "step_read_bytes", GIB, "9.2f"),
    ("written", "step_written_bytes", GIB, "8.2f"),
    ("waited s", "step_placement_exposed_wait_s", 1, "9.3f"),
    ("RSS MiB", "steps_rss_bytes", MIB, "8.0f"),
    ("anon MiB", "steps_anonymous_bytes", MIB, "9.0f"),
    ("differs", "difference", 1, "8.1g"),
)
STARTS = (
    ("load s", "load_wall_s", 1, "8.2f"),
    ("attach s", "attach_wall_s", 1, "9.2f"),
    ("first s", "first_wall_s", 1, "8.2f"),
    ("CPU s", "start_cpu_s", 1, "7.2f"),
    ("read x", "start_reads_per_byte", 1, "7.2f"),
    ("written GiB", "start_written_bytes", GIB, "12.2f"),
    ("RSS MiB", "attach_rss_bytes", MIB, "8.0f"),
    ("group MiB", "group_max_usage_bytes", MIB, "10.0f"),
)


def summary(result: dict[str, Any], num_weight_bytes: int) -> dict[str, Any]:
    """One flat row of a run: the start up to the end of the first step, and the median of the later steps."""
    first, *later = result["steps"]
    start = [result["load"], result["attach"], first]
    row = {
        "load_wall_s": result["load"]["wall_s"],
        "attach_wall_s": result["attach"]["wall_s"],
        "first_wall_s": first["wall_s"],
        "load_read_bytes": result["load"]["read_bytes"],
        "attach_read_bytes": result["attach"]["read_bytes"],
        "first_read_bytes": first["read_bytes"],
        "start_cpu_s": sum(cost["cpu_s"] for cost in start),
        "start_reads_per_byte": sum(cost["read_bytes"] for cost in start) / num_weight_bytes,
        "start_written_bytes": sum(cost["written_bytes"] for cost in start),
        **{f"attach_{name}": value for name, value in result["attach_peak"].items()},
        **{f"steps_{name}": value for name, value in result["steps_peak"].items()},
        **{f"group_{name}": value for name, value in result["group"].items()},
        **{f"placement_{name}": value for name, value in result["placement"].items()},
        "load_average": result["load_average"],
        "versions": result["versions"],
    }
    for name in ("wall_s", "cpu_s", "read_bytes", "written_bytes", "major_faults"):
        row[f"step_{name}"] = statistics.median(step[name] for step in later)
    for name in first["placement"]:
        row[f"step_{name}"] = statistics.median(step["placement"][name] for step in later)
    exact = {"difference": result["difference"]}
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()} | exact


def medians(rounds: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per system, the medians over the rounds that ended, and `failed` if one did not; the worst difference."""
    table: dict[str, dict[str, Any]] = {}
    for system in rounds[0]:
        rows = [one[system] for one in rounds]
        done = [row for row in rows if "failed" not in row]
        table[system] = {}
        if done:
            numbers = {name: value for name, value in done[0].items() if isinstance(value, (int, float))}
            table[system] = {name: statistics.median(row[name] for row in done) for name in numbers}
        if done and "difference" in done[0]:
            table[system]["difference"] = max((row["difference"] for row in done), key=_badness)
        if len(done) < len(rows):
            failed = [row["failed"] for row in rows if "failed" in row]
            table[system]["failed"] = f"{len(failed)} of {len(rows)} runs: {failed[0]}"
    return table


def _badness(difference: float) -> float:
    return difference if difference == difference else float("inf")  # NaN is the worst


def print_systems(table: dict[str, dict[str, Any]]) -> None:
    """Two tables, of the steps and of the start, one line per system."""
    for title, columns in (("each step after the first", COLUMNS), ("up to the end of the first step", STARTS)):
        print(f"\n{title:32s}" + "".join(f"{head:>{_width(form)}s}" for head, _, _, form in columns))
        for system, row in table.items():
            if system == "disk":
                continue
            cells = [
                f"{row[name] / unit:{form}}" if name in row else "-".rjust(_width(form))
                for _, name, unit, form in columns
            ]
            print(f"{system:32s}" + "".join(cells) + (f"  {row['failed']}" if "failed" in row else ""))


def _width(form: str) -> int:
    return int(form.split(".")[0])


def print_aims(
    rounds: list[dict[str, Any]], table: dict[str, dict[str, Any]], facts: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """What came out for penstock, what was wanted, and whether that was reached; nothing where it has no row.

    Args:
        rounds: rows by system, one dictionary per round; ratios of times are taken within a round.
        table: their medians.
        facts: `weight_bytes`, `cap_bytes` and `budget_share` of the benchmark.
    """
    needed = ("plain", "penstock")
    ended = [one for one in rounds if all("step_wall_s" in one.get(name, {}) for name in needed)]
    if not ended:
        return {}
    found = [*_against_bounds(ended, table, facts), *_against_rivals(ended, table)]
    aims: dict[str, dict[str, Any]] = {}
    print(f"\n{'penstock':44s}   measured   wanted")
    for name, value, wanted in found:
        sign, limit = wanted.split() if wanted else ("", "")
        reached = None if not wanted else value <= float(limit) if sign == "<=" else value >= float(limit)
        print(f"{name:44s} {value:10.3f}   {wanted:8s} {'' if reached is None else 'yes' if reached else 'NO'}")
        aims[name] = {"measured": value, "wanted": wanted, "reached": reached}
    print()
    return aims


def _against_bounds(
    ended: list[dict[str, Any]], table: dict[str, dict[str, Any]], facts: dict[str, Any]
) -> Iterator[Finding]:
    """Against the plain run and the disk: nobody who may hold a share of the weights reads less than the rest."""
    ours, share = table["penstock"], facts["budget_share"]
    least_bytes = facts["weight_bytes"] * (1 - share)
    bounds = [max(one["plain"]["step_wall_s"], least_bytes / one["disk"]["bytes_per_s"]) for one in ended]
    ratios = [one["penstock"]["step_wall_s"] / bound for one, bound in zip(ended, bounds, strict=True)]
    yield "step / max(plain compute, least reading)", statistics.median(ratios), "<= 1.10"
    cpu = [one["penstock"]["step_cpu_s"] / one["plain"]["step_cpu_s"] for one in ended]
    yield "CPU seconds per step / plain's", statistics.median(cpu), ""
    yield "bytes read per step / least", ours["step_read_bytes"] / least_bytes, ""
    if "step_placement_exposed_wait_s" in ours:
        reading_s = least_bytes / table["disk"]["bytes_per_s"]
        forced_s = max(0.0, reading_s - table["plain"]["step_wall_s"])  # no compute is left to hide it under
        wait_s = ours["step_placement_exposed_wait_s"]
        yield "exposed wait / reading time", wait_s / reading_s, ""
        yield "the same, less what compute cannot hide", max(0.0, wait_s - forced_s) / reading_s, "<= 0.05"
    if "placement_peak_bytes" in ours:
        held = ours["placement_peak_bytes"] / (facts["weight_bytes"] * share)
        yield "weights held at most / budget", held, "<= 1.0"
    yield "bytes written", ours["start_written_bytes"] + ours["step_written_bytes"], "<= 0"
    # diffusers' own loading maps the files, and the kernel reads ahead of each tensor that it looks at
    yield "bytes read by loading / weights", ours["load_read_bytes"] / facts["weight_bytes"], ""
    read_bytes = ours["attach_read_bytes"] + ours["first_read_bytes"]
    # what is read ahead for the second step fits in the budget
    yield "bytes read from then to step 1 / weights", read_bytes / facts["weight_bytes"], f"<= {1 + share:.2f}"
    yield "difference from plain", ours["difference"], "<= 0"
    if facts["cap_bytes"] and "failed" not in ours:
        yield "weights / memory cap", facts["weight_bytes"] / facts["cap_bytes"], ">= 1"


def _against_rivals(ended: list[dict[str, Any]], table: dict[str, dict[str, Any]]) -> Iterator[Finding]:
    """Against the fastest rival, and against the memory of the smallest."""
    rivals = [name for name in RIVALS if "step_wall_s" in table.get(name, {})]
    for what in ("wall", "cpu") if rivals else ():
        key = f"step_{what}_s"
        best = min(rivals, key=lambda name: table[name][key])
        ratios = [one[best][key] / one["penstock"][key] for one in ended if "failed" not in one[best]]
        if ratios:
            yield f"{best} / penstock, {what} per step", statistics.median(ratios), ">= 1.5" if what == "wall" else ""
    mapped = [one["plain-capped"] for one in ended if "failed" not in one.get("plain-capped", {"failed": ""})]
    if mapped:
        ratio = statistics.median(row["step_wall_s"] for row in mapped) / table["penstock"]["step_wall_s"]
        yield "plain-capped / penstock, wall per step", ratio, ""
    for what in ("rss", "anonymous") if rivals else ():
        key = f"steps_{what}_bytes"
        best = min(rivals, key=lambda name: table[name][key])
        wanted = "<= 1.0" if what == "rss" else ""
        yield f"{what} peak of the steps / {best}'s", table["penstock"][key] / table[best][key], wanted
