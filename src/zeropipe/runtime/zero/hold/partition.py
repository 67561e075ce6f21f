"""A partition: parameters of one param group and dtype, laid flat, with the fp32 master shard of this rank.

    values   |---------- shard 0 ----------|---------- shard 1 ----------|   parameters are views into it
    master                                 |####### fp32, rank 1 ########|   the one tensor that is stepped

In fp32 the master *is* this rank's slice of the values, so nothing is stored twice; in 16 bits it is a tensor
of its own, and the values are rounded from it after each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from zeropipe.comm.collectives import Work, all_gather, broadcast, gather_from_owners
from zeropipe.comm.group import SELF, Group
from zeropipe.errors import UsageError
from zeropipe.layout.flat import FlatShards, flat_shards
from zeropipe.runtime.optimizers.shard_view import ShardView
from zeropipe.runtime.zero.hold.held_state import HeldState
from zeropipe.runtime.zero.hold.policy import Policy

if TYPE_CHECKING:
    from zeropipe.runtime.zero.hold.optimizer import ZeroOptimizer

# Elements of one cache line of fp32. torch's fused CPU steps handle the last numel % 16 elements in a scalar loop
# whose rounding differs by an ulp; a whole number of lines leaves no such rest, so that where the shards are cut
# (stage, number of ranks, threads) never shows in the numbers.
ALIGN = 16


class Partition:
    """Owns the values and the master of its parameters; see the picture above.

    ``names``: dotted names, as in ``module.named_parameters()``. ``group_index``: index of the param group.
    ``flat``: the optimizer steps on the master as one 1-D tensor; otherwise (unsharded partitions only) on its
    views, one per parameter in the parameter's own shape.
    """

    def __init__(
        self,
        names: Sequence[str],
        params: Sequence[torch.nn.Parameter],
        group_index: int,
        group: Group,
        policy: Policy,
        owner: ZeroOptimizer,
        flat: bool = True,
    ) -> None:
        self.owner = owner
        self.names = tuple(names)
        self.params = tuple(params)
        self.group_index = group_index
        self.group = group
        self.sharded = policy.shards_optimizer
        self._publish_numel = policy.publish_numel
        self.dtype = params[0].dtype
        specs = (
            (n, tuple(p.shape), str(p.dtype).removeprefix("torch."))
            for n, p in zip(names, params, strict=True)
        )
        self.shapes = tuple(tuple(param.shape) for param in params)
        self.layout: FlatShards = flat_shards(specs, group.size if self.sharded else 1, ALIGN)
        self.shard = group.rank if self.sharded else 0
        self._starts = tuple(self.layout.tensor_range(index)[0] for index in range(len(self.params)))
        self.values = _flatten(self.params, self.layout)  # 1D, padded_numel
        start, stop = self.layout.shard_range(self.shard)
        self.own_values = self.values[start:stop]  # 1D, shard_numel; a view
        broadcast(self.values, 0, group, label="initial values")
        self.master = torch.nn.Parameter(self._make_master(policy))  # 1D, shard_numel, fp32
        assert flat or not self.sharded
        self.flat = flat
        self.stepped = [self.master] if flat else self._views()  # what the torch optimizer holds
        self.state = HeldState(self, owner.optimizer)
        self._versions = [param._version for param in self.params]

    @property
    def master_is_values(self) -> bool:
        return self.master.data_ptr() == self.own_values.data_ptr() and self.own_values.numel() > 0

    def _make_master(self, policy: Policy) -> torch.Tensor:
        offloaded = policy.offload_optimizer and self.values.device.type != "cpu"
        if self.dtype in (torch.float32, torch.float64) and not offloaded:
            return self.own_values
        host = None
        if offloaded:
            host = torch.empty(self.own_values.shape, dtype=torch.float32, pin_memory=policy.pin_memory)
        return self.own_values.float() if host is None else host.copy_(self.own_values)

    def _views(self) -> list[torch.nn.Parameter]:
        if self.master_is_values:
            return list(self.params)
        views = self.pieces(self.master.detach())
        return [torch.nn.Parameter(v.view(p.shape)) for v, p in zip(views, self.params, strict=True)]

    def pieces(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """A master-sized tensor cut into each parameter's elements: 1D views; of an unsharded partition."""
        assert not self.sharded
        return [tensor[slice(*self.layout.tensor_range(index))] for index in range(len(self.params))]

    def new_state(self, dtype: torch.dtype) -> torch.Tensor:
        """Zeros for one kind of optimizer state, as the master."""
        return torch.zeros_like(self.master, dtype=dtype, requires_grad=False)

    def range_of(self, index: int) -> tuple[int, int]:
        """[start, stop): where this rank's elements of parameter ``index`` lie in a shard-sized tensor."""
        for piece in self.layout.tensor_pieces(index):
            if piece.shard == self.shard:
                return piece.offset, piece.offset + piece.numel
        return 0, 0

    def load_gradient(self, shard: torch.Tensor, factor: float) -> None:
        """Set the master's gradient to ``factor`` times ``shard`` (1D, shard_numel); may scale it in place."""
        if shard.dtype == self.master.dtype and shard.device == self.master.device:
            grad = shard if factor == 1.0 else shard.mul_(factor)
        else:
            grad = shard.to(self.master.dtype, copy=True)
            if factor != 1.0:
                grad.mul_(factor)
            grad = grad.to(self.master.device)
        if self.flat:
            self.master.grad = grad
            return
        for index, tensor in enumerate(self.stepped):
            tensor.grad = grad[slice(*self.layout.tensor_range(index))].view(tensor.shape)

    def drop_gradients(self, indices: Sequence[int] | None = None) -> None:
        """Take the gradients off what is stepped: all of it, or (where not flat) of some parameters."""
        if self.flat:
            if indices is None:
                self.master.grad = None
            return
        for index in range(len(self.stepped)) if indices is None else indices:
            self.stepped[index].grad = None

    @property
    def replicas(self) -> Group:
        """The ranks that hold the same shard as this one."""
        return SELF if self.sharded else self.group

    def views(self) -> dict[torch.nn.Parameter, ShardView]:
        """What an optimizer that needs whole tensors is told of the master."""
        return {self.master: ShardView(self.layout, self.shard, self.group if self.sharded else SELF)}

    def flats(self) -> Iterator[tuple[str, FlatShards, int, slice]]:
        """(name, layout, shard, where it lies in a master-sized tensor) of this partition, for a checkpoint."""
        name = f"group{self.group_index}.{str(self.dtype).removeprefix('torch.')}.{self.names[0]}"
        yield name, self.layout, self.shard, slice(0, self.layout.shard_numel)

    def _values_of(self, index: int) -> torch.Tensor:
        """The parameter's value in the flat buffer: 1D, a view."""
        start, stop = self.layout.tensor_range(index)
        return self.values[start:stop]

    def publish(self) -> None:
        """Round the stepped master into the values and give every rank the whole of them."""
        if self.layout.numel == 0:
            return
        if len(self.runs) > 1:
            for work in [self.publish_run(start, stop) for start, stop in self.runs]:
                work.wait()
            return
        if not self.master_is_values:
            self.own_values.copy_(self.master.detach(), non_blocking=True)
        if self.sharded and self.group.size > 1:
            all_gather(self.values, self.own_values, self.group, label="parameters")

    @cached_property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """The parts of a shard, [start, stop), that are published one by one; the same on every rank."""
        apart = self.sharded and self.group.size > 1 and self.values.device.type == "cpu"
        size = self._publish_numel if apart else max(self.layout.shard_numel, 1)
        return tuple(cuts(self.layout.shard_numel, size))

    def publish_run(self, start: int, stop: int) -> Work:
        """``publish`` of the elements [start, stop) of every rank's shard, which may still be under way."""
        if not self.master_is_values:
            self.own_values[start:stop].copy_(self.master.detach()[start:stop])
        shards = self.values.view(self.group.size, -1)
        cuts = [(rank, shards[rank, start:stop]) for rank in range(self.group.size)]
        return gather_from_owners(cuts, self.group, label="parameters", async_op=True)

    def write_value(self, index: int, value: torch.Tensor) -> None:
        """Set parameter ``index`` to ``value`` (its shape, the same on every rank): master and values."""
        self.scatter(self.master.detach(), index, value)
        self._values_of(index).copy_(value.detach().reshape(-1))

    def refresh_master(self) -> None:
        """Take the master anew from the values, after somebody wrote those (a loaded state dict, an edit)."""
        if not self.master_is_values:
            self.master.detach().copy_(self.own_values)

    def take_edits(self, sure: bool = False) -> None:
        """Let what was written to parameters in place, under ``no_grad``, reach a master that is a tensor of its own.

        Not collective: each rank takes the elements of its shard, so all must have written the same. The version
        counters tell of it, which a write through ``.data`` leaves alone; a tensor that was assigned to ``.data`` is
        told by its place. ``sure``: look at the values, whatever the counters say.
        """
        first, size = self.values.data_ptr(), self.values.element_size()
        for index, param in enumerate(self.params):
            if param.data_ptr() != first + self._starts[index] * size:
                self._bring_home(index)
        versions = [param._version for param in self.params]
        if versions == self._versions and not sure:
            return
        self._versions = versions
        if not self.master_is_values:
            take_edited(self.master.detach(), self.own_values)

    def _bring_home(self, index: int) -> None:
        """Copy a value that was assigned to ``param.data`` into the flat buffer, and show that again."""
        param, home = self.params[index], self._values_of(index).view(self.shapes[index])
        if not param.numel() or param.data_ptr() == home.data_ptr():
            return
        self.check_dtypes([index])
        if param.shape != home.shape:
            raise UsageError(
                f"parameter '{self.names[index]}' was given other data (param.data = ...)",
                expected=f"shape {tuple(home.shape)}",
                found=f"shape {tuple(param.shape)}",
                fix="give it data of its shape, or a model of the new shape an engine of its own",
            )
        home.copy_(param.detach())
        param.data = home
        self._versions[index] = -1  # an edit, whatever its counter says

    def check_dtypes(self, indices: Sequence[int] = (0,)) -> None:
        """Raise UsageError where the module was converted (``module.half()``) after the engine had taken it; that
        converts all parameters, so that one tells."""
        for index in indices:
            param = self.params[index]
            if param.dtype != self.dtype or param.device != self.values.device:
                raise UsageError(
                    f"parameter '{self.names[index]}' is trained in {self.dtype} on {self.values.device} and cannot "
                    f"become {param.dtype} on {param.device}. Fix: choose the precision in the config (bf16 or fp16)"
                )

    def take_edit(self, index: int) -> None:
        """``take_edits`` of one parameter."""
        self._bring_home(index)
        version = self.params[index]._version
        if version == self._versions[index]:
            return
        self._versions[index] = version
        if not self.master_is_values:
            take_edited(self.local(self.master.detach(), index), self.local(self.own_values, index))

    def full(self, shard: torch.Tensor, index: int) -> torch.Tensor:
        """Parameter ``index``'s elements of a shard-sized tensor (master, gradient or state), from all ranks.

        Collective over the group when the partition is sharded. Returns a new tensor of the parameter's shape.
        """
        spec = self.layout.tensors[index]
        whole = torch.zeros(spec.numel, dtype=shard.dtype, device=self.values.device)
        for piece in self.layout.tensor_pieces(index):
            view = whole[piece.start : piece.start + piece.numel]
            if piece.shard == self.shard:
                view.copy_(shard[piece.offset : piece.offset + piece.numel])
            if self.sharded:
                broadcast(view, piece.shard, self.group, label=spec.name)
        return whole.view(spec.shape)

    def scatter(self, shard: torch.Tensor, index: int, value: torch.Tensor) -> None:
        """Write this rank's piece of ``value`` (the parameter's shape) into a shard-sized tensor."""
        flat = value.detach().reshape(-1)
        for piece in self.layout.tensor_pieces(index):
            if piece.shard == self.shard:
                shard[piece.offset : piece.offset + piece.numel].copy_(
                    flat[piece.start : piece.start + piece.numel]
                )

    def local(self, shard: torch.Tensor, index: int) -> torch.Tensor:
        """This rank's elements of parameter ``index`` in a shard-sized tensor: a 1D view, empty if it has none."""
        return shard[slice(*self.range_of(index))]

    def move_values(self, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Let the values (in fp32 the master with them) be ``move`` of themselves."""
        with_master = self.master_is_values
        self.values = move(self.values)
        self.own_values = self.values[slice(*self.layout.shard_range(self.shard))]
        for index, param in enumerate(self.params):
            param.data = self._values_of(index).view(param.shape)
        if with_master:
            self.master.data = self.own_values

    def move_master(self, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Let a master that is a tensor of its own be ``move`` of itself."""
        if self.master_is_values:
            return
        self.master.data = move(self.master.data)
        if not self.flat:
            for index, tensor in enumerate(self.stepped):
                tensor.data = self.master.data[slice(*self.layout.tensor_range(index))].view(tensor.shape)

    def release(self) -> None:
        """Give the parameters storage of their own again."""
        for param in self.params:
            param.data = param.data.clone()


def take_edited(master: torch.Tensor, values: torch.Tensor) -> None:
    """Set ``master`` to ``values`` (its shape, any dtype) where these are not what it rounds to; the rest keeps its
    bits."""
    new = values.to(master.device)
    master.copy_(torch.where(new == master.to(new.dtype), master, new.to(master.dtype)))


def _flatten(params: Sequence[torch.nn.Parameter], layout: FlatShards) -> torch.Tensor:
    """Move the parameters into one buffer, one at a time, so that at most one exists twice."""
    first = params[0]
    flat = torch.zeros(layout.padded_numel, dtype=first.dtype, device=first.device)
    for index, param in enumerate(params):
        start, stop = layout.tensor_range(index)
        view = flat[start:stop].view(param.shape)
        view.copy_(param.detach())
        param.data = view
    return flat


def cuts(numel: int, size: int) -> Iterator[tuple[int, int]]:
    """Runs of at most about ``size`` elements; all but the last are whole cache lines, for the reason of ALIGN."""
    size = max(size // ALIGN, 1) * ALIGN
    for start in range(0, numel, size):
        yield start, min(start + size, numel)
