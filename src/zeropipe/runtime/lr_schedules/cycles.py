"""Schedules that look for a learning rate (LRRangeTest) and that use the range found (OneCycle).

Source: L. N. Smith, "A disciplined approach to neural network hyper-parameters: Part 1", sections 4.1-4.3.

    lr   max     /\\                 momentum   max  \\    /----
                /  \\                                 \\  /
         min   /    \\____ decay                min    \\/
               first second                          first second
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zeropipe.runtime.lr_schedules.base import Schedule, per_group, positive


class LRRangeTest(Schedule):
    """``min_lr * (1 + rate * steps / step_size)``: grows without end, to see where training diverges.

    With ``lr_range_test_staircase`` it grows only every ``lr_range_test_step_size`` steps.
    """

    def __init__(
        self,
        optimizer: Any,
        lr_range_test_min_lr: float | Sequence[float] = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        groups = self.optimizer.param_groups
        self.min_lr = per_group("lr_range_test_min_lr", lr_range_test_min_lr, len(groups))
        self.step_size = positive("lr_range_test_step_size", lr_range_test_step_size)
        self.step_rate = float(lr_range_test_step_rate)
        self.staircase = bool(lr_range_test_staircase)
        self._start()

    def _lrs(self, iteration: int) -> list[float]:
        done = iteration + 1
        intervals = done // self.step_size if self.staircase else done / self.step_size
        return [lr * (1 + self.step_rate * intervals) for lr in self.min_lr]


class OneCycle(Schedule):
    """One cycle of the learning rate, up and down, with the momentum the other way, then a decay of both.

    The rise takes ``cycle_first_step_size`` steps and the fall ``cycle_second_step_size`` (None or below 1: as
    many as the rise). A stair count above 0 cuts its half into that many jumps; the second defaults to the
    first. After the cycle, every ``decay_step_size`` steps (0: no decay) take ``lr`` to
    ``min_lr / (1 + decay_lr_rate * n)`` and the momentum to ``max_mom * (1 + decay_mom_rate * n)``.

    The momentum is the first of ``betas``, or ``momentum`` in groups where it is not 0; groups with neither
    are left alone, and so are the other betas. (DeepSpeed sets ``betas`` to ``(momentum, 0.99)`` and does
    not cycle the momentum of SGD.)
    """

    def __init__(
        self,
        optimizer: Any,
        cycle_min_lr: float | Sequence[float],
        cycle_max_lr: float | Sequence[float],
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: int = 2000,
        cycle_second_step_size: int | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: int = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: float | Sequence[float] = 0.8,
        cycle_max_mom: float | Sequence[float] = 0.9,
        decay_mom_rate: float = 0.0,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        groups = self.optimizer.param_groups
        self.min_lrs = per_group("cycle_min_lr", cycle_min_lr, len(groups))
        self.max_lrs = per_group("cycle_max_lr", cycle_max_lr, len(groups))
        self.min_moms = per_group("cycle_min_mom", cycle_min_mom, len(groups))
        self.max_moms = per_group("cycle_max_mom", cycle_max_mom, len(groups))
        self.decay_lr_rate = float(decay_lr_rate)
        self.decay_mom_rate = float(decay_mom_rate)
        self.first_step_size = positive("cycle_first_step_size", cycle_first_step_size)
        # The command line has no None: it writes -1 for "not given".
        given = cycle_second_step_size is not None and cycle_second_step_size > 0
        second = cycle_second_step_size if given and cycle_second_step_size else cycle_first_step_size
        self.second_step_size = positive("cycle_second_step_size", second)
        self.first_stair_count = max(0, cycle_first_stair_count)
        stairs = cycle_second_stair_count
        self.second_stair_count = self.first_stair_count if stairs is None or stairs < 0 else stairs
        self.decay_step_size = max(0, decay_step_size)
        self.total_size = self.first_step_size + self.second_step_size
        self.cycle_momentum = cycle_momentum
        self._start()

    def _height(self, done: int) -> float:
        """How far up the cycle is after ``done`` steps: 0 at both ends, 1 at the top. Whole numbers until the
        division, so that the ends and the stairs are met exactly."""
        if done <= self.first_step_size:
            up, steps, stairs = done, self.first_step_size, self.first_stair_count
        else:
            up, steps, stairs = self.total_size - done, self.second_step_size, self.second_stair_count
        return up / steps if stairs == 0 else up * stairs // steps / stairs

    def _decay_intervals(self, done: int) -> float:
        return (done - self.total_size) / self.decay_step_size if self.decay_step_size else 0.0

    def _lrs(self, iteration: int) -> list[float]:
        done = iteration + 1
        if done > self.total_size:
            factor = 1 + self.decay_lr_rate * self._decay_intervals(done)
            return [low / factor for low in self.min_lrs]
        height = self._height(done)
        return [low + (high - low) * height for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]

    def get_mom(self) -> list[float]:
        """The momentum of the current iteration, one per param group; ``cycle_min_mom`` before the first."""
        done = self.last_batch_iteration + 1
        if done <= 0:
            return list(self.min_moms)
        if done > self.total_size:
            factor = 1 + self.decay_mom_rate * self._decay_intervals(done)
            return [high * factor for high in self.max_moms]
        height = self._height(done)
        return [high - (high - low) * height for low, high in zip(self.min_moms, self.max_moms, strict=True)]

    def _write(self) -> None:
        super()._write()
        if not self.cycle_momentum:
            return
        for group, momentum in zip(self.optimizer.param_groups, self.get_mom(), strict=True):
            if "betas" in group:
                group["betas"] = (momentum, *group["betas"][1:])
            elif group.get("momentum"):
                group["momentum"] = momentum
