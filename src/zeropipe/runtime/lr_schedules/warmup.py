"""Schedules that warm up: then hold, then fall in a line, or then fall along a cosine.

factor g of iteration k during warm-up of n steps:   log(k + 1) / log(n)   or   k / n
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from zeropipe.errors import ConfigError
from zeropipe.runtime.lr_schedules.base import Schedule, per_group, positive
from zeropipe.runtime.lr_schedules.constants import WARMUP_LINEAR_RATE, WARMUP_LOG_RATE


class _Warmup(Schedule):
    """The warm-up itself, shared by the three schedules."""

    def __init__(self, optimizer: Any, num_steps: int, kind: str, last_batch_iteration: int) -> None:
        super().__init__(optimizer, last_batch_iteration)
        if kind not in (WARMUP_LOG_RATE, WARMUP_LINEAR_RATE):
            raise ConfigError(
                "scheduler.params.warmup_type is not known",
                expected=f"{WARMUP_LOG_RATE!r} or {WARMUP_LINEAR_RATE!r}",
                found=repr(kind),
                fix='set "warmup_type": "log" or "linear"',
            )
        self.warmup_type = kind
        # 0 and 1 are written by clients for "no warm-up", and log(1) = 0 would divide: two is the shortest.
        self.warmup_num_steps = max(2, positive("warmup_num_steps", num_steps, least=0))
        self.inverse_log_warm_up = 1.0 / math.log(self.warmup_num_steps)

    def _rise(self, iteration: int) -> float:
        """From 0 at the start to 1 at the end of the warm-up; 0 before the first step."""
        if iteration < 0:
            return 0.0
        if self.warmup_type == WARMUP_LINEAR_RATE:
            return iteration / self.warmup_num_steps
        return self.inverse_log_warm_up * math.log(iteration + 1)  # a product: DeepSpeed's bits


class WarmupLR(_Warmup):
    """From ``warmup_min_lr`` to ``warmup_max_lr`` in ``warmup_num_steps``, then constant.

    ``warmup_max_lr=None`` takes each param group's own ``lr``. Both may be lists, one entry per group.
    ``warmup_num_steps`` below 2 is taken as 2. ConfigError for a value that cannot be used.
    """

    def __init__(
        self,
        optimizer: Any,
        warmup_min_lr: float | Sequence[float] = 0.0,
        warmup_max_lr: float | Sequence[float] | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = WARMUP_LOG_RATE,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, warmup_num_steps, warmup_type, last_batch_iteration)
        groups = self.optimizer.param_groups
        if warmup_max_lr is None:
            warmup_max_lr = [float(group["lr"]) for group in groups]
        self.min_lrs = per_group("warmup_min_lr", warmup_min_lr, len(groups))
        self.max_lrs = per_group("warmup_max_lr", warmup_max_lr, len(groups))
        self._prepare()
        self._start()

    def _prepare(self) -> None:
        """What a subclass needs before the first values are written."""

    def _after(self, iteration: int) -> float:
        """The factor once the warm-up is over."""
        return 1.0

    def _lrs(self, iteration: int) -> list[float]:
        factor = self._rise(iteration) if iteration < self.warmup_num_steps else self._after(iteration)
        return [low + (high - low) * factor for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]


class WarmupDecayLR(WarmupLR):
    """As WarmupLR, then in a line down to ``warmup_min_lr`` at ``total_num_steps``, and constant from there."""

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: int,
        warmup_min_lr: float | Sequence[float] = 0.0,
        warmup_max_lr: float | Sequence[float] | None = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: str = WARMUP_LOG_RATE,
        last_batch_iteration: int = -1,
    ) -> None:
        self.total_num_steps = positive("total_num_steps", total_num_steps)
        super().__init__(
            optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, last_batch_iteration
        )

    def _after(self, iteration: int) -> float:
        falling = max(1, self.total_num_steps - self.warmup_num_steps)
        return max(0.0, (self.total_num_steps - iteration) / falling)


class WarmupCosineLR(_Warmup):
    """Each param group's own ``lr`` times a ratio: warm-up from ``warmup_min_ratio`` to 1, then a half cosine
    down to ``cos_min_ratio`` at ``total_num_steps``, and constant from there.

    Before the first step the learning rate is 0. Source: Loshchilov and Hutter, "SGDR", equation 5.
    """

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: str = WARMUP_LOG_RATE,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, warmup_num_steps, warmup_type, last_batch_iteration)
        self.total_num_steps = positive("total_num_steps", total_num_steps)
        self.warmup_min_ratio = float(warmup_min_ratio)
        self.cos_min_ratio = float(cos_min_ratio)
        self.org_lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._start()

    def get_lr_ratio(self) -> float:
        """The ratio of the current iteration."""
        return self._ratio(self.last_batch_iteration)

    def _ratio(self, iteration: int) -> float:
        if iteration < 0:
            return 0.0
        if iteration < self.warmup_num_steps:
            return self.warmup_min_ratio + (1.0 - self.warmup_min_ratio) * self._rise(iteration)
        falling = self.total_num_steps - self.warmup_num_steps
        done = iteration - self.warmup_num_steps + 1
        if done >= falling:
            return self.cos_min_ratio
        height = (1.0 + math.cos(math.pi * done / falling)) / 2.0
        return max(0.0, self.cos_min_ratio + (1.0 - self.cos_min_ratio) * height)

    def _lrs(self, iteration: int) -> list[float]:
        ratio = self._ratio(iteration)
        return [lr * ratio for lr in self.org_lrs]
