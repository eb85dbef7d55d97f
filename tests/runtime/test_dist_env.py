"""The launcher's variables, as torchrun and Slurm really set them, become a DistEnv or one clear error."""

from __future__ import annotations

import pytest

from internlm_lite.errors import MeshError
from internlm_lite.runtime.dist_env import FIRST_PORT, N_PORTS, DistEnv, check_options, overlap_notes, read_dist_env

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "gpu01",
    "MASTER_PORT": "29400", "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1",
    "TORCHELASTIC_ERROR_FILE": "/tmp/torchelastic_a/none_b/attempt_2/1/error.json",
}  # fmt: skip
LATER = "/tmp/torchelastic_a/none_b/attempt_3/0/error.json"

# Task 2 of `srun -N 2 -n 3` inside an allocation made with --ntasks-per-node=2: that variable is stale.
SRUN = {
    "SLURM_PROCID": "2", "SLURM_NTASKS": "3", "SLURM_LOCALID": "0", "SLURM_NODEID": "1", "SLURM_JOB_ID": "1",
    "SLURM_STEP_ID": "0", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS_PER_NODE": "2", "SLURM_TASKS_PER_NODE": "2,1", "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1", "SLURMD_NODENAME": "node2", "ENVIRONMENT": "BATCH",
}  # fmt: skip

# The seed's srun -N 2 -n 16 --ntasks-per-node=8, with the variables that every Slurm sets.
SEED = {
    "SLURM_PROCID": "11", "SLURM_NTASKS": "16", "SLURM_LOCALID": "3", "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "HOST-10-140-60-[69,95]", "SLURM_NTASKS_PER_NODE": "8",
    "SLURMD_NODENAME": "HOST-10-140-60-95",
}  # fmt: skip

BATCH_SHELL = {
    "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_ID": "1",
    "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_TASKS_PER_NODE": "2(x2)", "ENVIRONMENT": "BATCH",
}  # fmt: skip


# Rank 1 of 2 under Open MPI 4.1, and under Hydra of MPICH 4.0.
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "836567041", "PMIX_ID": "836567041.1",
}  # fmt: skip
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "PMI_FD": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


def place_of(environ: dict[str, str], launcher: str = "auto", resolves=True, **kwargs) -> DistEnv:
    return read_dist_env(environ, launcher, resolves=lambda name: resolves, **kwargs)


def test_torchrun():
    dist_env = place_of(TORCHRUN)
    assert (dist_env.rank, dist_env.world_size, dist_env.local_rank, dist_env.local_world_size) == (5, 8, 1, 4)
    assert (dist_env.launcher, dist_env.master_host, dist_env.master_port) == ("torch", "gpu01", 29400)
    assert (dist_env.attempt, dist_env.supervised, dist_env.agent_store) == (2, True, True)
    assert str(dist_env.error_file) == TORCHRUN["TORCHELASTIC_ERROR_FILE"]
    assert (
        dist_env.agent == "/tmp/torchelastic_a/none_b" == place_of(TORCHRUN | {"TORCHELASTIC_ERROR_FILE": LATER}).agent
    )
    assert place_of(TORCHRUN | {"TORCHELASTIC_ERROR_FILE": ""}).agent == "", "torchrun --log-dir /dev/null"
    assert "TORCHELASTIC_RUN_ID" in dist_env.why and "\n" not in dist_env.why
    assert dist_env.cpu_threads is None, "torchrun's own OMP_NUM_THREADS=1 is not a wish"
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert place_of(TORCHRUN | alone).cpu_threads == 1, "for one process it does not set it"


def test_ranks_set_by_hand():
    environ = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "h",
        "MASTER_PORT": "2",
        "OMP_NUM_THREADS": "1",
    }
    dist_env = place_of(environ)
    assert (dist_env.launcher, dist_env.local_world_size, dist_env.cpu_threads) == ("torch", 2, 1)
    assert not dist_env.supervised and not dist_env.agent_store
    assert "LOCAL_WORLD_SIZE is not set" in dist_env.why


def test_srun_task():
    dist_env = place_of(SRUN)
    assert (dist_env.rank, dist_env.world_size, dist_env.local_rank, dist_env.local_world_size) == (2, 3, 0, 1)
    assert (dist_env.launcher, dist_env.master_host, dist_env.hostname) == ("slurm", "node1", "node2")
    assert FIRST_PORT <= dist_env.master_port < FIRST_PORT + N_PORTS
    assert "SLURM_PROCID=2" in dist_env.why


def test_seed_srun():
    dist_env = place_of(SEED)
    assert (dist_env.rank, dist_env.world_size, dist_env.local_rank, dist_env.local_world_size) == (11, 16, 3, 8)
    assert (dist_env.master_host, dist_env.hostname) == ("HOST-10-140-60-69", "HOST-10-140-60-95")


