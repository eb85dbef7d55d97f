"""Two hosts on one machine for tests: network namespaces with a name, an address and a link of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path


def missing_parts() -> str | None:
    """One line naming what is not there; None if hosts can be made. iproute2 is installed where that is possible."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None and shutil.which("apt-get") is not None:
        install = "apt-get update -qq && apt-get install -y -qq --no-install-recommends iproute2"
        subprocess.run(["sh", "-c", install], check=False, capture_output=True)
    if shutil.which("ip") is None:
        return "ip is not installed: apt-get install iproute2"
    tried = subprocess.run(["unshare", "--net", "--uts", "true"], check=False, capture_output=True, text=True)
    return None if tried.returncode == 0 else f"no network namespaces here: {tried.stderr.strip()}"


class Hosts:
    """`count` hosts on a bridge, numbered from 1; between `with` and its end."""

    def __init__(self, count: int) -> None:
        number = os.getpid() % 100_000
        self._bridge = f"ilb{number}"
        self.names = [f"ilh{number}-{host}" for host in range(1, count + 1)]
        self._links = [f"ilv{number}-{host}" for host in range(1, count + 1)]
        self._net = f"10.{77 + number % 100}.{number % 250}"

    def address(self, host: int) -> str:
        return f"{self._net}.{host}"

    def __enter__(self) -> Hosts:
        try:
            _ip("link", "add", self._bridge, "type", "bridge")
            _ip("link", "set", self._bridge, "up")
            known = [f"{self.address(host)} {name}" for host, name in enumerate(self.names, 1)]
            for host, (name, link) in enumerate(zip(self.names, self._links, strict=True), 1):
                # Without names of its own a host asks a name server that no one can reach, and waits.
                files = Path("/etc/netns") / name
                files.mkdir(parents=True)
                (files / "resolv.conf").write_text("")
                (files / "hosts").write_text("\n".join(["127.0.0.1 localhost", *known, ""]))
                _ip("netns", "add", name)
                _ip("-n", name, "link", "set", "lo", "up")
                _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
                _ip("link", "set", link, "master", self._bridge, "up")
                _ip("-n", name, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
                _ip("-n", name, "link", "set", "eth0", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name, link in zip(self.names, self._links, strict=True):
            with suppress(subprocess.CalledProcessError):
                _ip("link", "del", link)  # a namespace lives on, with its end of it, while a lost connection lingers
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "del", name)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)
        with suppress(subprocess.CalledProcessError):
            _ip("link", "del", self._bridge)
        with suppress(OSError):
            Path("/etc/netns").rmdir()

    def cut(self, host: int) -> None:
        """Its link goes down: packets are lost without a word."""
        _ip("link", "set", self._links[host - 1], "down")

    def start(
        self, host: int, command: Sequence[str], folder: Path, log: Path, environ: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        """`command` on a host, in a process group of its own."""
        name = self.names[host - 1]
        here = ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', name]
        variables = {**os.environ, **environ, "GLOO_SOCKET_IFNAME": "eth0", "TP_SOCKET_IFNAME": "eth0"}
        with log.open("wb") as output:
            return subprocess.Popen(
                [*here, *command], cwd=folder, stdout=output, stderr=output, env=variables, start_new_session=True
            )


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
