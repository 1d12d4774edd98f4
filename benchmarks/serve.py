"""What a server costs beside its pipeline: `penstock serve demo` against plain diffusers in a loop, on the CPU.

    python benchmarks/serve.py [--quick] [--rounds 5] [--out benchmarks/results/serve_cpu.json]

Every process computes with one thread. The rival (serve_loop.py) only calls the pipeline; the server also queues,
records, encodes and stores each picture, which crosses HTTP. Systems take turns in rounds, and a ratio is the median of
the rounds' ratios. All pictures must be the rival's, pixel for pixel.

    start      seconds from nothing to /ready, against from_pretrained and one step; the fastest of the tries
    overhead   one client: seconds per request over the loop's, and CPU seconds of all of the server's processes over
               the loop's. Four clients: pictures per second, to the loop's
    crowd      200 clients for a minute: seconds of answers and of /health, and the server's memory
    replicas   four clients on two replicas against one; `at once` is the control: two loops side by side, which tells
               what the machine takes from processes that share it

`others` is the share of the machine that processes had which are not ours. Linux only. Prints tables, then one line of
JSON; fails where an answer is neither the right picture nor 429.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from serve_processes import Clients, Loop, Machine, MemoryWatch, Server, first_step_s, tree_cpu_s

RESULTS = Path(__file__).with_name("results") / "serve_cpu.json"
MIB = 2**20
STEPS = (8, 24)
SEVERAL = 4
AIMS = {
    "overhead per request, ms": ("<", 10.0),
    "throughput to the loop's": (">=", 0.97),
    "two replicas to one": (">=", 1.8),
    "/health p99 in the crowd, ms": ("<", 50.0),
    "/health slowest in the crowd, ms": ("<", 50.0),
    "memory grown in the crowd": ("<", 0.03),
}
MOST_DISTURBANCE = 0.05


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="5, or 1 where quick")
    parser.add_argument("--pictures", type=int, help="of a system in a round; 30, or 8 where quick")
    parser.add_argument("--clients", type=int, default=200, help="in the crowd")
    parser.add_argument("--crowd-s", type=float, help="60, or 6 where quick")
    parser.add_argument("--quick", action="store_true", help="to see that all runs; the numbers mean little")
    parser.add_argument("--out", type=Path, help=f"where to write the line of JSON; {RESULTS.name} where not quick")
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 5)
    options.pictures = options.pictures or (8 if options.quick else 30)
    options.crowd_s = options.crowd_s or (6.0 if options.quick else 60.0)
    options.out = options.out or (None if options.quick else RESULTS)
    return options


def starts(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """How long servers and the rival take to begin, in turn."""
    ready_s, rival_s = [], []
    for number in range(1 if options.quick else 3):
        rival_s.append(first_step_s())
        server = Server(folder / f"start{number}")
        ready_s.append(server.ready_s)
        server.end()
    ratio = min(ready_s) / min(rival_s)
    return {"ready_s": ready_s, "rival_s": rival_s, "start_ratio": ratio}


def overhead(server: Server, loop: Loop, options: argparse.Namespace, steps: int) -> dict[str, Any]:
    """One client and several against the loop."""
    rounds = []
    clients = Clients(server.port)
    count = max(8, options.pictures * STEPS[0] // steps)
    machine = Machine([server, loop, clients])
    for _ in range(options.rounds):
        alone = loop.make(count, steps)
        begun_cpu_s = tree_cpu_s(server.pid)
        one = clients.do("ask", clients=1, count=count, steps=steps)
        cpu_s = tree_cpu_s(server.pid) - begun_cpu_s
        several = clients.do("ask", clients=SEVERAL, count=count, steps=steps)
        rounds.append(
            {
                "loop_s": alone["wall_s"] / count,
                "one_s": one["wall_s"] / count,
                "several_s": several["wall_s"] / count,
                "overhead_ms": 1000 * (one["wall_s"] - alone["wall_s"]) / count,
                "cpu_overhead_ms": 1000 * (cpu_s - alone["cpu_s"]) / count,
                "throughput": alone["wall_s"] / several["wall_s"],
                "wrong": wrong(one, alone, only=("200",)) + wrong(several, alone, only=("200",)),
            }
        )
    clients.end()
    return {**medians(rounds), "others": machine.others(), "rounds": rounds}


def crowd(server: Server, loop: Loop, options: argparse.Namespace) -> dict[str, Any]:
    """Many clients, and somebody who asks for /health meanwhile."""
    known = loop.make(8, STEPS[0])
    clients, prober = Clients(server.port), Clients(server.port)
    machine = Machine([server, loop, clients, prober])
    with MemoryWatch(server) as memory:
        clients.ask("crowd", clients=options.clients, for_s=options.crowd_s, steps=STEPS[0])
        health = prober.do("probe", for_s=options.crowd_s)
        found = clients.answer()
    others = machine.others()
    clients.end()
    prober.end()
    return {
        "clients": options.clients,
        "for_s": options.crowd_s,
        "statuses": found["statuses"],
        "answers": percentiles(found["latencies_s"]),
        "refusals": percentiles(found["refusals_s"]),
        "health": percentiles(health["latencies_s"]),
        "pictures_per_s": len(found["latencies_s"]) / found["wall_s"],
        "loop_pictures_per_s": 8 / known["wall_s"],
        "memory": memory.story(),
        "others": others,
        "wrong": wrong(found, known, only=("200", "429")) + wrong(health, known, only=("200",)),
    }


def replicas(servers: list[Server], loops: list[Loop], options: argparse.Namespace) -> dict[str, Any]:
    """Two replicas against one, and two loops against one."""
    rounds = []
    teams = [Clients(server.port) for server in servers]
    count, steps = 2 * options.pictures, STEPS[0]
    machine = Machine([*servers, *loops, *teams])
    for _ in range(options.rounds):
        one, two = (team.do("ask", clients=SEVERAL, count=count, steps=steps) for team in teams)
        alone = loops[0].make(count // 2, steps)
        for loop in loops:
            loop.ask(count // 2, steps)
        at_once_s = max(loop.answer()["wall_s"] for loop in loops)
        rounds.append(
            {
                "one_s": one["wall_s"] / count,
                "two_s": two["wall_s"] / count,
                "speed_up": one["wall_s"] / two["wall_s"],
                "attainable": 2 * alone["wall_s"] / at_once_s,
                "wrong": wrong(one, alone, only=("200",)) + wrong(two, alone, only=("200",)),
            }
        )
    for team in teams:
        team.end()
    return {**medians(rounds), "others": machine.others(), "rounds": rounds}


def wrong(found: dict[str, Any], known: dict[str, Any], only: tuple[str, ...]) -> list[str]:
    """What should not have come back."""
    said = [f"{number} answers {status}" for status, number in found["statuses"].items() if status not in only]
    for seed, digests in found["digests"].items():
        if digests != [known["digests"][int(seed)]]:
            said.append(f"seed {seed} is not the loop's picture")
    return said + found["strange"]


def medians(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each number over the rounds; all that was wrong."""
    numbers = {name: statistics.median(one[name] for one in rounds) for name in rounds[0] if name != "wrong"}
    return {**numbers, "wrong": sorted({text for one in rounds for text in one["wrong"]})}


