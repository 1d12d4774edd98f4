"""Memory: the host's, that of control groups of both versions, and the device's."""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from penstock.errors import ConfigError
from penstock.machine import Machine, read_machine
from tests import processes

GIB = 1024**3
UNLIMITED_V1 = 9223372036854771712
V1 = "sys/fs/cgroup/memory"
V2 = "sys/fs/cgroup"


def write(root: Path, name: str, text: str | int) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def group1(root: Path, path: str, limit: int, used: int = 0, files: int = 0) -> None:
    """A group of version 1; its page cache is in the groups below it, as the totals tell."""
    write(root, f"{V1}{path}/memory.limit_in_bytes", limit)
    write(root, f"{V1}{path}/memory.usage_in_bytes", used)
    stat = f"inactive_file 0\nactive_file 0\ntotal_inactive_file {files // 2}\ntotal_active_file {files // 2}"
    write(root, f"{V1}{path}/memory.stat", stat)


def group2(root: Path, path: str, limit: int | str, used: int = 0, files: int = 0, high: int | str = "max") -> None:
    """A group of version 2."""
    write(root, f"{V2}{path}/memory.max", limit)
    write(root, f"{V2}{path}/memory.high", high)
    write(root, f"{V2}{path}/memory.current", used)
    write(root, f"{V2}{path}/memory.stat", f"anon 5\ninactive_file {files // 2}\nactive_file {files // 2}")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with 32 GiB, 24 of them free, and no control groups."""
    write(tmp_path, "proc/meminfo", f"MemTotal: {32 * GIB // 1024} kB\nMemAvailable: {24 * GIB // 1024} kB\nHuge: 0")
    return tmp_path


def host(root: Path) -> tuple[float, float, str]:
    machine = read_machine(root=root)
    assert (machine.device_bytes, machine.device_free_bytes) == (machine.host_bytes, machine.host_free_bytes)
    return machine.host_bytes / GIB, machine.host_free_bytes / GIB, machine.limited_by


def test_machine_without_groups(root: Path) -> None:
    assert host(root) == (32, 24, "memory")


def test_old_kernel_without_available_memory(tmp_path: Path) -> None:
    write(tmp_path, "proc/meminfo", "MemTotal: 4096 kB\nMemFree: 1024 kB\nBuffers: 512 kB\nCached: 512 kB")
    machine = read_machine(root=tmp_path)
    assert (machine.host_bytes, machine.host_free_bytes) == (4096 * 1024, 2048 * 1024)


def test_version_1_without_limits(root: Path) -> None:
    write(root, "proc/self/cgroup", "5:devices:/\n4:memory:/job\n0::/")
    group1(root, "/job", UNLIMITED_V1, used=3 * GIB)
    group1(root, "", UNLIMITED_V1, used=8 * GIB)
    assert host(root) == (32, 24, "memory")


def test_version_1_counts_page_cache_as_free(root: Path) -> None:
    write(root, "proc/self/cgroup", "4:memory:/job")
    group1(root, "/job", 8 * GIB, used=7 * GIB, files=5 * GIB)
    assert host(root) == (8, 6, "cgroup /sys/fs/cgroup/memory/job")


def test_version_1_without_hierarchy_has_no_totals(root: Path) -> None:
    write(root, "proc/self/cgroup", "4:memory:/job")
    group1(root, "/job", 8 * GIB, used=7 * GIB)
    write(root, f"{V1}/job/memory.stat", f"inactive_file {GIB}\nactive_file {GIB}")
    assert host(root) == (8, 3, "cgroup /sys/fs/cgroup/memory/job")


def test_version_2(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/user/job")
    group2(root, "/user/job", 4 * GIB, used=3 * GIB, files=GIB)
    group2(root, "/user", "max", used=20 * GIB)
    assert host(root) == (4, 2, "cgroup /sys/fs/cgroup/user/job")


def test_version_2_slows_down_above_the_high_mark(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/job")
    group2(root, "/job", 4 * GIB, used=GIB, high=2 * GIB)
    assert host(root) == (2, 1, "cgroup /sys/fs/cgroup/job")


def test_all_groups_above_count(root: Path) -> None:
    """The job's own limit is the smallest; its neighbours have nearly filled the one above."""
    write(root, "proc/self/cgroup", "0::/a/b/job")
    group2(root, "/a/b/job", 8 * GIB, used=GIB)
    group2(root, "/a/b", "max", used=15 * GIB)
    group2(root, "/a", 16 * GIB, used=15 * GIB, files=2 * GIB)
    assert host(root) == (8, 3, "cgroup /sys/fs/cgroup/a/b/job")
    group2(root, "/a", 6 * GIB, used=2 * GIB)
    assert host(root) == (6, 4, "cgroup /sys/fs/cgroup/a")


