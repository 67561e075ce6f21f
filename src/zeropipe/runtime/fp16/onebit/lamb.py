"""1-bit LAMB: LAMB until the variance has settled, then momentum at one bit per element with scaled coefficients.

Li et al., 1-bit LAMB, arXiv 2104.06069, Algorithm 1 (warm-up) and Algorithm 2 (compression), per tensor.
Steps t = 1..freeze_step, with g the gradient averaged over ranks:

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g g
    d = m / (sqrt(v) + eps) + decay x
    c = clip(||x|| / ||d||, min_coeff, max_coeff), 1 where a norm is 0        x = x - lr c d
    c_avg = coeff_beta c_avg + (1 - coeff_beta) c

Afterwards v and c_avg stay, and with g_i the gradient of rank i:

    m_i = b1 m + (1 - b1) g_i              m' = compressed average of the m_i
    g~ = (m' - b1 m) / (1 - b1)            the gradient as the average knows it (section 4.2, "reconstructed")
    w = b2 w + (1 - b2) g~ g~              the fresh variance, w = v at the beginning
    r = max((sqrt(v) + eps) / (sqrt(w) + eps)), brought towards 1 by the share of the decay in d:
        s = min(1, ||d - decay x|| / ||d||)        r = r s + 1 - s
    r = clip(r, factor_min, factor_max), then within factor_threshold of the last r, relatively
    x = x - lr c_avg r (m' / (sqrt(v) + eps) + decay x)

c_avg begins at 0, so it is divided by 1 - coeff_beta**(dense steps) where it is used; after a warm-up of any useful
length that is 1. Of a tensor that has been stepped but whose c_avg no checkpoint knew, it is NaN until the next step,
dense or not, which takes that step's c for it. The paper's ``scaling_coeff``, which brings all momenta to one
magnitude before they share one scale, is computed and shown but has nothing to do here: every tensor has a scale of
its own in the message.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from zeropipe.comm import collectives
from zeropipe.given import Anything, ParametersLike
from zeropipe.runtime.fp16.onebit.adam import corrections, denominator, direction, follow, move_moments
from zeropipe.runtime.fp16.onebit.base import CompressedOptimizer, check_ranges
from zeropipe.runtime.fp16.onebit.lane import Entry, Kept, Lane
from zeropipe.runtime.fp16.onebit.plan import Phase, Rules


class OnebitLamb(CompressedOptimizer):
    """1-bit LAMB. Gradients on the parameters are each rank's own; see ``base`` for use under an engine.

    ``freeze_step``: dense steps before compression begins. ``max_coeff``, ``min_coeff``: bounds of LAMB's
    coefficient; ``coeff_beta``: of its moving average; ``factor_max``, ``factor_min``: bounds of the factor on it
    in the compressed phase; ``factor_threshold``: how much the factor may change from step to step, relatively.

    State of each parameter: as OnebitAdam, with ``lamb_coeff``, ``lamb_coeff_freeze``, and in the compressed
    phase ``exp_avg_sq_fresh``, ``last_factor`` and ``scaling_coeff``.
    """

    kept = Kept(later=("exp_avg_sq_fresh",))

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
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        amsgrad: bool = False,
        cuda_aware: bool = False,
        comm_backend_name: str = "nccl",
        coeff_beta: float = 0.9,
        factor_max: float = 4.0,
        factor_min: float = 0.5,
        factor_threshold: float = 0.1,
        node_size: int = 1,
    ) -> None:
        bounds = "positive bounds in order"
        check_ranges(
            type(self).__name__,
            {
                "min_coeff, max_coeff": (0 < min_coeff <= max_coeff, bounds, (min_coeff, max_coeff)),
                "factor_min, factor_max": (0 < factor_min <= factor_max, bounds, (factor_min, factor_max)),
                "coeff_beta": (0 <= coeff_beta < 1, "a number in [0, 1)", coeff_beta),
                "factor_threshold": (factor_threshold >= 0, "at least 0", factor_threshold),
            },
        )
        super().__init__(params, Rules(freeze_step), locals(), "max_coeff", "min_coeff")
        self.freeze_step = freeze_step
        self.coeff_beta = coeff_beta
        self.factor_max, self.factor_min = factor_max, factor_min
        self.factor_threshold = factor_threshold

    lamb_freeze_key = CompressedOptimizer.freeze_key

    def get_lamb_coeffs(self) -> list[float]:
        """The coefficient of each parameter in the last step."""
        lanes = (lane.per_tensor.get("lamb_coeff") for lane in self._lanes)
        return [c for coeffs in lanes if coeffs is not None for c in coeffs.tolist()]

    def _averages(self, lane: Lane) -> torch.Tensor:  # c_avg, float64, one per tensor
        if "lamb_coeff_freeze" not in lane.per_tensor:
            for name in ("lamb_coeff", "lamb_coeff_freeze"):
                lane.per_tensor[name] = torch.zeros(len(lane.layout.tensors), dtype=torch.float64)
        return lane.per_tensor["lamb_coeff_freeze"]

    def _settled(self, lane: Lane) -> float:
        """The share of c in c_avg that its dense steps have reached: its bias."""
        return 1 - self.coeff_beta**lane.variance_steps if lane.variance_steps else 1.0

    def _coefficients(self, lane: Lane, values: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        """c of each tensor, float64. Collective where the state is sharded."""
        (weights, updates), _ = measure(lane, [values, update], [])
        ratio = (weights / updates).clamp(lane.options["min_coeff"], lane.options["max_coeff"])
        return torch.where((weights > 0) & (updates > 0), ratio, 1.0)

    def _dense_step(self, lane: Lane, gradient: torch.Tensor) -> None:
        move_moments(lane, gradient)
        values, update = lane.read(), direction(lane)
        if lane.options["weight_decay"]:
            update.add_(values * lane.options["weight_decay"])
        coeff, average = self._coefficients(lane, values, update), self._averages(lane)
        # NaN: no checkpoint knew this tensor's; it takes this step's c for all of its steps so far.
        unknown = average.isnan()
        average.mul_(self.coeff_beta).add_(coeff, alpha=1 - self.coeff_beta)
        average[unknown] = coeff[unknown] * self._settled(lane)
        self._apply(lane, values, update, coeff)

    def _exchange_step(self, lane: Lane, gradient: torch.Tensor, phase: Phase) -> None:
        if not lane.late:
            self._freeze()
        beta1, beta2 = lane.options["betas"]

        # [1] m', and what it says of the gradient: with that the fresh variance goes on.
        before = lane.own["exp_avg"].clone()
        lane.average_momentum(gradient, beta1)
        rebuilt = before.mul_(-beta1).add_(lane.own["exp_avg"]).div_(1 - beta1)
        follow(lane.own["exp_avg_sq_fresh"], rebuilt.square_(), beta2)

        # [2] How much smaller steps would be with the fresh variance, which saw every step, than with the frozen one.
        second = corrections(lane)[1]
        frozen = denominator(lane, lane.own["exp_avg_sq"], second)
        third = 1 - beta2**lane.step if lane.options["bias_correction"] else 1.0
        moving = denominator(lane, lane.own["exp_avg_sq_fresh"], third)

        # [3] One pass over the buffer for all that is known per tensor: collective where it is sharded.
        adam = direction(lane)
        values, decay = lane.read(), lane.options["weight_decay"]
        update = adam + values * decay if decay else adam
        (plain, updates), (factor,) = measure(lane, [adam, update], [frozen.div_(moving)])
        if decay:
            # The decay's part of d does not depend on the variance.
            share = torch.where(updates > 0, plain / updates, 1.0).clamp(max=1.0)
            factor = factor * share + (1 - share)

        # [4] r, bounded, and never far from the last one.
        factor = factor.clamp(self.factor_min, self.factor_max)
        last = lane.per_tensor["last_factor"]
        factor = factor.clamp(last * (1 - self.factor_threshold), last * (1 + self.factor_threshold))
        last.copy_(factor)
        average, settled = self._averages(lane), self._settled(lane)
        # The same on every rank, for so is the checkpoint: all take part in the norms, or none.
        unknown = average.isnan()
        if unknown.any():
            average[unknown] = self._coefficients(lane, values, update)[unknown] * settled
        self._apply(lane, values, update, average / settled * factor)

    def _apply(self, lane: Lane, values: torch.Tensor, update: torch.Tensor, coeff: torch.Tensor) -> None:
        """x = x - lr c d, with one c for each tensor."""
        lane.per_tensor["lamb_coeff"].copy_(coeff)
        rates = (coeff * -lane.options["lr"]).tolist()
        for tensor, start, stop in extents(lane):
            values[start:stop] += update[start:stop] * rates[tensor]
        lane.write(values)

    def _freeze(self) -> None:
        """Begin the compressed phase: the fresh variance starts from the frozen one."""
        # All lanes at once: scaling_coeff compares the momenta of all tensors.
        sizes: list[torch.Tensor] = []
        lanes = [lane for lane in self._lanes if not lane.late]
        for lane in lanes:
            lane.begin()
            lane.own["exp_avg_sq_fresh"].copy_(lane.own["exp_avg_sq"])
            lane.per_tensor["last_factor"] = torch.ones(len(lane.layout.tensors), dtype=torch.float64)
            (norms,), _ = measure(lane, [lane.own["exp_avg"]], [])
            numels = torch.tensor([max(t.numel, 1) for t in lane.layout.tensors], dtype=torch.float64)
            sizes.append(norms / numels.sqrt())
        united = torch.cat(sizes).mean()
        for lane, size in zip(lanes, sizes, strict=True):
            lane.per_tensor["scaling_coeff"] = torch.where(size > 0, united / size, 1.0)

    def _restored(self, lane: Lane, entries: Sequence[Entry]) -> None:
        if lane.variance_steps:
            for name in ("lamb_coeff", "lamb_coeff_freeze"):
                lane.per_tensor[name] = lane.numbers(name, entries)
        if not lane.late:
            return
        compressed = {name: lane.numbers(name, entries) for name in ("last_factor", "scaling_coeff")}
        begun = compressed["last_factor"].isnan().logical_not_()
        if not begun.any() or not self.lamb_freeze_key:
            # A later freeze step, or moments of another optimizer: the compressed phase begins anew.
            lane.end()
            return
        for tensor, start, stop in extents(lane):
            # A tensor that the saving run had not begun with begins as in ``_freeze``.
            if not begun[tensor]:
                lane.own["exp_avg_sq_fresh"][start:stop] = lane.own["exp_avg_sq"][start:stop]
        lane.per_tensor.update({name: value.nan_to_num(nan=1.0) for name, value in compressed.items()})


def extents(lane: Lane) -> list[tuple[int, int, int]]:
    """(tensor, start, stop) for each tensor with elements in this rank's state, counted in the state."""
    return [(p.tensor, p.offset, p.offset + p.numel) for p in lane.layout.pieces(lane.shard)]


