"""Who this process is among its ranks: what torchrun, Slurm, Open MPI and MPICH tell their processes.

Owns the variables of launchers, and the process groups that a rank starts. torch is imported only when a rank joins
the others: a launcher reads the environment without it. Does not know what ranks do together.
"""

from __future__ import annotations

import os
import re
import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from penstock.distributed.launcher import inherited_listener
from penstock.distributed.signing import agree_on_secret
from penstock.errors import ConfigError

if TYPE_CHECKING:
    import torch

LOOPBACK = "127.0.0.1"
"""Where ranks of one machine meet."""

_AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
_PORTS = range(20_000, 30_000)  # below those that systems hand out by themselves
_TIMEOUT = timedelta(minutes=10)
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_OPEN_MPI = tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
_MPICH = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
_LIST_ITEM = re.compile(r"((?:[^,\[]|\[[^\]]*\])+)(?:,|$)")
_REPEATED = re.compile(r"(\d+)(?:\(x(\d+)\))?")
_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
_started = False
_timeout = _TIMEOUT  # of this process's ranks


@dataclass(frozen=True)
class RankEnvironment:
    """What a launcher told this process.

    Attributes:
        rank: from 0, over all machines.
        world_size: number of ranks.
        local_rank: from 0, on this machine.
        local_world_size: number of ranks on this machine.
        host: of rank 0.
        port: on which rank 0 listens.

    Raises:
        ConfigError: for numbers that contradict each other.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    host: str
    port: int

    @property
    def is_on_one_machine(self) -> bool:
        """Whether all ranks are on this machine."""
        return self.local_world_size == self.world_size

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"the launcher says rank {self.rank} of {self.world_size}. Ranks count from 0 up.")
        if not 0 <= self.local_rank < self.local_world_size <= self.world_size:
            raise ConfigError(
                f"the launcher says local rank {self.local_rank} of {self.local_world_size}, of {self.world_size} "
                "ranks in all. Local ranks count from 0 up on each machine."
            )
        if not 0 < self.port < 2**16:
            raise ConfigError(f"MASTER_PORT={self.port} is no port. Give a number from 1 to 65535.")


def read_environment(environ: Mapping[str, str] = os.environ) -> RankEnvironment | None:
    """Who this process is among ranks that a launcher started; None for a process on its own.

    One rank alone is a process on its own, and so is the shell of a Slurm allocation: only tasks of a step are ranks.

    Raises:
        ConfigError: where a launcher's variables are incomplete, or contradict each other.
    """
    for read in (_read_torchrun, _read_open_mpi, _read_mpich, _read_slurm):
        found = read(environ)
        if found is not None:
            return found if found.world_size > 1 else None
    _refuse_half(environ)
    return None


def _refuse_half(environ: Mapping[str, str]) -> None:
    """Refuse a process that was told a part of what a rank needs to know."""
    if ("RANK" in environ) != (environ.get("WORLD_SIZE", "1") != "1"):
        raise _incomplete(environ, _TORCHRUN)
    if "PMI_RANK" in environ and environ.get("PMI_SIZE") != "1":
        raise _incomplete(environ, _MPICH)


def _read_torchrun(environ: Mapping[str, str]) -> RankEnvironment | None:
    if not {"RANK", "WORLD_SIZE"} <= environ.keys():
        return None
    if _number(environ, "WORLD_SIZE") == 1:
        return RankEnvironment(_number(environ, "RANK"), 1, 0, 1, LOOPBACK, _PORTS[0])
    if not environ.keys() >= set(_TORCHRUN):
        raise _incomplete(environ, _TORCHRUN)
    rank, world_size, local_rank, local_world_size = (_number(environ, name) for name in _TORCHRUN[:4])
    port = _number(environ, "MASTER_PORT")
    return RankEnvironment(rank, world_size, local_rank, local_world_size, environ["MASTER_ADDR"], port)


def _read_open_mpi(environ: Mapping[str, str]) -> RankEnvironment | None:
    job = environ.get("PMIX_NAMESPACE", "") or environ.get("OMPI_MCA_ess_base_jobid", "")
    return _read_mpi(environ, _OPEN_MPI, job) if environ.keys() & set(_OPEN_MPI) else None


def _read_mpich(environ: Mapping[str, str]) -> RankEnvironment | None:
    return _read_mpi(environ, _MPICH, environ.get("PMI_PORT", "")) if "MPI_LOCALRANKID" in environ else None


def _read_mpi(environ: Mapping[str, str], names: tuple[str, ...], job: str) -> RankEnvironment:
    """Read rank, size, local rank and local size; MPI tells no rank where rank 0 is."""
    if not environ.keys() >= set(names):
        raise _incomplete(environ, names)
    rank, world_size, local_rank, local_world_size = (_number(environ, name) for name in names)
    if local_world_size < world_size and "MASTER_ADDR" not in environ:
        raise ConfigError(
            f"rank {rank} of {world_size} runs on one of several machines, and MPI does not say where rank 0 is. "
            "Set MASTER_ADDR to its host name for all ranks (mpirun -x MASTER_ADDR=..., mpiexec -genv MASTER_ADDR ...)."
        )
    host = environ.get("MASTER_ADDR", LOOPBACK)
    return RankEnvironment(rank, world_size, local_rank, local_world_size, host, _port(environ, job))


def _read_slurm(environ: Mapping[str, str]) -> RankEnvironment | None:
    """Read a task of a step. The shell of an allocation has a SLURM_PROCID as well, but no step, or one of one task."""
    if not {"SLURM_PROCID", "SLURM_STEP_ID"} <= environ.keys():
        return None
    num_tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    needed = ("SLURM_PROCID", num_tasks, "SLURM_LOCALID")
    if not environ.keys() >= set(needed):
        raise _incomplete(environ, needed)
    rank, world_size, local_rank = (_number(environ, name) for name in needed)
    host = environ.get("MASTER_ADDR") or first_host(nodes)
    port = _port(environ, f"{environ.get('SLURM_JOB_ID', '')}.{environ['SLURM_STEP_ID']}")
    return RankEnvironment(rank, world_size, local_rank, _slurm_local_size(environ, world_size), host, port)


def _slurm_local_size(environ: Mapping[str, str], world_size: int) -> int:
    """Tasks on this machine: `2(x3),1` says two on each of the first three, one on the last."""
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        counts = [
            int(count) for count, times in _REPEATED.findall(environ.get(name, "")) for _ in range(int(times or 1))
        ]
        node = int(environ.get("SLURM_NODEID", "0"))
        if node < len(counts) and sum(counts) == world_size:
            return counts[node]
    if "SLURM_NTASKS_PER_NODE" in environ:
        return min(_number(environ, "SLURM_NTASKS_PER_NODE"), world_size)
    nodes = environ.get("SLURM_STEP_NUM_NODES") or environ.get("SLURM_JOB_NUM_NODES", "1")
    return -(-world_size // int(nodes))


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: `gpu-[03-05,9],login` begins with `gpu-03`.

    Raises:
        ConfigError: for a list without hosts.
    """
    match = _LIST_ITEM.match(nodes)
    if match is None:
        raise ConfigError(f"Slurm's node list {nodes!r} names no host. Set MASTER_ADDR to that of rank 0.")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", match[1])


