"""One sharded parameter: this rank's shard, and the whole value while it is gathered.

    at rest     param.data: shape [0]                 shard: 1D, ceil(numel / ranks), fp32 master or own tensor
    gathered    param.data: a view of ``full``        full: 1D, padded; its storage is resized to 0 on release

The storage object of ``full`` lives on, so a view of it that autograd saved is valid again once the parameter
has been gathered again.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch

from zeropipe.comm.collectives import Work, all_gather
from zeropipe.comm.group import Group
from zeropipe.comm.leases import LEASES
from zeropipe.layout.flat import FlatShards, flat_shards
from zeropipe.runtime.zero.gather.own_writes import OwnWrites
from zeropipe.runtime.zero.gather.sharded_parameter import mark_available, mark_unavailable, show_shape
from zeropipe.runtime.zero.param import GATHER as GATHER
from zeropipe.runtime.zero.param import ZeroParam
from zeropipe.runtime.zero.status import ZeroParamStatus, ZeroParamType, check_transition


class Builder(Protocol):
    """A model under construction: while it is active any use of its parameters fetches them, and they show their
    whole shape."""

    active: bool

    def fetch(self, shards: Shards) -> None: ...


class FetchForUse(Protocol):
    """Gathers for a use inside a forward, or only says whether it would (``ask``); False outside of any."""

    def __call__(self, shards: Shards, ask: bool = False) -> bool: ...


class Shards:
    """Owns the elements of one parameter on this rank. ``source``: what a gather reads, any floating dtype."""

    def __init__(self, param: torch.nn.Parameter, name: str, ident: int, group: Group) -> None:
        self.name = name
        self.ident = ident
        self.group = group
        LEASES.hold(group, self)
        self.everyone = group  # with those that hold the same shards (MiCS)
        self.shape = torch.Size(param.shape)
        self.dtype = param.dtype
        spec = (name, tuple(param.shape), str(param.dtype).removeprefix("torch."))
        self.layout: FlatShards = flat_shards([spec], group.size)
        self.numel, self.shard_numel = self.layout.numel, self.layout.shard_numel
        self.status = ZeroParamStatus.AVAILABLE
        self.persist = False  # stays gathered between uses
        self.holds = 0  # users that need it gathered now
        self.uses = 0  # of those, modules that run
        self.shows_shape = False  # though it is away
        self.in_leaf = False  # gathered with a whole module whose children run as the data says
        self.kind = ZeroParamType.PARTITIONED
        self.active_modules: set[int] = set()  # what clients know as ds_active_sub_modules
        # Set by a coordinator: fetches for a use inside a forward and says whether it did.
        self.fetch_for_use: FetchForUse | None = None
        # Set with it: keeps the value for a graph that reads it later, as long as the function says that it may.
        self.keep_for_graph: Callable[[Shards, Callable[[], bool]], None] | None = None
        self.builder: Builder | None = None  # zero.Init that made it
        self.loading = False  # load_state_dict is about to copy a whole value in
        # The last state dict that has the whole value, and that value.
        self.shown: tuple[weakref.ref[Any], weakref.ref[torch.Tensor]] | None = None
        self.contexts = 0  # GatheredParameters that hold it
        self.pinned = False  # held by zero.unshard until zero.reshard
        self.renewals = 0  # how often the shards changed under a gathered value
        self.writes = OwnWrites()  # of modules' forwards on this rank
        self.master: torch.Tensor | None = None  # 1D, shard_numel; where ``source`` is a copy of it
        # Told of elements of ``source`` that were read and are not used for a while.
        self.let_go: Callable[[torch.Tensor], None] = _keep
        self.read_ahead: Callable[[torch.Tensor], None] = _keep  # told of elements that will be read soon
        self._param = weakref.ref(param)
        self._work: Work | None = None
        self.full = torch.zeros(self.layout.padded_numel, dtype=param.dtype, device=param.device)  # 1D
        self.full[: self.numel].copy_(param.detach().reshape(-1))
        self.source = self.full[self._own()].clone()  # 1D, shard_numel
        mark_available(param, self.full[: self.numel].view(self.shape))

    def fetch_in_forward(self, ask: bool = False) -> bool:
        """Gather for a use that is met in the forward of some module, or only say whether one runs (``ask``)."""
        return self.fetch_for_use is not None and self.fetch_for_use(self, ask)

    @property
    def building(self) -> bool:
        return self.builder is not None and self.builder.active

    @property
    def param(self) -> torch.nn.Parameter:
        param = self._param()
        assert param is not None
        return param

    @property
    def own_elements(self) -> torch.Tensor:
        """This rank's elements of the gathered value: 1D, shard_numel, a view."""
        return self.full[self._own()]

    def _own(self) -> slice:
        return slice(*self.layout.shard_range(self.group.rank))

    def cast(self, dtype: torch.dtype, device: torch.device) -> None:
        """Change the dtype and device of a parameter at rest; also takes a new ``name`` into the layout."""
        self.release()
        spec = (self.name, tuple(self.shape), str(dtype).removeprefix("torch."))
        self.layout = flat_shards([spec], self.group.size)
        if dtype != self.dtype or device != self.full.device:
            self.dtype = dtype
            away = self.kind is ZeroParamType.REMOTE  # what offload placed stays there
            self.source = self.source.to(self.source.device if away else device, dtype)
            self.full = torch.empty(self.layout.padded_numel, dtype=dtype, device=device)
            self.full.untyped_storage().resize_(0)
            mark_unavailable(self.param, torch.empty(0, dtype=dtype, device=device))

    def start_gather(self, note: int = 0) -> None:
        """Begin to gather; does nothing unless the parameter is at rest. The peers are told ``note``."""
        if self.status is not ZeroParamStatus.NOT_AVAILABLE:
            return
        # Before the status: where memory is short the parameter stays at rest, and may be gathered later.
        self.full.untyped_storage().resize_(self.full.numel() * self.full.element_size())
        self.status = check_transition(self.name, self.status, ZeroParamStatus.INFLIGHT)
        try:
            own = self.full[self._own()]
            own.copy_(self.source, non_blocking=True)
            self.let_go(self.source)
            self._work = all_gather(
                self.full,
                own,
                self.group,
                label=self.name,
                async_op=True,
                channel=GATHER,
                guarded=True,
                note=note,
            )
        except BaseException:  # nothing is under way: the parameter is at rest as before
            self.status = check_transition(self.name, self.status, ZeroParamStatus.NOT_AVAILABLE)
            self.full.untyped_storage().resize_(0)
            raise

    def finish_gather(self, unless_alone: bool = False) -> int | None:
        """Wait for the gather under way, if any; the parameter is then available.

        ``unless_alone``: only if peers may be waiting for what this rank hands on in it.
        Returns the lowest of all ranks' notes; None where nothing was under way, or ``Group.speaks`` is false.
        """
        if self._work is None or (unless_alone and not self._work.peers_wait):
            return None
        work, self._work = self._work, None
        try:
            work.wait()
        except BaseException:
            self.status = check_transition(self.name, self.status, ZeroParamStatus.NOT_AVAILABLE)
            raise
        self.status = check_transition(self.name, self.status, ZeroParamStatus.AVAILABLE)
        self.shows_shape = False
        if self.writes.edits is not None:  # not joined yet: this rank goes on with what it wrote
            self.full[: self.numel].copy_(self.writes.edits.view(-1))
        mark_available(self.param, self.full[: self.numel].view(self.shape))
        return work.lowest_note

    def gather(self) -> None:
        self.start_gather()
        self.finish_gather()

    def release(self) -> None:
        """Free the whole value, whatever was written to it; the shard remains."""
        self.finish_gather()
        if self.status is not ZeroParamStatus.AVAILABLE:
            return
        self.status = check_transition(self.name, self.status, ZeroParamStatus.NOT_AVAILABLE)
        mark_unavailable(self.param, self.full.new_empty(0))
        self.full.untyped_storage().resize_(0)

    def leave(self) -> None:
        """As ``release``, but the storage goes on to whoever holds a view of it."""
        self.finish_gather()
        if self.status is ZeroParamStatus.AVAILABLE:
            self.status = check_transition(self.name, self.status, ZeroParamStatus.NOT_AVAILABLE)
            mark_unavailable(self.param, self.full.new_empty(0))
            self.full = torch.empty_like(self.full)
            self.full.untyped_storage().resize_(0)

    def begin_loading(self) -> None:
        """Let torch see the shape, of memory to which it cannot write; what it copies in comes to ``write``."""
        self.loading = True
        mark_unavailable(self.param, self.full.new_empty(()).expand(self.shape))

    def end_loading(self) -> None:
        self.loading = False
        mark_unavailable(self.param, self.full.new_empty(0))

    def release_if_idle(self) -> None:
        if self.holds:
            return
        if self.shows_shape:
            self.shows_shape = False
            mark_unavailable(self.param, self.full.new_empty(0))
        elif not self.persist:
            self.release()

    def show_shape(self) -> None:
        """Until it is idle or gathered: let autograd see the shape, which is all that it asks for when a gradient
        arrives that was made without the value."""
        self.finish_gather()
        if self.status is ZeroParamStatus.NOT_AVAILABLE:
            self.shows_shape = True
            show_shape(self.param, self.shape)

    def write_back(self) -> None:
        """Take this rank's shard anew from the gathered value (the same on every rank)."""
        assert self.status is ZeroParamStatus.AVAILABLE
        self._renew(self.full[self._own()])

    def write(self, value: torch.Tensor) -> None:
        """Take this rank's shard from ``value`` (the whole, the same on every rank); not collective."""
        cut = torch.zeros(self.shard_numel, dtype=self.dtype, device=self.source.device)
        flat = value.detach().reshape(-1)
        for piece in self.layout.pieces(self.group.rank):
            cut[piece.offset : piece.offset + piece.numel].copy_(
                flat[piece.start : piece.start + piece.numel]
            )
        self._renew(cut)
        if self.status is ZeroParamStatus.AVAILABLE:
            self.full[: self.numel].copy_(flat)

    def whole(self) -> torch.Tensor:
        """A new tensor with the whole value; collective unless it is gathered, and the state stays as it is."""
        self.finish_gather()
        if self.status is ZeroParamStatus.AVAILABLE:
            return self.full[: self.numel].clone().view(self.shape)
        return self.settled()

    def live_at(
        self,
        source: torch.Tensor,
        master: torch.Tensor | None,
        let_go: Callable[[torch.Tensor], None] | None = None,
        read_ahead: Callable[[torch.Tensor], None] | None = None,
        remote: bool | None = None,
    ) -> None:
        """From now on gathers read ``source``, which ``master`` (None: it is the master) is rounded into."""
        self.source, self.master = source, master
        self.let_go = self.let_go if let_go is None else let_go
        self.read_ahead = self.read_ahead if read_ahead is None else read_ahead
        if remote is not None:
            self.kind = ZeroParamType.REMOTE if remote else ZeroParamType.PARTITIONED

    def show(self, whole: torch.Tensor) -> None:
        """The shards were renewed: let the gathered value be ``whole`` (1D, with or without padding)."""
        self.renewals += 1
        self.full[: whole.numel()].copy_(whole)

    def hold(self) -> None:
        """A use by a module begins: from here on writes are noticed."""
        self.holds += 1
        self.uses += 1
        if self.uses == 1:
            self.writes.begin(self)

    @property
    def in_use(self) -> bool:
        """Whether a write now would be one of a module's forward."""
        return self.uses > 0 and not self.contexts and self.status is ZeroParamStatus.AVAILABLE

    def settled(self) -> torch.Tensor:
        """A new tensor with the whole value as the shards have it, whatever was written here; collective."""
        self.finish_gather()
        value = torch.empty(self.layout.padded_numel, dtype=self.dtype, device=self.full.device)
        own = value[self._own()]
        own.copy_(self.source)
        self.let_go(self.source)
        all_gather(value, own, self.group, label=self.name, channel=GATHER, guarded=True)
        return value[: self.numel].view(self.shape)

    def differs(self) -> bool:
        """Whether this rank's elements of the gathered value are no longer those of its shard."""
        own = self.own_elements
        return not torch.equal(own.view(torch.uint8), self.source.to(own.device, own.dtype).view(torch.uint8))

    def _renew(self, shard: torch.Tensor) -> None:
        """Set the shard to ``shard`` (1D, in the parameter's dtype). An fp32 master keeps the bits of elements that
        did not change in the parameter's precision."""
        self.renewals += 1
        for place in (self.source, self.master):
            if place is None:
                continue
            if place.dtype == shard.dtype:
                place.copy_(shard)
            else:
                new = shard.to(place.device)
                place.copy_(torch.where(new == place.to(new.dtype), place, new.to(place.dtype)))
            self.let_go(place)

    def duplicate(self, param: torch.nn.Parameter) -> torch.nn.Parameter:
        """Another parameter with shards of the same value, at rest; not collective, as nothing is gathered."""
        empty = torch.empty(0, dtype=self.dtype, device=self.full.device)
        other = torch.nn.Parameter(empty, param.requires_grad)
        shards = copy.copy(self)
        LEASES.hold(self.group, shards)
        shards._param = weakref.ref(other)
        shards.source = self.source.to(self.dtype, copy=True)
        shards.master, shards.let_go, shards.read_ahead = None, _keep, _keep
        shards.full = torch.empty_like(self.full)
        shards.full.untyped_storage().resize_(0)
        shards.persist, shards.pinned = False, False
        shards.holds, shards.uses, shards.contexts = 0, 0, 0
        shards.active_modules, shards.shown, shards.fetch_for_use = set(), None, None
        shards.keep_for_graph = None
        shards.writes = OwnWrites()
        other._zero = ZeroParam(self.name, shards=shards)  # type: ignore[attr-defined]
        mark_unavailable(other, empty)
        return other


def _keep(tensor: torch.Tensor) -> None:
    """Memory that is nowhere else needs no telling."""


def shards_of(param: torch.Tensor) -> Shards | None:
    """The parameter's shards; None where its value is whole on each rank."""
    zp = getattr(param, "_zero", None)
    return None if zp is None else zp.shards


def shard_parameter(param: torch.nn.Parameter, name: str, ident: int, group: Group) -> Shards:
    """Cut ``param`` (the same value on every rank) into shards and free the whole. Not collective."""
    shards = Shards(param, name, ident, group)
    param._zero = ZeroParam(name, shards=shards)  # type: ignore[attr-defined]
    shards.release()
    return shards
