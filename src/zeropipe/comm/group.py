"""Who communicates: how this process joins torch.distributed, and groups of ranks, thin and hashable objects."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # its functions hold the world of their first import for good: here there is none yet

from zeropipe.errors import ConfigError, UsageError
from zeropipe.given import Anything, Mpu
from zeropipe.layout.two_hops import TwoHops

_ENV = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that communicate together.

    torch.distributed owns the process group and this only refers to it. Held here it would outlive
    ``destroy_process_group``, and its threads with it: one that lets go of its last tensors while the interpreter ends
    needs the interpreter's lock, and ends the process with an abort.
    """

    ranks: tuple[int, ...]  # global ranks, in group order
    rank: int  # this process's index in ``ranks``
    # None for a group of one that was never started: every collective on it is the identity. Unlike the address of a
    # process group that ended, which a new one may get, it tells two worlds of the same ranks apart; ``==`` does not,
    # so whoever keeps something for a world compares this too.
    started: weakref.ref[dist.ProcessGroup] | None = field(default=None, compare=False, repr=False)
    backends: tuple[tuple[str, str], ...] = ()  # (device type, backend name)
    hops: Hops | None = field(default=None, compare=False, repr=False)  # None: in one hop
    # Process groups of the same ranks for channels from 1 on (``Leases.lanes``). On gloo tags keep channels apart;
    # NCCL has no tags, and two channels on one communicator would have to be interleaved alike on all ranks.
    lanes: tuple[weakref.ref[dist.ProcessGroup], ...] = field(default=(), compare=False, repr=False)

    @property
    def pg(self) -> dist.ProcessGroup | None:
        """The process group; None where none was started, or where it was destroyed."""
        return None if self.started is None else self.started()

    def on(self, channel: int) -> dist.ProcessGroup | None:
        """The process group that carries ``channel``."""
        return self.lanes[channel - 1]() if channel and self.lanes else self.pg

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def backend(self) -> str:
        """The backend's name as torch gives it, e.g. ``gloo``, ``nccl`` or ``cpu:gloo,cuda:nccl``."""
        names = {name for _, name in self.backends}
        return names.pop() if len(names) == 1 else ",".join(f"{d}:{n}" for d, n in self.backends)

    @property
    def has_tags(self) -> bool:
        """Whether tags tell messages and channels apart, on every device: on gloo. Elsewhere only their order does."""
        return all(name == "gloo" for _, name in self.backends)

    @property
    def speaks(self) -> bool:
        """Whether members can tell each other words (``agreement.py``): it takes gloo, alone or beside NCCL."""
        return dict(self.backends).get("cpu") == "gloo"

    @property
    def only_device(self) -> str | None:
        """The device that CPU tensors travel through, where the group has a backend for nothing else."""
        kinds = [kind for kind, _ in self.backends]
        return kinds[0] if kinds and "cpu" not in kinds else None

    def backend_for(self, tensor: torch.Tensor) -> str:
        """The backend that carries ``tensor``.

        Raises UsageError when the group has none for its device.
        """
        kind = tensor.device.type
        if kind == "cpu" and self.only_device is not None:
            return self.backends[0][1]
        for device, name in self.backends:
            # torch names gloo for every device, and its messages take any pointer for one of host memory.
            if device == kind and (name != "gloo" or kind == "cpu"):
                return name
        raise UsageError(
            f"a {kind} tensor cannot be sent over {self.backend}",
            rank=self.ranks[self.rank],
            expected=f"a backend for {kind} tensors",
            found=self.backend,
            fix="start torch.distributed with one for each device, as "
            "init_process_group('cpu:gloo,cuda:nccl') and zeropipe.init_distributed() do",
        )


@dataclass(frozen=True, slots=True)
class Hops:
    """The groups of a gather in two hops; ``plan`` counts their members in their order."""

    plan: TwoHops
    across: Group  # this rank and those of its place in the other nodes
    node: Group  # the ranks of this node


# A group of this process alone. Its rank stands for whichever this is, and is not the global one.
SELF = Group(ranks=(0,), rank=0)


def from_process_group(pg: dist.ProcessGroup) -> Group:
    """Wrap a torch process group of which this process is a member."""
    config = dist.get_backend_config(pg)
    backends = (
        tuple(tuple(pair.split(":", 1)) for pair in str(config).split(",")) if ":" in str(config) else ()
    )
    return Group(
        ranks=tuple(dist.get_process_group_ranks(pg)),
        rank=dist.get_rank(pg),
        started=weakref.ref(pg),
        backends=backends or (("cpu", str(config)), ("cuda", str(config))),  # type: ignore[arg-type]
    )


def world() -> Group:
    """All ranks; a group of one when torch.distributed has not been started."""
    if not dist.is_initialized():
        return SELF
    pg = dist.group.WORLD
    assert pg is not None
    return from_process_group(pg)


