"""1-bit Adam: Adam until the variance has settled, then momentum at one bit per element.

Tang et al., 1-bit Adam, arXiv 2102.02888, Algorithm 1. Steps t = 1..freeze_step (lines 1-3, "warm-up"), with g
the gradient averaged over ranks:

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g g
    x = x - lr (m / (sqrt(v) + eps) + weight_decay x)

Afterwards v stays as it is (section 4.1), and with g_i the gradient of rank i (lines 4-12):

    m_i = b1 m + (1 - b1) g_i          m = compressed average of the m_i, with error feedback (see ``exchange``)
    x = x - lr (m / (sqrt(v) + eps) + weight_decay x)

Weight decay is decoupled, as in AdamW. With ``bias_correction`` m is divided by 1 - b1**t and v by
1 - b2**(its updates), as in Adam; the paper has none.

The formulas below are what all compressed optimizers share. Products and sums are separate operations: torch's fused
forms round once inside a vector and twice in the last few elements of a tensor, so that an element's bits would depend
on where in a buffer it lies, and on the stage.
"""

from __future__ import annotations

import torch

from zeropipe.given import Anything, ParametersLike
from zeropipe.runtime.fp16.onebit.base import CompressedOptimizer
from zeropipe.runtime.fp16.onebit.lane import Lane
from zeropipe.runtime.fp16.onebit.plan import Phase, Rules


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


def denominator(lane: Lane, variance: torch.Tensor, correction: float) -> torch.Tensor:
    """sqrt(v) + eps, or sqrt(v + eps) where eps is inside; v is divided by ``correction`` first."""
    eps = lane.options["eps"]
    corrected = variance / correction
    return corrected.add_(eps).sqrt_() if lane.eps_inside else corrected.sqrt_().add_(eps)


def direction(lane: Lane) -> torch.Tensor:  # 1-D float32, lane.numel
    """m / (sqrt(v) + eps), corrected."""
    # Where v is 0, so is m (see ``Lane.hiding``): eps alone below would throw an element.
    first, second = corrections(lane)
    below = denominator(lane, lane.own["exp_avg_sq"], second)
    return torch.div(lane.own["exp_avg"] / first, below, out=below)


def adam_update(lane: Lane) -> None:
    """x = x - lr (m / (sqrt(v) + eps) + decay x)."""
    update, values = direction(lane), lane.read()
    # Decoupled: the decay is not divided by the root of the variance.
    if lane.options["weight_decay"]:
        update.add_(values * lane.options["weight_decay"])
    values.sub_(update.mul_(lane.options["lr"]))
    lane.write(values)


class OnebitAdam(CompressedOptimizer):
    """1-bit Adam. Gradients on the parameters are each rank's own; see ``base`` for use under an engine.

    ``freeze_step``: dense steps before compression begins; 15-25 % of a run is usual. ``deepspeed``,
    ``cuda_aware`` and ``comm_backend_name`` are accepted for the interface's sake: the process group decides.
    ``node_size``: ranks per node, if ranks of a node are to be averaged in full precision first.
    A param group may hold ``exp_avg_mask``: 0 where a gradient is always exactly 0, which a sign cannot say.

    State of each parameter: ``step``, ``exp_avg``, ``exp_avg_sq``, ``variance_steps``; from the first compressed
    step ``worker_error`` and ``server_error`` too. Moments and errors are float32.
    """

    def __init__(
        self,
        params: ParametersLike,
        deepspeed: Anything = None,
        lr: float = 1e-3,
        freeze_step: int = 100000,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        amsgrad: bool = False,
        cuda_aware: bool = False,
        comm_backend_name: str = "nccl",
        node_size: int = 1,
    ) -> None:
        super().__init__(params, Rules(freeze_step), locals())
        self.freeze_step = freeze_step

    adam_freeze_key = CompressedOptimizer.freeze_key

    def _dense_step(self, lane: Lane, gradient: torch.Tensor) -> None:
        move_moments(lane, gradient)
        adam_update(lane)

    def _exchange_step(self, lane: Lane, gradient: torch.Tensor, phase: Phase) -> None:
        lane.average_momentum(gradient, lane.options["betas"][0])
        adam_update(lane)