def _port(environ: Mapping[str, str], job: str) -> int:
    """MASTER_PORT, or one that all ranks of a job compute alike."""
    if "MASTER_PORT" in environ:
        return _number(environ, "MASTER_PORT")
    return _PORTS[zlib.crc32(job.encode()) % len(_PORTS)]


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ[name]
    if not re.fullmatch(r"\d{1,9}", text):
        raise ConfigError(f"{name}={text!r} is not a whole number. Unset it, or let a launcher set it.")
    return int(text)


def _incomplete(environ: Mapping[str, str], needed: tuple[str, ...]) -> ConfigError:
    given = ", ".join(f"{name}={environ[name]}" for name in needed if name in environ)
    lacking = ", ".join(name for name in needed if name not in environ)
    return ConfigError(
        f"{given} and no {lacking}: a rank needs all of them. Start with torchrun, srun or mpirun, or unset them to "
        "run as one process."
    )


def start(environment: RankEnvironment, device: torch.device, timeout: timedelta = _TIMEOUT) -> None:
    """Take this rank's device and join the other ranks; a group that the user made already is joined as it is.

    Args:
        environment: who this process is.
        device: where its pipeline runs. On CUDA the rank's own device becomes the current one: that of its local
            rank, or the only one that its launcher lets it see.
        timeout: for the start, and for every exchange.

    Raises:
        ConfigError: where this machine has fewer CUDA devices than ranks, the others do not come, or the user's group
            cannot exchange what is on the CPU and on the device.

    Cost: waits for all ranks.
    """
    import torch
    import torch.distributed as dist

    global _started, _timeout
    own, _timeout = None, timeout
    if device.type == "cuda":
        own = torch.device("cuda", _device_index(environment, torch.cuda.device_count()))
        torch.cuda.set_device(own)
    if dist.is_initialized():
        _require_backends({"cpu", device.type})
        agree_on_secret()
        return
    if environment.is_on_one_machine:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback_interface())  # else others can reach what ranks exchange
    host = f"[{environment.host}]" if ":" in environment.host else environment.host
    where = f"{host}:{environment.port}"
    try:
        dist.init_process_group(
            _BACKENDS["cpu" if own is None else "cuda"],
            **_meeting(environment, where, timeout),
            rank=environment.rank,
            world_size=environment.world_size,
            timeout=timeout,
            device_id=own,
        )
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"rank {environment.rank} of {environment.world_size} did not meet the others at {where}: {reason} "
            "Start all of them, and choose another MASTER_PORT where that one is taken."
        ) from error
    _started = True
    agree_on_secret()


