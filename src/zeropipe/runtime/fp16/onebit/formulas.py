"""Adam's recursion and step on one lane, which all compressed optimizers share.

Products and sums are separate operations: torch's fused forms round once inside a vector and twice in the last few
elements of a tensor, so that an element's bits would depend on where in a buffer it lies, and on the stage.
"""

from __future__ import annotations

import torch

from zeropipe.runtime.fp16.onebit.lane import Lane


def move_moments(lane: Lane, gradient: torch.Tensor) -> None:
    """m = b1 m + (1 - b1) g and v = b2 v + (1 - b2) g g."""
    beta1, beta2 = lane.options["betas"]
    follow(lane.own["exp_avg"], gradient, beta1)
    follow(lane.own["exp_avg_sq"], gradient * gradient, beta2)


def follow(average: torch.Tensor, value: torch.Tensor, beta: float) -> None:
    """average = beta average + (1 - beta) value, in place."""
    average.mul_(beta).add_(value * (1 - beta))


def corrections(lane: Lane) -> tuple[float, float]:
    """What m and v are divided by: 1 - b1**steps and 1 - b2**updates, or 1 without bias correction."""
    if not lane.options["bias_correction"]:
        return 1.0, 1.0
    beta1, beta2 = lane.options["betas"]
    # A variance that was never updated is 0; dividing it by 1 keeps it so.
    second = 1 - beta2**lane.variance_steps if lane.variance_steps else 1.0
    return float(1 - beta1**lane.step), float(second)


def denominator(lane: Lane, variance: torch.Tensor, correction: float, inside: bool) -> torch.Tensor:
    """sqrt(v) + eps, or sqrt(v + eps) where eps is ``inside``; v is divided by ``correction`` first."""
    eps = lane.options["eps"]
    corrected = variance / correction
    return corrected.add_(eps).sqrt_() if inside else corrected.sqrt_().add_(eps)


def direction(lane: Lane, inside: bool) -> torch.Tensor:  # 1-D float32, lane.numel
    """m / (sqrt(v) + eps), corrected. Where v is 0, so is m: see ``Lane.hiding``."""
    first, second = corrections(lane)
    below = denominator(lane, lane.own["exp_avg_sq"], second, inside)
    return torch.div(lane.own["exp_avg"] / first, below, out=below)


def adam_update(lane: Lane, inside: bool) -> None:
    """x = x - lr (m / (sqrt(v) + eps) + decay x)."""
    update, values = direction(lane, inside), lane.read()
    if lane.options["weight_decay"]:
        update.add_(values * lane.options["weight_decay"])
    values.sub_(update.mul_(lane.options["lr"]))
    lane.write(values)
