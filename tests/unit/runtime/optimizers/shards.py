"""Shards in one process: each rank a thread, the seam replaced by queues, so that hostile cuts cost nothing."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from queue import Queue

import pytest
import torch
from torch import nn

from zeropipe.comm import collectives
from zeropipe.comm.group import Group
from zeropipe.layout.flat import FlatShards, flat_shards
from zeropipe.runtime.optimizers import ShardView

DEADLOCK = 20.0  # seconds without a message: the exchange is stuck


class Later:
    """A Work whose effect happens when it is waited for."""

    def __init__(self, finish: Callable[[], object] = lambda: None) -> None:
        self._finish = finish

    def wait(self) -> None:
        finish, self._finish = self._finish, lambda: None
        finish()


class Wire:
    """Point-to-point queues and a rank-ordered all-reduce among threads; it counts what passes."""

    def __init__(self, size: int) -> None:
        self.queues: dict[tuple[int, int, int], Queue[torch.Tensor]] = defaultdict(Queue)
        self.barrier = threading.Barrier(size, timeout=DEADLOCK)
        self.parts: dict[int, torch.Tensor] = {}
        self.log: list[tuple[str, int, int]] = []  # (what, rank, elements)

    def send(self, tensor, dst, group, *, tag=0, label="", async_op=False):
        self.log.append(("send", group.rank, tensor.numel()))
        self.queues[group.rank, dst, tag].put(tensor.clone())
        return Later()

    def recv(self, tensor, src, group, *, tag=0, label="", async_op=False):
        queue = self.queues[src, group.rank, tag]
        return Later(lambda: tensor.copy_(queue.get(timeout=DEADLOCK)))

    def all_reduce(self, tensor, group, *, op="sum", label="", async_op=False):
        self.log.append(("all_reduce", group.rank, tensor.numel()))
        self.parts[group.rank] = tensor.clone()
        self.barrier.wait()
        total = sum(self.parts[rank] for rank in range(group.size))
        self.barrier.wait()
        tensor.copy_(total)
        return Later()


def layout_of(params: list[torch.Tensor], num_shards: int, align: int = 1) -> FlatShards:
    return flat_shards(
        [(f"p{i}", tuple(p.shape), str(p.dtype)[6:]) for i, p in enumerate(params)], num_shards, align
    )


def flatten(tensors: list[torch.Tensor], layout: FlatShards) -> torch.Tensor:
    full = torch.zeros(layout.padded_numel, dtype=tensors[0].dtype)
    full[: layout.numel] = torch.cat([t.detach().reshape(-1) for t in tensors])
    return full


def run_sharded(
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[list], torch.optim.Optimizer],
    groups: list[tuple[list[torch.Tensor], dict]],
    grads: list[list[list[torch.Tensor]]],  # [step][group][tensor]
    size: int,
    align: int = 1,
    idle: tuple[int, int] | None = None,  # (step, group) without a gradient anywhere
) -> tuple[list[list[torch.Tensor]], Wire]:
    """Step ``make``'s optimizer on every shard; the tensors after the last step, and the wire's log."""
    wire = Wire(size)
    for name in ("send", "recv", "all_reduce"):
        monkeypatch.setattr(collectives, name, getattr(wire, name))
    layouts = [layout_of(tensors, size, align) for tensors, _ in groups]
    fulls = [flatten(tensors, layout) for (tensors, _), layout in zip(groups, layouts, strict=True)]
    failures: list[BaseException] = []

    def rank_main(rank: int) -> None:
        try:
            group = Group(tuple(range(size)), rank)
            masters = [
                nn.Parameter(full[slice(*layout.shard_range(rank))].clone())
                for full, layout in zip(fulls, layouts, strict=True)
            ]
            optimizer = make(
                [{"params": [m], **extra} for m, (_, extra) in zip(masters, groups, strict=True)]
            )
            for master, layout in zip(masters, layouts, strict=True):
                optimizer.bind_shards({master: ShardView(layout, rank, group)})
            for number, step in enumerate(grads):
                for index, (master, layout) in enumerate(zip(masters, layouts, strict=True)):
                    full = flatten(step[index], layout)
                    master.grad = full[slice(*layout.shard_range(rank))].clone()
                    if idle == (number, index):
                        master.grad = None
                optimizer.step()
            for full, layout, master in zip(fulls, layouts, masters, strict=True):
                full[slice(*layout.shard_range(rank))] = master.detach()
        except BaseException as error:
            failures.append(error)
            wire.barrier.abort()

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return [
        [full[slice(*layout.tensor_range(i))].view(spec.shape) for i, spec in enumerate(layout.tensors)]
        for full, layout in zip(fulls, layouts, strict=True)
    ], wire


def run_whole(
    make: Callable[[list], torch.optim.Optimizer],
    groups: list[tuple[list[torch.Tensor], dict]],
    grads: list[list[list[torch.Tensor]]],
    idle: tuple[int, int] | None = None,
) -> list[list[torch.Tensor]]:
    """The same steps on ordinary parameters."""
    params = [[nn.Parameter(t.clone()) for t in tensors] for tensors, _ in groups]
    optimizer = make([{"params": mine, **extra} for mine, (_, extra) in zip(params, groups, strict=True)])
    for number, step in enumerate(grads):
        for index, (mine, given) in enumerate(zip(params, step, strict=True)):
            for p, g in zip(mine, given, strict=True):
                p.grad = None if idle == (number, index) else g.clone()
        optimizer.step()
    return [[p.detach() for p in mine] for mine in params]


def nasty(generator: torch.Generator, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """A scalar, an empty one, one larger than the rest together, fewer elements than shards, conv, a zero one."""
    shapes = [(), (3, 5), (0, 4), (2,), (23, 17), (7, 2), (4, 3, 2, 2), (1, 9), (9, 1), (5,)]
    tensors = [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]
    tensors[5].zero_()
    return tensors


def like(tensors: list[torch.Tensor], generator: torch.Generator) -> list[torch.Tensor]:
    return [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in tensors]
