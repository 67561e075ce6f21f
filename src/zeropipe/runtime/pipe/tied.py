"""Keeps weights that several stages share equal: one starting value, one summed gradient.

The layers of one `TiedLayerSpec` key are one module, whatever the cut: all its parameters are tied. Every rank that
holds a tied weight has its own copy of it. The copies start equal (the first stage's value), get
the same gradient (the sum over all uses, computed to the same bits on every rank) and the same update, so they stay
equal without ever being sent again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

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


def sum_gradients(
    ties: Iterable[Tie],
    has: Callable[[nn.Parameter], bool],
    gradient: Callable[[nn.Parameter], torch.Tensor],
) -> None:
    """Sum the copies' gradients in place; collective over each tie's group.

    ``has``: whether a parameter was used here. ``gradient``: the tensor to be changed in place, zeros if there was
    none. A parameter that no copy has used gets none, so that the optimizer passes over it as in one process.
    """
    by_group: dict[Group, list[Tie]] = {}
    for tie in ties:
        if tie.group.size > 1 and tie.param.numel():
            by_group.setdefault(tie.group, []).append(tie)
    for group, shared in by_group.items():
        here = [has(tie.param) for tie in shared]
        used = torch.tensor(here, dtype=torch.int32, device=shared[0].param.device)
        all_reduce(used, group, op="max", label="tied weights in use")
        for tie, somewhere in zip(shared, used.tolist(), strict=True):
            if somewhere:
                all_reduce(gradient(tie.param), group, label=f"tied {tie.plan.key}")
