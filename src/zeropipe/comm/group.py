"""Who communicates: how this process joins torch.distributed, and groups of ranks, thin and hashable objects."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
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
    # The same ranks over gloo, where the group has none itself (``with_words``).
    beside: Group | None = field(default=None, compare=False, repr=False)

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
    def timeout(self) -> timedelta | None:
        """How long a member waits for the others; None where that cannot be known."""
        for device in sorted((kind for kind, _ in self.backends), key="cpu".__eq__):
            with suppress(
                AttributeError, RuntimeError
            ):  # torch's fake group has none, a CPU no backend for GPUs
                found = self.pg._get_backend(torch.device(device)).options._timeout  # type: ignore[union-attr]
                return found if isinstance(found, timedelta) else None
        return None

    @property
    def has_tags(self) -> bool:
        """Whether tags tell messages and channels apart, on every device: on gloo. Elsewhere only their order does."""
        return all(name == "gloo" for _, name in self.backends)

    @property
    def speaking(self) -> Group | None:
        """The group by which members tell each other words (``agreement.py``): it takes gloo, here or beside."""
        return self if dict(self.backends).get("cpu") == "gloo" else self.beside

    @property
    def speaks(self) -> bool:
        return self.speaking is not None

    def carrying(self, tensor: torch.Tensor) -> Group:
        """The group that ``tensor`` travels by: CPU tensors (offloaded state) go beside one for a device alone."""
        if self.beside is None or tensor.device.type != "cpu" or "cpu" in dict(self.backends):
            return self
        return self.beside

    @property
    def imagined(self) -> bool:
        """Whether this process alone stands for the group (``imagined.py``): the others would say what it says."""
        return any(name == "fake" for _, name in self.backends)

    def backend_for(self, tensor: torch.Tensor) -> str:
        """The backend that carries ``tensor``.

        Raises UsageError when the group has none for its device.
        """
        kind = tensor.device.type
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
    group = Group(
        ranks=tuple(dist.get_process_group_ranks(pg)),
        rank=dist.get_rank(pg),
        started=weakref.ref(pg),
        backends=backends or (("cpu", str(config)), ("cuda", str(config))),  # type: ignore[arg-type]
    )
    return replace(group, beside=_BESIDE.of(group.ranks)) if group.speaking is None else group


class _Beside:
    """The gloo groups beside those of a world that was started without it. Process groups belong to the process, and
    so does this."""

    def __init__(self) -> None:
        self._world: weakref.ref[dist.ProcessGroup] | None = None  # the one that these are of
        self._groups: dict[tuple[int, ...], Group] = {}

    def of(self, ranks: tuple[int, ...]) -> Group | None:
        """That of ``ranks``, if it was started in this world."""
        here = self._world is not None and self._world() is dist.group.WORLD
        return self._groups.get(ranks) if here else None

    def start(self, group: Group) -> Group:
        """That of ``group``; collective among its members alone, the first time."""
        found = self.of(group.ranks)
        if found is None:
            if self._world is None or self._world() is not dist.group.WORLD:
                assert dist.group.WORLD is not None
                self._world, self._groups = weakref.ref(dist.group.WORLD), {}
            # A host's own words and tensors have no business in a GPU's queue, and torch splits no communicator for it.
            pg = dist.new_group(
                list(group.ranks),
                group.timeout,
                backend="gloo",
                use_local_synchronization=True,
                sort_ranks=False,
                group_desc="zeropipe: words and CPU tensors",
            )
            found = self._groups[group.ranks] = Group(
                group.ranks, group.rank, weakref.ref(pg), (("cpu", "gloo"),)
            )
        return found


_BESIDE = _Beside()


def with_words(group: Group) -> Group:
    """``group``, with gloo beside it if it has none: for the words of ``agreement.py``, and for CPU tensors.

    Collective among its members, the first time that these ranks ask. Where torch was built without gloo there are
    none: ranks that part then wait until the backend's own watchdog ends them, and CPU tensors are refused.
    """
    # Of torch's fake group one rank alone is there, and nobody would answer.
    if group.size == 1 or group.speaks or group.backend == "fake" or not dist.is_gloo_available():
        return group
    return replace(group, beside=_BESIDE.start(group))


def world() -> Group:
    """All ranks; a group of one when torch.distributed has not been started."""
    if not dist.is_initialized():
        return SELF
    pg = dist.group.WORLD
    assert pg is not None
    return from_process_group(pg)


def new_group(ranks: Sequence[int], timeout: timedelta | None = None) -> Group | None:
    """Start a group. Every rank of the world must call this, in the same order; None for non-members."""
    return start_groups([tuple(ranks)], timeout).get(tuple(ranks))


def start_groups(
    lists: Sequence[tuple[int, ...]], timeout: timedelta | None = None, backend: str | None = None
) -> dict[tuple[int, ...], Group]:
    """This rank's groups of ``lists``, which start together. Every rank of the world must call this, with the same."""
    everyone = world()
    found = {ranks: with_words(everyone) for ranks in lists if ranks == everyone.ranks}
    others = [ranks for ranks in dict.fromkeys(lists) if ranks != everyone.ranks]
    # A communicator of its own for each group is a meeting of the world. Where the world's can be split, groups without
    # a common member are one split, whatever their number: the shard groups of MiCS, and then the replicas.
    splits = everyone.size > 1 and _splits(everyone)
    timeout = timeout or everyone.timeout  # torch would take its default, whatever the world's is
    for together in disjoint(others) if splits else [[ranks] for ranks in others]:
        if splits:
            pg = dist.split_group(everyone.pg, [list(ranks) for ranks in together], timeout=timeout)
        else:
            pg = dist.new_group(list(together[0]), timeout=timeout, backend=backend)
        mine = next((ranks for ranks in together if everyone.ranks[everyone.rank] in ranks), None)
        if mine is not None:
            assert pg is not None
            found[mine] = with_words(from_process_group(pg))
    return found