def test_slurm_port():
    ports = {place_of(SRUN | {"SLURM_PROCID": str(rank)}).master_port for rank in range(3)}
    others = {place_of(SRUN | {"SLURM_JOB_ID": str(job)}).master_port for job in range(2, 52)}
    others |= {place_of(SRUN | {"SLURM_STEP_ID": str(step)}).master_port for step in range(1, 50)}
    assert len(ports) == 1 and len(others) > 90 and not ports & others


def test_host_and_port_options():
    by_hand = TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "False"}
    for environ in (SRUN, by_hand):
        dist_env = place_of(environ, host="10.0.0.7", port=12345, resolves=False)
        assert (dist_env.master_host, dist_env.master_port) == ("10.0.0.7", 12345)
    with pytest.raises(MeshError, match="agent serves the ranks' store; give torchrun --master-addr"):
        place_of(TORCHRUN, port=12345)


def test_unresolvable_node_names():
    dist_env = place_of(SRUN, resolves=False)
    assert dist_env.master_host == "127.0.0.1" and "does not resolve" in dist_env.why
    with pytest.raises(MeshError, match="SLURM_LAUNCH_NODE_IPADDR is not set; pass --host"):
        place_of({key: value for key, value in SRUN.items() if key != "SLURM_LAUNCH_NODE_IPADDR"}, resolves=False)


@pytest.mark.parametrize(("environ", "name"), [(OPEN_MPI, "OMPI_COMM_WORLD_RANK=1"), (HYDRA, "PMI_RANK=1")])
def test_mpirun(environ, name):
    for around in ({}, BATCH_SHELL, SRUN):  # mpirun starts its daemons with srun
        dist_env = place_of(around | environ)
        assert (dist_env.rank, dist_env.world_size, dist_env.local_rank, dist_env.local_world_size) == (1, 2, 1, 2)
        assert (dist_env.launcher, dist_env.master_host) == ("mpi", "localhost") and name in dist_env.why
        assert FIRST_PORT <= dist_env.master_port < FIRST_PORT + N_PORTS
    assert place_of(TORCHRUN | environ).launcher == "torch", "the user set RANK from mpirun's"
    far = environ | dict.fromkeys(set(environ) & {"OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"}, "1")
    far |= dict.fromkeys(set(environ) & {"OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"}, "0")
    with pytest.raises(MeshError, match=r"1 of 2 ranks on host .* no address of rank 0: pass --host"):
        place_of(far)
    assert place_of(far, host="gpu01", port=7).master_host == "gpu01"
    dist_env = place_of(far | {"MASTER_ADDR": "gpu02", "MASTER_PORT": "29500"})
    assert (dist_env.master_host, dist_env.master_port) == ("gpu02", 29500)


def test_mpirun_jobs_have_ports_of_their_own():
    assert place_of(OPEN_MPI).master_port != place_of(OPEN_MPI | {"PMIX_NAMESPACE": "836567042"}).master_port


def test_options_of_old_launchers():
    check_options(place_of(TORCHRUN), rank=5, world_size=8, local_rank=1)
    check_options(place_of({}), rank=None, world_size=None, local_rank=0)
    with pytest.raises(MeshError, match="found --world_size 8, but this process has world size 1 "):
        check_options(place_of({}), rank=0, world_size=8)
    with pytest.raises(MeshError, match="found --local_rank 0, but this process has local rank 1 "):
        check_options(place_of(TORCHRUN), local_rank=0)


def test_torchrun_inside_srun():
    dist_env = place_of(SRUN | TORCHRUN)
    assert dist_env.launcher == "torch" and dist_env.rank == 5 and "inside Slurm task 2" in dist_env.why


def test_srun_despite_exported_variables():
    exported = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500", "WORLD_SIZE": "3"}
    assert place_of(SRUN | exported).launcher == "slurm"


@pytest.mark.parametrize(
    ("environ", "why"),
    [
        ({}, "no variable of torchrun, mpirun or Slurm"),
        ({"WORLD_SIZE": "1"}, "no variable"),
        ({"SLURM_JOB_ID": "9", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "n[1-2]"}, "a shell inside Slurm job 9"),
        (BATCH_SHELL, "batch script or interactive shell inside Slurm job 1"),
        (SRUN | {"SLURM_STEP_ID": "4294967290"}, "batch script or interactive shell inside Slurm job 1"),
    ],
)
def test_single(environ, why):
    dist_env = place_of(environ)
    assert (dist_env.launcher, dist_env.rank, dist_env.world_size, dist_env.local_world_size) == ("single", 0, 1, 1)
    assert why in dist_env.why and "\n" not in dist_env.why
    assert dist_env.idle_tasks == int(environ.get("SLURM_NTASKS", "1")) - 1
    assert place_of(environ, "single").idle_tasks == 0


