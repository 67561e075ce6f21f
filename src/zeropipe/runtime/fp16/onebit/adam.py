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
"""

from __future__ import annotations

from typing import Any

import torch

from zeropipe.runtime.fp16.onebit.base import CompressedOptimizer
from zeropipe.runtime.fp16.onebit.exchange import Topology
from zeropipe.runtime.fp16.onebit.formulas import adam_update, move_moments
from zeropipe.runtime.fp16.onebit.lane import Lane
from zeropipe.runtime.fp16.onebit.options import Common
from zeropipe.runtime.fp16.onebit.phases import OneBitPhases, Phase


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
        params: Any,
        deepspeed: Any = None,
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
        common = Common(
            deepspeed=deepspeed,
            lr=lr,
            bias_correction=bias_correction,
            betas=betas,
            eps=eps,
            eps_inside_sqrt=eps_inside_sqrt,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            amsgrad=amsgrad,
            cuda_aware=cuda_aware,
            comm_backend_name=comm_backend_name,
            node_size=node_size,
        )
        super().__init__(params, OneBitPhases(freeze_step), common)
        self.freeze_step = freeze_step

    @property
    def adam_freeze_key(self) -> bool:
        """Whether the variance is frozen, so that the coming step is compressed."""
        return self._phases.frozen

    def _dense_step(self, lane: Lane, gradient: torch.Tensor) -> None:
        move_moments(lane, gradient)
        adam_update(lane, self.eps_mode == 0)

    def _exchange_step(self, lane: Lane, gradient: torch.Tensor, phase: Phase, topology: Topology) -> None:
        lane.average_momentum(gradient, lane.options["betas"][0], topology)
        adam_update(lane, self.eps_mode == 0)