def disjoint(lists: Sequence[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """``lists`` in as few bundles as come without search, such that those of one have no common member."""
    bundles: list[list[tuple[int, ...]]] = []
    for ranks in lists:
        free = (b for b in bundles if not any(set(ranks) & set(other) for other in b))
        bundle = next(free, None)
        if bundle is None:
            bundles.append(bundle := [])
        bundle.append(ranks)
    return bundles


def _splits(group: Group) -> bool:
    """Whether communicators of ``group`` come of a split: those that were started with their device do."""
    pg, everyone = group.pg, dist.group.WORLD
    device = None if everyone is None else everyone.bound_device_id
    return pg is not None and device is not None and bool(pg._get_backend(device).supports_splitting)


def start_lane(group: Group, name: str) -> weakref.ref[dist.ProcessGroup]:
    """Start one more process group of the same ranks, which a watchdog calls ``name``. Collective among them alone."""
    parent = group.pg
    assert parent is not None
    if _splits(group):
        # By a start anew every rank of the world would have to take part.
        pg = dist.split_group(parent, [list(range(group.size))], group.timeout, group_desc=name)
    else:
        # torch names it by its ranks and what is there of them: the same on all, who have started the same.
        pg = dist.new_group(
            list(group.ranks),
            group.timeout,
            use_local_synchronization=True,
            sort_ranks=False,
            group_desc=name,
        )
    assert pg is not None
    return weakref.ref(pg)


def new_groups(lists: Sequence[Sequence[int]]) -> Group:
    """Start several disjoint groups and return the one that holds this rank.

    Raises UsageError when no list names this rank.
    """
    # torch.distributed.nn's backward names the members of a "gloo" group by their ranks in the world, and so fails in
    # any smaller one. In a group of the same backend by its longer name it takes another way.
    backend = "cpu:gloo" if dist.is_initialized() and dist.get_backend() == "gloo" else None
    mine = start_groups([tuple(ranks) for ranks in lists], backend=backend)
    if not mine:
        raise UsageError(f"rank {world().rank} is in none of the groups {list(map(list, lists))}")
    return next(iter(mine.values()))


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
