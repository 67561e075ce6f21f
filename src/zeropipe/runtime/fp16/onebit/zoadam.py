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
from typing import Any

import torch
from torch import nn

from zeropipe.errors import UnsupportedOptimizerError, UsageError
from zeropipe.runtime.fp16.onebit.base import CompressedOptimizer
from zeropipe.runtime.fp16.onebit.exchange import Topology
from zeropipe.runtime.fp16.onebit.formulas import adam_update, corrections, denominator, follow, move_moments
from zeropipe.runtime.fp16.onebit.lane import Lane, View
from zeropipe.runtime.fp16.onebit.options import Common
from zeropipe.runtime.fp16.onebit.phases import Phase, ZeroOnePhases, ZeroOneRules

_LOCAL = ("momentum_accumulator", "last_synced")  # u and y
_SUMS = ("lrs", "corrected_lrs")  # sum(lr) for the decay, sum(lr / correction of m) for u


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

    def __init__(
        self,
        params: Any,
        deepspeed: Any = None,
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
        rules = ZeroOneRules(var_freeze_step, var_update_scaler, local_step_scaler, local_step_clipper)
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
        super().__init__(params, ZeroOnePhases(rules), common)
        self.var_freeze_step = rules.var_freeze_step
        self.var_update_scaler = rules.var_update_scaler
        self.local_step_scaler = rules.local_step_scaler
        self.local_step_clipper = rules.local_step_clipper

    @property
    def freeze_key(self) -> bool:
        """Whether the variance will not move any more."""
        return self._phases.frozen

    def bind_shards(self, views: Mapping[nn.Parameter, View]) -> None:
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

    def _extra(self, lane: Lane) -> dict[str, Any]:
        assert isinstance(self._phases, ZeroOnePhases)
        return {"var_interval": self._phases.var_interval, "local_step_interval": self._phases.interval}

    def _dense_step(self, lane: Lane, gradient: torch.Tensor) -> None:
        self._leave_local(lane)
        move_moments(lane, gradient)
        adam_update(lane, self.eps_mode == 0)

    def _exchange_step(self, lane: Lane, gradient: torch.Tensor, phase: Phase, topology: Topology) -> None:
        if phase is Phase.COMPRESSED:
            self._leave_local(lane)
            lane.average_momentum(gradient, lane.options["betas"][0], topology)
            adam_update(lane, self.eps_mode == 0)
            return
        if "momentum_accumulator" not in lane.own:
            self._enter_local(lane)
        lane.hiding(topology)
        if lane.unused is not None:  # what no bit would tell the others of must not move here alone
            gradient = gradient.masked_fill(lane.unused, 0)
        rate = lane.options["lr"] / corrections(lane)[0]
        follow(lane.own["exp_avg"][: gradient.numel()], gradient, lane.options["betas"][0])
        lane.own["momentum_accumulator"].add_(lane.own["exp_avg"] * rate)
        lane.scalars["lrs"] += lane.options["lr"]
        lane.scalars["corrected_lrs"] += rate
        if phase is Phase.SYNC and lane.scalars["corrected_lrs"] > 0:
            self._synchronise(lane, topology)
        else:
            lane.write(self._position(lane))

    def _synchronise(self, lane: Lane, topology: Topology) -> None:
        update = lane.own["momentum_accumulator"][: lane.layout.numel]
        exchange = lane.hiding(topology)
        messages = exchange.average(update, *lane.errors(topology), label="updates")
        if messages is not None:
            exchange.decode(messages, update)
        torch.div(lane.own["momentum_accumulator"], lane.scalars["corrected_lrs"], out=lane.own["exp_avg"])
        values = self._position(lane)
        lane.write(values)
        lane.own["last_synced"].copy_(lane.read())  # as the parameters' dtype holds it
        lane.own["momentum_accumulator"].zero_()
        lane.scalars.update(dict.fromkeys(_SUMS, 0.0))

    def _position(self, lane: Lane) -> torch.Tensor:  # 1-D float32, numel
        """y - u / (sqrt(v) + eps) - decay y sum(lr)."""
        below = denominator(lane, lane.own["exp_avg_sq"], corrections(lane)[1], self.eps_mode == 0)
        update = lane.own["momentum_accumulator"] / below
        update.add_(lane.own["last_synced"] * (lane.options["weight_decay"] * lane.scalars["lrs"]))
        return torch.sub(lane.own["last_synced"], update, out=update)

    def _enter_local(self, lane: Lane) -> None:
        lane.allocate("momentum_accumulator")
        lane.allocate("last_synced").copy_(lane.read())
        lane.scalars.update(dict.fromkeys(_SUMS, 0.0))
        self._scale_errors(lane, lane.options["lr"] / corrections(lane)[0])

    def _leave_local(self, lane: Lane) -> None:
        """Back to exchanges at every step, which only other rules than the saved ones can ask for."""
        if "momentum_accumulator" not in lane.own:
            return
        if lane.scalars["lrs"]:
            raise UsageError(
                "the rules of 0/1 Adam were changed while ranks had stepped apart. Fix: load a checkpoint that was "
                "saved at an exchange (state 'lrs' is 0), or keep var_freeze_step and local_step_clipper"
            )
        for name in _LOCAL:
            del lane.own[name]
        rate = lane.options["lr"] / corrections(lane)[0]
        self._scale_errors(lane, 1 / rate if rate else 0.0)

    def _scale_errors(self, lane: Lane, factor: float) -> None:
        for error in (lane.worker_error, lane.server_error):
            if error is not None:
                error.mul_(factor)

    def _more_own(self, entry: Mapping[str, Any]) -> tuple[str, ...]:
        return _LOCAL if all(name in entry for name in _LOCAL) else ()

    def _restored(self, lane: Lane, entries: Sequence[Mapping[str, Any]]) -> None:
        if "last_synced" not in lane.own:
            return
        # What the saving rank did by itself is not this rank's, so all begin at y; see load_rank_states.
        lane.scalars.update(dict.fromkeys(_SUMS, 0.0))
        lane.own["momentum_accumulator"].zero_()
        lane.write(self._position(lane))

    def _rank_tensors(self, lane: Lane) -> dict[str, torch.Tensor]:
        if "momentum_accumulator" not in lane.own:
            return {}
        sums = {name: torch.tensor(lane.scalars[name], dtype=torch.float64) for name in _SUMS}
        return sums | {name: lane.own[name] for name in ("exp_avg", "momentum_accumulator")}

    def _load_rank_tensors(self, lane: Lane, tensors: dict[str, torch.Tensor]) -> None:
        if not tensors or "last_synced" not in lane.own:
            return
        lane.scalars.update({name: float(tensors[name]) for name in _SUMS})
        for name in ("exp_avg", "momentum_accumulator"):
            lane.own[name][: tensors[name].numel()].copy_(tensors[name])
        lane.drop_noise()
        lane.write(self._position(lane))
