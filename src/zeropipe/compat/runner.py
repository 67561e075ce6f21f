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

from zeropipe.errors import ConfigError, ZeropipeError, describe

# A file of NAME=VALUE lines, in the current folder or at home, for launches on several nodes.
DEEPSPEED_ENVIRONMENT_NAME: Final = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
DEFAULT_HOSTFILE: Final = "/job/hostfile"
DEFAULT_PORT: Final = 29500
# Beginnings of variables that other nodes need. Scripts append to it at their top; this command logs in nowhere.
EXPORT_ENVS: Final = ["NCCL", "PYTHON", "MV2", "UCX"]
# Flags that are taken and do nothing -> (why, whether they have a value).
_IDLE: Final = {
    "save_pid": ("the process keeps its number when it becomes torchrun", False),
    "no_ssh_check": ("no ssh is used", False),
    "ssh_port": ("no ssh is used", True),
    "venv_script": ("activate the environment before you start", True),
    "launcher_args": ("torchrun is the only launcher", True),
}


Slots = dict[str, tuple[int, ...]]  # host -> the indices of its devices, in hostfile order


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
    add("--autotuning", default="", help="not offered")
    for name, (why, has_value) in _IDLE.items():
        add(f"--{name}", action="store" if has_value else "store_true", help=f"has no effect: {why}")
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
    # [1] Where: hosts and slots, and which of the hosts this is. Nothing is started on others.
    chosen = choose(
        _pool(options, hosts, devices), options.include, options.exclude, options.num_nodes, options.num_gpus
    )
    names = list(chosen)
    several = len(names) > 1 or options.force_multi
    if several and not options.no_ssh:
        raise ConfigError(_on_every_node(options, chosen))
    rank = _node_rank(options, names) if several else 0
    # [2] How the processes find each other: alone on a free port that torchrun picks, or at an address all know.
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
    # [3] What scripts for DeepSpeed's launcher read.
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
    # Without GPUs a slot is a process, of which there may be any number.
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


def _script(options: argparse.Namespace) -> list[str]:
    """The script and its arguments, as torchrun takes them."""
    kind = ["--module"] if options.module else ["--no-python"] if options.no_python else []
    # torchrun fills in ``${...}``, so every other dollar is doubled.
    local_rank = [] if options.no_local_rank else ["--local_rank=${local_rank}"]
    return [*kind, options.user_script, *local_rank, *(one.replace("$", "$$") for one in options.user_args)]


def _on_every_node(options: argparse.Namespace, chosen: Slots) -> str:
    names = list(chosen)
    address = options.master_addr or names[0].replace(" ", "-")
    lines = [
        f"{name}: torchrun --nnodes={len(names)} --node-rank={rank} --nproc-per-node={len(chosen[name])} "
        f"--master-addr={address} --master-port={options.master_port or DEFAULT_PORT} "
        + shlex.join(_script(options))
        for rank, name in enumerate(names)
    ]
    return describe(
        f"this command does not log in to other nodes ({', '.join(names)})",
        fix="start it on every node with --no_ssh --node_rank=K --master_addr=HOST, or, on\n  "
        + "\n  ".join(lines),
    )


# ---- which slots of which hosts ----


def parse_hostfile(text: str, name: str = "hostfile") -> Slots:
    """``host slots=N`` lines; ``#`` begins a comment. Raises ConfigError for another line or a repeated host."""
    hosts: Slots = {}
    for number, line in enumerate(text.splitlines(), 1):
        # Exactly two words: what else stands there (a user, a port) would be passed over in silence.
        words = line.partition("#")[0].split()
        if not words:
            continue
        host, slots = words[0], words[1:]
        count = slots[0].removeprefix("slots=") if len(slots) == 1 and slots[0].startswith("slots=") else ""
        if not count.isdecimal() or host in hosts:
            raise ConfigError(
                f"{name}, line {number}",
                expected="a host once, as 'name slots=N'",
                found=repr(line),
                fix="correct the line",
            )
        hosts[host] = tuple(range(int(count)))
    if not hosts:
        raise ConfigError(f"{name} names no host", fix="write a line such as 'localhost slots=2'")
    return hosts


