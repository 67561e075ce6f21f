"""0/1 Adam: the variance moves ever more rarely, ranks exchange bits, and later step apart between exchanges.

Lu et al., 0/1 Adam, arXiv 2202.06009, Algorithm 1; the sets of steps T_v and T_u stand in ``phases``.

t in T_v (dense; g is averaged in full precision, so no bits need to be exchanged at this step):
    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g g        x = x - lr (m / (sqrt(v) + eps) + decay x)
otherwise, while ranks exchange at every step (lines 3, 6-8 with u = lr m, divided by lr on both sides):
    m_i = b1 m + (1 - b1) g_i    m = compressed average of the m_i      x as above, v as it was
with an interval above 1, since the last exchange at step t', where x was y on every rank (lines 3-10):
    m_i = b1 m_i + (1 - b1) g_i         u_i = u_i + lr m_i
    x_i = y - u_i / (sqrt(v) + eps) - decay y sum(lr)
and at t in T_u, at the end of the interval:
    u = compressed average of the u_i   m = u / sum(lr)
    x = y - u / (sqrt(v) + eps) - decay y sum(lr)

y is kept, not computed back from x_i, so that ranks are equal to the bit after every exchange. Weight decay acts
on y, because only then do all ranks take the same one. When the first interval begins, the error feedback changes
its unit from m to u, so it is multiplied by lr. With ``bias_correction`` m is divided by 1 - b1**t, v by 1 - b2**(its
updates).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from zeropipe.errors import UnsupportedOptimizerError, UsageError
from zeropipe.given import Anything, ParametersLike
from zeropipe.runtime.fp16.onebit.adam import adam_update, corrections, denominator, follow, move_moments
from zeropipe.runtime.fp16.onebit.base import CompressedOptimizer
from zeropipe.runtime.fp16.onebit.lane import Entry, Kept, Lane
from zeropipe.runtime.fp16.onebit.plan import Phase, Rules
from zeropipe.runtime.optimizers.shard_view import ShardView


class ZeroOneAdam(CompressedOptimizer):
    """0/1 Adam. Gradients on the parameters are each rank's own; see ``base`` for use under an engine.

    ``var_freeze_step``: the last step at which the variance may be updated, usually the end of the learning
    rate's warm-up. ``var_update_scaler``: updates before the gap between them doubles (kappa).
    ``local_step_scaler``: steps before the interval between exchanges doubles; ``local_step_clipper``: its
    largest value (H); 1 means that ranks exchange at every step, which ZeRO stage 1 needs.
    Between exchanges the parameters differ from rank to rank.

    State of each parameter: as OnebitAdam, with ``var_interval``, ``local_step_interval``, and once ranks step
    apart ``momentum_accumulator``, ``last_synced``, ``lrs`` and ``corrected_lrs``.
    """

    # u and y; sum(lr) for the decay, sum(lr / correction of m) for u.
    kept = Kept(
        later=("momentum_accumulator", "last_synced"),
        by_rank=("exp_avg", "momentum_accumulator"),
        sums=("lrs", "corrected_lrs"),
    )

    def __init__(
        self,
        params: ParametersLike,
        deepspeed: Anything = None,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        var_freeze_step: int = 100000,
        var_update_scaler: int = 16,
        local_step_scaler: int = 32678,
        local_step_clipper: int = 16,
        amsgrad: bool = False,
        cuda_aware: bool = False,
        comm_backend_name: str = "nccl",
        node_size: int = 1,
    ) -> None:
        rules = Rules(var_freeze_step, var_update_scaler, local_step_scaler, local_step_clipper)
        super().__init__(params, rules, locals())
        self.var_freeze_step, self.var_update_scaler = rules.freeze_step, rules.var_update_scaler
        self.local_step_scaler, self.local_step_clipper = rules.local_step_scaler, rules.local_step_clipper

    def bind_shards(self, views: Mapping[nn.Parameter, ShardView]) -> None:
        """Raises UnsupportedOptimizerError for shards, unless ranks never step apart."""
        shards = max((view.layout.num_shards for view in views.values()), default=1)
        if shards > 1 and self.local_step_clipper > 1:
            raise UnsupportedOptimizerError(
                "ZeroOneAdam cannot step on shards: between exchanges each rank's parameters are its own, "
                "so each rank needs all of them",
                expected="zero_optimization.stage 0, or local_step_clipper 1",
                found=f"local_step_clipper {self.local_step_clipper} and {shards} shards",
                fix="use stage 0, or set optimizer.params.local_step_clipper to 1",
            )
        super().bind_shards(views)

    def _dense_step(self, lane: Lane, gradient: torch.Tensor) -> None:
        self._rejoin(lane)
        move_moments(lane, gradient)
        adam_update(lane)

    def _exchange_step(self, lane: Lane, gradient: torch.Tensor, phase: Phase) -> None:
        if phase is Phase.COMPRESSED:
            self._rejoin(lane)
            lane.average_momentum(gradient, lane.options["betas"][0])
            adam_update(lane)
            return
        rate = lane.options["lr"] / corrections(lane)[0]
        if not lane.late:
            # The first interval begins; from here on debts are of u, which is m times the rate.
            lane.begin()
            lane.own["last_synced"].copy_(lane.read())
            lane.exchange.scale_errors(rate)
        lane.hiding()
        if lane.unused is not None:
            # What no bit would tell the others of must not move here alone.
            gradient = gradient.masked_fill(lane.unused, 0)
        follow(lane.own["exp_avg"][: gradient.numel()], gradient, lane.options["betas"][0])
        lane.own["momentum_accumulator"].add_(lane.own["exp_avg"] * rate)
        lane.scalars["lrs"] += lane.options["lr"]
        lane.scalars["corrected_lrs"] += rate
        # Nothing to tell at a rate of 0, and nothing to divide by: u waits for the next exchange.
        if phase is Phase.SYNC and lane.scalars["corrected_lrs"] > 0:
            self._synchronise(lane)
        else:
            lane.write(self._position(lane))

    def _synchronise(self, lane: Lane) -> None:
        update = lane.own["momentum_accumulator"][: lane.layout.numel]
        exchange = lane.hiding()
        messages = exchange.average(update, label="updates")
        if messages is not None:
            exchange.decode(messages, update)
        torch.div(lane.own["momentum_accumulator"], lane.scalars["corrected_lrs"], out=lane.own["exp_avg"])
        lane.write(self._position(lane))
        # Read back, as the parameters' dtype holds it: the next interval begins where all ranks are.
        lane.own["last_synced"].copy_(lane.read())
        lane.own["momentum_accumulator"].zero_()
        lane.scalars.update(dict.fromkeys(self.kept.sums, 0.0))

    def _position(self, lane: Lane) -> torch.Tensor:  # 1-D float32, numel
        """y - u / (sqrt(v) + eps) - decay y sum(lr)."""
        below = denominator(lane, lane.own["exp_avg_sq"], corrections(lane)[1])
        update = lane.own["momentum_accumulator"] / below
        update.add_(lane.own["last_synced"] * (lane.options["weight_decay"] * lane.scalars["lrs"]))
        return torch.sub(lane.own["last_synced"], update, out=update)

    def _rejoin(self, lane: Lane) -> None:
        """Back to exchanges at every step, which only other rules than the saved ones can ask for."""
        if not lane.late:
            return
        if lane.scalars["lrs"]:
            raise UsageError(
                "the rules of 0/1 Adam were changed while ranks had stepped apart. Fix: load a checkpoint that was "
                "saved at an exchange (state 'lrs' is 0), or keep var_freeze_step and local_step_clipper"
            )
        lane.end()
        rate = lane.options["lr"] / corrections(lane)[0]
        lane.exchange.scale_errors(1 / rate if rate else 0.0)

    def _restored(self, lane: Lane, entries: Sequence[Entry]) -> None:
        if lane.late:
            lane.write(self._position(lane))
