"""A slow network on one machine: a network namespace for each rank, joined by a bridge, each port rate-limited.

    zpXrank0 --eth0(tbf)--\\
    zpXrank1 --eth0(tbf)---  bridge in zpXswitch        X: this process's id
    zpXrank2 --eth0(tbf)--/

Only traffic between these namespaces is shaped; nothing of the machine's own network is touched. Everything is
removed on the way out, also after an error.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

INTERFACE = "eth0"
BURST = "256kb"  # what a port may send at once; at 1 Gbit/s 2 ms worth


class NotAllowedError(Exception):
    """This machine does not let us make network namespaces, or shape their traffic."""


@dataclass(frozen=True)
class Network:
    """Where rank r lives: run its command with ``prefix(r)`` in front; rank 0 listens at ``address``."""

    names: tuple[str, ...]
    address: str = "10.77.0.1"

    def prefix(self, rank: int) -> list[str]:
        return ["ip", "netns", "exec", self.names[rank]]


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotAllowedError(f"{command[0]}: {error}") from error
    if done.returncode:
        raise NotAllowedError(f"{' '.join(command[:4])}...: {done.stderr.strip() or done.returncode}")


@contextmanager
def network(ranks: int, rate: str) -> Iterator[Network]:
    """``rate``: what each rank may send, in tc's words, e.g. ``100mbit``. Raises NotAllowedError."""
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise NotAllowedError(f"there is no command {tool!r} (package iproute2)")
    mark = f"zp{os.getpid()}"
    switch, names = f"{mark}switch", tuple(f"{mark}rank{rank}" for rank in range(ranks))
    made: list[str] = []
    try:
        for name in (switch, *names):
            _run("ip", "netns", "add", name)
            made.append(name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        _run("ip", "-n", switch, "link", "add", "bridge0", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge0", "up")
        for rank, name in enumerate(names):
            port = f"port{rank}"
            _run(
                *("ip", "-n", switch, "link", "add", port, "type", "veth"),
                *("peer", "name", INTERFACE, "netns", name),
            )
            _run("ip", "-n", switch, "link", "set", port, "master", "bridge0")
            _run("ip", "-n", switch, "link", "set", port, "up")
            _run("ip", "-n", name, "addr", "add", f"10.77.0.{rank + 1}/24", "dev", INTERFACE)
            _run("ip", "-n", name, "link", "set", INTERFACE, "up")
            _run(
                *("tc", "-n", name, "qdisc", "add", "dev", INTERFACE, "root"),
                *("tbf", "rate", rate, "burst", BURST, "latency", "400ms"),
            )
        yield Network(names)
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=20)