def parse_filter(text: str, flag: str) -> dict[str, tuple[int, ...] | None]:
    """``host[:slot,slot...]`` joined by ``@``; None for all slots. Raises ConfigError for another form."""
    found: dict[str, tuple[int, ...] | None] = {}
    for part in text.split("@"):
        host, colon, slots = part.strip().partition(":")
        numbers = slots.split(",")
        if not host or host in found or (colon and not all(n.strip().isdecimal() for n in numbers)):
            raise ConfigError(
                flag, expected="host:slot,slot@host:slot", found=repr(text), fix=f"{flag}=localhost:0,1"
            )
        found[host] = tuple(sorted({int(n) for n in numbers})) if colon else None
    return found


def choose(
    hosts: Mapping[str, tuple[int, ...]],
    include: str = "",
    exclude: str = "",
    num_nodes: int | None = None,
    num_gpus: int | None = None,
) -> Slots:
    """The hosts and slots that are left; hosts without any are left out.

    Raises ConfigError for filters that exclude each other, name what is not there, or leave nothing.
    """
    if include and exclude:
        raise ConfigError("--include and --exclude exclude each other", fix="give one of them")
    if (include or exclude) and (num_nodes is not None or num_gpus is not None):
        raise ConfigError(
            "--include and --exclude say which slots are used; --num_nodes and --num_gpus say it again",
            fix="remove --num_nodes and --num_gpus",
        )
    named = (
        parse_filter(include or exclude, "--include" if include else "--exclude")
        if include or exclude
        else {}
    )
    for host, slots in named.items():
        missing = host not in hosts or set(slots or ()) - set(hosts[host])
        if missing:
            known = ", ".join(f"{name}:{','.join(map(str, there))}" for name, there in hosts.items())
            shown = host if slots is None else f"{host}:{','.join(map(str, slots))}"
            raise ConfigError(
                "--include" if include else "--exclude",
                expected=f"slots of {known}",
                found=shown,
                fix="name hosts and slots that exist",
            )
    # --include keeps what it names, --exclude what it does not; a host without slots means all of its slots.
    left: Slots = {}
    for host, there in hosts.items():
        listed = named.get(host, ())
        if include:
            left[host] = there if listed is None else listed
        else:
            left[host] = () if listed is None else tuple(s for s in there if s not in listed)
    left = {host: there for host, there in left.items() if there}
    if num_nodes is not None:
        _check_count("--num_nodes", num_nodes, len(left), "hosts")
        left = dict(list(left.items())[:num_nodes])
    if num_gpus is not None:
        for host, there in left.items():
            _check_count("--num_gpus", num_gpus, len(there), f"slots on {host}")
        left = {host: there[:num_gpus] for host, there in left.items()}
    if not left:
        raise ConfigError("no slot is left to run on", fix="widen --include, or narrow --exclude")
    return left


def _check_count(flag: str, wanted: int, there: int, what: str) -> None:
    if not 0 < wanted <= there:
        raise ConfigError(
            flag, expected=f"1 to {there} ({what})", found=wanted, fix=f"lower it, or leave {flag} out"
        )


def fetch_hostfile(hostfile_path: str) -> dict[str, int] | None:
    """{host: number of its slots} of a hostfile, None where there is none. Raises ConfigError for a bad line."""
    file = Path(hostfile_path)
    if not file.is_file():
        return None
    return {host: len(slots) for host, slots in parse_hostfile(file.read_text(), file.name).items()}


def parse_inclusion_exclusion(
    resource_pool: Mapping[str, int], inclusion: str = "", exclusion: str = ""
) -> dict[str, list[int]]:
    """{host: the slots that are left} of {host: number of its slots}; the filters are those of the command.

    Raises ConfigError for filters that exclude each other, name what is not there, or leave nothing.
    """
    pool = {host: tuple(range(count)) for host, count in resource_pool.items()}
    return {host: list(slots) for host, slots in choose(pool, inclusion, exclusion).items()}


# ---- what this node has, and becoming torchrun ----


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
    idle = [f"--{name} ({why})" for name, (why, _) in _IDLE.items() if getattr(options, name)]
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
