"""The loss scale of fp16 training: keeps small gradients above fp16's smallest value, and backs off from inf.

    overflow      hysteresis left: -1          used up: scale / factor, not below the minimum
    no overflow   after `scale_window` of them in a row the next one multiplies the scale by the factor

Source: Micikevicius et al., "Mixed Precision Training", section 3.2. Names and counting are those that
DeepSpeed users know. A scaler is pure: it neither looks at ranks nor communicates; whoever calls
``update_scale`` has agreed on the overflow with all ranks first, so all scalers stay equal.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any

import torch

from zeropipe.errors import CheckpointError, ConfigError, LossScaleError, describe
from zeropipe.tensor.norms import overflow_flag

logger = logging.getLogger(__name__)

# Keys of `dynamic_loss_args`.
INITIAL_LOSS_SCALE = "init_scale"
SCALE_WINDOW = "scale_window"
DELAYED_SHIFT = "delayed_shift"
CONSECUTIVE_HYSTERESIS = "consecutive_hysteresis"
MIN_LOSS_SCALE = "min_scale"


# What moves while training, beside the scale.
_MOVING = ("cur_iter", "last_overflow_iter", "cur_hysteresis")


class MinScalePolicy(StrEnum):
    """What an overflow does when the scale is at its minimum already."""

    RAISE = "raise"  # LossScaleError: the run cannot make progress
    SKIP = "skip"  # the step is skipped, nothing is said
    WARN = "warn"  # the step is skipped, one log line each time


class LossScalerBase:
    """A scale and the calls that apply it; the scale itself never moves here."""

    dynamic = False

    def __init__(self, cur_scale: float) -> None:
        if not (math.isfinite(cur_scale) and cur_scale > 0):
            raise ConfigError(
                "the loss scale cannot be used",
                expected="a finite number above 0",
                found=cur_scale,
                fix='set "fp16": {"loss_scale": 0} for a dynamic scale or a positive number for a static one',
            )
        self.cur_scale = float(cur_scale)

    @property
    def loss_scale(self) -> float:
        return self.cur_scale

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """``loss`` times the scale, in fp32 at least: an fp16 product would overflow by itself."""
        # A loss of 1.0 times 2**32 is inf in fp16.
        wide = loss if loss.dtype == torch.float64 else loss.float()
        return wide * self.cur_scale

    def backward(self, loss: torch.Tensor, retain_graph: bool = False) -> None:
        """Backward of the scaled loss; gradients come out multiplied by ``loss_scale``."""
        self.scale_loss(loss).backward(retain_graph=retain_graph)

    def scale_gradient(
        self, module: object, grad_in: tuple[torch.Tensor | None, ...], grad_out: object
    ) -> tuple[torch.Tensor | None, ...]:
        """A backward hook that multiplies each gradient of ``grad_in`` by the scale."""
        return tuple(None if g is None else g * self.cur_scale for g in grad_in)

    def has_overflow(self, params: Iterable[torch.Tensor]) -> bool:
        """Whether this scaler finds inf or NaN in the ``.grad`` of ``params``, on this rank."""
        return False

    def update_scale(self, overflow: bool, diagnosis: object = None) -> None:
        """Tell the scaler whether the step just tried overflowed (on any rank)."""

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers: all that changes while training. Settings stay with the configuration."""
        return {"dynamic": self.dynamic, "cur_scale": self.cur_scale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` stopped.

        The state of the other kind of scaler is passed over, because the configuration has chosen this one.
        Raises CheckpointError if a number is missing.
        """
        try:
            if bool(state["dynamic"]) == self.dynamic:
                self._load(state)
        except KeyError as error:
            raise CheckpointError(
                f"the loss scaler's state has no {error.args[0]!r}",
                expected=sorted(self.state_dict()),
                found=sorted(map(str, state)),
                fix="load with load_optimizer_states=False to start with a fresh loss scale",
            ) from error

    def _load(self, state: Mapping[str, Any]) -> None:
        self.cur_scale = float(state["cur_scale"])


class LossScaler(LossScalerBase):
    """A static scale: 1 for fp32 and bf16, or the ``fp16.loss_scale`` of the configuration."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__(scale)


class DynamicLossScaler(LossScalerBase):
    """A scale that shrinks at overflows and grows after ``scale_window`` steps without one.

    ``delayed_shift`` (the configuration's ``hysteresis``) is the number of overflows that are let pass, the
    last one included, before the scale shrinks. Used-up hysteresis comes back when the scale grows, or, with
    ``consecutive_hysteresis``, at every step without overflow.

    ``on_min_scale`` says what happens at ``min_scale``; when None, ``raise_error_at_min_scale`` chooses
    between "raise" and "skip". Raises ConfigError for settings that no run can use.
    """

    dynamic = True

    def __init__(
        self,
        init_scale: float = 2.0**32,
        scale_factor: float = 2.0,
        scale_window: int = 1000,
        min_scale: float = 1,
        delayed_shift: int = 1,
        consecutive_hysteresis: bool = False,
        raise_error_at_min_scale: bool = True,
        dtype: torch.dtype = torch.half,
        on_min_scale: MinScalePolicy | str | None = None,
    ) -> None:
        super().__init__(init_scale)
        default = MinScalePolicy.RAISE if raise_error_at_min_scale else MinScalePolicy.SKIP
        known = [policy.value for policy in MinScalePolicy]
        for name, value, holds, rule in (
            ("scale_factor", scale_factor, scale_factor > 1, "a number above 1"),
            ("scale_window", scale_window, scale_window >= 1, "at least 1 step"),
            ("min_scale", min_scale, 0 <= min_scale <= init_scale, f"from 0 to the initial {init_scale:g}"),
            ("delayed_shift (hysteresis)", delayed_shift, delayed_shift >= 1, "at least 1 overflow"),
            ("on_min_scale", on_min_scale, on_min_scale in (None, *known), f"one of {known}"),
        ):
            if not holds:
                raise ConfigError(f"dynamic loss scaling cannot use {name}", expected=rule, found=value)
        # Settings, under the names that users know.
        self.on_min_scale = default if on_min_scale is None else MinScalePolicy(on_min_scale)
        self.scale_factor = float(scale_factor)
        self.scale_window = int(scale_window)
        self.min_scale = float(min_scale)
        self.delayed_shift = int(delayed_shift)
        self.consecutive_hysteresis = consecutive_hysteresis
        self.dtype = dtype

        # What moves, and is saved beside the scale.
        self.cur_iter = 0
        self.last_overflow_iter = -1
        self.cur_hysteresis = self.delayed_shift

    @property
    def raise_error_at_min_scale(self) -> bool:
        return self.on_min_scale is MinScalePolicy.RAISE

    def has_overflow(self, params: Iterable[torch.Tensor]) -> bool:
        return bool(overflow_flag(p.grad for p in params))

    def update_scale(self, overflow: bool, diagnosis: object = None) -> None:
        """Move the scale after a step that overflowed, or did not, on any rank.

        ``diagnosis`` (its ``str``, e.g. of a ``tensor.norms.NonFinite``) is shown at the minimum scale.
        Raises LossScaleError there under the policy "raise"; the scaler is then as before the call.
        """
        if overflow:
            if self.cur_hysteresis > 1:
                self.cur_hysteresis -= 1
            elif self.cur_scale > self.min_scale:
                self.cur_scale = max(self.cur_scale / self.scale_factor, self.min_scale)
            elif self.on_min_scale is MinScalePolicy.RAISE:
                raise LossScaleError(self._minimum_text(diagnosis))
            elif self.on_min_scale is MinScalePolicy.WARN:
                logger.warning("step skipped: %s", self._minimum_text(diagnosis))
            self.last_overflow_iter = self.cur_iter
        else:
            # Steps since the overflow, this one not counted: after a full window the next one grows the scale.
            clean = self.cur_iter - self.last_overflow_iter - 1
            grows = clean > 0 and clean % self.scale_window == 0
            if self.consecutive_hysteresis or grows:
                self.cur_hysteresis = self.delayed_shift
            if grows:
                self.cur_scale *= self.scale_factor
        self.cur_iter += 1

    def _minimum_text(self, diagnosis: object) -> str:
        found = "inf or NaN (no gradient named)" if diagnosis is None else str(diagnosis)
        return describe(
            f"the loss scale is at its minimum ({self.min_scale:g}) and gradients still overflow "
            f"(iteration {self.cur_iter})",
            expected="finite gradients",
            found=found,
            fix="look at the named layer and its batch, lower the learning rate or clip; or train in bf16 "
            '("bf16": {"enabled": true}), which needs no loss scale; or allow a smaller one '
            '("fp16": {"min_loss_scale": ...}); or skip such steps ("on_min_scale": "skip" or "warn")',
        )

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), **{key: getattr(self, key) for key in _MOVING}}

    def _load(self, state: Mapping[str, Any]) -> None:
        # All are read before any is set: a number that is missing leaves the scaler as it was.
        scale, numbers = float(state["cur_scale"]), [int(state[key]) for key in _MOVING]
        self.cur_iter, self.last_overflow_iter, hysteresis = numbers
        # The minimum may have been raised since, the hysteresis lowered.
        self.cur_scale, self.cur_hysteresis = max(scale, self.min_scale), min(hysteresis, self.delayed_shift)


def get_loss_scaler(
    dtype: torch.dtype,
    static_loss_scale: float = 1.0,
    dynamic_scaling: bool = False,
    dynamic_loss_args: Mapping[str, Any] | None = None,
) -> LossScaler | DynamicLossScaler:
    """The scaler that training in ``dtype`` needs.

    fp16: dynamic (with ``dynamic_loss_args``, the keywords of DynamicLossScaler) or static. Every other
    dtype has fp32's range and gets a static scale of 1, whatever else is asked.
    """
    # The range of bf16 is that of fp32: small gradients are not lost, so nothing is to be scaled.
    if dtype != torch.float16:
        return LossScaler(1.0)
    if dynamic_scaling:
        return DynamicLossScaler(dtype=dtype, **(dynamic_loss_args or {}))
    return LossScaler(static_loss_scale)


CreateLossScaler = get_loss_scaler
