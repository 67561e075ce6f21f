"""What all schedules share: a step counter, and the learning rate of each param group as a function of it.

``last_batch_iteration`` counts from 0; -1 means that no step was taken. The values of an iteration depend on
nothing else, so a state is one number and a loaded schedule writes exactly the values it had.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from zeropipe.errors import CheckpointError, ConfigError, UsageError
from zeropipe.given import OptimizerLike, ScheduleLike


def get_torch_optimizer(optimizer: OptimizerLike) -> Optimizer:
    """``optimizer`` itself, or the torch optimizer that it wraps as ``.optimizer``. Raises UsageError else."""
    for candidate in (optimizer, getattr(optimizer, "optimizer", None)):
        if isinstance(candidate, Optimizer):
            return candidate
    raise UsageError(
        "a schedule needs a torch optimizer",
        expected="torch.optim.Optimizer, or an object with one as .optimizer",
        found=type(optimizer).__name__,
        fix="pass the optimizer that initialize() returned",
    )


def per_group(key: str, value: float | Sequence[float], num_groups: int) -> list[float]:
    """``value`` for each param group; a sequence must have one entry per group (ConfigError)."""
    if not isinstance(value, (list, tuple)):
        return [float(value)] * num_groups  # type: ignore[arg-type]
    if len(value) != num_groups:
        raise ConfigError(
            f"scheduler.params.{key} does not fit the optimizer",
            expected=f"one number, or {num_groups} (one per param group)",
            found=list(value),
            fix=f"give {num_groups} values or a single one",
        )
    return [float(v) for v in value]


def positive(key: str, value: float, *, least: int = 1) -> int:
    """``value`` as a whole number of steps, at least ``least``; ConfigError else."""
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value % 1 or value < least:
        raise ConfigError(
            f"scheduler.params.{key} is not a number of steps",
            expected=f"a whole number, {least} or more",
            found=repr(value),
            fix=f"set {key} to the number of optimizer steps",
        )
    return int(value)


class Schedule(ABC):
    """A learning rate for each param group at each iteration.

    At construction (with ``last_batch_iteration=-1``) the values before the first step are written to the
    optimizer; each ``step()`` writes those of the next iteration. A ``lr`` that is a tensor is filled in place.
    """

    def __init__(self, optimizer: OptimizerLike, last_batch_iteration: int = -1) -> None:
        self.optimizer = get_torch_optimizer(optimizer)
        self.last_batch_iteration = last_batch_iteration
        self._last_lr: list[float] | None = None

    @abstractmethod
    def _lrs(self, iteration: int) -> list[float]:
        """The learning rate of each param group at ``iteration``; -1 for before the first step."""

    def _start(self) -> None:
        """The last line of each constructor: a fresh schedule sets the first values."""
        if self.last_batch_iteration == -1:
            self._write()

    def _write(self) -> None:
        """Put this iteration's values into the optimizer's param groups."""
        # Groups are counted each time: one that came later would train at whatever its rate was, for ever.
        groups, lrs = self.optimizer.param_groups, self.get_lr()
        if len(groups) != len(lrs):
            raise UsageError(
                "param groups were added after the schedule was made",
                expected=f"{len(lrs)} param groups",
                found=len(groups),
                fix="make the schedule after the last add_param_group()",
            )
        for group, lr in zip(groups, lrs, strict=True):
            # Compiled code reads a tensor at its address.
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def get_lr(self) -> list[float]:
        """The learning rates of the current iteration, one per param group."""
        return self._lrs(self.last_batch_iteration)

    def get_last_lr(self) -> list[float]:
        """The learning rates that the last ``step()`` wrote. AssertionError before the first one."""
        if self._last_lr is None:
            # Clients catch exactly this type and look for these words.
            raise AssertionError("need to call step() first")
        return list(self._last_lr)

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Go on to the next iteration, or to the one given, and write its values."""
        # An iteration that is given may lie anywhere: values depend on it alone, not on the way there.
        if last_batch_iteration is None:
            last_batch_iteration = self.last_batch_iteration + 1
        self.last_batch_iteration = last_batch_iteration
        self._write()
        self._last_lr = self.get_lr()

    def state_dict(self) -> dict[str, Any]:
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at the iteration in ``state``, with its values in the optimizer.

        Raises CheckpointError for the state of another kind of scheduler.
        """
        if "last_batch_iteration" not in state:
            raise CheckpointError(
                f"this is not the state of a {type(self).__name__}",
                expected="last_batch_iteration",
                found=sorted(map(str, state)),
                fix="use the scheduler that the checkpoint was saved with, or load_lr_scheduler_states=False",
            )
        # -1 was saved before the first step: there are no values that a step wrote.
        self.last_batch_iteration = int(state["last_batch_iteration"])
        self._write()
        self._last_lr = self.get_lr() if self.last_batch_iteration >= 0 else None


def step_schedule(
    schedule: ScheduleLike, param_groups: Sequence[dict[str, Any]], arguments: dict[str, Any]
) -> None:
    """``schedule.step(**arguments)``; where that raises, it and ``param_groups`` are as they were."""
    # Shallow: schedules replace what they count, and a copy of all would cost every step.
    before = [(vars(part), dict(vars(part))) for part in _parts(schedule)]
    options = [
        {k: v.clone() if torch.is_tensor(v) else v for k, v in group.items() if k != "params"}
        for group in param_groups
    ]
    try:
        schedule.step(**arguments)
    except BaseException:
        for now, then in before:
            now.clear()
            now.update(then)
        for group, values in zip(param_groups, options, strict=True):
            for key, value in values.items():
                if torch.is_tensor(value) and torch.is_tensor(group[key]):
                    # In place: compiled code reads a learning rate at its address.
                    group[key].copy_(value)
                else:
                    group[key] = value
        raise


def _parts(schedule: Any) -> Iterator[Any]:
    """The schedule and those that it is made of."""
    waiting, seen = [schedule], set[int]()
    while waiting:
        part = waiting.pop()
        if id(part) in seen or not hasattr(part, "__dict__"):
            continue
        seen.add(id(part))
        yield part
        # Found by what they can do: those of other libraries have no class in common.
        for value in vars(part).values():
            for inner in value if isinstance(value, (list, tuple)) else (value,):
                if (
                    hasattr(inner, "state_dict")
                    and hasattr(inner, "step")
                    and not hasattr(inner, "param_groups")
                ):
                    waiting.append(inner)
