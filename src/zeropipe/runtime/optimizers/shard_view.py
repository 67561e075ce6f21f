"""What our optimizers share: the view of the 1-D shard that they are given to step on, and range checks of options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from zeropipe.comm.group import SELF, Group
from zeropipe.errors import UsageError
from zeropipe.layout.flat import FlatShards, Piece, TensorSpec


@dataclass(frozen=True, slots=True)
class ShardView:
    """One 1-D master: shard ``shard`` of ``layout``, whose other shards lie with the members of ``group``.

    Member ``s`` of the group holds shard ``s``. True shapes are in ``layout.tensors[i].shape``.
    """

    layout: FlatShards
    shard: int
    group: Group

    def __post_init__(self) -> None:
        if self.group.size != self.layout.num_shards or self.group.rank != self.shard:
            raise UsageError(
                "a shard view needs one group member per shard, in order",
                rank=self.group.ranks[self.group.rank],
                expected=f"shard {self.group.rank} of {self.group.size}",
                found=f"shard {self.shard} of {self.layout.num_shards}",
            )

    def pieces(self) -> tuple[Piece, ...]:
        return self.layout.pieces(self.shard)


@runtime_checkable
class ShardAware(Protocol):
    """An optimizer whose update of a tensor needs the whole tensor, and that can get it from shards.

    ``bind_shards`` is called before the first step that meets a master, with its view; later calls add to
    earlier ones. The caller sees to it that a master's gradient is None on all members of the group or on none:
    None means that the master is not stepped, so no member may wait for it.
    """

    def bind_shards(self, views: Mapping[nn.Parameter, ShardView]) -> None: ...


def whole(param: torch.Tensor) -> ShardView:
    """The view of an ordinary, unsharded tensor: a layout of one, held by a group of one."""
    spec = TensorSpec("", tuple(param.shape), str(param.dtype).removeprefix("torch."))
    return ShardView(FlatShards((spec,), 1), 0, SELF)


def check_bound(views: Mapping[nn.Parameter, ShardView]) -> None:
    """Raises UsageError where a master is not the 1-D shard that its view describes."""
    for param, view in views.items():
        if tuple(param.shape) != (view.layout.shard_numel,):
            raise UsageError(
                "a master does not have the shape of its shard",
                rank=view.group.ranks[view.group.rank],
                expected=(view.layout.shard_numel,),
                found=tuple(param.shape),
            )


def view_or_whole(
    param: torch.Tensor, bound: Mapping[nn.Parameter, ShardView], cache: dict[torch.Tensor, ShardView]
) -> ShardView:
    """The bound view of ``param``, or that of a whole tensor (kept in ``cache``, as shapes do not change)."""
    found = bound.get(param) if isinstance(param, nn.Parameter) else None
    if found is not None:
        return found
    if param not in cache:
        cache[param] = whole(param)
    return cache[param]


def gradient(param: torch.Tensor, name: str) -> torch.Tensor | None:  # 1-D, numel of param
    """``param.grad`` as one flat run; None where there is none."""
    grad = param.grad
    if grad is None:
        return None
    if grad.is_sparse:
        raise UsageError(f"{name} does not take sparse gradients. Fix: build the embedding with sparse=False")
    return grad.reshape(-1)


def flat(param: torch.Tensor) -> torch.Tensor:  # 1-D, numel of param
    """``param`` as one run of elements: a view of it where it is contiguous, else a copy to be put back."""
    data = param.detach()
    return data.view(-1) if data.is_contiguous() else data.reshape(-1)


def put_back(param: torch.Tensor, run: torch.Tensor) -> None:
    """Write ``run``, made by ``flat``, back into ``param`` where it is a copy."""
    if not param.is_contiguous():
        param.detach().copy_(run.view(param.shape))


def check_not_negative(**values: float) -> None:
    for name, value in values.items():
        if not float(value) >= 0.0:
            raise ValueError(f"{name} must be at least 0, found {value}")


def check_betas(betas: Sequence[float]) -> None:
    if len(betas) != 2 or not all(0.0 <= float(beta) < 1.0 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), found {betas}")
