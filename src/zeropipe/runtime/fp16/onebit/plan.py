"""When a compressed optimizer sends what, and how much: a pure state machine, and the plan of a run read from it.

    1-bit Adam, 1-bit LAMB     WARM_UP x freeze_step -> COMPRESSED ...
    (arXiv 2102.02888 and 2104.06069, Algorithm 1)

    0/1 Adam                   VARIANCE <-> COMPRESSED     until var_freeze_step, while interval is 1
    (arXiv 2202.06009,         LOCAL x (interval - 1) -> SYNC ...     afterwards
    Algorithm 1, section 6)

0/1 Adam updates the variance at steps k_0 = 1, k_1, ... with

    k_(j+1) - k_j = 2 ** floor(j / var_update_scaler)          until var_freeze_step        (set T_v)

and exchanges once per interval, which starts at 1, doubles every local_step_scaler steps after var_freeze_step and
stops growing at local_step_clipper (set T_u). 1-bit Adam is the same with gaps that never grow and an interval of 1.

Bytes are what one rank sends (it receives as many) under the engine, by the bandwidth-optimal algorithms that the
groups use: an all-reduce of n bytes sends 2 n (W - 1) / W, a reduce-scatter, all-gather or all-to-all half of that.
An exchange is a step in which gradients, momenta or updates travel; a round is a step in which ranks wait for each
other at all, and those are all steps: in each the ranks agree on the norm of the gradients. Not counted is one more
small all-reduce in a dense step in which some rank leaves a parameter out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from enum import Enum
from itertools import groupby, pairwise
from math import inf
from operator import itemgetter
from typing import Any

from zeropipe.errors import ConfigError
from zeropipe.layout.flat import FlatShards, TensorSpec
from zeropipe.runtime.fp16.onebit.exchange import ALIGN

# By proper name: the options that say which step does what, in the order of ``Rules``, with the optimizers' defaults.
_OPTIONS = {
    "OnebitAdam": {"freeze_step": 100000},
    "OnebitLamb": {"freeze_step": 100000},
    "ZeroOneAdam": {
        "var_freeze_step": 100000,
        "var_update_scaler": 16,
        "local_step_scaler": 32678,
        "local_step_clipper": 16,
    },
}
_AGREEMENT = 24  # bytes: three numbers that the ranks all-reduce in every step
_MASTER_ALIGN = 16  # elements of which a shard of stage 1 holds a multiple


class Phase(Enum):
    """What one step does; the value is the word that plans print."""

    WARM_UP = "warm-up"  # gradients averaged in full precision; both moments move
    VARIANCE = "variance"  # the same, at a step of T_v
    COMPRESSED = "compressed"  # momentum exchanged at one bit per element
    SYNC = "sync"  # the sum of local updates exchanged at one bit per element
    LOCAL = "local"  # nothing is sent; ranks step apart

    @property
    def dense(self) -> bool:
        """Whether the step needs gradients that were averaged over all ranks."""
        return self in (Phase.WARM_UP, Phase.VARIANCE)


@dataclass(frozen=True, slots=True)
class Rules:
    """Which step does what. Raises ConfigError for what is no number of steps."""

    freeze_step: int  # the option of this name, or var_freeze_step
    var_update_scaler: float = inf  # kappa; inf, for 1-bit Adam and LAMB: gaps never grow
    local_step_scaler: int = 1
    local_step_clipper: int = 1  # H; 1: ranks never step apart

    def __post_init__(self) -> None:
        # Every rule is at least 1: without one update there would be no variance to divide by.
        for name, value in asdict(self).items():
            if name == "var_update_scaler" and value == inf:
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or value < 1 or value % 1:
                raise ConfigError(
                    f"optimizer.params.{self.option if name == 'freeze_step' else name} is a number of steps",
                    expected="an integer of at least 1",
                    found=repr(value),
                )
            object.__setattr__(self, name, int(value))

    @property
    def gapless(self) -> bool:
        """Whether the variance moves in every step until it is frozen: 1-bit Adam and LAMB."""
        return self.var_update_scaler == inf

    @property
    def option(self) -> str:
        """How users call ``freeze_step``."""
        return "freeze_step" if self.gapless else "var_freeze_step"

    def gap(self, updates: int) -> int:
        """Steps from variance update number ``updates`` (from 0) to the next."""
        return 1 << int(updates // self.var_update_scaler)

    def interval(self, step: int) -> int:
        """Steps between exchanges after ``step`` steps."""
        since = step - self.freeze_step
        if since < 0:
            return 1
        doublings = min(since // self.local_step_scaler, self.local_step_clipper.bit_length())
        return min(1 << doublings, self.local_step_clipper)


@dataclass(frozen=True, slots=True)
class Phases:
    """Where an optimizer stands. Frozen: ``next`` gives the coming step's phase and the state after it."""

    rules: Rules
    step: int = 0  # steps done
    updates: int = 0  # of the variance: j
    next_update: int = 1  # k_j
    last_sync: int = 0

    @property
    def frozen(self) -> bool:
        """Whether the variance will not move any more: of 1-bit Adam, whether the coming step is compressed."""
        return self.step >= self.rules.freeze_step

    @property
    def interval(self) -> int:
        """Steps between exchanges, for the coming step."""
        return self.rules.interval(self.step)

    @property
    def owes(self) -> bool:
        """Whether error feedback of earlier steps is still to be delivered.

        0/1 Adam's is, past the dense steps between; a new dense beginning of 1-bit Adam has no use for it.
        """
        return self.frozen if self.rules.gapless else self.step > 0

    def next(self) -> tuple[Phase, Phases]:
        step, interval = self.step + 1, self.interval
        # An update that came due while the variance was frozen is made up for: only a checkpoint loaded under a
        # larger freeze step is ever past next_update.
        if not self.frozen and step >= self.next_update:
            after = Phases(self.rules, step, self.updates + 1, step + self.rules.gap(self.updates), step)
            return Phase.WARM_UP if self.rules.gapless else Phase.VARIANCE, after
        if interval > 1 and step - self.last_sync < interval:
            return Phase.LOCAL, replace(self, step=step)
        # Ranks that never step apart exchange momentum; those that may have done exchange their sum of updates.
        phase = Phase.COMPRESSED if interval == 1 else Phase.SYNC
        return phase, replace(self, step=step, last_sync=step)

    def forwarded(self, step: int) -> Phases:
        """These rules after ``step`` steps."""
        if self.rules.gapless:
            updates = min(step, self.rules.freeze_step)
            return Phases(self.rules, step, updates, updates + 1, step)
        state = Phases(self.rules)
        for _ in range(step):
            _, state = state.next()
        return state

    def resumed(self, saved: Mapping[str, int]) -> Phases:
        """These rules where ``saved`` stood: those that differ from the saved ones take effect."""
        if self.rules.gapless:
            return self.forwarded(saved["step"])
        return Phases(self.rules, *(saved[key] for key in ("step", "updates", "next_update", "last_sync")))

    def to_json(self) -> dict[str, int]:
        keys = ("step",) if self.rules.gapless else ("step", "updates", "next_update", "last_sync")
        return {key: getattr(self, key) for key in keys}

    def shown(self) -> dict[str, int]:
        """What an optimizer's state shows of it for each parameter, beside the counts."""
        if self.rules.gapless:
            return {}
        gap = self.rules.gap(max(self.updates - 1, 0))  # from the last variance update to the one after it
        return {"var_interval": gap, "local_step_interval": self.interval}

    def check_run(self, total_steps: int | None, warmup_steps: int | None) -> None:
        """Raises ConfigError when compression would never start, or would start while the learning rate still warms up.

        ``total_steps`` and ``warmup_steps``: of the schedule (optimizer steps), None where it has none.
        """
        name, freeze = self.rules.option, self.rules.freeze_step
        # 0/1 Adam compresses between variance updates from the start.
        if self.rules.gapless and total_steps is not None and freeze >= total_steps:
            raise ConfigError(
                "compression would never start",
                expected=f"optimizer.params.{name} below the run's {total_steps} steps",
                found=freeze,
                fix=f"set {name} to about {max(1, round(total_steps * 0.15))} (15 % of the run), or use Adam",
            )
        if warmup_steps is not None and freeze < warmup_steps:
            raise ConfigError(
                "the variance would be frozen while the learning rate still warms up",
                expected=f"optimizer.params.{name} of at least the schedule's {warmup_steps} warm-up steps",
                found=freeze,
                fix=f"set {name} to {warmup_steps} or more, or shorten the schedule's warm-up",
            )


