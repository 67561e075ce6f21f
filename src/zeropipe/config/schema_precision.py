"""The sections that choose number formats: fp16, bf16, torch autocast, and the dtypes of sums and traffic."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from zeropipe.config.fields import Count, Dtype, Lowercase, NoEffect, Real, Refused, Section, key


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
    fp16_master_weights_and_grads: Annotated[
        bool, Refused("masters and their gradients are always fp32 here", "remove the key or set it to false")
    ] = key(False, "Keep masters in fp16.")


class Bf16(Section):
    """Train in bf16 with fp32 masters; no loss scale is needed."""

    enabled: bool = key(False, "Turn bf16 training on.")
    check_grad_overflow: bool = key(True, "Skip a step whose gradients hold inf or NaN.")
    immediate_grad_update: Annotated[
        bool, NoEffect("gradients are always accumulated as soon as backward produces them")
    ] = key(False, "Accumulate a gradient as soon as it is produced.")
    bf16_master_weights_and_grads: Annotated[
        bool, Refused("masters and their gradients are always fp32 here", "remove the key or set it to false")
    ] = key(False, "Keep masters in bf16.")
    bf16_optimizer_states: Annotated[
        bool, Refused("optimizer state is always fp32 here", "remove the key or set it to false")
    ] = key(False, "Keep optimizer state in bf16.")


class TorchAutocast(Section):
    """Run the forward pass under ``torch.autocast``; parameters keep their dtype."""

    enabled: bool = key(False, "Turn torch.autocast on.")
    dtype: Dtype | None = key(None, "The dtype of autocast; unset: torch's default for the device.")
    lower_precision_safe_modules: Annotated[
        list[str] | None, NoEffect("all gradients travel in communication_data_type")
    ] = key(None, "Class names of modules whose parameters may be communicated in the lower precision.")


class DataTypes(Section):
    """Dtypes of what is neither a weight nor an activation."""

    grad_accum_dtype: Dtype | None = key(
        None, "The dtype in which gradients accumulate; unset: the dtype of the parameters."
    )
    param_dtype: Annotated[
        Dtype | None,
        Refused("parameters follow fp16.enabled or bf16.enabled", "use the fp16 or bf16 section instead"),
    ] = key(None, "Cast the parameters to this dtype.")
    buffer_dtype: Annotated[
        Dtype | None,
        Refused("buffers keep the dtype the model gives them", "cast the buffers in the model instead"),
    ] = key(None, "Cast the buffers to this dtype.")
    keep_in_fp32_modules: Annotated[
        Any,
        Refused(
            "modules are kept in fp32 by zeropipe.runtime.fp16.fp16_utils, not by the configuration",
            "remove the key and convert the model before zeropipe.initialize",
        ),
    ] = key(None, "Modules that stay in fp32.")