def measure(
    lane: Lane, norms: Sequence[torch.Tensor], maxima: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Per tensor of the layout: the norm of each of ``norms`` and the largest value of each of ``maxima``.

    Both: 1-D over this rank's state, ``maxima`` not negative. The results are float64 on the CPU, 0 for an
    empty tensor. Collective where the state is sharded.
    """
    # Summed by shard, in order, also where nothing is sharded (as if it were), so that all stages give the same bits.
    ranks = 1 if lane.sharded else lane.exchange.topology.group.size
    cut = lane.layout if lane.sharded else lane.layout.reshard(ranks)
    rows = torch.zeros((ranks, len(norms) + len(maxima), len(lane.layout.tensors)), dtype=torch.float64)
    pieces = [
        (row, p.tensor, slice(start + p.offset, start + p.offset + p.numel))
        for row in range(ranks)
        for start in (0 if lane.sharded else cut.shard_range(row)[0],)
        for p in cut.pieces(lane.shard if lane.sharded else row)
    ]
    found = [
        value
        for _, _, run in pieces
        for value in (
            *(torch.linalg.vector_norm(source[run], dtype=torch.float64).square() for source in norms),
            *(source[run].max().double() for source in maxima),
        )
    ]
    if found:
        values = torch.stack(found).cpu().view(len(pieces), -1)
        for (row, tensor, _), column in zip(pieces, values, strict=True):
            rows[row, :, tensor] = column
    if lane.sharded and lane.shard_group is not None:
        gathered = rows.new_empty((lane.shard_group.size, rows.numel()), device=lane.device)
        sent = rows.view(-1).to(lane.device)
        collectives.all_gather(gathered.view(-1), sent, lane.shard_group, label="norms per tensor")
        rows = gathered.cpu().view(-1, *rows.shape[1:])
    total = rows[0]
    for row in rows[1:]:
        total[: len(norms)] += row[: len(norms)]
        torch.maximum(total[len(norms) :], row[len(norms) :], out=total[len(norms) :])
    return list(total[: len(norms)].sqrt()), list(total[len(norms) :])
