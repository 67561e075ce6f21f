"""LAMB on 1-D shards: whole-tensor norms from the sums of squares of pieces, in one small all-reduce."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from math import sqrt
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from zeropipe.comm import collectives
from zeropipe.comm.group import Group
from zeropipe.runtime.optimizers.shard_view import (
    OnShards,
    ShardView,
    check_betas,
    check_not_negative,
    flat,
    put_back,
)
from zeropipe.tensor.host import sent


@dataclass(slots=True)
class _Slot:
    """One parameter (or master) in the middle of a step."""

    param: torch.Tensor
    view: ShardView
    value: torch.Tensor  # 1-D, the parameter's elements
    update: torch.Tensor  # 1-D, the gradient, then the Adam direction plus weight decay
    group: dict[str, Any]

    def runs(self, run: torch.Tensor) -> list[torch.Tensor]:
        return [run[piece.offset : piece.offset + piece.numel] for piece in self.view.pieces()]


class Lamb(OnShards):
    """Layer-wise Adaptive Moments (arXiv 1904.00962, Algorithm 2), whole tensors or shards.

    ``r = m_hat / (sqrt(v_hat) + eps) + weight_decay x``; ``x = x - lr ratio r``, where the trust ratio is
    ``|x| / |r|`` kept within [min_coeff, max_coeff], and 1 where either norm is 0. Norms are of whole tensors;
    the sums over pieces are fp64. While a step runs it holds one more buffer of the parameters' size.

    Raises ValueError for values out of range.
    """

    per_element_state = ("exp_avg", "exp_avg_sq")  # see state_kinds.py

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
    ) -> None:
        check_not_negative(lr=lr, eps=eps, weight_decay=weight_decay, min_coeff=min_coeff)
        check_betas(betas)
        if max_coeff < min_coeff:
            raise ValueError(f"max_coeff must be at least min_coeff {min_coeff}, found {max_coeff}")
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": tuple(betas),
                "eps": eps,
                "weight_decay": weight_decay,
                "bias_correction": bias_correction,
                "max_coeff": max_coeff,
                "min_coeff": min_coeff,
            },
        )

    norms_of_shards = True  # where shards are cut shows in the last bits

    def _update(self) -> None:
        alike: dict[tuple[int, float], list[_Slot]] = {}  # by param group and step count
        by_group: dict[Group, list[_Slot]] = {}
        for param, grad, group in self._stepped():
            state = self._counted(param, self.per_element_state)
            slot = _Slot(param, self._view(param), flat(param), grad, group)
            alike.setdefault((id(group), float(state["step"])), []).append(slot)
            by_group.setdefault(slot.view.group, []).append(slot)
        for (_, step), slots in alike.items():
            self._turn(slots, step)
        for members, slots in by_group.items():
            # Each group's all-reduce is met by all of its members: a master has a gradient on all of them or on none.
            for slot, ratio in zip(slots, _trust_ratios(slots, members), strict=True):
                for piece, run in zip(slot.view.pieces(), slot.runs(slot.update), strict=True):
                    run.mul_(ratio[piece.tensor])
                slot.value.add_(slot.update, alpha=-float(slot.group["lr"]))
                put_back(slot.param, slot.value)

    def _turn(self, slots: list[_Slot], step: float) -> None:
        """Let the update of each slot, which is its gradient yet, be Adam's direction plus the decay."""
        # [1] Elementwise: shards need nobody for it, and all tensors go in one call.
        group, grads = slots[0].group, [slot.update for slot in slots]
        states = [self.state[slot.param] for slot in slots]
        means, squares = ([state[name].view(-1) for state in states] for name in self.per_element_state)
        first, second = group["betas"]
        torch._foreach_lerp_(means, grads, 1.0 - first)
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, grads, grads, value=1.0 - second)
        corrections = (1.0 - first**step, 1.0 - second**step) if group["bias_correction"] else (1.0, 1.0)
        # The corrections are divided out of the result, which takes the place of the roots: one buffer for both.
        updates = torch._foreach_sqrt(squares)
        torch._foreach_div_(updates, sqrt(corrections[1]))
        torch._foreach_add_(updates, group["eps"])
        for mean, update in zip(means, updates, strict=True):
            torch.div(mean, update, out=update)
        torch._foreach_div_(updates, corrections[0])
        if group["weight_decay"]:
            torch._foreach_add_(updates, [slot.value for slot in slots], alpha=group["weight_decay"])
        for slot, update in zip(slots, updates, strict=True):
            slot.update = update


def _trust_ratios(slots: list[_Slot], group: Group) -> list[torch.Tensor]:
    """Per slot, one ratio for each tensor of its layout (1-D, fp64), from one all-reduce for all slots."""
    # [2] The sums of squares of this rank's pieces, a column for each tensor; then of all ranks'. In fp64, so that
    # where a tensor is cut changes its norm by less than an fp32 can show.
    counts = [len(slot.view.layout.tensors) for slot in slots]
    sums = torch.zeros(2, sum(counts), dtype=torch.float64, device=slots[0].value.device)
    by_dtype: dict[torch.dtype, list[tuple[int, torch.Tensor, torch.Tensor]]] = {}  # column, weight, update
    for slot, start in zip(slots, accumulate(counts, initial=0), strict=False):
        runs = zip(slot.view.pieces(), slot.runs(slot.value), slot.runs(slot.update), strict=True)
        by_dtype.setdefault(slot.value.dtype, []).extend((start + p.tensor, w, u) for p, w, u in runs)
    for dtype, pieces in by_dtype.items():
        if not pieces:
            continue
        columns, *both = zip(*pieces, strict=True)
        wide = torch.promote_types(dtype, torch.float32)  # 16-bit norms would overflow or round
        norms = torch.stack(torch._foreach_norm([run for runs in both for run in runs], 2, wide))
        # No two pieces of a rank are of one tensor.
        sums[:, sent(columns, torch.long, sums.device)] = norms.double().square().view(2, -1)
    if group.size > 1:
        collectives.all_reduce(sums, group, label="lamb norms")
    # [3] A norm of 0 says nothing of the step's length (a bias at its start, a gradient of zeros): ratio 1.
    weight, update = sums.sqrt()
    both = (weight > 0) & (update > 0)
    parts = zip(slots, (weight / update).split(counts), both.split(counts), strict=True)
    return [
        torch.where(known, ratio.clamp(slot.group["min_coeff"], slot.group["max_coeff"]), 1.0)
        for slot, ratio, known in parts
    ]
