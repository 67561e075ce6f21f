"""A small problem with nasty parameters that the tests of the compressed optimizers share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zeropipe.comm.group import Group, world
from zeropipe.layout.flat import FlatShards, TensorSpec
from zeropipe.runtime.fp16.onebit import OnebitAdam, OnebitLamb, ZeroOneAdam

CLASSES = {"adam": OnebitAdam, "lamb": OnebitLamb, "zero-one": ZeroOneAdam}
SHAPES = ((), (0, 3), (40, 9), (5,), (3, 2, 2), (1,))  # a scalar, an empty one, one larger than all others


def make_params(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(11)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def targets() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(12)
    return [torch.randn(shape, generator=generator) * 3 for shape in SHAPES]


def gradients(params: list[torch.Tensor], rank: int, step: int, noise: float = 0.5) -> list[torch.Tensor]:
    """Of 0.5 * |x - target|^2, with this rank's own noise at this step: a function of the parameters."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return [
        p.detach().float() - t + torch.randn(t.shape, generator=generator) * noise
        for p, t in zip(params, targets(), strict=True)
    ]


def set_gradients(params: list[nn.Parameter], rank: int, step: int) -> None:
    for param, gradient in zip(params, gradients(list(params), rank, step), strict=True):
        param.grad = gradient.to(param.dtype)


def groups_of(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Two param groups with their own learning rate and decay."""
    return [{"params": params[:3]}, {"params": params[3:], "lr": 0.02, "weight_decay": 0.0}]


def build(name: str, params: list[nn.Parameter], **options: Any) -> Any:
    return CLASSES[name](groups_of(params), **{"lr": 0.05, "weight_decay": 0.01, **options})


def loss(params: list[nn.Parameter]) -> float:
    return sum(float(((p.detach().float() - t) ** 2).sum()) for p, t in zip(params, targets(), strict=True))


def copies(params: list[nn.Parameter]) -> list[torch.Tensor]:
    return [p.detach().clone() for p in params]


@dataclass(frozen=True)
class ShardOf:
    """What an engine tells an optimizer of one master."""

    layout: FlatShards
    shard: int
    group: Group


class Masters:
    """The least engine that keeps the optimizers' protocol: 1-D fp32 masters, sharded or not."""

    def __init__(self, name: str, sharded: bool, **options: Any) -> None:
        self.params = make_params()
        self.group = world()
        self.layouts: list[FlatShards] = []
        self.views: dict[nn.Parameter, ShardOf] = {}
        groups = groups_of(self.params)
        self.members = [entry["params"] for entry in groups]
        for entry in groups:
            specs = [TensorSpec(str(i), tuple(p.shape), "float32") for i, p in enumerate(entry["params"])]
            layout = FlatShards(tuple(specs), self.group.size if sharded else 1)
            flat = self._flat(entry["params"], layout)
            shard = self.group.rank if sharded else 0
            start, stop = layout.shard_range(shard)
            master = nn.Parameter(flat[start:stop].clone())
            holders = self.group if sharded else Group(ranks=(0,), rank=0)
            self.views[master] = ShardOf(layout, shard, holders)
            entry["params"] = [master]
        self.optimizer = CLASSES[name](groups, **{"lr": 0.05, "weight_decay": 0.01, **options})
        self.optimizer.bind_communication(self.group)
        self.optimizer.bind_shards(self.views)

    @staticmethod
    def _flat(tensors: list[torch.Tensor], layout: FlatShards) -> torch.Tensor:
        flat = torch.zeros(layout.padded_numel)
        flat[: layout.numel] = torch.cat([t.detach().reshape(-1) for t in tensors])
        return flat

    def step(self, number: int) -> None:
        from zeropipe.comm import collectives

        local = self.optimizer.wants_local_gradients()
        every = dict(zip(self.params, gradients(list(self.params), self.group.rank, number), strict=True))
        for (master, view), members in zip(self.views.items(), self.members, strict=True):
            flat = self._flat([every[p] for p in members], view.layout)
            if local:
                master.grad = None
                self.optimizer.set_local_gradient(master, flat)
            else:
                collectives.all_reduce(flat[: view.layout.numel], self.group, op="avg")
                start, stop = view.layout.shard_range(view.shard)
                master.grad = flat[start:stop].clone()
        self.optimizer.step()
        for (master, view), members in zip(self.views.items(), self.members, strict=True):
            full = torch.zeros(view.layout.padded_numel)
            collectives.all_gather(full, master.detach(), view.group)
            for index, param in enumerate(members):
                start, stop = view.layout.tensor_range(index)
                param.data.copy_(full[start:stop].view(param.shape))


def shown(optimizer: Any) -> Mapping[str, Any]:
    """The state of the first parameter that has one."""
    return next(iter(optimizer.state.values()))
