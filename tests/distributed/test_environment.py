"""Every launcher's variables become the same five facts; half of them, or a shell beside them, never do."""

from __future__ import annotations

import socket
import sys
from datetime import timedelta

import psutil
import pytest
import torch
import torch.distributed as dist

from penstock.distributed.environment import RankEnvironment, first_host, read_environment, start, stop
from penstock.errors import ConfigError
from tests import processes

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "gpu7",
    "MASTER_PORT": "29400",
}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_NODELIST": "node[01-03,07],other",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


def without(variables: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in names}


def test_torchrun() -> None:
    assert read_environment(TORCHRUN) == RankEnvironment(5, 8, 1, 4, "gpu7", 29400)


def test_torchrun_inside_slurm_is_what_counts() -> None:
    assert read_environment({**SLURM, **TORCHRUN}) == read_environment(TORCHRUN)


def test_slurm() -> None:
    found = read_environment(SLURM)
    assert found is not None
    assert (found.rank, found.world_size, found.local_rank, found.local_world_size) == (5, 7, 1, 2)
    assert found.host == "node01"
    assert found == read_environment({**SLURM})  # another task computes the same port
    other = read_environment({**SLURM, "SLURM_JOB_ID": "78"})
    assert other is not None and other.port != found.port
    last = read_environment({**SLURM, "SLURM_PROCID": "6", "SLURM_LOCALID": "0", "SLURM_NODEID": "3"})
    assert last is not None and last.local_world_size == 1


def test_slurm_with_fewer_variables() -> None:
    lean = without(SLURM, "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE")
    found = read_environment({**lean, "SLURM_JOB_NODELIST": "n1,n2", "SLURM_NTASKS_PER_NODE": "4"})
    assert found is not None
    assert (found.world_size, found.local_world_size, found.host) == (8, 4, "n1")


def test_exported_address_and_world_size_beside_slurm() -> None:
    found = read_environment({**SLURM, "WORLD_SIZE": "7", "MASTER_ADDR": "head", "MASTER_PORT": "1234"})
    assert found is not None and (found.host, found.port, found.rank) == ("head", 1234, 5)


@pytest.mark.parametrize(
    "shell",
    [
        {},
        {"PATH": "/bin", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "77"},  # salloc
        without(SLURM, "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"),  # the batch script
        {**SLURM, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # srun --pty bash
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"WORLD_SIZE": "1"},
        {"PMI_RANK": "0", "PMI_SIZE": "1"},
    ],
)
def test_shell_is_no_rank(shell: dict[str, str]) -> None:
    assert read_environment(shell) is None


@pytest.mark.parametrize("variables", [OPEN_MPI, MPICH])
def test_mpi(variables: dict[str, str]) -> None:
    found = read_environment(variables)
    assert found is not None
    assert (found.rank, found.world_size, found.local_rank, found.local_world_size) == (1, 2, 1, 2)
    assert found.host == "127.0.0.1"
    # the daemons of mpirun are tasks of Slurm, and their ranks inherit it
    assert read_environment({**SLURM, **variables}) == found


