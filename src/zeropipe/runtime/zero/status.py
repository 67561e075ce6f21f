"""The states of a sharded parameter, what each costs in memory, and the only ways from one to another."""

from __future__ import annotations

from enum import Enum

from zeropipe.errors import UsageError


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

    AWAY = 1  # shape [0]
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


_STATUS = {State.INFLIGHT: ZeroParamStatus.INFLIGHT, State.WHOLE: ZeroParamStatus.AVAILABLE}
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
