"""When a compressed optimizer sends what: a pure state machine per optimizer, read ahead as a plan.

1-bit Adam and LAMB (arXiv 2102.02888 Algorithm 1; 2104.06069 Algorithm 1): dense steps 1..freeze_step, then bits.

0/1 Adam (arXiv 2202.06009, Algorithm 1 and section 6): the variance is updated at steps k_0 = 1, k_1, ... with

    k_(j+1) - k_j = 2 ** floor(j / var_update_scaler)          until var_freeze_step        (set T_v)

and ranks exchange momentum at every step until then; afterwards once per interval, which starts at 1, doubles
every local_step_scaler steps and stops growing at local_step_clipper                       (set T_u).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from zeropipe.errors import ConfigError


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

    @property
    def communicates(self) -> bool:
        return self is not Phase.LOCAL


class Phases(Protocol):
    """Where an optimizer stands. Frozen: ``next`` gives the coming step's phase and the state after it."""

    @property
    def step(self) -> int: ...  # steps done

    def next(self) -> tuple[Phase, Phases]: ...

    def to_json(self) -> dict[str, int]: ...


def _at_least(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value < least or value != int(value):
        raise ConfigError(
            f"optimizer.params.{name} is a number of steps",
            expected=f"an integer of at least {least}",
            found=repr(value),
        )
    return int(value)


@dataclass(frozen=True, slots=True)
class OneBitPhases:
    """1-bit Adam and 1-bit LAMB."""

    freeze_step: int
    step: int = 0

    def __post_init__(self) -> None:
        # States that follow a checked one need no check; 0 would leave no variance to divide by.
        if self.step == 0:
            object.__setattr__(self, "freeze_step", _at_least("freeze_step", self.freeze_step, 1))

    @property
    def frozen(self) -> bool:
        """Whether the coming step is compressed."""
        return self.step >= self.freeze_step

    @property
    def owes(self) -> bool:
        """Whether error feedback of earlier steps is still to be delivered: a new dense beginning has no use for it."""
        return self.frozen

    def next(self) -> tuple[Phase, OneBitPhases]:
        phase = Phase.COMPRESSED if self.frozen else Phase.WARM_UP
        return phase, OneBitPhases(self.freeze_step, self.step + 1)

    @property
    def variance_steps(self) -> int:
        """Updates of the variance so far, if these rules held from the start."""
        return min(self.step, self.freeze_step)

    def forwarded(self, step: int) -> OneBitPhases:
        """These rules after ``step`` steps."""
        return OneBitPhases(self.freeze_step, step)

    def resumed(self, saved: dict[str, int]) -> OneBitPhases:
        """These rules at the step of ``saved``: a freeze_step that differs from the saved one takes effect."""
        return OneBitPhases(self.freeze_step, saved["step"])

    def to_json(self) -> dict[str, int]:
        return {"step": self.step}


@dataclass(frozen=True, slots=True)
class ZeroOneRules:
    """0/1 Adam's two sets of steps, T_v and T_u."""

    var_freeze_step: int
    var_update_scaler: int  # kappa
    local_step_scaler: int
    local_step_clipper: int  # H

    def __post_init__(self) -> None:
        # Every rule is at least 1: without one update there would be no variance to divide by.
        for name in ("var_freeze_step", "var_update_scaler", "local_step_scaler", "local_step_clipper"):
            object.__setattr__(self, name, _at_least(name, getattr(self, name), 1))

    def interval(self, step: int) -> int:
        """Steps between exchanges after ``step`` steps."""
        since = step - self.var_freeze_step
        if since < 0:
            return 1
        doublings = min(since // self.local_step_scaler, self.local_step_clipper.bit_length())
        return min(1 << doublings, self.local_step_clipper)


@dataclass(frozen=True, slots=True)
class ZeroOnePhases:
    """0/1 Adam."""

    rules: ZeroOneRules
    step: int = 0
    updates: int = 0  # of the variance: j
    next_update: int = 1  # k_j
    last_sync: int = 0

    @property
    def var_interval(self) -> int:
        """Steps from the last variance update to the one after it."""
        return 1 << (max(self.updates - 1, 0) // self.rules.var_update_scaler)

    @property
    def frozen(self) -> bool:
        """Whether the variance will not move any more."""
        return self.step >= self.rules.var_freeze_step

    @property
    def interval(self) -> int:
        """Steps between exchanges, for the coming step."""
        return self.rules.interval(self.step)

    @property
    def owes(self) -> bool:
        """Whether error feedback of earlier steps is still to be delivered: always, past the dense steps between."""
        return self.step > 0

    def next(self) -> tuple[Phase, ZeroOnePhases]:
        step, interval = self.step + 1, self.interval
        # An update that came due while the variance was frozen is made up for: only a checkpoint loaded under a
        # larger var_freeze_step is ever past next_update.
        if not self.frozen and step >= self.next_update:
            gap = 1 << (self.updates // self.rules.var_update_scaler)
            return Phase.VARIANCE, ZeroOnePhases(self.rules, step, self.updates + 1, step + gap, step)
        if interval > 1 and step - self.last_sync < interval:
            return Phase.LOCAL, ZeroOnePhases(
                self.rules, step, self.updates, self.next_update, self.last_sync
            )
        # Ranks that never step apart exchange momentum; those that may have done exchange their sum of updates.
        phase = Phase.COMPRESSED if interval == 1 else Phase.SYNC
        return phase, ZeroOnePhases(self.rules, step, self.updates, self.next_update, step)

    @property
    def variance_steps(self) -> int:
        """Updates of the variance so far."""
        return self.updates

    def forwarded(self, step: int) -> ZeroOnePhases:
        """These rules after ``step`` steps."""
        state = ZeroOnePhases(self.rules)
        for _ in range(step):
            _, state = state.next()
        return state

    def resumed(self, saved: dict[str, int]) -> ZeroOnePhases:
        """These rules in the state of ``saved``."""
        keys = ("step", "updates", "next_update", "last_sync")
        return ZeroOnePhases(self.rules, *(saved[key] for key in keys))

    def to_json(self) -> dict[str, int]:
        return {
            "step": self.step,
            "updates": self.updates,
            "next_update": self.next_update,
            "last_sync": self.last_sync,
        }


@dataclass(frozen=True, slots=True)
class Stretch:
    """Steps ``first``..``last`` in which the same phases repeat: ``counts`` says how often each came."""

    first: int
    last: int
    counts: tuple[tuple[Phase, int], ...]

    def __str__(self) -> str:
        inside = " + ".join(f"{count} {phase.value}" for phase, count in self.counts)
        return f"{self.first}..{self.last}: {inside}"

    @classmethod
    def parse(cls, text: str) -> Stretch:
        steps, inside = text.split(": ")
        first, last = steps.split("..")
        pairs = (part.split(" ", 1) for part in inside.split(" + "))
        return cls(int(first), int(last), tuple((Phase(word), int(count)) for count, word in pairs))


def walk(start: Phases, steps: int) -> Iterator[tuple[Phase, Phases]]:
    """The phases of the next ``steps`` steps, each with the state after it."""
    state = start
    for _ in range(steps):
        phase, state = state.next()
        yield phase, state


def stretches(start: Phases, steps: int) -> tuple[Stretch, ...]:
    """The plan of the next ``steps`` steps, cut where the rhythm changes."""
    found: list[Stretch] = []
    counts: dict[Phase, int] = {}
    first, last, rhythm, state = start.step + 1, start.step, _rhythm(start), start
    for phase, after in walk(start, steps):
        if counts and _rhythm(state) != rhythm:
            found.append(Stretch(first, last, tuple(counts.items())))
            counts, first = {}, last + 1
        rhythm, state, last = _rhythm(state), after, after.step
        counts[phase] = counts.get(phase, 0) + 1
    if counts:
        found.append(Stretch(first, last, tuple(counts.items())))
    return tuple(found)


def totals(plan: Iterable[Stretch]) -> dict[Phase, int]:
    """How many steps of a plan are in each phase; phases that never come are left out."""
    counts: dict[Phase, int] = {}
    for stretch in plan:
        for phase, count in stretch.counts:
            counts[phase] = counts.get(phase, 0) + count
    return counts


def _rhythm(state: Phases) -> tuple[bool, int]:
    interval = state.interval if isinstance(state, ZeroOnePhases) else 1
    return bool(getattr(state, "frozen", False)), interval


def check_against_run(
    phases: OneBitPhases | ZeroOnePhases, total_steps: int | None, warmup_steps: int | None
) -> None:
    """Raises ConfigError when compression would never start, or would start while the learning rate still warms up.

    ``total_steps`` and ``warmup_steps``: of the schedule (optimizer steps), None where it has none.
    """
    one_bit = isinstance(phases, OneBitPhases)
    name = "freeze_step" if isinstance(phases, OneBitPhases) else "var_freeze_step"
    freeze = phases.freeze_step if isinstance(phases, OneBitPhases) else phases.rules.var_freeze_step
    if one_bit and total_steps is not None and freeze >= total_steps:
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
