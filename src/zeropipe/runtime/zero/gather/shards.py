"""One sharded parameter: this rank's shard, and the whole value while it is gathered (``param.py`` draws the states).

    at rest     param.data: shape [0]                 own: this rank's shard
    gathered    param.data: a view of ``full``        full: 1D, padded; its storage is resized to 0 on release

The storage object of ``full`` lives on: views of it that autograd saved are valid again after the next gather.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sized
from contextlib import AbstractContextManager, suppress
from typing import Any, Protocol

import torch

from zeropipe.comm.collectives import Exposed
from zeropipe.comm.group import Group
from zeropipe.comm.leases import LEASES
from zeropipe.errors import UsageError
from zeropipe.layout.flat import FlatShards
from zeropipe.runtime.zero.gather.edits import OwnWrites
from zeropipe.runtime.zero.gather.own_shard import Gather, OwnShard, Tell, start_gathers
from zeropipe.runtime.zero.param import Need, State, check_transition

DATA: Any = torch.Tensor.data  # type: ignore[misc]  # what reads and sets it without telling anybody


class Builder(Protocol):
    """While it is active any use of its parameters fetches them, and they show their whole shape."""

    active: bool

    def fetch(self, shards: Shards) -> None: ...


class Conductor(Protocol):
    """What gathers the units of a model (``Coordinator``), as far as a parameter that somebody meets has to know it."""

    @property
    def running(self) -> Sized: ...
    def fetch_for_use(self, shards: Shards) -> bool: ...
    def keep_for_graph(self, shards: Shards, needed: Callable[[], bool]) -> None: ...
    def silent(self) -> AbstractContextManager[None]: ...


class Hold:
    """A parameter that somebody needs whole: it is not freed before the last hold of it is released."""

    __slots__ = ("need", "shards")

    def __init__(self, shards: Shards, need: Need = Need.VALUE) -> None:
        self.shards, self.need = shards, need
        shards.count(need, 1)

    def release(self, free: bool = True) -> None:
        """To be called once. ``free``: the value goes with its last hold, unless it stays for good."""
        self.shards.count(self.need, -1)
        if free:
            self.shards.release_if_idle()


class Shards:
    """One parameter, cut from the whole value that it has now. Not collective to make."""

    def __init__(
        self,
        param: torch.nn.Parameter,
        faces: tuple[type, type],
        name: str,
        ident: int,
        group: Group,
        everyone: Group | None = None,
        builder: Builder | None = None,
    ) -> None:
        # What it is. ``everyone``: the group, with those that hold the same shards (MiCS). ``faces``: the classes of
        # the parameter while the value is here, and while it is away, which guards it against use.
        value = param.detach()
        self.own = OwnShard(value, name, group)
        self.shape, self.numel, self.shard_numel = value.shape, value.numel(), self.own.layout.shard_numel
        self._faces = faces
        self.adopt(name, ident, group, everyone or group)
        self.builder = builder  # who fetches it for uses outside of forwards
        self.in_leaf = False  # gathered with a whole module whose children run as the data says
        self._begin(param, value.device)

    def _begin(self, param: torch.nn.Parameter, device: torch.device) -> None:
        """At rest, and needed by nobody."""
        # The whole value, while there is one.
        self.state = State.AWAY
        self._gather: Gather | None = None  # under way
        self._lost: Gather | None = None  # one that failed: the transport may still write to its memory
        self.renewals = 0  # how often the shards changed under it
        self._param: Callable[[], torch.nn.Parameter] = weakref.ref(param)  # type: ignore[assignment]  # outlives this
        self._lay_out(device)

        # Who needs it, what forwards on this rank wrote to it, and who fetches it when a forward meets it.
        self.persist = False  # stays gathered between uses
        self.needs: Counter[Need] = Counter()  # holds
        self.uses = 0  # by modules that run
        self.holds = 0  # both together
        self.own_writes = OwnWrites()
        self._version = 0  # the parameter's, when the use began
        # The last state dict that has the whole value, and that value.
        self._asked: tuple[Callable[[], Any], Callable[[], torch.Tensor | None]] = (lambda: None,) * 2
        self.conductor: Conductor | None = None
        self.active_modules: set[int] = set()  # what clients know as ds_active_sub_modules

    def _lay_out(self, device: torch.device) -> None:
        """Make ``full``, without memory, and show that nothing is here."""
        # Its views are made once: to make them for each gather would be half the work of a small layer.
        self.full = torch.empty(self.layout.padded_numel, dtype=self.dtype, device=device)
        self.rows = self.full.view(self.group.size, self.shard_numel)  # by rank; each of these:
        self.row_of = self.rows.unbind()
        self.own_elements = self.own.of(self.full)
        self._whole, self._nothing = self.full[: self.numel].view(self.shape), self.full.new_empty(0)
        self._storage, self._nbytes = self.full.untyped_storage(), self.full.nbytes
        self._storage.resize_(0)
        self.route = (self.group, self.dtype, device)  # what may be in one message has the same
        self.memory = self._storage._cdata  # the same for every tensor that is a view of ``full``
        self._turn(State.AWAY, self._nothing)

    # ---- what it is ----

    @property
    def param(self) -> torch.nn.Parameter:
        return self._param()

    @property
    def name(self) -> str:
        return self.own.name

    @property
    def dtype(self) -> torch.dtype:
        return self.own.dtype

    @property
    def layout(self) -> FlatShards:
        return self.own.layout

    @property
    def source(self) -> torch.Tensor:  # 1D, shard_numel
        return self.own.source

    @property
    def gathered(self) -> bool:
        """Whether the whole value is here and may be read."""
        return self.state is State.WHOLE

    def adopt(self, name: str, ident: int, group: Group, everyone: Group) -> None:
        """Be known by this name among these ranks."""
        self.ident, self.group, self.everyone = ident, group, everyone
        self.own.lay_out(name, group)
        LEASES.hold(group, self)

    def live_at(
        self,
        source: torch.Tensor,
        master: torch.Tensor | None,
        let_go: Tell | None = None,
        read_ahead: Tell | None = None,
        remote: bool | None = None,
        exposed: tuple[Exposed, slice] | None = None,
    ) -> None:
        self.own.live_at(source, master, let_go, read_ahead, remote, exposed)

    def cast(self, dtype: torch.dtype, device: torch.device) -> None:
        """Change the dtype and device of a parameter, which is put to rest."""
        self.release()
        if dtype != self.dtype or device != self.full.device:
            self.own.cast(dtype, device)
            self._lay_out(device)

    def twin(self, param: torch.nn.Parameter) -> Shards:
        """Shards of the same value, at rest, for another parameter; not collective, as nothing is gathered."""
        twin = copy.copy(self)
        LEASES.hold(self.group, twin)
        twin.own = copy.copy(self.own)
        twin.own.keep(self.source.to(self.dtype, copy=True))
        twin._begin(param, self.full.device)
        return twin

    # ---- from shard to whole value and back ----

    def start_gather(self, note: int = 0) -> None:
        """Begin to gather; does nothing unless the parameter is at rest. The peers are told ``note``."""
        start_gathers([(self,)], note)

    def finish_gather(self, unless_alone: bool = False) -> int | None:
        """Wait for the gather under way, if any; the parameter is then available.

        ``unless_alone``: only if peers may be waiting for what this rank hands on in it.
        Returns the lowest of all ranks' notes; None where nothing was under way, or ``Group.speaks`` is false.
        """
        gather = self._gather
        if gather is None or (unless_alone and not gather.peers_wait):
            return None
        return gather.finish()

    def depart(self, gather: Gather) -> None:
        # The memory first: where it is short the parameter stays at rest, and may be gathered later.
        self._storage.resize_(self._nbytes)
        self.state = check_transition(self.own.name, self.state, State.INFLIGHT)
        self._gather = gather

    def arrive(self) -> None:
        self._gather = self._lost = None
        if self.own_writes.edits is not None:  # not joined yet: this rank goes on with what it wrote
            self.full[: self.numel].copy_(self.own_writes.edits.view(-1))
        self._turn(State.WHOLE, self._whole)

    def give_up(self, free: bool) -> None:
        """The gather failed; not ``free``: the transport may still write to the memory."""
        if self.state is State.INFLIGHT:
            self._gather, self._lost = None, self._gather
            self._turn(State.AWAY, self._nothing)
        if free:
            self._storage.resize_(0)

    def gather(self) -> None:
        self.start_gather()
        self.finish_gather()

    def release(self, leave: bool = False) -> None:
        """Free the whole value, whatever was written to it. ``leave``: whoever holds a view of it keeps its storage."""
        if self._gather is not None:
            self.finish_gather()
        if self.state is not State.WHOLE:
            return
        # A view would see the next gather in the old storage: the parameter takes another one; as it does where torch
        # has given the memory to NumPy, for good.
        if leave or not self._storage.resizable():
            self._lay_out(self.full.device)
        else:
            self._turn(State.AWAY, self._nothing)
            self._storage.resize_(0)

    def release_if_idle(self) -> None:
        if self.holds:
            return
        if self.state in (State.SHAPED, State.LOADING):
            self._turn(State.AWAY, self._nothing)
        elif not self.persist:
            self.release()

    def whole(self, asked: Any = None) -> torch.Tensor:
        """A new tensor with the whole value; collective unless it is gathered, and the state stays as it is.

        ``asked``: a state dict, which gets the same tensor under every name that the parameter has.
        """
        # Tied weights have several names, and whoever loads the dict tells by identity that they are one.
        known, value = (ref() for ref in self._asked)
        if asked is not None and known is asked and value is not None:
            return value
        self.finish_gather()
        whole = self._whole.clone() if self.gathered else self.settled()
        with suppress(TypeError):  # a plain dict cannot be told apart from a later one
            self._asked = (weakref.ref(asked), weakref.ref(whole))
        return whole

    def settled(self) -> torch.Tensor:
        """A new tensor with the whole value as the shards have it, whatever was written here; collective."""
        self.finish_gather()
        value = torch.empty(self.layout.padded_numel, dtype=self.dtype, device=self.full.device)
        self.own.gather_into(value)
        return value[: self.numel].view(self.shape)

    # ---- what the parameter shows ----

    def _turn(self, state: State, value: torch.Tensor | None = None) -> None:
        """Be in ``state``, and let the parameter be ``value``, guarded against use unless that is whole."""
        if state is not self.state:
            self.state = check_transition(self.own.name, self.state, state)
        if value is not None:
            param, (here, away) = self._param(), self._faces
            param.__class__ = here  # of which torch asks nothing
            DATA.__set__(param, value)
            if state is not State.WHOLE:
                param.__class__ = away

    def present(self) -> None:
        """Let the parameter be the gathered value, whatever its ``.data`` was set to."""
        self._turn(State.WHOLE, self._whole)

    def show_shape(self, state: State = State.SHAPED) -> None:
        """Until it is idle or gathered: let autograd see the shape, all that it asks for when a gradient arrives.

        LOADING: let torch copy a state dict's value, which then comes to ``write``.
        """
        self.finish_gather()
        if self.state is State.AWAY or (state is State.LOADING and self.state is State.SHAPED):
            self._turn(state, self.full.new_full((), torch.nan).expand(self.shape))

    # ---- edits ----

    def differs(self) -> bool:
        """Whether this rank's elements of the gathered value are no longer those of its shard."""
        return self.own.differs(self.full)

    def write_back(self) -> None:
        """Take this rank's shard anew from the gathered value (the same on every rank)."""
        self.write(self._whole)

    def renewed(self) -> torch.Tensor:
        """The shards were renewed: the memory of the gathered value (1D, padded), to be written to."""
        self.renewals += 1
        return self.full

    def write(self, value: torch.Tensor) -> None:
        """Take this rank's shard from ``value`` (the whole, the same on every rank); not collective."""
        self.renewals += 1
        self.own.renew(self.own.cut(value))
        if self.gathered:
            self.full[: self.numel].copy_(value.detach().reshape(-1))

    def hold(self, need: Need = Need.VALUE) -> Hold:
        """Somebody needs the whole value, until the hold is released."""
        return Hold(self, need)

    def count(self, need: Need, change: int) -> None:
        self.needs[need] += change
        self.holds += change

    @property
    def contexts(self) -> int:
        """How many GatheredParameters hold it."""
        return self.needs[Need.CONTEXT]

    @property
    def in_use(self) -> bool:
        """Whether a write now would be one of a module's forward."""
        return self.uses > 0 and not self.contexts and self.gathered

    def pin(self, pinned: bool) -> None:
        """Whether it is held until this is called again; repeating it changes nothing."""
        self.count(Need.PIN, pinned - self.needs[Need.PIN])

    def stay(self, persist: bool) -> None:
        """Whether it stays gathered between uses from now on."""
        self.persist = persist

    def conduct(self, conductor: Conductor | None) -> None:
        self.conductor = conductor

    @property
    def building(self) -> bool:
        return self.builder is not None and self.builder.active


