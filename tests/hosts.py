"""Two hosts made of network namespaces, with a cable between them: what two machines are to a process group."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

NETWORK = "10.77.0"
"""Of the addresses: host n has number n + 1. Both are in namespaces of their own, where none can be in use."""

PORT = 29500


def ip(*arguments: object) -> None:
    """Run ``ip``; raise CalledProcessError, with what it said, if it fails."""
    subprocess.run(["ip", *map(str, arguments)], check=True, capture_output=True, text=True, timeout=60)


class Hosts:
    """Two hosts. As a context it ends what runs on them and takes them away.

    Raises:
        OSError: there is no ``ip``.
        CalledProcessError: this process must not make namespaces or links.
    """

    def __init__(self) -> None:
        self.names = [f"sparsekern-{os.getpid()}-{number}" for number in (0, 1)]
        self._started: list[subprocess.Popen[bytes]] = []
        try:
            for name in self.names:
                ip("netns", "add", name)
            ip("link", "add", "cable", "netns", self.names[0], "type", "veth", "peer", "cable", "netns", self.names[1])
            for number, name in enumerate(self.names):
                ip("-n", name, "addr", "add", f"{NETWORK}.{number + 1}/24", "dev", "cable")
                ip("-n", name, "link", "set", "lo", "up")
                ip("-n", name, "link", "set", "cable", "up")
                # else torchrun waits a quarter of an hour for a store whose host has vanished
                ip("netns", "exec", name, "sysctl", "-q", "-w", "net.ipv4.tcp_retries2=5")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def torchrun(self, host: int, arguments: Sequence[str], log: Path, ranks: int = 1) -> subprocess.Popen[bytes]:
        """Start ``sparsekern`` under torchrun on a host; what both say goes to ``log``."""
        launcher = ["torch.distributed.run", "--nnodes=2", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d"]
        # by its own name a host would be found, but these have the name of the machine
        launcher += [f"--rdzv-endpoint={NETWORK}.1:{PORT}", f"--rdzv-conf=is_host={1 - host}"]
        launcher += [f"--local-addr={NETWORK}.{host + 1}", "-m", "sparsekern"]
        with log.open("wb") as file:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.names[host], sys.executable, "-m", *launcher, *arguments],
                env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable"},
                stdout=file,
                stderr=file,
            )
        self._started.append(process)
        return process

    def vanish(self, host: int) -> None:
        """Cut a host off: no packet leaves it, not even those that say that its processes, killed now, have ended."""
        ip("-n", self.names[host], "link", "set", "cable", "down")
        self.kill(host)

    def come_back(self, host: int) -> None:
        """Plug the cable in again."""
        ip("-n", self.names[host], "link", "set", "cable", "up")

    def processes(self, host: int) -> list[int]:
        """Return the numbers of the processes on a host, torchrun's first."""
        listed = ["ip", "netns", "pids", self.names[host]]
        found = subprocess.run(listed, capture_output=True, text=True, check=True, timeout=60).stdout
        return sorted(map(int, found.split()))

    def kill(self, host: int) -> None:
        """Kill all processes on a host."""
        for number in self.processes(host):
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)

    def close(self) -> None:
        """End all processes on the hosts and take the hosts away."""
        for host, name in enumerate(self.names):
            if Path("/run/netns", name).exists():
                self.kill(host)
                ip("netns", "del", name)
        for process in self._started:
            process.wait()


def hosts_or_reason() -> tuple[Hosts | None, str]:
    """Return two hosts, or None and why there can be none."""
    try:
        return Hosts(), ""
    except OSError as error:
        return None, f"no network namespaces: {error}"
    except subprocess.CalledProcessError as error:
        return None, f"no network namespaces: {error.stderr.strip()}"
