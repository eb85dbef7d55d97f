"""Hosts for tests: network namespaces with a host name and an address each, connected by one link that can be cut.

    with NetLab() as lab:
        lab.start(0, "python", "-c", "...", log=path)
        lab.link(1, up=False)

Two hosts on a pair of virtual interfaces called eth0, isolated from all other networks. `close` ends the processes
that were started, by their ids, and deletes the namespaces and with them the link.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

_INSIDE = 'hostname "$1"; shift; exec "$@"'
_END_SECONDS = 20.0


def missing_parts() -> str | None:
    """One line naming the missing requirements; None if hosts can be made."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [program for program in ("ip", "unshare", "hostname") if shutil.which(program) is None]
    if missing:
        return f"no {', '.join(missing)}: apt-get install iproute2 util-linux hostname"
    probe = ["unshare", "--net", "--uts", "true"]
    done = subprocess.run(probe, capture_output=True, text=True, timeout=20, check=False)
    return f"network namespaces are not allowed here: {done.stderr.strip()}" if done.returncode else None


class NetLab:
    """Hosts 0 and 1. Use as a context manager."""

    def __init__(self) -> None:
        self.names = [f"lab{os.getpid()}n{number}" for number in range(2)]
        self.addresses = ["10.77.0.1", "10.77.0.2"]
        self.started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> NetLab:
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _make(self) -> None:
        for name in self.names:
            _ip("netns", "add", name)
            # `ip netns exec` mounts these over /etc: names resolve without a name server
            own = Path("/etc/netns") / name
            own.mkdir(parents=True)
            (own / "resolv.conf").touch()
            hosts = [f"{address} {host}" for host, address in zip(self.names, self.addresses, strict=True)]
            (own / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts]) + "\n")
        ends = ["netns", self.names[0], "type", "veth", "peer", "name", "eth0", "netns", self.names[1]]
        _ip("link", "add", "eth0", *ends)
        for name, address in zip(self.names, self.addresses, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            for interface in ("lo", "eth0"):
                _ip("-n", name, "link", "set", interface, "up")

    def link(self, host: int, up: bool) -> None:
        """Switch one end of the link on or off; if it is off, the other end has no carrier."""
        _ip("-n", self.names[host], "link", "set", "eth0", "up" if up else "down")

    def start(self, host: int, *command: str, log: Path, folder: Path, **environment: str) -> subprocess.Popen[bytes]:
        """Start a process on a host, in a session of its own, so that `close` finds its children."""
        inside = ["ip", "netns", "exec", self.names[host], "unshare", "--uts", "bash", "-c", _INSIDE, "_"]
        with open(log, "ab") as out:
            process = subprocess.Popen(
                [*inside, self.names[host], *command],
                cwd=folder,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def processes(self, *hosts: int) -> dict[int, str]:
        """Process id -> command line, on these hosts; without arguments on all."""
        names = [self.names[host] for host in hosts] or self.names
        found = {}
        for text in [_ip("netns", "pids", name) for name in names if Path("/run/netns", name).exists()]:
            for pid in text.split():
                with contextlib.suppress(OSError):  # it has ended meanwhile
                    found[int(pid)] = Path("/proc", pid, "cmdline").read_text().replace("\0", " ").strip()
        return found

    def kill(self, *hosts: int) -> None:
        """Kill all processes on these hosts, or on all hosts, and wait for their end."""
        deadline = time.monotonic() + _END_SECONDS
        while (left := self.processes(*hosts)) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for process in self.started:
                process.poll()  # reaps ended processes
            time.sleep(0.05)

    def close(self) -> None:
        self.kill()
        for process in self.started:
            process.wait(_END_SECONDS)
        for name in self.names:
            if Path("/run/netns", name).exists():
                _ip("netns", "delete", name)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)
        with contextlib.suppress(OSError):
            Path("/etc/netns").rmdir()  # fails if it has other entries


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
    return done.stdout