def percentiles(values_s: list[float]) -> dict[str, float]:
    """Milliseconds: the middle, nearly all, all."""
    if len(values_s) < 2:
        return {"number": len(values_s)}
    cuts = statistics.quantiles(values_s, n=100, method="inclusive")
    return {"number": len(values_s), "p50_ms": 1e3 * cuts[49], "p99_ms": 1e3 * cuts[98], "most_ms": 1e3 * max(values_s)}


def verdicts(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was aimed at, and what came out."""
    few, health = found["overhead"][str(STEPS[0])], found["crowd"]["health"]
    measured = {
        "overhead per request, ms": (few["overhead_ms"], few["others"]),
        "throughput to the loop's": (few["throughput"], few["others"]),
        "two replicas to one": (found["replicas"]["speed_up"], found["replicas"]["others"]),
        "/health p99 in the crowd, ms": (health["p99_ms"], found["crowd"]["others"]),
        "/health slowest in the crowd, ms": (health["most_ms"], found["crowd"]["others"]),
        "memory grown in the crowd": (found["crowd"]["memory"]["growth"], found["crowd"]["others"]),
    }
    table = {}
    for name, (value, others) in measured.items():
        sign, aim = AIMS[name]
        reached = {"<": value < aim, "<=": value <= aim, ">=": value >= aim}[sign]
        table[name] = {"measured": value, "wanted": f"{sign} {aim:g}", "reached": reached, "others": others}
    return table


def show(found: dict[str, Any]) -> None:
    """The tables."""
    start, storm, pair = found["start"], found["crowd"], found["replicas"]
    print(f"\nstart      ready {min(start['ready_s']):.2f} s, rival's first step {min(start['rival_s']):.2f} s", end="")
    print(f": {start['start_ratio']:.2f}")
    titles = ("loop", "one", "overhead", "of CPU", "four", "throughput", "others")
    print(f"\n{'steps':9s}" + "".join(f"{title:>{11 if len(title) > 8 else 9}s}" for title in titles) + "   (ms)")
    for steps, row in found["overhead"].items():
        cells = "".join(f"{1000 * row[name]:9.1f}" for name in ("loop_s", "one_s"))
        cells += f"{row['overhead_ms']:9.1f}{row['cpu_overhead_ms']:9.1f}{1000 * row['several_s']:9.1f}"
        print(f"{steps:9s}{cells}{row['throughput']:11.3f}{row['others']:9.2f}")
    print(f"\ncrowd      {storm['clients']} clients, {storm['for_s']:.0f} s: {storm['statuses']}", end=", ")
    print(f"{storm['pictures_per_s']:.1f} pictures/s, the loop alone {storm['loop_pictures_per_s']:.1f}")
    for name in ("answers", "refusals", "health"):
        row = storm[name]
        print(f"  {name:9s}" + ", ".join(f"{key} {value:.1f}" for key, value in row.items()))
    memory = storm["memory"]
    early_mib, late_mib = memory["early_bytes"] / MIB, memory["late_bytes"] / MIB
    print(f"  memory   {early_mib:.1f} MiB, later {late_mib:.1f}: {memory['growth']:+.1%}")
    print(
        f"\nreplicas   {1000 * pair['one_s']:.1f} ms a picture with one, {1000 * pair['two_s']:.1f} with two: ", end=""
    )
    print(f"{pair['speed_up']:.2f}; two loops at once {pair['attainable']:.2f}; others {pair['others']:.2f}\n")


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All of it."""
    found: dict[str, Any] = {"facts": {"cpus": os.cpu_count(), "rounds": options.rounds, "quick": options.quick}}
    loops: list[Loop] = []
    servers: list[Server] = []
    try:
        found["start"] = starts(folder, options)
        loops.append(Loop())
        servers.append(Server(folder / "one"))
        for process in (*loops, Clients(servers[0].port)):  # nobody's first picture is timed
            if isinstance(process, Loop):
                process.make(4, STEPS[0])
            else:
                process.do("ask", clients=1, count=4, steps=STEPS[0])
                process.end()
        told("start and warm up")
        found["overhead"] = {str(steps): overhead(servers[0], loops[0], options, steps) for steps in STEPS}
        told("overhead")
        found["crowd"] = crowd(servers[0], loops[0], options)
        told("crowd")
        loops.append(Loop())
        servers.append(Server(folder / "two", "--data-parallel-size", "2"))
        found["replicas"] = replicas(servers, loops, options)
        told("replicas")
    finally:
        for process in (*servers, *loops):
            process.end()
    return found


def told(what: str) -> None:
    """How far we are."""
    print(f"{time.strftime('%H:%M:%S')} {what} done, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)


def main() -> None:
    """Measure, print what came out, and fail where an answer was wrong."""
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    found["aims"] = verdicts(found)
    show(found)
    for name, aim in found["aims"].items():
        print(
            f"{name:36s} {aim['measured']:8.3f}  {aim['wanted']:8s} {'yes' if aim['reached'] else 'NO':3s}"
            + (f" DISTURBED: others had {aim['others']:.0%}" if aim["others"] > MOST_DISTURBANCE else "")
        )
    line = json.dumps(found)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(line + "\n")
    print(line)
    parts = (*found["overhead"].values(), found["crowd"], found["replicas"])
    if mistakes := [text for part in parts for text in part["wrong"]]:
        sys.exit("WRONG: " + "; ".join(mistakes))


if __name__ == "__main__":
    main()
