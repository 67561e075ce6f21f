"""What a schedule is made for: which rank runs which stage, and what the steps of a stage cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from math import inf
from typing import Any

from zeropipe.errors import ScheduleError
from zeropipe.runtime.pipe.instructions import Op


class Placement(Enum):
    """How the stages of a model are dealt to the ranks of the pipeline."""

    LOOP = "loop"  # stage s on rank s mod p
    VEE = "vee"  # the odd passes run backwards, so the last rank also holds the next stage: no transfer there

    def rank(self, stage: int, ranks: int) -> int:
        # A lap is one chunk of every rank; on odd laps a vee comes back.
        lap, place = divmod(stage, ranks)
        return ranks - 1 - place if self is Placement.VEE and lap % 2 else place

    def stage(self, rank: int, chunk: int, ranks: int) -> int:
        """The stage that is chunk number ``chunk`` of ``rank``."""
        place = ranks - 1 - rank if self is Placement.VEE and chunk % 2 else rank
        return chunk * ranks + place


_BY_STAGE = ("forward", "backward_input", "backward_weight", "activation")
_SINGLE = ("transfer", "unshard", "reduce")


@dataclass(frozen=True, slots=True)
class Costs:
    """Time and memory of each stage. A tuple of one entry holds for all stages; units are the user's own."""

    forward: tuple[float, ...] = (1.0,)
    backward_input: tuple[float, ...] = (1.0,)
    backward_weight: tuple[float, ...] = (1.0,)
    transfer: float = 0.0
    unshard: float = 0.0
    reduce: float = 0.0
    activation: tuple[float, ...] | None = None  # held from forward to the last backward; None: 1 / chunks

    @classmethod
    def parse(cls, text: str) -> Costs:
        """Read ``F,B,W`` or ``F,B,W,comm`` (B is the input gradient alone)."""
        try:
            parts = [float(word) for word in text.split(",")]
            forward, backward, weight = parts[:3]
            transfer = parts[3] if len(parts) == 4 else 0.0
            if len(parts) > 4:
                raise ValueError(text)
        except ValueError as error:
            raise ScheduleError(
                "cannot read the costs", expected="F,B,W or F,B,W,comm", found=repr(text)
            ) from error
        return cls((forward,), (backward,), (weight,), transfer).checked()

    def checked(self, stages: int | None = None) -> Costs:
        """These costs; raises ScheduleError for what no time can be, or for another number of ``stages``."""
        # Infinity would never end, NaN and negative times order nothing.
        given = {name: getattr(self, name) or (1.0,) for name in _BY_STAGE}
        given[", ".join(_SINGLE)] = [getattr(self, name) for name in _SINGLE]
        for name, values in given.items():
            if not all(0 <= value < inf for value in values):
                raise ScheduleError(
                    f"cost {name}", expected="finite numbers, none negative", found=list(values)
                )
            if name in _BY_STAGE and len(values) not in (1, stages or len(values)):
                raise ScheduleError(
                    f"cost {name}",
                    expected=f"one number, or one for each of {stages} stages",
                    found=list(values),
                )
        if not sum(self.forward + self.backward_input + self.backward_weight):
            raise ScheduleError("every step costs nothing", expected="a forward or backward above 0")
        return self

    def average(self) -> Costs:
        """One number for all stages, and only what decides which step comes first."""
        forward, backward, weight = (
            (sum(v) / len(v),) for v in (self.forward, self.backward_input, self.backward_weight)
        )
        return Costs(forward, backward, weight, self.transfer)

    def share(self, chunks: int) -> Costs:
        """The costs of one chunk, given those of a rank's whole share."""
        forward, backward, weight = (
            tuple(x / chunks for x in v) for v in (self.forward, self.backward_input, self.backward_weight)
        )
        return replace(self, forward=forward, backward_input=backward, backward_weight=weight)

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> Costs:
        """Read a measured profile: the fields of this class, each a number or one number for each stage."""
        known = {*_BY_STAGE, *_SINGLE}
        wrong = sorted(set(data) - known)
        if wrong:
            raise ScheduleError(
                f"unknown key in the cost profile: {wrong[0]!r}", expected=f"some of {sorted(known)}"
            )
        values: dict[str, Any] = {}
        for key, value in data.items():
            many = key in _BY_STAGE and isinstance(value, list) and value
            try:
                numbers = tuple(map(float, value if many else [value]))
            except (TypeError, ValueError) as error:
                raise ScheduleError(
                    f"cost {key!r} of the profile", expected="numbers", found=repr(value)
                ) from error
            values[key] = numbers if key in _BY_STAGE else numbers[0]
        return cls(**values).checked()

    def of(self, op: Op, stage: int = 0) -> float:
        """How long a step keeps its rank busy."""
        parts = {
            Op.FORWARD: (self.forward,),
            Op.BACKWARD: (self.backward_input, self.backward_weight),
            Op.BACKWARD_INPUT: (self.backward_input,),
            Op.BACKWARD_WEIGHT: (self.backward_weight,),
            Op.UNSHARD: ((self.unshard,),),
            Op.REDUCE_GRAD: ((self.reduce,),),
        }.get(op, ())
        return sum(_at(values, stage) for values in parts)

    def held(self, stage: int, chunks: int) -> float:
        return 1.0 / chunks if self.activation is None else _at(self.activation, stage)


def _at(values: tuple[float, ...], stage: int) -> float:
    return values[0] if len(values) == 1 else values[stage]


UNIT = Costs()
