"""What a parameter is in ZeRO (its states, and what each costs in memory), and the record that it carries: its name,
who trains it, and (stage 3) the shards that it is cut into.

The record stands between the two wings, so it knows neither: each says here what the other may ask of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch

from zeropipe.comm.collectives import Exposed
from zeropipe.comm.group import Group
from zeropipe.errors import UsageError
from zeropipe.layout.flat import FlatShards

# Channels: collectives on one need no order among those on another, so no gather waits for its place among the
# reductions that gradients start as they arrive.
GATHER, REDUCE = 1, 2
CHANNELS = 2


class ZeroParamType(Enum):
    """Where a parameter's elements are at rest."""

    NORMAL = 1  # whole on every rank
    PARTITIONED = 2  # a shard on every rank of the group
    REMOTE = 3  # a shard, off the device (host memory or a file)


class ZeroParamStatus(Enum):
    """What this rank has of a sharded parameter at the moment (P = its elements, N = ranks)."""

    AVAILABLE = 1  # the whole value: P + P/N elements
    NOT_AVAILABLE = 2  # its shard alone: P/N elements
    INFLIGHT = 3  # a gather is under way: P + P/N elements, not to be read


class State(Enum):
    """As ``ZeroParamStatus``, with what a parameter that is away shows instead of its value::

                start_gather          finish_gather
        AWAY ----------------> INFLIGHT ------------> WHOLE
        ^ ^ |                     |                     |
        | | |     it failed       |                     |
        | +-|---------------------+---- release, leave -+
        |   v
        SHAPED, LOADING    which a gather may also begin from

    What ``status`` says to users is the value.
    """

    AWAY = 1  # shape [0]: a use that needs elements fails in torch, too, where ours cannot see it
    SHAPED = 2  # the whole shape without memory, for autograd, when a gradient arrives that was made without the value
    LOADING = 3  # the same, for load_state_dict; what is then copied in is cut into shards
    INFLIGHT = 4
    WHOLE = 5

    # Each gather looks states up in dicts; Enum's own hash is a call in Python, for every one of them.
    __hash__ = object.__hash__

    @property
    def status(self) -> ZeroParamStatus:
        return _STATUS.get(self, ZeroParamStatus.NOT_AVAILABLE)


class Need(Enum):
    """Why somebody holds the whole value."""

    VALUE = "it is read"
    USE = "a module runs: what it writes is noticed"
    CONTEXT = "a GatheredParameters is open: that answers for edits"
    PIN = "of zero.unshard, until zero.reshard"

    __hash__ = object.__hash__  # as State's: counted in every hold


# Whoever is not told more sees three states: what is shown instead of a value is nobody's value.
_STATUS = {State.INFLIGHT: ZeroParamStatus.INFLIGHT, State.WHOLE: ZeroParamStatus.AVAILABLE}
# From WHOLE only to rest: a shape may be shown, and a value loaded, where there is none.
_NEXT = {
    State.AWAY: (State.SHAPED, State.LOADING, State.INFLIGHT),
    State.SHAPED: (State.AWAY, State.LOADING, State.INFLIGHT),
    State.LOADING: (State.AWAY, State.INFLIGHT),
    State.INFLIGHT: (State.WHOLE, State.AWAY),
    State.WHOLE: (State.AWAY,),
}


def check_transition(name: str, before: State, after: State) -> State:
    """``after``, if it may follow ``before``; raises UsageError naming the parameter otherwise."""
    if after not in _NEXT[before]:
        raise UsageError(f"parameter '{name}' cannot go from {before.name} to {after.name}")
    return after


class Trainer(Protocol):
    """An optimizer's side of a parameter (``hold/access.py``)."""

    @property
    def group(self) -> Group:
        """The ranks that hold what it trains, whole or as shards."""

    def write_value(self, value: torch.Tensor) -> None:
        """Set master and parameter to ``value`` (its shape, the same on every rank)."""