def walk(state: Phases, steps: int) -> Iterator[tuple[Phase, Phases]]:
    """The phases of the next ``steps`` steps, each with the state after it."""
    for _ in range(steps):
        phase, state = state.next()
        yield phase, state


def stretches(start: Phases, steps: int) -> list[tuple[int, int, Counter[Phase]]]:
    """The next ``steps`` steps, cut where the rhythm changes: (first, last, how often each phase comes)."""
    walked = list(walk(start, steps))
    before = [start, *(after for _, after in walked)]
    rhythms = zip(((s.frozen, s.interval) for s in before), (phase for phase, _ in walked), strict=False)
    found, first = [], start.step + 1
    for _, run in groupby(rhythms, key=itemgetter(0)):
        counts = Counter(phase for _, phase in run)
        found.append((first, first + counts.total() - 1, counts))
        first += counts.total()
    return found


@dataclass(frozen=True, slots=True)
class Job:
    """The run whose traffic is counted."""

    params: int  # elements that are trained
    steps: int
    world: int  # ranks that average together
    # Of a gradient on the wire (``communication_data_type``): 2 for fp16 and bf16, 4 for fp32.
    element_bytes: int = 2
    stage: int = 0
    tensors: int = 1  # each has a scale of its own in each message that holds some of it
    node_size: int = 1
    param_bytes: int | None = None  # of a parameter, which stage 1 gathers; None: as a gradient
    # Elements of each tensor, buffer by buffer (one for each param group and dtype), for figures that are exact to the
    # byte; without them ``params`` are shared out evenly among ``tensors`` in one buffer.
    sizes: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        for name in ("params", "steps", "world", "tensors", "node_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"plan: {name}", expected="at least 1", found=getattr(self, name))
        if self.world % self.node_size:
            raise ConfigError("plan: node_size", expected=f"a divisor of {self.world}", found=self.node_size)

    @property
    def others(self) -> float:
        """The part of a whole tensor that a rank sends to the others."""
        return (self.world - 1) / self.world

    def layouts(self, align: int) -> list[FlatShards]:
        """The buffers, cut into a shard for each rank."""
        even, more = divmod(self.params, self.tensors)
        sizes = self.sizes or ([even + 1] * more + [even] * (self.tensors - more),)
        named = ([TensorSpec(str(i), (n,), "") for i, n in enumerate(buffer)] for buffer in sizes)
        return [FlatShards(tuple(specs), self.world, align) for specs in named]

    def gathered(self, element_bytes: int) -> float:
        """Bytes to gather all shards of the masters, with their padding; none at stage 0."""
        numel = sum(layout.padded_numel for layout in self.layouts(_MASTER_ALIGN)) if self.stage else 0
        return numel * element_bytes * self.others

    def norms(self, kinds: int) -> float:
        """Bytes of LAMB's norms of each tensor, where shards must be put together for them."""
        tensors = sum(map(len, self.sizes)) or self.tensors
        return 8 * kinds * tensors * self.world * self.others if self.stage else 0.0


@dataclass(frozen=True, slots=True)
class Row:
    """All steps of one phase."""

    phase: Phase
    steps: int
    bytes: int
    rounds: int  # steps in which ranks wait for each other
    exchanges: int  # of these, those in which values travel


@dataclass(frozen=True, slots=True)
class Plan:
    """A run's traffic; ``rows`` holds one row for each phase that comes."""

    name: str
    stretches: list[tuple[int, int, Counter[Phase]]]
    rows: tuple[Row, ...]

    def sum(self, of: str) -> int:
        """Of all rows: steps, bytes, rounds or exchanges."""
        return sum(getattr(row, of) for row in self.rows)

    def saves(self, of: str, other: Plan) -> float:
        """1 - own / other's: 0.87 is 87 % less."""
        return 1 - self.sum(of) / other.sum(of) if other.sum(of) else 0.0

    def times_less_than(self, other: Plan) -> float:
        return other.sum("bytes") / self.sum("bytes") if self.sum("bytes") else float("inf")

    def __str__(self) -> str:
        lines = [self.name]
        for first, last, counts in self.stretches:
            inside = " + ".join(f"{count} {phase.value}" for phase, count in counts.items())
            lines.append(f"  steps {first}..{last}: {inside}")
        kinds = ("steps", "rounds", "exchanges")
        cells: list[tuple[object, ...]] = [("phase", *kinds, "sent per step", "sent in all")]
        for row in self.rows:
            numbers = (getattr(row, kind) for kind in kinds)
            cells.append((row.phase.value, *numbers, human(row.bytes / row.steps), human(row.bytes)))
        cells.append(("all", *map(self.sum, kinds), "", human(self.sum("bytes"))))
        return "\n".join([*lines, *("  {:<12}{:>10}{:>10}{:>11}{:>16}{:>14}".format(*row) for row in cells)])


def dense_bytes(job: Job) -> float:
    """Averaging gradients for one step: an all-reduce; from stage 1 on its first half, then parameters are gathered."""
    half = job.params * job.element_bytes * job.others
    return half + (job.gathered(job.param_bytes or job.element_bytes) if job.stage else half)


def compressed_bytes(job: Job) -> float:
    """One exchange of bits: two rounds between nodes, full precision and a gather of bits inside one.

    At stage 1 the updated parameters are gathered too, which is dense.
    """
    nodes, inside = job.world // job.node_size, job.node_size
    sent = job.gathered(job.param_bytes or job.element_bytes)
    for layout in job.layouts(ALIGN):
        scales = max(len(layout.pieces(shard)) for shard in range(job.world))
        message = 4 * scales + layout.shard_numel // 8
        if nodes == 1:  # nobody to send bits to
            sent += 2 * 4 * layout.numel * (inside - 1) / inside
        else:
            sent += 2 * (nodes - 1) * message
            sent += (inside - 1) * (4 * layout.padded_numel / inside + nodes * message)
    return sent


def plan(name: str, phases: Phases, job: Job) -> Plan:
    """The traffic of an optimizer with these phases; of ``OnebitLamb`` with its norms."""
    kinds, lamb, rows = [phase for phase, _ in walk(phases, job.steps)], name == "OnebitLamb", []
    # At stage 1 the whole momentum is gathered where it is in shards: after a dense step, and always in one node, where
    # nobody sends the bits of which it could be put together.
    begun = sum(before.dense and not phase.dense for before, phase in pairwise(kinds))
    for phase, steps in Counter(kinds).items():
        each = 2 * _AGREEMENT * job.others
        if phase.dense:
            each += dense_bytes(job) + (job.norms(2) if lamb else 0.0)
        elif phase is not Phase.LOCAL:
            each += compressed_bytes(job) + (job.norms(3) if lamb else 0.0)
        sent = steps * each
        if phase is Phase.COMPRESSED:
            times = steps if job.world == job.node_size else begun
            sent += times * job.gathered(4) + (job.norms(1) if lamb else 0.0)
        rounds = steps if job.world > 1 else 0
        rows.append(Row(phase, steps, round(sent), rounds, 0 if phase is Phase.LOCAL else rounds))
    return Plan(name, stretches(phases, job.steps), tuple(rows))


def dense_plan(job: Job, name: str = "dense Adam") -> Plan:
    """Every step averages gradients in full."""
    return plan(name, Phases(Rules(job.steps)), job)


def phases_of(type: str | None, params: Mapping[str, Any]) -> tuple[str, Phases]:
    """The optimizer's proper name and its phases, from a config's ``optimizer`` section.

    Raises ConfigError for an optimizer that does not compress.
    """
    plain = (type or "").lower().replace("_", "").replace("-", "")
    for name, options in _OPTIONS.items():
        if name.lower() == plain:
            return name, Phases(Rules(*(params.get(key, default) for key, default in options.items())))
    raise ConfigError(
        "this optimizer does not compress its communication",
        expected="optimizer.type OneBitAdam, OneBitLamb or ZeroOneAdam",
        found=repr(type),
    )


def check(phases: Phases, name: str, job: Job, warmup_steps: int | None = None) -> None:
    """Raises ConfigError for a job in which this optimizer cannot compress."""
    phases.check_run(job.steps, warmup_steps)
    apart = phases.rules.local_step_clipper > 1
    if job.stage >= 2 or (job.stage == 1 and apart):
        raise ConfigError(
            f"{name} cannot run at this ZeRO stage",
            expected="zero_optimization.stage 0" + ("" if apart else " or 1"),
            found=job.stage,
            fix="set local_step_clipper to 1 for stage 1, or use stage 0" if apart else "use stage 0 or 1",
        )


def human(count: float) -> str:
    """Bytes in units of 1024, three digits."""
    power = next((n for n in range(4) if count / 1024**n < 1000), 4)
    value, unit = count / 1024**power, ("B", "KiB", "MiB", "GiB", "TiB")[power]
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