def exchange_timeout() -> timedelta:
    """How long an exchange of these ranks may take, in whichever of their groups; torch gives a new one its own."""
    return _timeout


def _meeting(environment: RankEnvironment, where: str, timeout: timedelta) -> dict[str, Any]:
    """How the ranks find each other; on one machine they cannot be reached from others.

    Rank 0 of our own launcher inherits the socket that it listens on. torchrun keeps the store itself, as it likes.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    if not environment.is_on_one_machine or os.environ.get(_AGENT_STORE) == str(True):
        return {"init_method": f"tcp://{where}"}
    port, size, is_first = environment.port, environment.world_size, environment.rank == 0
    listener = inherited_listener()
    if is_first and listener is None:
        try:
            listener = socket.create_server((LOOPBACK, port)).detach()
        except OSError as error:
            raise ConfigError(
                f"rank 0 of {size} cannot listen on {LOOPBACK}:{port}: {error.strerror}. Choose another MASTER_PORT."
            ) from error
    return {"store": TCPStore(LOOPBACK, port, size, is_first, timeout, master_listen_fd=listener)}


def _loopback_interface() -> str:
    """The name of this machine's own interface: lo on Linux, lo0 elsewhere."""
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")


def _require_backends(kinds: set[str]) -> None:
    """Refuse a group that was made for other kinds of device; numbers and seeds are exchanged on the CPU."""
    import torch.distributed as dist

    backends = dist.get_backend_config()
    lacking = kinds - {item.partition(":")[0] for item in backends.split(",")}
    if lacking:
        wanted = _BACKENDS["cuda" if "cuda" in kinds else "cpu"]
        raise ConfigError(
            f"the process group that exists has backends {backends}, and none for {', '.join(sorted(lacking))}: ranks "
            f'exchange on {" and ".join(sorted(kinds))}. Make it with init_process_group("{wanted}").'
        )


def _device_index(environment: RankEnvironment, num_devices: int) -> int:
    if environment.local_rank < num_devices >= environment.local_world_size:
        return environment.local_rank
    if num_devices == 1 and "CUDA_VISIBLE_DEVICES" in os.environ:
        return 0  # bound by its launcher; were it not, NCCL would say that two ranks share a device
    raise ConfigError(
        f"{environment.local_world_size} ranks run on this machine, and it has {num_devices} CUDA devices: each rank "
        "needs its own. Start fewer, or give --device cpu."
    )


def stop() -> None:
    """Leave the groups that `start` made; those of somebody else are left as they are."""
    import torch.distributed as dist

    global _started
    if _started and dist.is_initialized():
        dist.destroy_process_group()
    _started = False