@pytest.mark.parametrize(("used", "files", "free"), [(5, 0, 0), (4, 8, 4)], ids=["overfull", "foreign page cache"])
def test_free_is_between_nothing_and_the_limit(used: int, files: int, free: int, root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/job")
    group2(root, "/job", 4 * GIB, used=used * GIB, files=files * GIB)
    assert host(root)[:2] == (4, free)


def test_both_versions_mounted(root: Path) -> None:
    """Hybrid: version 1 has the memory controller, version 2 stands beside it without."""
    write(root, "proc/self/cgroup", "4:memory:/job\n1:name=systemd:/x\n0::/session")
    mounts = [
        "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755",
        "34 31 0:31 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct",
        "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory",
        "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw",
    ]
    write(root, "proc/self/mountinfo", "\n".join(mounts))
    group1(root, "/job", 8 * GIB, used=GIB)
    write(root, f"{V2}/unified/session/cgroup.procs", "1")
    assert host(root) == (8, 7, "cgroup /sys/fs/cgroup/memory/job")


@pytest.mark.parametrize("path", ["/docker/0123abc", "/../other", "/"])
def test_container_that_sees_its_own_group_as_the_root(path: str, root: Path) -> None:
    write(root, "proc/self/cgroup", f"0::{path}")
    group2(root, "", 4 * GIB, used=GIB)
    assert host(root) == (4, 3, "cgroup /sys/fs/cgroup")


def test_container_of_version_1_with_its_group_bound_into_place(root: Path) -> None:
    write(root, "proc/self/cgroup", "4:memory:/docker/0123abc/inner")
    mount = "35 31 0:32 /docker/0123abc /sys/fs/cgroup/memory ro master:7 - cgroup cgroup rw,memory"
    write(root, "proc/self/mountinfo", mount)
    group1(root, "", 8 * GIB, used=2 * GIB)
    group1(root, "/inner", 4 * GIB, used=GIB)
    assert host(root) == (4, 3, "cgroup /sys/fs/cgroup/memory/inner")
    write(root, "proc/self/cgroup", "4:memory:/docker/0123abc")
    assert host(root) == (8, 6, "cgroup /sys/fs/cgroup/memory")


def test_groups_mounted_elsewhere(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/job")
    write(root, "proc/self/mountinfo", r"30 23 0:26 / /run/my\040groups rw shared:4 - cgroup2 cgroup rw")
    write(root, "run/my groups/job/memory.max", GIB)
    write(root, "run/my groups/job/memory.current", 0)
    assert host(root) == (1, 1, "cgroup /run/my groups/job")


def test_json(root: Path) -> None:
    machine = read_machine(root=root)
    assert Machine(**json.loads(machine.to_json())) == machine
    assert "\n" not in machine.to_json()
    assert asdict(machine)["device"] == "cpu"


def test_cuda_tells_its_own(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: {"cuda:1": (3 * GIB, 8 * GIB)}[device])
    machine = read_machine("cuda:1", root)
    assert (machine.device, machine.device_bytes, machine.device_free_bytes) == ("cuda:1", 8 * GIB, 3 * GIB)
    assert machine.host_bytes == 32 * GIB


def test_mps_tells_its_own(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 8 * GIB)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 3 * GIB)
    machine = read_machine("mps", root)
    assert (machine.device_bytes, machine.device_free_bytes) == (8 * GIB, 5 * GIB)


@pytest.mark.parametrize("error", [RuntimeError("no driver\nmore"), AssertionError(), ValueError("no index")])
def test_device_that_is_not_there(error: Exception, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(device: str) -> None:
        raise error

    monkeypatch.setattr(torch.cuda, "mem_get_info", absent)
    message = r"device='cuda:9' is not on this machine \(torch .*\): [^.]+\. Choose another, or cpu\."
    with pytest.raises(ConfigError, match=message):
        read_machine("cuda:9", root)


def test_device_that_does_not_tell(root: Path) -> None:
    machine = read_machine("xpu", root)
    assert machine.device_bytes is None and machine.device_free_bytes is None


def test_system_without_proc_asks_psutil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(total=16 * GIB, available=9 * GIB)
    monkeypatch.setitem(sys.modules, "psutil", SimpleNamespace(virtual_memory=lambda: memory))
    assert host(tmp_path) == (16, 9, "memory")


@pytest.fixture
def no_psutil(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)  # `import psutil` fails


@pytest.mark.usefixtures("no_psutil")
def test_system_without_proc_and_psutil_asks_posix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 4 * GIB // 4096, "SC_AVPHYS_PAGES": GIB // 4096}
    monkeypatch.setattr(os, "sysconf", told.__getitem__, raising=False)
    monkeypatch.setattr(os, "sysconf_names", told, raising=False)
    assert host(tmp_path) == (4, 1, "memory")
    del told["SC_AVPHYS_PAGES"]  # macOS
    assert host(tmp_path) == (4, 4, "memory")


@pytest.mark.usefixtures("no_psutil")
def test_system_that_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sysconf", raising=False)  # Windows
    with pytest.raises(ConfigError, match="does not tell how much memory it has .* Install psutil"):
        read_machine(root=tmp_path)


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="only Linux tells it in this place")
def test_this_machine() -> None:
    psutil = importlib.import_module("psutil")
    machine = read_machine()
    assert 0 < machine.host_free_bytes <= machine.host_bytes <= psutil.virtual_memory().total
    if machine.limited_by == "memory":
        assert machine.host_bytes == psutil.virtual_memory().total
    else:
        assert Path(machine.limited_by.removeprefix("cgroup ")).is_dir()


def test_it_takes_no_torch_to_know_the_host() -> None:
    code = "import sys; from penstock.machine import read_machine; read_machine(); print('torch' in sys.modules)"
    done = processes.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_files_that_must_not_be_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(root, "proc/self/cgroup", "0::/job")
    group2(root, "/job", 4 * GIB, used=GIB)
    stock = Path.read_text

    def guarded(self: Path, *args: Any, **options: Any) -> str:
        if self.name == "memory.current":
            raise PermissionError(13, "no", str(self))
        return stock(self, *args, **options)

    monkeypatch.setattr(Path, "read_text", guarded)
    assert host(root) == (32, 24, "memory")