def begin_uses(every: Iterable[Shards]) -> None:
    """A module that runs needs these, as a hold does, and what it writes to them is noticed."""
    # Every layer does so in every pass: a count, no object, and no call for each parameter.
    for shards in every:
        shards.holds += 1
        shards.uses += 1
        if shards.uses == 1:
            shards._version = shards._param()._version
            if shards.own_writes.alert:
                shards.own_writes.begin(shards)


def end_uses(every: Iterable[Shards], free: bool, wrote: Callable[[Shards], None]) -> None:
    """``free`` as in ``Hold.release``; ``wrote`` is told of each that was written to. All end before one raises."""
    error = None
    for shards in every:
        version = shards._param()._version
        if version != shards._version or shards.own_writes.alert:
            try:
                if shards.own_writes.end(shards, version != shards._version):
                    shards._version = shards._param()._version
                    wrote(shards)
            except UsageError as found:
                error = found
        shards.uses -= 1
        shards.holds -= 1
        if free and not shards.holds and not shards.persist:
            shards.release()
    if error is not None:
        raise error


def shards_of(param: torch.Tensor) -> Shards | None:
    """The parameter's shards; None where its value is whole on each rank."""
    zp = getattr(param, "_zero", None)
    return None if zp is None else zp.shards


def shards_in(module: torch.nn.Module, recurse: bool = True) -> list[Shards]:
    """Those of the module's parameters that are sharded, each once, in order."""
    return shards_among(module.parameters(recurse))


def shards_among(params: Iterable[torch.Tensor | None]) -> list[Shards]:
    """Those of ``params`` that are sharded."""
    found = (None if param is None else shards_of(param) for param in params)
    return [shards for shards in found if shards is not None]
