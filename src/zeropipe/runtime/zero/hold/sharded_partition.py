"""A partition of stage 3: parameters that are shards, whose masters lie end to end in one 1-D tensor.

    master   |-- a's shard --|- b's -|------ c's shard ------|pad|      fp32, this rank's; the optimizer steps it
    a        gathered from every rank's "a's shard" when a module needs it, cast to a's dtype on the way

No second copy exists: in fp32 as in 16 bits a gather reads the master.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from zeropipe.comm.collectives import all_gather
from zeropipe.comm.group import Group
from zeropipe.layout.flat import FlatShards, flat_shards
from zeropipe.runtime.optimizers.shard_view import ShardView
from zeropipe.runtime.zero.gather.shards import GATHER, Shards, shards_of
from zeropipe.runtime.zero.hold.held_state import HeldState
from zeropipe.runtime.zero.hold.partition import ALIGN
from zeropipe.runtime.zero.hold.policy import Policy
from zeropipe.runtime.zero.status import ZeroParamStatus

if TYPE_CHECKING:
    from zeropipe.runtime.zero.hold.optimizer import ZeroOptimizer


class ShardedPartition:
    """Owns the masters of its parameters' shards. Attributes and methods are those of ``Partition``.

    ``flat``: the optimizer steps on the master as one tensor; otherwise on its pieces, one per parameter, each
    the 1-D shard of that parameter (optimizers that need whole tensors).
    """

    sharded = True

    def __init__(
        self,
        names: Sequence[str],
        params: Sequence[torch.nn.Parameter],
        group_index: int,
        group: Group,  # the ranks that train together; shards may lie within a part of them (MiCS)
        policy: Policy,
        owner: ZeroOptimizer,
        flat: bool = True,
    ) -> None:
        self.owner = owner
        self.names = tuple(names)
        self.params = tuple(params)
        self.group_index = group_index
        self.dtype = params[0].dtype
        self.device = params[0].device
        self.shards: tuple[Shards, ...] = tuple(_shards(param) for param in params)
        self.group = self.shards[0].group
        self.replicas = owner.options.replicas  # the ranks that hold these very shards
        self.shard = self.group.rank
        assert self.group.size * self.replicas.size == group.size
        self.shapes = tuple(tuple(shards.shape) for shards in self.shards)
        specs = ((s.name, (s.shard_numel,), "float32") for s in self.shards)
        self.local_layout: FlatShards = flat_shards(specs, 1, ALIGN)  # where each shard lies in the master
        offload = owner.offload
        numel = self.local_layout.padded_numel
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        master = offload.state(numel, wide, self.device)
        # What gathers read where that is not the master: 1D, as the master, in the parameters' dtype.
        self.values: torch.Tensor | None = None
        if not offload.gathers_read_masters(self.dtype, self.device):
            self.values = offload.source(numel, self.dtype, self.device)
        for index, shards in enumerate(self.shards):
            piece = master[slice(*self.local_layout.tensor_range(index))]
            offload.copy(piece, shards.source)
            self._place(index, piece)
        self.master = torch.nn.Parameter(master)  # 1D, fp32
        self.flat = flat
        self.stepped = [self.master] if flat else [torch.nn.Parameter(piece) for piece in self.pieces(master)]
        self.state = HeldState(self, owner.optimizer)
        # What the parameters that stay gathered showed last, and which these were: to see that somebody wrote to them.
        self._shown: tuple[list[tuple[int, int]], torch.Tensor]
        self._remember()

    def _place(self, index: int, piece: torch.Tensor) -> None:
        """Let parameter ``index`` have ``piece`` as its master, and gathers read the place meant for them."""
        shards, offload = self.shards[index], self.owner.offload
        remote = offload.is_remote(self.device)
        told = (offload.let_go, offload.read_ahead if remote else None, remote)
        if self.values is None:
            shards.live_at(piece, None, *told)
            return
        copy = self.values[slice(*self.local_layout.tensor_range(index))]
        offload.copy(copy, shards.source)
        shards.live_at(copy, piece, *told)

    def pieces(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """A master-sized tensor cut into each parameter's shard: 1D views."""
        return [tensor[slice(*self.local_layout.tensor_range(index))] for index in range(len(self.params))]

    def views(self) -> dict[torch.nn.Parameter, ShardView]:
        """What an optimizer that needs whole tensors is told of each tensor that it steps."""
        pairs = zip(self.stepped, self.shards, strict=True)
        return {tensor: ShardView(shards.layout, self.shard, self.group) for tensor, shards in pairs}

    def flats(self) -> Iterator[tuple[str, FlatShards, int, slice]]:
        """(name, layout, shard, where it lies in a master-sized tensor) of every parameter, for a checkpoint."""
        for index, shards in enumerate(self.shards):
            yield shards.name, shards.layout, self.shard, slice(*self.local_layout.tensor_range(index))

    def load_gradient(self, shard: torch.Tensor, factor: float) -> None:
        """Set the master's gradient to ``factor`` times ``shard`` (1D, as the master); may scale it in place."""
        if shard.dtype == self.master.dtype and shard.device == self.master.device:
            grad = shard if factor == 1.0 else shard.mul_(factor)
        else:
            grad = shard.to(self.master.dtype, copy=True).mul_(factor).to(self.master.device)
        if self.flat:
            self.master.grad = grad
            return
        for index, tensor in enumerate(self.stepped):
            tensor.grad = grad[slice(*self.local_layout.tensor_range(index))]

    def drop_gradients(self, indices: Sequence[int] | None = None) -> None:
        """Take the gradients off what is stepped: all of it, or (where not flat) of some parameters."""
        if self.flat:
            if indices is None:
                self.master.grad = None
            return
        for index in range(len(self.stepped)) if indices is None else indices:
            self.stepped[index].grad = None

    def publish(self) -> None:
        """Make the parameters that are gathered now show the stepped masters; the others are gathered at use."""
        if self.values is not None:
            self.owner.offload.copy(self.values, self.master.detach())
        gathered = [s for s in self.shards if s.status is ZeroParamStatus.AVAILABLE and s.numel]
        if not gathered:
            return
        layout = flat_shards(((s.name, (s.shard_numel,), "") for s in gathered), 1)
        # Row r: rank r's shards of all that is gathered.
        wire = torch.empty((self.group.size, layout.numel), dtype=self.dtype, device=self.device)
        own = wire[self.shard]
        for index, shards in enumerate(gathered):
            own[slice(*layout.tensor_range(index))].copy_(shards.source)
            shards.let_go(shards.source)
        all_gather(wire.view(-1), own, self.group, label="persistent parameters")
        for index, shards in enumerate(gathered):
            shards.show(wire[:, slice(*layout.tensor_range(index))].reshape(-1))
        self._remember()

    def check_dtypes(self) -> None:
        """Shards refuse another dtype when it is assigned."""

    def take_edits(self, sure: bool = False) -> None:
        """Let what was written to parameters that stay gathered reach their masters.

        Not collective: each rank takes the elements of its shards, so all must have written the same. What a
        ``GatheredParameters`` holds is left to that.
        """
        gathered = self._gathered()
        known, values = self._shown
        if known == _facts(gathered):
            here = self._own_elements(gathered)
            if torch.equal(here, values):
                return
            sizes = [shards.shard_numel for shards in gathered]
            pairs = zip(gathered, here.split(sizes), values.split(sizes), strict=True)
            edited = [shards for shards, new, old in pairs if not torch.equal(new, old)]
        else:  # others were gathered then, or the shards were written since
            edited = gathered
        for shards in edited:
            if shards.differs():
                shards.write_back()
        self._remember()

    def take_edit(self, index: int) -> None:
        """``take_edits`` of one parameter."""
        shards = self.shards[index]
        gathered = shards.status is ZeroParamStatus.AVAILABLE and shards.numel and not shards.contexts
        if gathered and shards.differs():
            shards.write_back()

    def _remember(self) -> None:
        gathered = self._gathered()
        self._shown = (_facts(gathered), self._own_elements(gathered))

    def _own_elements(self, gathered: Sequence[Shards]) -> torch.Tensor:
        """1D, a copy."""
        nothing = torch.empty(0, dtype=self.dtype, device=self.device)
        return torch.cat([nothing, *(shards.own_elements for shards in gathered)])

    def _gathered(self) -> list[Shards]:
        return [
            s for s in self.shards if s.status is ZeroParamStatus.AVAILABLE and s.numel and not s.contexts
        ]

    def refresh_master(self) -> None:
        """After the values were written: nothing to do where they have no existence of their own beside the master."""
        if self.values is not None:
            self.owner.offload.copy(self.master.detach(), self.values)

    def new_state(self, dtype: torch.dtype) -> torch.Tensor:
        """Zeros for one kind of optimizer state, as the master, where this partition's state lives."""
        return self.owner.offload.state(self.local_layout.padded_numel, dtype, self.device)

    def full(self, shard: torch.Tensor, index: int) -> torch.Tensor:
        """Parameter ``index``'s elements of a master-sized tensor, from all ranks; collective. A new tensor."""
        shards = self.shards[index]
        own = shard[slice(*self.local_layout.tensor_range(index))].to(self.device)
        whole = torch.empty(shards.layout.padded_numel, dtype=shard.dtype, device=self.device)
        all_gather(whole, own, self.group, label=shards.name, channel=GATHER, guarded=True)
        return whole[: shards.numel].view(shards.shape)

    def scatter(self, shard: torch.Tensor, index: int, value: torch.Tensor) -> None:
        """Write this rank's piece of ``value`` (the parameter's shape) into a master-sized tensor."""
        if self.device.type == "cuda":  # a copy from host memory may still be under way
            torch.cuda.current_stream(self.device).synchronize()
        place = shard[slice(*self.local_layout.tensor_range(index))]
        place.copy_(self._cut(index, value))
        self.owner.offload.let_go(place)

    def local(self, shard: torch.Tensor, index: int) -> torch.Tensor:
        """This rank's elements of parameter ``index`` in a master-sized tensor: a 1D view, without padding."""
        start, _ = self.local_layout.tensor_range(index)
        numel = sum(piece.numel for piece in self.shards[index].layout.pieces(self.shard))
        return shard[start : start + numel]

    def range_of(self, index: int) -> tuple[int, int]:
        """[start, stop): where this rank's shard of parameter ``index``, padding included, lies in the master."""
        return self.local_layout.tensor_range(index)

    def write_value(self, index: int, value: torch.Tensor) -> None:
        """Set parameter ``index`` to ``value`` (its shape, the same on every rank)."""
        self.scatter(self.master.detach(), index, value)
        if self.values is not None:
            self.scatter(self.values, index, value)
        shards = self.shards[index]
        if shards.status is ZeroParamStatus.AVAILABLE:
            shards.show(value.detach().reshape(-1))

    def move_values(self, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Let what gathers read, where it is a copy of the masters, be ``move`` of itself."""
        if self.values is None:
            return
        self.values = move(self.values)
        for shards, piece in zip(self.shards, self.pieces(self.values), strict=True):
            shards.source = piece

    def move_master(self, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Let the master be ``move`` of itself; gathers go on reading it, wherever it is."""
        self.master.data = move(self.master.data)
        for index, piece in enumerate(self.pieces(self.master.data)):
            if self.values is None:
                self.shards[index].source = piece
            else:
                self.shards[index].master = piece
            if not self.flat:
                self.stepped[index].data = piece

    def release(self) -> None:
        """Leave the parameters as shards without an optimizer."""
        for shards in self.shards:
            if not self.owner.offload.is_remote(self.device):
                shards.source = shards.source.to(self.device, self.dtype, copy=True)
            shards.master = None

    def _cut(self, index: int, value: torch.Tensor) -> torch.Tensor:  # 1D, shard_numel, this rank's
        """This rank's shard of a whole value."""
        shards = self.shards[index]
        cut = torch.zeros(shards.shard_numel, dtype=value.dtype, device=value.device)
        flat = value.detach().reshape(-1)
        for piece in shards.layout.pieces(self.shard):
            cut[piece.offset : piece.offset + piece.numel] = flat[piece.start : piece.start + piece.numel]
        return cut


def _facts(gathered: Sequence[Shards]) -> list[tuple[int, int]]:
    """What changes when other parameters are gathered, or the shards are written behind the gathered values."""
    return [(shards.ident, shards.renewals) for shards in gathered]


def _shards(param: torch.nn.Parameter) -> Shards:
    shards = shards_of(param)
    assert shards is not None
    return shards
