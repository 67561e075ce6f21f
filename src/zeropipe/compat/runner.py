"""The ``deepspeed`` command: turns its flags into torchrun's and becomes torchrun; it starts nothing of its own."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from zeropipe.compat.hosts import Slots, choose, parse_hostfile
from zeropipe.errors import ConfigError, ZeropipeError, describe

# A file of NAME=VALUE lines, in the current folder or at home, for launches on several nodes.
DEEPSPEED_ENVIRONMENT_NAME: Final = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
DEFAULT_HOSTFILE: Final = "/job/hostfile"
DEFAULT_PORT: Final = 29500
# Flags that are taken and do nothing -> why.
_IDLE: Final = {
    "save_pid": "the process keeps its number when it becomes torchrun",
    "no_ssh_check": "no ssh is used",
    "ssh_port": "no ssh is used",
    "venv_script": "activate the environment before you start",
    "launcher_args": "torchrun is the only launcher",
}


@dataclass(frozen=True, slots=True)
class Launch:
    """What to become: torchrun's arguments, what to add to the environment, the cores to keep to (empty: all)."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    cores: tuple[int, ...] = ()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deepspeed",
        allow_abbrev=False,  # or an argument of the script could be taken for a short form
        description="Start a training script with torchrun (the command of zeropipe's alias).",
    )
    add = parser.add_argument
    add("-H", "--hostfile", default=DEFAULT_HOSTFILE, help="lines 'host slots=N'")
    add("-i", "--include", default="", help="hosts and slots to use, such as worker-0@worker-1:0,2")
    add("-e", "--exclude", default="", help="hosts and slots to leave out")
    add("--num_nodes", type=int, help="use this many hosts of the hostfile")
    add("--num_gpus", "--num_accelerators", type=int, help="processes per node; on a CPU any number")
    add("--master_port", type=int, help=f"default {DEFAULT_PORT} on several nodes, a free port on one")
    add("--master_addr", default="", help="default: the first host")
    add("--node_rank", type=int, help="which of the nodes this is")
    add("--no_ssh", action="store_true", help="this command is started on every node")
    add("--force_multi", action="store_true", help="treat one host as one of several nodes")
    add("--module", action="store_true", help="the script is a module")
    add("--no_python", action="store_true", help="the script is an executable")
    add("--no_local_rank", action="store_true", help="do not pass --local_rank=N to the script")
    add("--enable_each_rank_log", metavar="FOLDER", help="write what each rank prints into files there")
    add("--bind_cores_to_rank", action="store_true", help="divide the cores among the ranks")
    add("--bind_core_list", default="", help="cores to use, such as 0-3,8")
    add("--launcher", default="", help="for several nodes: only torchrun, started on every node")
    add("--launcher_args", default="", help="has no effect")
    add("--autotuning", default="", help="not offered")
    add("--save_pid", action="store_true", help="has no effect")
    add("--no_ssh_check", action="store_true", help="has no effect")
    add("--ssh_port", type=int, help="has no effect")
    add("--venv_script", help="has no effect")
    add("--log_level", default="info", help="has no effect")
    add("-q", "--quiet", action="store_true", help="do not name flags without effect")
    add("user_script", help="the training script")
    add("user_args", nargs=argparse.REMAINDER, help="its arguments")
    return parser


