"""The schedules themselves: three that warm up, one that looks for a learning rate, one that uses the range found.

warm-up of n steps, factor of iteration k:   log(k + 1) / log(n)   or   k / n

    lr   max     /\\                 momentum   max  \\    /----
                /  \\                                 \\  /
         min   /    \\____ decay                min    \\/
               first second                          first second

The lower picture is OneCycle's, of L. N. Smith, "A disciplined approach to neural network hyper-parameters: Part 1",
sections 4.1-4.3, from where LRRangeTest is too. ``build`` makes any of them, or of torch's, by its name.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from torch.optim import lr_scheduler as torch_schedules
from torch.optim.lr_scheduler import LRScheduler

from zeropipe.errors import ConfigError
from zeropipe.given import OptimizerLike
from zeropipe.runtime.lr_schedules.base import Schedule, get_torch_optimizer, per_group, positive
from zeropipe.runtime.lr_schedules.config import VALID_LR_SCHEDULES, WARMUP_LINEAR_RATE, WARMUP_LOG_RATE


def between(lows: Sequence[float], highs: Sequence[float], height: float) -> list[float]:
    """For each param group: 0 is its low value, 1 its high one."""
    return [low + (high - low) * height for low, high in zip(lows, highs, strict=True)]


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
        # A product, not log(k + 1) / log(n), which would round once less: these are DeepSpeed's bits.
        return self.inverse_log_warm_up * math.log(iteration + 1)


class WarmupLR(_Warmup):
    """From ``warmup_min_lr`` to ``warmup_max_lr`` in ``warmup_num_steps``, then constant.

    ``warmup_max_lr=None`` takes each param group's own ``lr``. Both may be lists, one entry per group.
    ``warmup_num_steps`` below 2 is taken as 2. ConfigError for a value that cannot be used.
    """

    def __init__(
        self,
        optimizer: OptimizerLike,
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
        self._start()

    def _after(self, iteration: int) -> float:
        """The factor once the warm-up is over."""
        return 1.0

    def _lrs(self, iteration: int) -> list[float]:
        factor = self._rise(iteration) if iteration < self.warmup_num_steps else self._after(iteration)
        return between(self.min_lrs, self.max_lrs, factor)


class WarmupDecayLR(WarmupLR):
    """As WarmupLR, then in a line down to ``warmup_min_lr`` at ``total_num_steps``, and constant from there."""

    def __init__(
        self,
        optimizer: OptimizerLike,
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
        # A warm-up as long as the run leaves nothing to fall in.
        falling = max(1, self.total_num_steps - self.warmup_num_steps)
        return max(0.0, (self.total_num_steps - iteration) / falling)


class WarmupCosineLR(_Warmup):
    """Each param group's own ``lr`` times a ratio: warm-up from ``warmup_min_ratio`` to 1, then a half cosine
    down to ``cos_min_ratio`` at ``total_num_steps``, and constant from there.

    Before the first step the learning rate is 0. Source: Loshchilov and Hutter, "SGDR", equation 5.
    """

    def __init__(
        self,
        optimizer: OptimizerLike,
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
        # The first step after the warm-up is one step down already, as in DeepSpeed.
        falling = self.total_num_steps - self.warmup_num_steps
        done = iteration - self.warmup_num_steps + 1
        if done >= falling:
            return self.cos_min_ratio
        height = (1.0 + math.cos(math.pi * done / falling)) / 2.0
        return max(0.0, self.cos_min_ratio + (1.0 - self.cos_min_ratio) * height)

    def _lrs(self, iteration: int) -> list[float]:
        ratio = self._ratio(iteration)
        return [lr * ratio for lr in self.org_lrs]


class LRRangeTest(Schedule):
    """``min_lr * (1 + rate * steps / step_size)``: grows without end, to see where training diverges.

    With ``lr_range_test_staircase`` it grows only every ``lr_range_test_step_size`` steps.
    """

    def __init__(
        self,
        optimizer: OptimizerLike,
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
        # Counted from 1: the first step has grown already.
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
        optimizer: OptimizerLike,
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
        """How far up the cycle is after ``done`` steps: 0 at both ends, 1 at the top."""
        if done <= self.first_step_size:
            up, steps, stairs = done, self.first_step_size, self.first_stair_count
        else:
            up, steps, stairs = self.total_size - done, self.second_step_size, self.second_stair_count
        # Whole numbers until the division, so that the ends and the stairs are met exactly.
        return up / steps if stairs == 0 else up * stairs // steps / stairs

    def _decay_intervals(self, done: int) -> float:
        return (done - self.total_size) / self.decay_step_size if self.decay_step_size else 0.0

    def _lrs(self, iteration: int) -> list[float]:
        done = iteration + 1
        if done > self.total_size:
            factor = 1 + self.decay_lr_rate * self._decay_intervals(done)
            return [low / factor for low in self.min_lrs]
        return between(self.min_lrs, self.max_lrs, self._height(done))

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
            # DeepSpeed sets the second beta to 0.99, and passes SGD over: neither is asked for.
            if "betas" in group:
                group["betas"] = (momentum, *group["betas"][1:])
            elif group.get("momentum"):
                group["momentum"] = momentum


_OURS: Mapping[str, type[Schedule]] = {
    cls.__name__: cls for cls in (LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR)
}
assert list(_OURS) == VALID_LR_SCHEDULES

# Schedules of torch that JSON cannot describe, or that step() without arguments cannot drive.
_NOT_FROM_JSON = {
    "LambdaLR": "it needs a function",
    "MultiplicativeLR": "it needs a function",
    "SequentialLR": "it needs other schedulers",
    "ChainedScheduler": "it needs other schedulers",
    "ReduceLROnPlateau": "its step() needs a metric",
    "LRScheduler": "it is the base class",
}


def _find(name: str) -> type[Any]:
    if name in _OURS:
        return _OURS[name]
    if name in _NOT_FROM_JSON:
        raise ConfigError(
            f"scheduler.type {name!r} cannot be made from a configuration: {_NOT_FROM_JSON[name]}",
            fix="make it in your code and pass it as lr_scheduler= to initialize()",
        )
    # Read from torch as it is installed: schedules come and go with its versions.
    torchs = {n: c for n, c in vars(torch_schedules).items() if n[0] != "_" and n not in _NOT_FROM_JSON}
    torchs = {n: c for n, c in torchs.items() if isinstance(c, type) and issubclass(c, LRScheduler)}
    if name in torchs:
        return torchs[name]
    near = get_close_matches(name, [*_OURS, *torchs], n=1, cutoff=0.5)
    raise ConfigError(
        f"scheduler.type {name!r} is not known",
        expected=f"one of {', '.join(_OURS)}, or a class of torch.optim.lr_scheduler",
        fix=f"use {near[0]!r}" if near else "use one of these",
    )


def build(
    name: str, optimizer: OptimizerLike, params: Mapping[str, Any] | None = None
) -> Schedule | LRScheduler:
    """The schedule ``name`` on ``optimizer`` (a torch optimizer, or an object with one as ``.optimizer``).

    Raises ConfigError for a name or a parameter that is not known, and for one that is missing.
    """
    # Judged by the constructor's own signature, so that a schedule says in one place what it takes.
    cls, given = _find(name), dict(params or {})
    known = [p for p in inspect.signature(cls).parameters.values() if p.name != "optimizer"]
    names = [p.name for p in known]
    for key in given:
        if key not in names:
            near = get_close_matches(key, names, n=1, cutoff=0.5)
            raise ConfigError(
                f"scheduler.params.{key} is not a parameter of {name}",
                expected=f"one of {', '.join(names)}",
                fix=f"use {near[0]!r}" if near else f"remove {key!r}",
            )
    missing = [p.name for p in known if p.default is inspect.Parameter.empty and p.name not in given]
    if missing:
        raise ConfigError(
            f"scheduler {name} lacks parameters",
            expected=", ".join(missing),
            found=", ".join(given) or "none of them",
            fix=f'add them to "scheduler": {{"type": "{name}", "params": {{...}}}}',
        )
    try:
        return cls(get_torch_optimizer(optimizer), **given)
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"scheduler {name} refuses its parameters: {error}", found=given) from error
