"""Keeps weights that several stages share equal: one starting value, one summed gradient.

The layers of one `TiedLayerSpec` key are one module, whatever the cut: all its parameters are tied. Every rank that
holds a tied weight has its own copy of it. The copies start equal (the first stage's value), get
the same gradient (the sum over all uses, computed to the same bits on every rank) and the same update, so they stay
equal without ever being sent again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from zeropipe.comm.collectives import all_reduce, broadcast
from zeropipe.comm.group import Group


@dataclass(frozen=True, slots=True)
class TiePlan:
    """One shared parameter: where it lives; the same on all ranks."""

    key: str  # the user's key and the parameter's name, or the name of the first use
    stages: tuple[int, ...]  # every stage that uses it, ascending
    ranks: tuple[int, ...]  # the pipeline ranks of those stages, ascending


@dataclass(slots=True)
class Tie:
    """One shared weight as this rank has it."""

    plan: TiePlan
    param: nn.Parameter
    group: Group  # the ranks of plan.ranks, in that order
    owner: bool  # this rank's copy is the one that counts in norms and is saved


def share_values(ties: Iterable[Tie]) -> None:
    """Give every copy the value of the first rank; collective over each tie's group."""
    for tie in ties:
        if tie.group.size > 1 and tie.param.numel():
            value = tie.param.detach().contiguous()
            broadcast(value, 0, tie.group, label=f"tied {tie.plan.key}")
            if value.data_ptr() != tie.param.data_ptr():
                tie.param.detach().copy_(value)


class Gradients(Protocol):
    """Who holds the gradients that this rank has accumulated."""

    def has_gradient(self, param: nn.Parameter) -> bool:
        """Whether there is one."""

    def gradient(self, param: nn.Parameter) -> torch.Tensor:
        """The tensor that holds it, to be changed in place; zeros where there was none."""


def sum_gradients(ties: Iterable[Tie], gradients: Gradients) -> None:
    """Sum the copies' gradients in place; collective over each tie's group.

    A parameter that no copy has used gets none, so that the optimizer passes over it as in one process.
    """
    by_group: dict[Group, list[Tie]] = {}
    for tie in ties:
        if tie.group.size > 1 and tie.param.numel():
            by_group.setdefault(tie.group, []).append(tie)
    for group, shared in by_group.items():
        here = [gradients.has_gradient(tie.param) for tie in shared]
        used = torch.tensor(here, dtype=torch.int32, device=shared[0].param.device)
        all_reduce(used, group, op="max", label="tied weights in use")
        for tie, somewhere in zip(shared, used.tolist(), strict=True):
            if somewhere:
                all_reduce(gradients.gradient(tie.param), group, label=f"tied {tie.plan.key}")