class Cut(Protocol):
    """A parameter that is shards, as its partition sees it (``gather/shards.py``)."""

    # What it is, alike on every rank of the group.
    ident: int
    group: Group
    in_leaf: bool  # gathered with a whole module whose children run as the data says
    shape: torch.Size
    numel: int
    shard_numel: int

    state: State

    # The whole value, for a partition that steps while somebody has it gathered: it must show what was stepped.
    full: torch.Tensor  # 1D, padded: the whole value while it is gathered
    renewals: int  # how often the shards changed under it

    @property
    def name(self) -> str: ...
    @property
    def layout(self) -> FlatShards: ...
    @property
    def source(self) -> torch.Tensor:  # 1D, shard_numel: what gathers read
        ...

    @property
    def contexts(self) -> int:
        """Who is writing to the whole value and brings it back."""

    @property
    def own_elements(self) -> torch.Tensor:
        """This rank's elements of the gathered value: 1D, shard_numel, a view."""

    def live_at(
        self,
        source: torch.Tensor,
        master: torch.Tensor | None,
        let_go: Callable[[torch.Tensor], None] | None = None,
        read_ahead: Callable[[torch.Tensor], None] | None = None,
        remote: bool | None = None,
        exposed: tuple[Exposed, slice] | None = None,
    ) -> None:
        """From now on gathers read ``source``; ``master``: what is rounded into it, where that is another tensor.
        ``exposed``: where all members see each other's.

        None: as they are. ``let_go`` and ``read_ahead`` are told of elements that were and will be read; ``remote``:
        ``source`` lives away from where the parameter is used.
        """

    def renewed(self) -> torch.Tensor:
        """The shards were renewed: the memory of the gathered value (1D, padded), to be written to."""

    def differs(self) -> bool:
        """Whether this rank's elements of the gathered value are no longer those of its shard."""

    def write_back(self) -> None:
        """Take this rank's shard anew from the gathered value (the same on every rank)."""


def stays(tensor: torch.Tensor) -> None:
    """``let_go`` and ``read_ahead`` of memory that is nowhere else."""


@dataclass(slots=True, weakref_slot=True)
class ZeroParam:
    """Carried by a parameter as ``param._zero``, the only state that zeropipe puts there.

    ``trained`` is None while no optimizer trains it; ``shards`` is None where the value is whole on each rank.
    """

    name: str

    # Each wing's side of it, by which the other reaches it: who steps it, and who gathers it.
    trained: Trainer | None = None
    shards: Cut | None = None

    # What ``GatheredParameters`` asks where neither of those says it.
    group: Group | None = None  # the ranks that hold it whole, where no optimizer trains it


def zero_param(param: torch.Tensor) -> ZeroParam | None:
    """The parameter's ZeroParam; None for one that no engine and no zero.Init knows."""
    return getattr(param, "_zero", None)


def is_trained(param: torch.Tensor) -> bool:
    """Whether an engine's optimizer has it."""
    zp = zero_param(param)
    return zp is not None and zp.trained is not None


def shards_at(param: torch.Tensor) -> Cut | None:
    """The parameter's shards, as a partition sees them; None where its value is whole on each rank."""
    zp = zero_param(param)
    return None if zp is None else zp.shards


def is_sharded(param: torch.Tensor) -> bool:
    return shards_at(param) is not None


def carry(param: torch.Tensor, record: ZeroParam | None) -> None:
    """Let ``param`` carry ``record``; None: nothing any more."""
    if record is None:
        del param._zero  # type: ignore[attr-defined]
    else:
        param._zero = record  # type: ignore[attr-defined]


def know_whole(module: torch.nn.Module, group: Group) -> None:
    """Let the parameters that ``group``'s ranks hold whole, and that no optimizer trains, be known as such."""
    for name, param in module.named_parameters():
        if zero_param(param) is None:
            carry(param, ZeroParam(name, group=group))


def forget_whole(module: torch.nn.Module) -> None:
    """Undo ``know_whole``."""
    for param in module.parameters():
        known = zero_param(param)
        if known is not None and known.group is not None:
            carry(param, None)


def holders(param: torch.Tensor) -> Group | None:
    """The ranks that hold ``param`` whole; None where it is shards, or no engine's."""
    known = zero_param(param)
    if known is None or known.shards is not None:
        return None
    return known.group if known.trained is None else known.trained.group