def new_group(
    ranks: Sequence[int], timeout: timedelta | None = None, backend: str | None = None
) -> Group | None:
    """Start a group. Every rank of the world must call this, in the same order; None for non-members."""
    everyone = world()
    if tuple(ranks) == everyone.ranks:
        return everyone
    pg = dist.new_group(list(ranks), timeout=timeout, backend=backend)
    return from_process_group(pg) if everyone.ranks[everyone.rank] in ranks else None


def start_lane(group: Group) -> weakref.ref[dist.ProcessGroup]:
    """Start one more process group of the same ranks. Collective among them alone."""
    everyone, parent = dist.group.WORLD, group.pg
    assert everyone is not None
    assert parent is not None
    if everyone.bound_device_id is None:
        # torch names it by its ranks and what is there of them: the same on all, who have started the same.
        pg = dist.new_group(list(group.ranks), use_local_synchronization=True, sort_ranks=False)
    else:
        # Communicators that were started with their device are split: without this every rank of the world would
        # have to take part.
        pg = dist.split_group(parent, [list(range(group.size))])
    assert pg is not None
    return weakref.ref(pg)


def new_groups(lists: Sequence[Sequence[int]]) -> Group:
    """Start several disjoint groups and return the one that holds this rank.

    Raises UsageError when no list names this rank.
    """
    mine: Group | None = None
    # torch.distributed.nn's backward names the members of a "gloo" group by their ranks in the world, and so fails in
    # any smaller one. In a group of the same backend by its longer name it takes another way.
    backend = "cpu:gloo" if dist.is_initialized() and dist.get_backend() == "gloo" else None
    for ranks in lists:
        mine = new_group(ranks, backend=backend) or mine
    if mine is None:
        raise UsageError(f"rank {world().rank} is in none of the groups {list(map(list, lists))}")
    return mine


def group_of(mpu: Mpu) -> Group:
    """The ranks that hold the same parameters as this one: those of ``mpu``'s data-parallel group, with the ranks that
    share its sequences.

    Raises UsageError where ``mpu`` divides sequences and does not say who holds the same parameters.
    """
    # Ours is a group already; others have torch's process groups.
    own = getattr(mpu, "data_group", None)
    if isinstance(own, Group):
        return own
    shared = getattr(mpu, "get_sequence_parallel_world_size", None)
    if shared is None or shared() == 1:
        return from_process_group(mpu.get_data_parallel_group())
    if not hasattr(mpu, "get_sequence_data_parallel_group"):
        raise UsageError(
            f"mpu divides a sequence among {shared()} ranks",
            expected="get_sequence_data_parallel_group(), of the ranks that hold the same parameters",
            found="no such method",
            fix="pass the mpu of initialize_sequence_parallel(size)",
        )
    return from_process_group(mpu.get_sequence_data_parallel_group())


# How this process joins the others.


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int | None = None,
    verbose: bool = True,
    timeout: timedelta | None = None,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: Anything = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Start torch.distributed once; a world that somebody else started is adopted as it is.

    ``dist_backend``: None picks gloo, or gloo for CPU tensors and NCCL for GPU tensors where there is a GPU.
    Without torchrun's variables (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) and without ``init_method`` or
    ``rank``, the process is a world of one. ``auto_mpi_discovery``, ``verbose`` and ``config`` are accepted for
    the interface's sake and change nothing.

    Raises ConfigError when some of torchrun's variables are set and others are not.
    """
    if dist.is_initialized() or dist_init_required is False:
        return
    # Before the backend starts, which takes the current device for what it sends by itself (objects, barriers).
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    backend = dist_backend or ("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    limits: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
    if init_method is not None or rank >= 0:
        dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=world_size, **limits)
        return
    if distributed_port is not None and "RANK" in os.environ:
        os.environ.setdefault("MASTER_PORT", str(distributed_port))
    found = [name for name in _ENV if name in os.environ]
    if len(found) == len(_ENV):
        dist.init_process_group(backend, **limits)
    elif "RANK" in found or "WORLD_SIZE" in found:
        missing = [name for name in _ENV if name not in found]
        raise ConfigError(
            "the environment describes a distributed run only in part",
            expected="all of " + ", ".join(_ENV),
            found="no " + ", ".join(missing),
            fix="start the script with torchrun, which sets all four",
        )
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, **limits)


def node_size() -> int:
    """How many ranks share this node: torchrun's LOCAL_WORLD_SIZE, 1 where it is not set.

    Nodes are assumed to hold consecutive ranks, as torchrun numbers them.
    Raises ConfigError where the variable is no number.
    """
    found = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if not found.isdigit() or int(found) < 1:
        raise ConfigError(
            "environment variable LOCAL_WORLD_SIZE",
            expected="the number of processes on this node",
            found=repr(found),
            fix="start the script with torchrun, which sets it",
        )
    return int(found)


def backends() -> tuple[str, ...]:
    """The backends that this build of torch can communicate with."""
    if not dist.is_available():
        return ()
    known = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available, "mpi": dist.is_mpi_available}
    return tuple(name for name, there in known.items() if there())
