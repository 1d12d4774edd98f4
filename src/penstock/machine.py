"""Machine: how much memory there is to plan with, on the device and on the host, and what limits it.

Owns the reading of `/proc` and of control groups (both versions, and both at once). Does not decide what is done
with the memory. Importing it does not import torch.

A process in a container may use less than the machine has: every control group from its own up to the root can
have a limit, and what counts is the smallest. Pages of files, which the mapped weights are, count as used there,
though the kernel drops them as soon as somebody needs the room: they are taken as free.

Sources: the kernel's `Documentation/admin-guide/cgroup-v1/memory.rst` and `cgroup-v2.rst`; proc(5).
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from penstock.errors import ConfigError

_MOUNTS = {1: "/sys/fs/cgroup/memory", 2: "/sys/fs/cgroup"}  # where nothing else is said
_LIMITS = {1: ("memory.limit_in_bytes",), 2: ("memory.max", "memory.high")}
_USAGE = {1: "memory.usage_in_bytes", 2: "memory.current"}
_PREFIX = {1: "total_", 2: ""}  # version 2 always counts the groups below as well


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Memory, as one process sees it at one moment.

    Attributes:
        device: the device asked for, as torch writes it.
        device_bytes: all of its memory; the host's for the CPU; None where the device does not tell.
        device_free_bytes: what can still be allocated there.
        host_bytes: what this process may use of the host's memory at most.
        host_free_bytes: what can still be allocated there, after pages of files have made room.
        limited_by: what sets `host_bytes`: `memory`, or `cgroup` and the folder of the group.
    """

    device: str
    device_bytes: int | None
    device_free_bytes: int | None
    host_bytes: int
    host_free_bytes: int
    limited_by: str

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class _Room:
    """What one level allows: bytes in all, bytes still free, and its name."""

    num_bytes: int
    free_bytes: int
    name: str


def read_machine(device: str = "cpu", root: Path = Path("/")) -> Machine:
    """Read how much memory there is.

    Args:
        device: cpu, cuda, cuda:N or mps.
        root: where `proc` and `sys` lie.

    Raises:
        ConfigError: for a device that this machine does not have, or a system that does not tell its memory.

    Cost: reads a few small files; for GPUs it imports torch and makes the device's context.
    """
    rooms = [_physical(root), *_groups(root)]
    tightest = min(rooms, key=lambda room: room.num_bytes)
    host_bytes = tightest.num_bytes
    host_free_bytes = max(0, min(host_bytes, *(room.free_bytes for room in rooms)))
    device_bytes, device_free_bytes = (host_bytes, host_free_bytes) if device == "cpu" else _device_memory(device)
    return Machine(
        device=device,
        device_bytes=device_bytes,
        device_free_bytes=device_free_bytes,
        host_bytes=host_bytes,
        host_free_bytes=host_free_bytes,
        limited_by=tightest.name,
    )


def _device_memory(device: str) -> tuple[int | None, int | None]:
    import torch

    kind = device.partition(":")[0]
    try:
        if kind == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            return total, free
        if kind == "mps":
            total = torch.mps.recommended_max_memory()
            return total, max(0, total - torch.mps.current_allocated_memory())
    except (RuntimeError, AssertionError, ValueError) as error:  # AssertionError: a torch without that backend
        raise ConfigError(
            f"device={device!r} is not on this machine (torch {torch.__version__}): "
            f"{(str(error).splitlines() or ['no message'])[0].rstrip('.')}. Choose another, or cpu."
        ) from error
    return None, None


def _physical(root: Path) -> _Room:
    """The host's own memory."""
    fields = _numbers(root / "proc/meminfo")  # in KiB
    if "MemTotal" in fields:
        older = sum(fields.get(name, 0) for name in ("MemFree", "Buffers", "Cached"))  # Linux before 3.14
        return _Room(fields["MemTotal"] * 1024, fields.get("MemAvailable", older) * 1024, "memory")
    try:
        psutil: Any = importlib.import_module("psutil")
    except ImportError:
        return _by_sysconf()
    memory = psutil.virtual_memory()
    return _Room(memory.total, memory.available, "memory")


def _by_sysconf() -> _Room:
    """What POSIX tells; where it does not tell what is free, all is taken as free."""
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total = os.sysconf("SC_PHYS_PAGES") * page
        free = os.sysconf("SC_AVPHYS_PAGES") * page if "SC_AVPHYS_PAGES" in os.sysconf_names else total
    except (AttributeError, ValueError, OSError) as error:
        raise ConfigError(f"this system does not tell how much memory it has ({error}). Install psutil.") from error
    return _Room(total, free, "memory")


def _groups(root: Path) -> Iterator[_Room]:
    """The memory control groups of this process, each with those above it; both versions may be mounted."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        version = 2 if number == "0" and not controllers else 1
        if version == 1 and "memory" not in controllers.split(","):
            continue
        own, top = _place(root, version, PurePosixPath(path))
        for folder in (own, *own.parents):
            room = _room(root, folder, version)
            if room is not None:
                yield room
            if folder == top:
                break


def _place(root: Path, version: int, group: PurePosixPath) -> tuple[Path, Path]:
    """The folders of a group and of the uppermost one that can be seen.

    In a container, the path may be one that only the host sees: then the mount shows the container's own group.
    """
    mounts = _mounts(root, version)
    for shown, point in mounts:
        if ".." not in group.parts and group.is_relative_to(shown):
            own = point / group.relative_to(shown)
            if own.is_dir():
                return own, point
    point = mounts[0][1]
    return point, point


def _mounts(root: Path, version: int) -> list[tuple[PurePosixPath, Path]]:
    """Where groups are mounted: the uppermost group that a mount shows, and its folder."""
    mounts = []
    for line in _text(root / "proc/self/mountinfo").splitlines():
        mount, _, source = line.partition(" - ")
        shown, point = mount.split(" ")[3:5]
        kind, _, options = source.split(" ", 2)
        if kind == {1: "cgroup", 2: "cgroup2"}[version] and (version == 2 or "memory" in options.split(",")):
            mounts.append((PurePosixPath(shown), root / point.replace("\\040", " ").lstrip("/")))
    return mounts or [(PurePosixPath("/"), root / _MOUNTS[version].lstrip("/"))]


def _room(root: Path, folder: Path, version: int) -> _Room | None:
    """What a group allows; None for one without a limit."""
    limits = [int(text) for name in _LIMITS[version] if (text := _text(folder / name).strip()).isdecimal()]
    used = _text(folder / _USAGE[version]).strip()
    if not limits or not used.isdecimal():
        return None
    pages = _numbers(folder / "memory.stat")
    names = [f"{kind}_file" for kind in ("inactive", "active")]
    files = sum(pages.get(_PREFIX[version] + name, pages.get(name, 0)) for name in names)
    limit = min(limits)
    free = limit - max(0, int(used) - files)
    return _Room(limit, free, f"cgroup /{folder.relative_to(root).as_posix()}")


def _text(path: Path) -> str:
    """A file's text; empty where it is not there, or must not be read."""
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return ""


def _numbers(path: Path) -> dict[str, int]:
    """The lines of a file such as `MemTotal:  16 kB` or `inactive_file 4096`, by their first word."""
    words = [line.split() for line in _text(path).splitlines()]
    return {word[0].rstrip(":"): int(word[1]) for word in words if len(word) > 1 and word[1].isdecimal()}
