"""One GPU: is the picture right there, is the promise kept, and how far from the limit are the steps?

    python benchmarks/gpu.py [--device cuda] [--minutes 8] [--out results.json]
    python benchmarks/gpu.py --device cpu --small     # the same script where there is no GPU

It needs no network. It writes a FLUX.1-sized checkpoint with random weights (bf16, real widths) once, runs
`tests/gpu` on the device, and then runs each system in a process of its own (`gpu_systems.py`):

    plain               from_pretrained().to(device): the measure of compute, activations and load time
    layerwise-10 ...    penstock with 10, 25, 50 and 100 % of the weights on the device, and with the least
    sequential          penstock, whole components
    group-block         diffusers' group offload, one block per group, with a copy stream
    group-leaf          the same, one layer per group
    accelerate          accelerate's cpu_offload

A step is bound by max(plain compute, bytes moved / bandwidth from pinned memory). The table shows the ratio to that
bound. Prints tables, then one line of JSON, which also goes to `benchmarks/results/gpu_<device name>.json` where
everything ran. Exits with 1 where an output differs, a promise is broken, a test fails, or a system of ours gives no
result.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from offload_checkpoint import Shape, num_weight_bytes, weight_files
from offload_meter import evict, read_bandwidth

HERE = Path(__file__).parent
SHARES = (10, 25, 50, 100)
OURS = ("plain", "layerwise-least", *(f"layerwise-{share}" for share in SHARES), "sequential")
RIVALS = ("group-block", "group-leaf", "accelerate")
FLUX = Shape(doubles=19, singles=38, heads=24)
SMALL = Shape(doubles=19, singles=38, heads=2)
GIB = 2**30
BOUND_AIM = 1.05
SLACK_BYTES = 64 * 2**20
"""The allocator rounds up, and libraries keep a workspace."""


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = Path(tempfile.gettempdir()) / "penstock-bench"
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--small", action="store_true", help="a model of a few MiB, for a machine without a GPU")
    parser.add_argument("--folder", type=Path, default=folder, help="where the checkpoint is written and used again")
    parser.add_argument("--minutes", type=float, default=8, help="for everything; what does not fit is named")
    parser.add_argument("--steps", type=int, default=5, help="that are measured, after two that are not")
    parser.add_argument("--tokens", type=int, help="of the picture; 4096 (1024x1024), or 64 with --small")
    parser.add_argument("--systems", nargs="+", choices=(*OURS, *RIVALS), default=[*OURS, *RIVALS])
    parser.add_argument("--no-tests", action="store_true", help="leave out tests/gpu")
    parser.add_argument("--cold", action="store_true", help="drop the checkpoint from the page cache before each load")
    parser.add_argument("--out", type=Path, help="where the JSON goes, other than results/")
    options = parser.parse_args()
    options.tokens = options.tokens or (64 if options.small else 4096)
    if options.steps < 2:
        parser.error("needs at least 2 steps")
    if "plain" not in options.systems:
        options.systems.insert(0, "plain")  # what every other system is compared with
    return options


class Deadline:
    """What is left of the time that the caller gave."""

    def __init__(self, seconds: float) -> None:
        self._end_s = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        """Seconds that are left; never negative."""
        return max(0.0, self._end_s - time.monotonic())


def run_process(command: list[str], timeout_s: float, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run one of our scripts; a process that takes too long is killed, and has the exit code -9."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", **variables}
    try:
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=max(timeout_s, 1))
    except subprocess.TimeoutExpired as error:
        said = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else (error.stdout or "")
        return subprocess.CompletedProcess(command, -9, said, f"not done after {timeout_s:.0f} s")


def last_line(text: str, default: str) -> str:
    """The last line of what a process said."""
    return (text.strip().splitlines() or [default])[-1]


def write_checkpoint(options: argparse.Namespace, deadline: Deadline) -> Path:
    """The folder of the pipeline, written now if this is the first time.

    Raises:
        SystemExit: where it cannot be written.
    """
    shape = SMALL if options.small else FLUX
    folder: Path = options.folder / f"pipeline-{shape.name}"
    done = run_process([sys.executable, str(HERE / "gpu_systems.py"), "write", str(folder), *shape_flags(shape)], 300)
    if done.returncode:
        sys.exit(f"the checkpoint was not written: {last_line(done.stderr, str(done.returncode))}")
    print(f"{folder.name}: {num_weight_bytes(folder) / GIB:.2f} GiB, {deadline.left_s:.0f} s left", flush=True)
    return folder


def shape_flags(shape: Shape) -> list[str]:
    """A shape as options of `gpu_systems.py write`."""
    return [f"--doubles={shape.doubles}", f"--singles={shape.singles}", f"--heads={shape.heads}"]


def run_tests(options: argparse.Namespace, deadline: Deadline) -> dict[str, Any]:
    """`tests/gpu` on this device: how many passed, and which failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu", "-rf", "--tb=short"]
    if options.small:
        command += ["-k", "flux or sd15 or wan22 or noticed"]
    begun_s = time.monotonic()
    done = subprocess.CompletedProcess[str](command, -9, "", "no time left")
    if deadline.left_s > 1:
        variables = {"PENSTOCK_GPU_TESTS": options.device, "PYTHONPATH": path_with(HERE.parent)}
        done = run_process(["env", "-C", str(HERE.parent), *command], deadline.left_s / 2, **variables)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error|skipped)", done.stdout)}
    failures = re.findall(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
    seconds = time.monotonic() - begun_s
    found = {"exit_code": done.returncode, "counts": counts, "failures": failures, "seconds": seconds}
    if done.returncode not in (0, 1):
        found["said"] = last_line(done.stderr or done.stdout, "nothing")
    elif failures:
        print(done.stdout[-6000:], flush=True)
    print(f"tests/gpu: {counts or found.get('said')} in {seconds:.0f} s", flush=True)
    return found


def path_with(folder: Path) -> str:
    """PYTHONPATH with one folder more."""
    return os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))