def parse_cores(text: str) -> tuple[int, ...]:
    """``0-3,8`` as numbers. Raises ConfigError for another form."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        low, dash, high = part.partition("-")
        if not low.isdecimal() or (dash and not (high.isdecimal() and int(high) >= int(low))):
            raise ConfigError(
                "--bind_core_list", expected="numbers and ranges", found=repr(text), fix="0-3,8"
            )
        found.update(range(int(low), int(high if dash else low) + 1))
    return tuple(sorted(found))


def plan(options: argparse.Namespace, hosts: Slots | None, devices: int, cores: Sequence[int]) -> Launch:
    """The launch that ``options`` ask for, on this node.

    ``hosts``: what a hostfile says, None without one. ``devices``: GPUs of this node, 0 where it computes on the
    CPU. ``cores``: those that this process may use. Raises ConfigError for flags that cannot be followed.
    """
    if options.autotuning:
        raise ConfigError("--autotuning is not part of zeropipe", fix="start the script without it")
    if options.module and options.no_python:
        raise ConfigError("--module and --no_python exclude each other", fix="give one of them")
    chosen = choose(
        _pool(options, hosts, devices), options.include, options.exclude, options.num_nodes, options.num_gpus
    )
    names = list(chosen)
    several = len(names) > 1 or options.force_multi
    if several and not options.no_ssh:
        raise ConfigError(_on_every_node(options, chosen))
    rank = _node_rank(options, names) if several else 0
    slots = chosen[names[rank]]
    arguments = [f"--nnodes={len(names)}", f"--nproc-per-node={len(slots)}"]
    if several or options.master_port is not None or options.master_addr:
        address = options.master_addr or (names[0] if several else "127.0.0.1")
        port = DEFAULT_PORT if options.master_port is None else options.master_port
        arguments += [f"--node-rank={rank}", f"--master-addr={address}", f"--master-port={port}"]
    else:
        arguments.append("--standalone")
    if options.enable_each_rank_log:
        arguments += [f"--log-dir={options.enable_each_rank_log}", "--redirects=3"]
    arguments += _kind_of_script(options)
    environment = {"LOCAL_SIZE": str(len(slots)), "CROSS_RANK": str(rank), "CROSS_SIZE": str(len(names))}
    # All of them need no choice, and one that was made outside stays.
    if devices and slots != tuple(range(devices)):
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, slots))
    # torchrun binds GPU ranks to the cores beside their GPU; CPU ranks only get as many threads as is their share.
    wanted = parse_cores(options.bind_core_list)
    if options.bind_cores_to_rank or wanted:
        environment["OMP_NUM_THREADS"] = str(max(1, len(wanted or cores) // len(slots)))
        if devices:
            arguments.append("--numa-binding=node")
    return Launch((*arguments, *_script(options)), environment, wanted)


def _pool(options: argparse.Namespace, hosts: Slots | None, devices: int) -> Slots:
    """The slots of every host that there is: those of the hostfile, or of as many nodes like this one."""
    if hosts is not None:
        return hosts
    slots = tuple(range(devices or options.num_gpus or _cpu_slots(options)))
    nodes = options.num_nodes or 1
    if nodes == 1:
        return {"localhost": slots}
    return {f"node {number}": slots for number in range(nodes)}


def _cpu_slots(options: argparse.Namespace) -> int:
    """Processes on a node without GPUs: as many as --include or --exclude names, else one."""
    digits = (options.include or options.exclude).partition(":")[2].replace("@", ",").split(",")
    return 1 + max((int(d) for d in digits if d.isdecimal()), default=0)


def _node_rank(options: argparse.Namespace, names: list[str]) -> int:
    rank = options.node_rank
    if rank is None or not 0 <= rank < len(names):
        raise ConfigError(
            "--node_rank", expected=f"0 to {len(names) - 1}", found=rank, fix="number the nodes, from 0"
        )
    if not options.master_addr and names[0].startswith("node "):
        raise ConfigError("--master_addr is missing", fix="give the address of the node with rank 0")
    return int(rank)


def _kind_of_script(options: argparse.Namespace) -> list[str]:
    """torchrun's flag for what the script is, if it needs one."""
    return ["--module"] if options.module else ["--no-python"] if options.no_python else []


def _script(options: argparse.Namespace) -> list[str]:
    """The script and its arguments, as torchrun takes them: it fills in ``${...}``."""
    local_rank = [] if options.no_local_rank else ["--local_rank=${local_rank}"]
    return [options.user_script, *local_rank, *(one.replace("$", "$$") for one in options.user_args)]


def _on_every_node(options: argparse.Namespace, chosen: Slots) -> str:
    names = list(chosen)
    address = options.master_addr or names[0].replace(" ", "-")
    lines = [
        f"{name}: torchrun --nnodes={len(names)} --node-rank={rank} --nproc-per-node={len(chosen[name])} "
        f"--master-addr={address} --master-port={options.master_port or DEFAULT_PORT} "
        + "".join(f"{flag} " for flag in _kind_of_script(options))
        + shlex.join(_script(options))
        for rank, name in enumerate(names)
    ]
    return describe(
        f"this command does not log in to other nodes ({', '.join(names)})",
        fix="start it on every node with --no_ssh --node_rank=K --master_addr=HOST, or, on\n  "
        + "\n  ".join(lines),
    )


def read_environment_file(folders: Sequence[Path]) -> dict[str, str]:
    """NAME=VALUE lines of the first DEEPSPEED_ENVIRONMENT_NAME in ``folders``; without one, nothing."""
    for folder in folders:
        file = folder / DEEPSPEED_ENVIRONMENT_NAME
        if file.is_file():
            pairs = (line.strip().partition("=") for line in file.read_text().splitlines())
            return {name: value for name, equals, value in pairs if equals and not name.startswith("#")}
    return {}


def _hosts(options: argparse.Namespace) -> Slots | None:
    file = Path(options.hostfile)
    if file.is_file():
        return parse_hostfile(file.read_text(), str(file))
    if options.hostfile != DEFAULT_HOSTFILE:
        raise ConfigError(f"--hostfile {file} cannot be read", fix="give a file of 'host slots=N' lines")
    return None


def _devices(options: argparse.Namespace) -> int:
    if options.include or options.exclude or options.num_gpus is not None:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # these flags count the devices of the machine
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``deepspeed``: does not return."""
    options = build_parser().parse_args(argv)
    try:
        hosts = _hosts(options)
        launch = plan(options, hosts, _devices(options), sorted(os.sched_getaffinity(0)))
    except ZeropipeError as error:
        sys.exit(f"deepspeed: error: {error}")
    idle = [f"--{name} ({why})" for name, why in _IDLE.items() if getattr(options, name)]
    if idle and not options.quiet:
        sys.stderr.writelines([f"deepspeed: without effect: {'; '.join(idle)}\n"])
    environment = {**os.environ, **launch.environment}
    if options.no_ssh:
        environment.update(read_environment_file([Path.cwd(), Path.home()]))
    if launch.cores:
        os.sched_setaffinity(0, launch.cores)
    # In place of this process, so that signals and the exit code of torchrun are those of the command.
    os.execve(sys.executable, [sys.executable, "-m", "torch.distributed.run", *launch.arguments], environment)


if __name__ == "__main__":
    main()
