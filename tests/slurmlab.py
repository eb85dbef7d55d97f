"""A real Slurm for tests: munged, slurmctld and one slurmd per node, on this machine, without systemd.

    with SlurmLab(2, cpus=4) as lab:
        lab.run("srun", "-N", "2", "hostname")

All daemons listen on 127.0.0.1 only and keep key, sockets, state and logs in one folder. The nodes are slurmds of
Debian's build, which allows several per host; their names do not resolve, as on some clusters. The daemons are child
processes, ended by their ids; remaining processes of jobs are found by SLURM_CONF, and killed and returned by `close`.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.installing import advice, install
from tests.ports import free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scancel", "scontrol", "squeue", "sinfo")
PACKAGES = ("slurm-wlm", "munge")
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"  # on Debian only root has sbin in PATH
_START_SECONDS, _END_SECONDS = 60.0, 30.0


def missing_parts() -> str | None:
    """One line naming missing programs; None if the lab can be started. Installs them first if that is allowed."""
    if missing := _missing():
        install(*PACKAGES)
        missing = _missing()
    return f"no {', '.join(missing)}: {advice(*PACKAGES)}" if missing else None


def _missing() -> list[str]:
    return [program for program in PROGRAMS if shutil.which(program, path=_PATH) is None]


class SlurmLab:
    """A cluster `lab` with one partition `main` of `node1` to `node<nodes>`."""

    def __init__(self, nodes: int = 2, cpus: int = 64) -> None:
        """Each node has `cpus` cores and 8 GPUs for Slurm, so that batch files of real clusters pass its checks."""
        self.nodes, self.cpus, self.user = nodes, cpus, pwd.getpwuid(os.geteuid()).pw_name
        self.folder = Path(tempfile.mkdtemp(prefix="slurmlab-"))  # short: socket paths have at most 108 bytes
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.ports = free_ports(1 + nodes)
        self.environment = {**os.environ, "PATH": _PATH, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> SlurmLab:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        left = self.close()
        assert not left, f"jobs left processes behind: {left}"

    def _start(self) -> None:
        self.folder.chmod(0o755)
        for name in ("state", "spool", "log"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        self._write_configs()
        self._daemon(
            "munged",
            ["munged", "--foreground", "--force", f"--socket={self.folder / 'munge.socket'}", f"--key-file={key}",
             f"--pid-file={self.folder / 'munged.pid'}", f"--log-file={self.folder / 'log' / 'munged'}",
             f"--seed-file={self.folder / 'munge.seed'}", "--origin=127.0.0.1"],
        )  # fmt: skip
        self._await("munged's socket", (self.folder / "munge.socket").exists)
        self._daemon("slurmctld", ["slurmctld", "-D", "-i"])
        for node in self.names:
            self.start_node(node)
        self._await("idle nodes", lambda: self.states().count("idle") == self.nodes)

    @property
    def names(self) -> list[str]:
        return [f"node{number + 1}" for number in range(self.nodes)]

    def start_node(self, node: str) -> None:
        self._daemon(node, ["slurmd", "-D", "-N", node])

    def _daemon(self, name: str, command: list[str]) -> None:
        with open(self.folder / "log" / f"{name}.out", "ab") as log:
            self.daemons[name] = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self.environment, cwd=self.folder
            )

    def _write_configs(self) -> None:
        host, user, folder = socket.gethostname().partition(".")[0], self.user, self.folder
        # Daemons can only be bound to the address of the host's name. If it is no loopback, only munge protects them.
        narrow = "NoCtldInAddrAny,NoInAddrAny" if _address(host) == "127.0.0.1" else ""
        lines = f"""
            ClusterName=lab
            SlurmctldHost={host}(127.0.0.1)
            SlurmUser={user}
            SlurmdUser={user}
            {f"CommunicationParameters={narrow}" if narrow else ""}
            AuthType=auth/munge
            AuthInfo=socket={folder}/munge.socket
            CredType=cred/munge
            SlurmctldPort={self.ports[0]}
            StateSaveLocation={folder}/state
            SlurmdSpoolDir={folder}/spool/%n
            SlurmctldPidFile={folder}/slurmctld.pid
            SlurmdPidFile={folder}/%n.pid
            SlurmctldLogFile={folder}/log/slurmctld
            SlurmdLogFile={folder}/log/%n
            ProctrackType=proctrack/linuxproc
            TaskPlugin=task/none
            SwitchType=switch/none
            MpiDefault=none
            GresTypes=gpu
            SelectType=select/cons_tres
            SelectTypeParameters=CR_Core
            SchedulerType=sched/backfill
            SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,requeue_delay=1
            SlurmdParameters=config_overrides
            ReturnToService=2
            SlurmctldTimeout=10
            SlurmdTimeout=10
            KillWait=10
            InactiveLimit=0
            JobRequeue=1
            AccountingStorageType=accounting_storage/none
            JobAcctGatherType=jobacct_gather/none
        """.replace("            ", "").splitlines()
        shape = f"CPUs={self.cpus} Sockets=1 CoresPerSocket={self.cpus} ThreadsPerCore=1 RealMemory=2000 Gres=gpu:8"
        lines += [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} {shape} State=UNKNOWN"
            for node, port in zip(self.names, self.ports[1:], strict=True)
        ]
        lines.append(f"PartitionName=main Nodes={','.join(self.names)} Default=YES MaxTime=INFINITE State=UP")
        (folder / "slurm.conf").write_text("\n".join(lines).strip() + "\n")
        for number in range(8):
            (folder / f"gpu{number}").touch()  # in place of a device file
        (folder / "gres.conf").write_text(f"NodeName={','.join(self.names)} Name=gpu File={folder}/gpu[0-7]\n")
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")

    def run(self, *command: str, folder: Path | None = None, timeout_seconds: float = 120, **environment: str):
        """Run a command to its end, with this cluster's SLURM_CONF."""
        return subprocess.run(
            command, cwd=folder or self.folder, env={**self.environment, **environment}, capture_output=True, text=True,
            timeout=timeout_seconds, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def start(self, *command: str, folder: Path, log: Path, **environment: str) -> subprocess.Popen[bytes]:
        with open(log, "ab") as out:
            return subprocess.Popen(
                command, cwd=folder, env={**self.environment, **environment}, stdout=out, stderr=out,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip

    def states(self) -> list[str]:
        """States of the nodes."""
        return self.run("sinfo", "-h", "-N", "-o", "%t").stdout.split()

    def job(self, number: int | str) -> dict[str, str]:
        """Fields of `scontrol show job`, such as JobState and Restarts; empty once Slurm has purged the job."""
        shown = self.run("scontrol", "show", "job", str(number)).stdout
        return dict(word.partition("=")[::2] for word in shown.split() if "=" in word)

    def submit(self, *arguments: str, folder: Path) -> str:
        """Run `sbatch ARGUMENTS`; returns the job's id."""
        done = self.run("sbatch", "--parsable", *arguments, folder=folder)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def start_now(self, job: str) -> None:
        """Start a requeued job: Slurm would delay it by two minutes for its processes to end; this waits for them.

        A node refuses a job in the second in which its last start was revoked, hence the start in two seconds.
        """
        self.await_state(job, "PENDING")
        self.until_quiet()
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now+2")

    def await_end(self, job: str, timeout_seconds: float = 120) -> dict[str, str]:
        """Wait until the job has ended; returns its last record."""
        return self.await_state(job, "COMPLETED FAILED CANCELLED TIMEOUT NODE_FAIL", timeout_seconds)

    def await_state(self, job: str, states: str, timeout_seconds: float = 60) -> dict[str, str]:
        """Wait until the job's state is one of `states`; returns its record."""
        self._await(f"job {job}: {states}", lambda: self.job(job).get("JobState") in states.split(), timeout_seconds)
        return self.job(job)

    def _await(self, what: str, there, timeout_seconds: float = _START_SECONDS) -> None:
        deadline = time.monotonic() + timeout_seconds
        while not there():
            ended = {name: daemon.returncode for name, daemon in self.daemons.items() if daemon.poll() is not None}
            if time.monotonic() > deadline or ended:
                raise RuntimeError(f"no {what} after {timeout_seconds:g} s; daemons ended: {ended}\n{self.logs()}")
            time.sleep(0.1)

    def logs(self) -> str:
        files = sorted((self.folder / "log").iterdir())
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-1500:]}" for file in files)

    def processes(self) -> dict[int, str]:
        """Process id -> command line of processes with this SLURM_CONF except daemons: clients, step daemons, tasks."""
        mark, own = f"SLURM_CONF={self.folder}/".encode(), {daemon.pid for daemon in self.daemons.values()}
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal() or int(entry.name) in own:
                continue
            with contextlib.suppress(OSError):  # it has ended meanwhile
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                helper = "slurmscriptd" in command  # a helper of slurmctld
                if mark in (entry / "environ").read_bytes() and _state(entry) != "Z" and not helper:
                    found[int(entry.name)] = command
        return found

    def until_quiet(self) -> dict[int, str]:
        """Wait up to half a minute for the processes of jobs to end; returns those that remain."""
        deadline = time.monotonic() + _END_SECONDS
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left

    def close(self) -> dict[int, str]:
        """End all jobs, then the daemons, and remove the folder; returns the processes that had to be killed."""
        if "slurmctld" in self.daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.run("scancel", "--user", self.user, timeout_seconds=15)
        left = self.until_quiet()
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for name in reversed(self.daemons):
            _end(self.daemons[name])
        self.daemons.clear()
        shutil.rmtree(self.folder, ignore_errors=True)
        return left


def _address(host: str) -> str | None:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return None


def _state(process: Path) -> str:
    return (process / "stat").read_text().rpartition(")")[2].split()[0]


def _end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmLab]:
    """One cluster per session; no process may remain at its end. PATH starts with the running Python."""
    if missing := missing_parts():
        pytest.skip(missing)
    with SlurmLab() as lab:
        lab.environment |= {"PATH": f"{Path(sys.executable).parent}:{lab.environment['PATH']}", "OMP_NUM_THREADS": "1"}
        yield lab