def run_system(system: str, folder: Path, output: Path, options: argparse.Namespace, left_s: float) -> dict[str, Any]:
    """One process with one system: what it measured, or `failed` with the reason."""
    if left_s < 5:
        return {"failed": "no time left"}
    if options.cold:
        evict(weight_files(folder / "transformer"))
    command = [sys.executable, str(HERE / "gpu_systems.py"), "run", system, str(folder), f"--output={output}"]
    command += [f"--device={options.device}", f"--steps={options.steps}", f"--tokens={options.tokens}"]
    done = run_process(command, min(left_s, 150))
    if done.returncode:
        return {"failed": last_line(done.stderr, f"exit code {done.returncode}"), "stderr": done.stderr[-3000:]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def judge(result: dict[str, Any], plain: dict[str, Any], bandwidth: float) -> None:
    """Add to one system's result its bound, the ratio to it, and whether its promise is kept."""
    if "failed" in result or "failed" in plain:
        return
    bound_s = max(plain["step_s"], result.get("moved_bytes_per_step", 0) / bandwidth)
    result["bound_s"], result["ratio"] = bound_s, result["step_s"] / bound_s
    result["over_plain"] = result["step_s"] / plain["step_s"]
    activations = max(plain["peak_device_bytes"] - plain["weight_bytes"], 0)  # not counted where the host is the device
    result["activation_bytes"] = activations
    if "promised_bytes" in result and result["peak_device_bytes"]:
        result["is_promise_kept"] = result["peak_device_bytes"] <= result["promised_bytes"] + activations + SLACK_BYTES


COLUMNS = (
    ("load s", "load_s", 1, "8.2f"),
    ("first s", "first_s", 1, "8.2f"),
    ("step s", "step_s", 1, "8.3f"),
    ("x plain", "over_plain", 1, "8.2f"),
    ("bound s", "bound_s", 1, "8.3f"),
    ("x bound", "ratio", 1, "8.2f"),
    ("wait s", "wait_s_per_step", 1, "8.3f"),
    ("moved GiB", "moved_bytes_per_step", GIB, "10.2f"),
    ("promise GiB", "promised_bytes", GIB, "12.2f"),
    ("peak GiB", "peak_device_bytes", GIB, "9.2f"),
    ("pinned GiB", "host_bytes", GIB, "11.2f"),
    ("differs", "difference", 1, "8.1g"),
)


def print_table(results: dict[str, dict[str, Any]]) -> None:
    """One row per system."""
    print(f"{'system':16s}" + "".join(f"{name:>{int(form.split('.')[0]) + 1}s}" for name, _, _, form in COLUMNS))
    for system, row in results.items():
        if "failed" in row:
            print(f"{system:16s} {row['failed']}")
            continue
        cells = [
            f"{row[key] / unit:{form}}" if row.get(key) is not None else " " * int(form.split(".")[0])
            for _, key, unit, form in COLUMNS
        ]
        print(f"{system:16s} " + " ".join(cells))


def findings(results: dict[str, dict[str, Any]], tests: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What has to be right and is not, and what is slower than it should be."""
    wrong = [f"{name}: {row['failed']}" for name, row in results.items() if name in OURS and "failed" in row]
    wrong += [f"{name}: the output differs" for name, row in results.items() if row.get("difference") and name in OURS]
    wrong += [f"{name}: the promise is broken" for name, row in results.items() if row.get("is_promise_kept") is False]
    wrong += [f"{name} failed" for name in tests.get("failures", ())]
    if tests and tests["exit_code"] not in (0, 1):
        wrong.append(f"tests/gpu: {tests.get('said')}")
    slow = [
        f"{name}: {row['ratio']:.2f} of its bound, aim {BOUND_AIM}"
        for name, row in results.items()
        if name.startswith("layerwise") and row.get("ratio", 0) > BOUND_AIM
    ]
    return wrong, slow


def main() -> None:
    """Run everything that the time allows, print what came out, and fail where something is wrong."""
    options = parse()
    options.folder.mkdir(parents=True, exist_ok=True)
    deadline = Deadline(options.minutes * 60)
    folder = write_checkpoint(options, deadline)
    asked = run_process([sys.executable, str(HERE / "gpu_systems.py"), "facts", f"--device={options.device}"], 120)
    if asked.returncode:
        sys.exit(f"{options.device}: {last_line(asked.stderr, 'no such device')}")
    facts = json.loads(asked.stdout.splitlines()[-1])
    try:
        facts["disk_bytes_per_s"] = read_bandwidth(weight_files(folder / "transformer")[:1])["bytes_per_s"]
    except OSError as error:
        facts["disk_bytes_per_s"] = f"not measured: {error}"  # such as tmpfs
    print(json.dumps(facts), flush=True)
    tests = {} if options.no_tests else run_tests(options, deadline)
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="output-") as scratch:
        for system in sorted(options.systems, key=(*OURS, *RIVALS).index):
            output = Path(scratch) / "latents.safetensors"
            results[system] = run_system(system, folder, output, options, deadline.left_s)
            judge(results[system], results["plain"], facts["pinned_bytes_per_s"])
            print(f"  {system:16s} {deadline.left_s:5.0f} s left", flush=True)
    print_table(results)
    wrong, slow = findings(results, tests)
    line = json.dumps(
        {"facts": facts, "tests": tests, "systems": results, "wrong": wrong, "slow": slow, "steps": options.steps}
    )
    name = re.sub(r"\W+", "_", facts["device_name"].lower()).strip("_")
    is_whole = bool(tests) and set(results) == {*OURS, *RIVALS}
    if not is_whole and not options.out:
        print(line)
        return finish(wrong, slow)
    out = options.out or HERE / "results" / f"gpu_{name}{'_small' if options.small else ''}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(line + "\n")
    print(line)
    finish(wrong, slow)


def finish(wrong: list[str], slow: list[str]) -> None:
    """Name what is slow, and exit with 1 where something is wrong."""
    for finding in slow:
        print(f"slow: {finding}")
    if wrong:
        sys.exit("WRONG: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