def test_mpi_over_machines_needs_an_address() -> None:
    spread = {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "4"}
    with pytest.raises(ConfigError, match="Set MASTER_ADDR"):
        read_environment(spread)
    found = read_environment({**spread, "MASTER_ADDR": "head"})
    assert found is not None and found.host == "head"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (without(TORCHRUN, "RANK"), "no RANK: a rank needs all"),
        (without(TORCHRUN, "WORLD_SIZE"), "no WORLD_SIZE: a rank needs all"),
        (without(TORCHRUN, "LOCAL_RANK", "MASTER_PORT"), "no LOCAL_RANK, MASTER_PORT: a rank needs all"),
        ({**TORCHRUN, "RANK": "8"}, "rank 8 of 8"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, "local rank 4 of 4"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "9"}, "of 9, of 8"),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, "MASTER_PORT=70000 is no port"),
        ({**TORCHRUN, "WORLD_SIZE": "many"}, "WORLD_SIZE='many' is not a whole number"),
        (without(OPEN_MPI, "OMPI_COMM_WORLD_SIZE"), "no OMPI_COMM_WORLD_SIZE"),
        (without(MPICH, "MPI_LOCALRANKID"), "no MPI_LOCALRANKID"),
        (without(SLURM, "SLURM_LOCALID"), "no SLURM_LOCALID"),
        ({**SLURM, "SLURM_STEP_NODELIST": ""}, "names no host"),
    ],
)
def test_half_told_or_contradicting_is_refused(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_environment(variables)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("alone", "alone"),
        ("a1,b2", "a1"),
        ("node[01-04,07]", "node01"),
        ("node[7]", "node7"),
        ("gpu-[003,5-9].cluster,login", "gpu-003.cluster"),
        ("rack[1-2]node[08-11]", "rack1node08"),
    ],
)
def test_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_reading_imports_no_torch() -> None:
    code = "import sys; from penstock.distributed.environment import read_environment; print('torch' in sys.modules)"
    done = processes.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def listening() -> set[str]:
    """The addresses on which this process listens."""
    return {
        connection.laddr.ip for connection in psutil.Process().net_connections("tcp") if connection.status == "LISTEN"
    }


@pytest.mark.parametrize("num_local", [1, 2])
def test_ranks_of_one_machine_cannot_be_reached_from_others(num_local: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control is a rank whose launcher says that there are other machines: it listens for them."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(RankEnvironment, "is_on_one_machine", num_local == 1)
    before = listening()
    start(RankEnvironment(0, 1, 0, 1, "localhost", free_port()), torch.device("cpu"))
    try:
        others = listening() - before - {"127.0.0.1", "::1"}
        assert bool(others) == (num_local == 2), others
    finally:
        stop()


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: .*Choose another MASTER_PORT"):
            start(RankEnvironment(0, 2, 0, 2, "127.0.0.1", port), torch.device("cpu"))


def test_stop_ends_what_start_began_and_only_that() -> None:
    alone = RankEnvironment(0, 1, 0, 1, "127.0.0.1", free_port())
    start(alone, torch.device("cpu"))
    assert dist.is_initialized() and dist.get_backend() == "gloo"
    stop()
    assert not dist.is_initialized()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    try:
        start(alone, torch.device("cpu"))
        stop()
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_ranks_that_do_not_come_are_told_of() -> None:
    lonely = RankEnvironment(0, 2, 0, 2, "127.0.0.1", free_port())
    with pytest.raises(ConfigError, match="rank 0 of 2 did not meet the others"):
        start(lonely, torch.device("cpu"), timedelta(seconds=1))
    assert not dist.is_initialized()


def test_group_of_the_user_gets_this_ranks_device(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    second = RankEnvironment(1, 2, 1, 2, "127.0.0.1", free_port())
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    try:
        start(second, torch.device("cuda", 0))
        assert chosen == [torch.device("cuda", 1)]
        start(second, torch.device("cpu"))
        assert len(chosen) == 1
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("backends", "device", "message"),
    [
        ("cuda:gloo", "cuda", r'none for cpu: .* on cpu and cuda\. .*init_process_group\("cpu:gloo,cuda:nccl"\)'),
        ("cpu:gloo", "cuda", r'none for cuda: .*init_process_group\("cpu:gloo,cuda:nccl"\)'),
        ("cuda:gloo", "cpu", r'none for cpu: .* on cpu\. .*init_process_group\("gloo"\)'),
    ],
)
def test_group_of_the_user_without_a_backend(
    backends: str, device: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    alone = RankEnvironment(0, 1, 0, 1, "127.0.0.1", free_port())
    dist.init_process_group(backends, init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    try:
        with pytest.raises(ConfigError, match=message):
            start(alone, torch.device(device))
    finally:
        dist.destroy_process_group()
