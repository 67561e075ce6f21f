"""LAMB on 1-D shards: whole-tensor norms from the sums of squares of pieces, in one small all-reduce."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(slots=True)
class _Slot:
    """One parameter (or master) in the middle of a step."""

    param: torch.Tensor
    view: ShardView
    value: torch.Tensor  # 1-D, the parameter's elements
    update: torch.Tensor  # 1-D, the Adam direction plus weight decay
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

    def _update(self) -> None:
        by_group: dict[Group, list[_Slot]] = {}
        for param, grad, group in self._stepped():
            slot = self._direction(param, grad, group)
            by_group.setdefault(slot.view.group, []).append(slot)
        for members, slots in by_group.items():
            # Each group's all-reduce is met by all of its members: a master has a gradient on all of them or on none.
            for slot, ratio in zip(slots, _trust_ratios(slots, members), strict=True):
                for piece, run in zip(slot.view.pieces(), slot.runs(slot.update), strict=True):
                    run.mul_(ratio[piece.tensor])
                slot.value.add_(slot.update, alpha=-float(slot.group["lr"]))
                put_back(slot.param, slot.value)

    def _direction(self, param: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> _Slot:
        # [1] Adam's direction, elementwise: shards need nobody for it.
        value, state = flat(param), self._counted(param, self.per_element_state)
        mean, square = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
        first, second = group["betas"]
        mean.lerp_(grad, 1.0 - first)
        square.mul_(second).addcmul_(grad, grad, value=1.0 - second)
        step = float(state["step"])
        corrections = (1.0 - first**step, 1.0 - second**step) if group["bias_correction"] else (1.0, 1.0)
        # The corrections are divided out of the result: no further buffer of the parameters' size.
        update = square.sqrt().div_(sqrt(corrections[1])).add_(group["eps"])
        torch.div(mean, update, out=update).div_(corrections[0])
        if group["weight_decay"]:
            update.add_(value, alpha=group["weight_decay"])
        return _Slot(param, self._view(param), value, update, group)


def _trust_ratios(slots: list[_Slot], group: Group) -> list[torch.Tensor]:
    """Per slot, one ratio for each tensor of its layout (1-D, fp64), from one all-reduce for all slots."""
    # [2] The sums of squares of this rank's pieces, a column for each tensor; then of all ranks'. In fp64, so that
    # where a tensor is cut changes its norm by less than an fp32 can show.
    counts = [len(slot.view.layout.tensors) for slot in slots]
    sums = torch.zeros(2, sum(counts), dtype=torch.float64, device=slots[0].value.device)
    for slot, column in zip(slots, sums.split(counts, dim=1), strict=True):
        index = torch.tensor(
            [piece.tensor for piece in slot.view.pieces()], device=sums.device, dtype=torch.long
        )
        if len(index):
            for row, run in zip(column, (slot.value, slot.update), strict=True):
                wide = torch.promote_types(run.dtype, torch.float32)  # 16-bit norms would overflow or round
                norms = torch.stack(torch._foreach_norm(slot.runs(run), 2, wide))
                row[index] = norms.double().square()
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
