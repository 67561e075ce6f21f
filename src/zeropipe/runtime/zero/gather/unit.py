"""A unit, and one run of it: what is gathered together, and who holds it until when."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from zeropipe.runtime.zero.gather.away_value import plainly
from zeropipe.runtime.zero.gather.sharded_parameter import mark_unavailable, show_shape
from zeropipe.runtime.zero.gather.shards import Shards
from zeropipe.runtime.zero.status import ZeroParamStatus


@dataclass(slots=True, eq=False)
class Unit:
    """A module whose sharded parameters are gathered together."""

    index: int
    name: str
    shards: list[Shards]  # own ones, and external ones that it was seen to use
    known: set[Shards] = field(default_factory=set)  # the same

    @property
    def numel(self) -> int:
        return sum(s.numel for s in self.shards if not s.persist)

    def add(self, shards: Shards) -> None:
        if shards not in self.known:
            self.known.add(shards)
            self.shards.append(shards)


@dataclass(slots=True, eq=False)
class Use:
    """One run of a unit, forward or backward: what it holds until it ends."""

    unit: Unit
    held: list[Shards] = field(default_factory=list)
    keep: bool = False


def gradient_sinks(units: Iterable[Unit]) -> list[object]:
    """Autograd's nodes for the gradients of the units' parameters, made while these show their whole shape.

    A custom function is bound to the node of a parameter before its forward asks for the value, and autograd checks
    the gradient against the shape that the node was made with. As long as somebody keeps a node it is the one that
    is used. Needed before the first pass only: later ones gather such a parameter before its user runs.
    """
    trained = [shards for unit in units for shards in unit.shards if shards.param.requires_grad]
    return [_gradient_sink(shards) for shards in trained]


def _gradient_sink(shards: Shards) -> object:
    away = shards.status is ZeroParamStatus.NOT_AVAILABLE and not shards.shows_shape
    if away:
        show_shape(shards.param, shards.shape)
    try:
        return plainly(torch.autograd.graph.get_gradient_edge, (shards.param,), {}).node
    finally:
        if away:
            mark_unavailable(shards.param, shards.full.new_empty(0))