def test_batch_script():
    with pytest.raises(MeshError, match="expected one of the 4 tasks of srun: say srun python"):
        place_of(BATCH_SHELL, "slurm")


def test_launcher_option():
    assert place_of(SRUN | TORCHRUN, "slurm").rank == 2
    assert place_of(SRUN | TORCHRUN, "single").world_size == 1
    with pytest.raises(MeshError, match="not set: RANK, WORLD_SIZE, LOCAL_RANK"):
        place_of(SRUN, "torch")
    with pytest.raises(MeshError, match="not set: SLURM_PROCID"):
        place_of({}, "slurm")
    with pytest.raises(MeshError, match="expected auto, torch, mpi, slurm or single"):
        place_of({}, "ssh")


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        (TORCHRUN | {"RANK": "8"}, "RANK=8, WORLD_SIZE=8"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "LOCAL_RANK=4, LOCAL_WORLD_SIZE=4"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE=9"),
        (TORCHRUN | {"RANK": "x"}, "RANK='x'"),
        (TORCHRUN | {"RANK": "-1"}, "RANK='-1'"),
        (TORCHRUN | {"MASTER_ADDR": ""}, "not set: MASTER_ADDR"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "master port 70000"),
        ({"WORLD_SIZE": "8"}, "not set: RANK, LOCAL_RANK"),
        ({"RANK": "0"}, "not set: WORLD_SIZE"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, "OMPI_COMM_WORLD_RANK=1, OMPI_COMM_WORLD_SIZE=1"),
        (HYDRA | {"MPI_LOCALRANKID": ""}, "not set: MPI_LOCALRANKID"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "not set: MPI_LOCALRANKID, MPI_LOCALNRANKS"),
        (SRUN | {"SLURM_HET_SIZE": "2"}, "a heterogeneous Slurm job of 2 components"),
        (SRUN | {"SLURM_PACK_SIZE": "3"}, "a heterogeneous Slurm job of 3 components"),
        (SRUN | {"SLURM_PROCID": "3"}, "SLURM_PROCID=3, SLURM_NTASKS=3"),
        (SRUN | {"SLURM_LOCALID": "1"}, "SLURM_LOCALID=1"),
        (SRUN | {"SLURM_NTASKS": ""}, "not set: SLURM_NTASKS"),
        (SRUN | {"SLURM_NTASKS": "5"}, "SLURM_NTASKS=5 but SLURM_STEP_TASKS_PER_NODE=2,1, SLURM_TASKS_PER_NODE=2,1"),
        (SRUN | {"SLURM_NODEID": "2"}, "node 2 of 2"),
        (SRUN | {"SLURM_STEP_NODELIST": "node[1-"}, "node list 'node\\[1-'"),
        (SRUN | {"SLURM_STEP_NODELIST": "", "SLURM_JOB_NODELIST": ""}, "SLURM_JOB_NODELIST are not set"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "two"}, "tasks per node 'two'"),
        (SEED | {"SLURM_NTASKS_PER_NODE": "7"}, "SLURM_NTASKS_PER_NODE=7"),
    ],
)
def test_contradictory_variables(environ, names):
    with pytest.raises(MeshError, match=names):
        place_of(environ)


def test_thread_counts():
    assert place_of(SRUN | {"SLURM_CPUS_PER_TASK": "6", "OMP_NUM_THREADS": "2"}).cpu_threads == 6
    assert place_of(SRUN | {"OMP_NUM_THREADS": "2"}).cpu_threads == 2
    assert place_of(TORCHRUN | {"OMP_NUM_THREADS": "4"}).cpu_threads == 4
    assert place_of(TORCHRUN | {"OMP_NUM_THREADS": "a"} | {"TORCHELASTIC_RUN_ID": "x"}, "single").cpu_threads is None


# One hardware queue, which Megatron's overlap of tensor parallelism wants, keeps ZeRO-2 and 3 from overlapping.
def test_one_queue_for_all_streams_is_told_where_weights_and_gradients_travel():
    one = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    assert (
        overlap_notes(one, 1) == overlap_notes({}, 3) == overlap_notes({"CUDA_DEVICE_MAX_CONNECTIONS": "16"}, 3) == []
    )
    (note,) = overlap_notes(one, 2)
    assert "parallel.zero_stage=2" in note and "unset CUDA_DEVICE_MAX_CONNECTIONS" in note
