"""Lion: one moment and the sign of its blend with the gradient, so half of Adam's state; elementwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, ParamsT

from zeropipe.runtime.optimizers.checks import check_betas, check_not_negative


class Lion(Optimizer):
    """EvoLved Sign Momentum (arXiv 2302.06675, Algorithm 2).

    ``u = sign(b1 m + (1 - b1) g)``, ``m = b2 m + (1 - b2) g``, ``x = x - lr (u + weight_decay x)``. Any shape and
    floating dtype; state ``exp_avg`` has the parameter's. Raises ValueError for values out of range.
    """

    per_element_state = ("exp_avg",)  # see state_kinds.py

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        check_not_negative(lr=lr, weight_decay=weight_decay)
        check_betas(betas)
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(group, params, [p.grad for p in params])
        return loss

    def _step_group(
        self, group: dict[str, Any], params: list[torch.Tensor], grads: list[torch.Tensor]
    ) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        moments = [self.state[p]["exp_avg"] for p in params]
        first, second = group["betas"]
        lr = float(group["lr"])
        update = torch._foreach_lerp(moments, grads, 1.0 - first)
        torch._foreach_sign_(update)
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1.0 - lr * group["weight_decay"])
        torch._foreach_add_(params, update, alpha=-lr)
        torch._foreach_lerp_(moments, grads, 1.0 - second)
