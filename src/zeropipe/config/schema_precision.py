"""The sections that choose number formats: fp16, bf16, torch autocast, and the dtypes of sums and traffic."""

from __future__ import annotations

from typing import Annotated, Literal

from zeropipe.config.fields import Count, Dtype, Lowercase, Real, Section, key
from zeropipe.config.without_effect import with_keys_without_effect


@with_keys_without_effect("fp16")
class Fp16(Section):
    """Train in fp16 with fp32 masters and a loss scale."""

    enabled: bool = key(False, "Turn fp16 training on.")
    auto_cast: bool = key(False, "Cast floating point inputs of the model to fp16.")
    loss_scale: Real = key(0.0, "Static loss scale; 0 means dynamic.", ge=0, allow_inf_nan=False)
    initial_scale_power: Count = key(16, "The dynamic scale starts at 2 to this power.", ge=0, le=126)
    loss_scale_window: Count = key(
        1000, "Steps without overflow after which the dynamic scale doubles.", gt=0
    )
    hysteresis: Count = key(2, "Overflows that are tolerated before the dynamic scale is halved.", ge=1)
    consecutive_hysteresis: bool = key(
        False, "Refill the hysteresis at every step without overflow, not only when the scale grows."
    )
    min_loss_scale: Real = key(1.0, "The dynamic scale never goes below this.", gt=0, allow_inf_nan=False)
    on_min_scale: Annotated[Literal["raise", "skip", "warn"], Lowercase] = key(
        "raise",
        "At the minimum scale and still overflowing: raise an error, skip the step silently, or skip and warn.",
    )


@with_keys_without_effect("bf16")
class Bf16(Section):
    """Train in bf16 with fp32 masters; no loss scale is needed."""

    enabled: bool = key(False, "Turn bf16 training on.")
    check_grad_overflow: bool = key(True, "Skip a step whose gradients hold inf or NaN.")


@with_keys_without_effect("torch_autocast")
class TorchAutocast(Section):
    """Run the forward pass under ``torch.autocast``; parameters keep their dtype."""

    enabled: bool = key(False, "Turn torch.autocast on.")
    dtype: Dtype | None = key(None, "The dtype of autocast; unset: torch's default for the device.")


@with_keys_without_effect("data_types")
class DataTypes(Section):
    """Dtypes of gradient sums, parameters and buffers."""

    grad_accum_dtype: Dtype | None = key(
        None, "The dtype in which gradients accumulate; unset: the dtype of the parameters."
    )
    param_dtype: Dtype | None = key(
        None,
        "Cast every floating-point parameter to this dtype, the run's precision; unset: those that the model keeps in"
        " fp32 on purpose stay (see [precision](precision.md#what-keeps-its-dtype)).",
    )
    buffer_dtype: Dtype | None = key(
        None,
        "Cast every floating-point buffer to this dtype; unset: buffers keep the dtype the model gives them.",
    )
