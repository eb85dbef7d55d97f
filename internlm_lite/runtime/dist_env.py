"""The rank of this process and other facts set by its launcher, read once from environment variables.

    torchrun, or RANK set by hand  >  mpirun  >  a task of srun  >  a single process

`auto` takes the first that applies.

Only this file knows the names of environment variables; they are read from a mapping passed by the caller.
"""

from __future__ import annotations

import os
import socket
import zlib
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from internlm_lite.config.masking import masked
from internlm_lite.errors import ConfigError, MeshError
from internlm_lite.runtime.nodes import expand_node_list, expand_task_counts

Launcher = Literal["torch", "mpi", "slurm", "single"]
Environ = Mapping[str, str]

FIRST_PORT, N_PORTS = 15_000, 15_000
"""Ports under Slurm and mpirun: above most registered services, below Linux' ephemeral range (32768 up)."""


@dataclass(frozen=True)
class _MpiNames:
    """The variables that one kind of mpirun sets for each process."""

    rank: str
    world_size: str
    local_rank: str
    local_world_size: str


_OPEN_MPI = _MpiNames(*(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")))
_HYDRA = _MpiNames("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
"""Hydra: the mpirun of MPICH, Intel MPI and others."""


@dataclass(frozen=True)
class DistEnv:
    """One process of the job."""

    rank: int
    world_size: int
    local_rank: int
    """Index of this process among those of its host."""
    local_world_size: int
    hostname: str
    launcher: Launcher
    why: str
    """One line: the launcher that was recognised, and the variables that identified it."""
    master_host: str
    """Host of the key-value store for the rendezvous, served by rank 0 or the launcher's agent."""
    master_port: int
    attempt: int = 0
    """Restarts so far, as the launcher counts them; an agent of torchrun counts only its own."""
    supervised: bool = False
    """Whether torchrun's agent started this process: it treats exit codes other than 0 as failures and may restart."""
    agent_store: bool = False
    """Whether torchrun's agent already serves the store."""
    agent: str = ""
    """Identifies the launcher that restarts this process: the log folder of torchrun's agent, or Slurm's step."""
    error_file: Path | None = None
    """File from which torchrun's agent reads the failure; see the function `error_file`."""
    idle_tasks: int = 0
    """Tasks of the surrounding Slurm job that stay unused by a single process without `--launcher single`."""
    cpu_threads: int | None = None
    """Threads per process, as set by the launcher or the user; None: not set."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def set_defaults(environ: MutableMapping[str, str]) -> None:
    """Set variables that libraries read on import: call it before importing torch. Values set by the user are kept."""
    # GNU OpenMP's threads busy-wait for each other. With two other busy processes that halved the training speed;
    # on idle cores a shorter busy-wait made no measurable difference.
    environ.setdefault("GOMP_SPINCOUNT", "10000")
    # torch's warnings about connections have 40 lines of C++ frames each; our errors explain the cause.
    environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Without these, NCCL's own threads end a process that lost a peer by SIGABRT, before the watchdog can say which.
    environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
    # Rows of changing composition would otherwise split the GPU's memory into pieces too small to use.
    if "PYTORCH_CUDA_ALLOC_CONF" not in environ:
        environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # What `deterministic=True` needs before the first product; on Hopper also the default.
    environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # wandb's own process must not send reports of its errors.
    environ.setdefault("WANDB_ERROR_REPORTING", "false")
    set_mlflow_defaults(environ)


def set_gpu_defaults(environ: MutableMapping[str, str], *, deterministic: bool) -> None:
    """Set variables that gloo and NCCL read when the first process group of a run on GPUs is made: call it before.
    Values set by the user are kept."""
    # Objects travel over gloo beside NCCL. Ranks connect when they first exchange one, not each to thousands of others.
    environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    if deterministic:
        # NVLink switches add in any order. torch itself excludes NVLS, but not the trees that use it inside a node.
        environ.setdefault("NCCL_ALGO", "^NVLS,NVLSTree")


def overlap_notes(environ: Environ, zero_stage: int) -> list[str]:
    """What the environment of a run on GPUs keeps from running side by side: a sentence each."""
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    if zero_stage == 1 or environ.get(name) != "1":
        return []
    return [
        f"{name}=1, as Megatron's tensor parallelism wants it, puts the kernels of all streams into one queue: with "
        f"parallel.zero_stage={zero_stage} weights and gradients do not travel while a block computes; unset {name}"
    ]


def set_mlflow_defaults(environ: MutableMapping[str, str]) -> None:
    """Set variables that mlflow reads on import: call it before. Values set by the user are kept."""
    environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # else newer versions refuse to write files
    # A call to a dead server must not keep other sinks of the queue waiting for minutes.
    environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")


def set_deepspeed_variables(accelerator: str, local_rank: int) -> None:
    """Set what DeepSpeed reads on import and where it builds an engine: "cpu" or "cuda", and the number of the device,
    which under some launchers is not LOCAL_RANK. Our own were read before."""
    os.environ["DS_ACCELERATOR"] = accelerator
    os.environ["LOCAL_RANK"] = str(local_rank)


def adopt_s3_keys(environ: MutableMapping[str, str]) -> None:
    """Copy InternLM's variables of the S3 credentials to those of boto3's default chain.

    InternLM's pair takes precedence; a session token, which belongs to other keys, is then removed.
    """
    ours = {"S3_ACCESS_KEY_ID": "AWS_ACCESS_KEY_ID", "S3_SECRET_ACCESS_KEY_ID": "AWS_SECRET_ACCESS_KEY"}
    given = [name for name in ours if environ.get(name)]
    if len(given) == 1:
        missing = next(name for name in ours if name not in given)
        raise ConfigError(f"the environment variable {given[0]} is set and {missing} is not: set both, or neither")
    for name in given:
        environ[ours[name]] = environ[name]
    if given:
        environ.pop("AWS_SESSION_TOKEN", None)


_WITH_VALUES = ("NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "CUDA_", "OMP_", "MKL_", "UCX_", "LD_LIBRARY_", "PYTHONPATH")
_NAMES_ALONE = ("S3_", "AWS_", "BOTO3_", "HF_", "WANDB_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY")
_OF_ONE_RANK = ("CUDA_VISIBLE_DEVICES", "NCCL_TOPO_FILE", "OMP_PLACES")
"""Variables that may differ between ranks."""


def common_variables(environ: Environ) -> dict[str, str]:
    """Variables that influence a run and should be equal on all ranks: name -> value.

    Secrets are ***; variables that may contain an address with a password are "set".
    """
    found = {}
    for name, value in environ.items():
        if name.upper().startswith(_NAMES_ALONE):
            found[name] = "set"
        elif name.startswith(_WITH_VALUES) and name not in _OF_ONE_RANK:
            found[name] = str(masked(value, name))
    return found


def chosen_interfaces(environ: Environ) -> dict[str, str]:
    """NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME, if set."""
    return {name: environ[name] for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME") if environ.get(name)}


def resolves(name: str) -> bool:
    """Whether this host can resolve `name` to an address."""
    try:
        socket.getaddrinfo(name, None)
    except (OSError, UnicodeError):
        return False
    return True


def read_dist_env(
    environ: Environ,
    launcher: str = "auto",
    host: str | None = None,
    port: int | None = None,
    resolves: Callable[[str], bool] = resolves,
) -> DistEnv:
    """Read the launcher's variables; `host` and `port`, from the command line, replace the launcher's.

    Raises MeshError naming the variables when they are missing or contradict each other.
    """
    idle_tasks = 0
    if launcher == "auto":
        launcher, why = _recognise(environ)
        idle_tasks = _number(environ, "SLURM_NTASKS", 1) - 1
    else:
        why = f"--launcher {launcher}"
    if launcher == "torch":
        dist_env = _from_torch(environ, why, host, port)
    elif launcher == "mpi":
        dist_env = _from_mpi(environ, why, host, port)
    elif launcher == "slurm":
        dist_env = _from_slurm(environ, why, host, port, resolves)
    elif launcher == "single":
        threads = environ.get("OMP_NUM_THREADS", "")
        dist_env = DistEnv(
            rank=0,
            world_size=1,
            local_rank=0,
            local_world_size=1,
            hostname=_hostname(environ),
            launcher="single",
            why=why,
            master_host="localhost",
            master_port=port or 0,
            idle_tasks=idle_tasks,
            cpu_threads=int(threads) if threads.isdecimal() else None,
        )
    else:
        raise MeshError(f"launcher {launcher!r}: expected auto, torch, mpi, slurm or single")
    _check(dist_env, environ)
    return dist_env


def _recognise(environ: Environ) -> tuple[Launcher, str]:
    inside = f", inside Slurm task {environ['SLURM_PROCID']}" if "SLURM_PROCID" in environ else ""
    if "TORCHELASTIC_RUN_ID" in environ:
        return "torch", f"started by torchrun: TORCHELASTIC_RUN_ID is set{inside}"
    if "RANK" in environ:
        return "torch", f"RANK={environ['RANK']} is set{inside}"
    if (names := _mpi_names(environ)).local_rank in environ:
        return "mpi", f"started by mpirun: {names.rank}={environ.get(names.rank)} is set{inside}"
    if "SLURM_PROCID" in environ and not _is_shell(environ):
        return "slurm", f"a task of srun: SLURM_PROCID={environ['SLURM_PROCID']} is set"
    if "SLURM_JOB_ID" in environ:
        shell = "a batch script or interactive shell" if "SLURM_PROCID" in environ else "a shell"
        inside = f"{shell} inside Slurm job {environ['SLURM_JOB_ID']} of {environ.get('SLURM_NTASKS', '1')} tasks"
        return "single", f"{inside}, not a task of srun; to use the whole job: srun python train.py"
    if environ.get("WORLD_SIZE", "1") != "1":
        return "torch", f"WORLD_SIZE={environ['WORLD_SIZE']} is set"
    if environ.get(_HYDRA.world_size, "1") != "1":
        return "mpi", f"{_HYDRA.world_size}={environ[_HYDRA.world_size]} is set"
    return "single", "no variable of torchrun, mpirun or Slurm is set"


def _mpi_names(environ: Environ) -> _MpiNames:
    return _OPEN_MPI if _OPEN_MPI.rank in environ else _HYDRA


def _is_shell(environ: Environ) -> bool:
    """Whether this is a batch script or interactive step: one process, although task variables are set."""
    step = environ.get("SLURM_STEP_ID")
    reserved = 0xFFFFFFF0  # step ids of batch, extern and interactive steps start here
    if step is None:
        return environ.get("ENVIRONMENT") == "BATCH"
    return step.isdecimal() and int(step) >= reserved


def _from_torch(environ: Environ, why: str, host: str | None, port: int | None) -> DistEnv:
    needed = ["RANK", "WORLD_SIZE", "LOCAL_RANK"]
    needed += ["MASTER_ADDR"] if host is None else []
    needed += ["MASTER_PORT"] if port is None else []
    _require(environ, needed, "torchrun sets them all; or pass --launcher single for one process")
    world_size = _number(environ, "WORLD_SIZE")
    if "LOCAL_WORLD_SIZE" not in environ:
        why += "; LOCAL_WORLD_SIZE is not set: all ranks are taken to be on this host"
    agent_store = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if agent_store and not (host is None and port is None):
        raise MeshError(
            "found --host or --port, but torchrun's agent serves the ranks' store; give torchrun --master-addr and "
            "--master-port instead"
        )
    local_world_size = _number(environ, "LOCAL_WORLD_SIZE", world_size)
    threads = environ.get("OMP_NUM_THREADS")
    # torchrun sets OMP_NUM_THREADS=1 for several processes, so that value is not the user's choice
    by_torchrun = threads == "1" and "TORCHELASTIC_RUN_ID" in environ and local_world_size > 1
    return DistEnv(
        rank=_number(environ, "RANK"),
        world_size=world_size,
        local_rank=_number(environ, "LOCAL_RANK"),
        local_world_size=local_world_size,
        hostname=_hostname(environ),
        launcher="torch",
        why=why,
        master_host=host or environ["MASTER_ADDR"],
        master_port=_number(environ, "MASTER_PORT") if port is None else port,
        attempt=_number(environ, "TORCHELASTIC_RESTART_COUNT", 0),
        supervised="TORCHELASTIC_RUN_ID" in environ,
        agent_store=agent_store,
        agent=_agent(environ),
        error_file=error_file(environ),
        cpu_threads=None if threads is None or by_torchrun else _number(environ, "OMP_NUM_THREADS"),
    )


def error_file(environ: Environ) -> Path | None:
    """The file from which torchrun's agent reads why this process failed; None: no agent."""
    file = environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(file) if file else None


def _agent(environ: Environ) -> str:
    """The file is AGENT/attempt_0/RANK/error.json; AGENT stays the same through all restarts."""
    agent, attempt, _ = environ.get("TORCHELASTIC_ERROR_FILE", "").rpartition("/attempt_")
    return agent if attempt else ""


def _from_mpi(environ: Environ, why: str, host: str | None, port: int | None) -> DistEnv:
    names = _mpi_names(environ)
    _require(environ, [*vars(names).values()], "mpirun sets them all; or start with torchrun or srun")
    world_size, local_world_size = _number(environ, names.world_size), _number(environ, names.local_world_size)
    host = host or environ.get("MASTER_ADDR") or ("localhost" if local_world_size >= world_size else None)
    if host is None:
        raise MeshError(
            f"mpirun: found {local_world_size} of {world_size} ranks on host {_hostname(environ)} and no address of "
            "rank 0: pass --host with one of its host, or set MASTER_ADDR for all ranks"
        )
    job = environ.get("PMIX_NAMESPACE", "")  # of Open MPI, the same on all hosts
    return DistEnv(
        rank=_number(environ, names.rank),
        world_size=world_size,
        local_rank=_number(environ, names.local_rank),
        local_world_size=local_world_size,
        hostname=_hostname(environ),
        launcher="mpi",
        why=why,
        master_host=host,
        master_port=port or _number(environ, "MASTER_PORT", FIRST_PORT + zlib.crc32(job.encode()) % N_PORTS),
        cpu_threads=_number(environ, "OMP_NUM_THREADS") if "OMP_NUM_THREADS" in environ else None,
    )


def check_options(dist_env: DistEnv, **given: int | None) -> None:
    """Raises MeshError if an option that older launchers pass, such as `local_rank`, contradicts the environment."""
    for name, value in given.items():
        found = getattr(dist_env, name)
        if value is not None and value != found:
            raise MeshError(
                f"found --{name} {value}, but this process has {name.replace('_', ' ')} {found} ({dist_env.why}): "
                "leave the option out, and start all ranks by one launcher: torchrun, srun, mpirun, or RANK, "
                "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set by hand"
            )


def _from_slurm(
    environ: Environ, why: str, host: str | None, port: int | None, resolves: Callable[[str], bool]
) -> DistEnv:
    _require(
        environ,
        ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"],
        "srun sets them for each of its tasks; start with srun, or pass --launcher single for one process",
    )
    components = environ.get("SLURM_HET_SIZE") or environ.get("SLURM_PACK_SIZE") or "1"
    if components != "1":
        raise MeshError(
            f"found a heterogeneous Slurm job of {components} components (SLURM_HET_SIZE), expected one: "
            "ask for equal nodes, without ':' and #SBATCH hetjob, or start the ranks with torchrun"
        )
    if _is_shell(environ) and _number(environ, "SLURM_NTASKS") > 1:
        raise MeshError(
            f"Slurm: found a batch script or interactive shell, expected one of the {environ['SLURM_NTASKS']} tasks of "
            "srun: say srun python train.py, or pass --launcher single for one process"
        )
    nodes_text = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if not nodes_text:
        raise MeshError("Slurm: SLURM_STEP_NODELIST and SLURM_JOB_NODELIST are not set; start with srun")
    nodes = expand_node_list(nodes_text)
    world_size = _number(environ, "SLURM_NTASKS")
    threads = [name for name in ("SLURM_CPUS_PER_TASK", "OMP_NUM_THREADS") if name in environ]
    if host is None:
        host, why = _rendezvous_host(environ, nodes[0], why, resolves)
    step = environ.get("SLURM_STEP_ID", "0")
    job = environ.get("SLURM_JOB_ID", "0")
    return DistEnv(
        rank=_number(environ, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_number(environ, "SLURM_LOCALID"),
        local_world_size=_slurm_local_tasks(environ, nodes, world_size),
        hostname=_hostname(environ),
        launcher="slurm",
        why=why,
        master_host=host,
        # two steps of one job may share their first node, hence the step
        master_port=port or FIRST_PORT + zlib.crc32(f"{job}.{step}".encode()) % N_PORTS,
        attempt=_number(environ, "SLURM_RESTART_COUNT", 0),
        agent=f"slurm {job}.{step}",
        cpu_threads=_number(environ, threads[0]) if threads else None,
    )


def _rendezvous_host(environ: Environ, first: str, why: str, resolves: Callable[[str], bool]) -> tuple[str, str]:
    """The first node, where rank 0 runs; its launch address if node names cannot be resolved."""
    if resolves(first):
        return first, why
    address = environ.get("SLURM_LAUNCH_NODE_IPADDR")
    if not address:
        raise MeshError(
            f"Slurm: the first node {first!r} has no address on host {_hostname(environ)} and SLURM_LAUNCH_NODE_IPADDR "
            "is not set; pass --host with an address of that node"
        )
    return address, f"{why}; node name {first} does not resolve: meeting at SLURM_LAUNCH_NODE_IPADDR {address}"


def _slurm_local_tasks(environ: Environ, nodes: list[str], world_size: int) -> int:
    """Tasks on this node, from the first variable that agrees with the step; those of the allocation may not."""
    node = _number(environ, "SLURM_NODEID", nodes.index(_hostname(environ)) if _hostname(environ) in nodes else 0)
    tried: dict[str, list[int]] = {}
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        if name in environ:
            tried[name] = expand_task_counts(environ[name])
    if "SLURM_NTASKS_PER_NODE" in environ:
        tried["SLURM_NTASKS_PER_NODE"] = [_number(environ, "SLURM_NTASKS_PER_NODE")] * len(nodes)
    for counts in tried.values():
        if sum(counts) == world_size and len(counts) == len(nodes) and node < len(nodes):
            return counts[node]
    if not tried and world_size % len(nodes) == 0:
        return world_size // len(nodes)
    seen = [f"{name}={environ[name]}" for name in tried]
    raise MeshError(
        f"Slurm: the number of tasks on node {node} of {len(nodes)} is unclear: SLURM_NTASKS={world_size} but "
        f"{', '.join(seen) or 'no SLURM_TASKS_PER_NODE'} (nodes {','.join(nodes[:4])}{',...' if nodes[4:] else ''}); "
        "start with srun and give -N, -n and --ntasks-per-node that agree"
    )


def _hostname(environ: Environ) -> str:
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def _require(environ: Environ, names: list[str], advice: str) -> None:
    missing = [name for name in names if not environ.get(name)]
    if missing:
        found = ", ".join(f"{name}={environ[name]}" for name in names if environ.get(name)) or "none of them"
        raise MeshError(f"not set: {', '.join(missing)} (found {found}): {advice}")


def _number(environ: Environ, name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if not text and default is not None:
        return default
    if text is None or not text.isdecimal():
        raise MeshError(f"{name}={text!r}: expected a number >= 0")
    return int(text)


def _check(dist_env: DistEnv, environ: Environ) -> None:
    if not (
        dist_env.rank < dist_env.world_size and dist_env.local_rank < dist_env.local_world_size <= dist_env.world_size
    ):
        names = {
            "torch": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
            "mpi": tuple(vars(_mpi_names(environ)).values()),
            "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "tasks on this node (SLURM_TASKS_PER_NODE)"),
            "single": ("rank", "world size", "local rank", "local world size"),
        }[dist_env.launcher]
        values = (dist_env.rank, dist_env.world_size, dist_env.local_rank, dist_env.local_world_size)
        raise MeshError(
            f"found {', '.join(f'{name}={value}' for name, value in zip(names, values, strict=True))}: expected "
            f"{names[0]} < {names[1]} and {names[2]} < {names[3]} <= {names[1]}; start all processes by one launcher"
        )
    if dist_env.world_size > 1 and not 1 <= dist_env.master_port < 65_536:
        raise MeshError(f"master port {dist_env.master_port}: expected 1 to 65535; give another --port or MASTER_PORT")
