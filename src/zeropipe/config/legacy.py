"""Rewrites names and forms of older configurations to the present ones, before anything else looks at them."""

from __future__ import annotations

from typing import Any

from zeropipe.errors import ConfigError

_ZERO = "zero_optimization"

# Old name inside zero_optimization -> present name, same meaning.
_ZERO_RENAMES = {
    "stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
    "gather_16bit_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
    "prefetch_bucket_size": "stage3_prefetch_bucket_size",
    "param_persistence_threshold": "stage3_param_persistence_threshold",
    "model_persistence_threshold": "stage3_model_persistence_threshold",
    "max_live_parameters": "stage3_max_live_parameters",
    "max_reuse_distance": "stage3_max_reuse_distance",
    "allgather_size": "allgather_bucket_size",
}


def modernize(raw: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """A copy of ``raw`` with present names, and old path -> new path of what was renamed.

    Raises ConfigError where the old and the new name are both given and disagree.
    """
    config, names = dict(raw), dict[str, str]()
    if "bfloat16" in config:
        _move(config, "bfloat16", config, "bf16", names, "")
    if config.pop("fp32_allreduce", False) is True:
        _put(config, "communication_data_type", "fp32", "fp32_allreduce", names, "")
    zero = config.get(_ZERO)
    if isinstance(zero, bool):
        # The first form of the section was a switch for what is now stage 1.
        zero = {"stage": int(zero)}
        names[f"{_ZERO}: {str(bool(zero['stage'])).lower()}"] = f"{_ZERO}.stage"
    if isinstance(zero, dict):
        zero = dict(zero)
        if "allgather_size" in config:
            _move(config, "allgather_size", zero, "allgather_bucket_size", names, f"{_ZERO}.")
        for old, new in _ZERO_RENAMES.items():
            if old in zero:
                _move(zero, old, zero, new, names, f"{_ZERO}.", old_prefix=f"{_ZERO}.")
        if "aio" in zero:  # where the documentation of Transformers writes it
            _move(zero, "aio", config, "aio", names, "", old_prefix=f"{_ZERO}.")
        _offload(zero, names)
        config[_ZERO] = zero
    return config, names


def _offload(zero: dict[str, Any], names: dict[str, str]) -> None:
    pin = zero.pop("cpu_offload_use_pin_memory", None)
    for old, new in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
        if _truth(zero.pop(old, None), f"{_ZERO}.{old}"):
            section = dict(zero.get(new) or {})
            _put(section, "device", "cpu", f"{_ZERO}.{old}", names, f"{_ZERO}.{new}.")
            if pin is not None:
                section.setdefault("pin_memory", pin)
                names[f"{_ZERO}.cpu_offload_use_pin_memory"] = f"{_ZERO}.{new}.pin_memory"
            zero[new] = section


def _truth(value: Any, path: str) -> bool:
    if value in (None, "auto", False, 0, "false"):
        return False
    if value in (True, 1, "true"):
        return True
    raise ConfigError(
        f"config key {path!r}", expected="true or false", found=repr(value), fix="write true or false"
    )


def _move(
    source: dict[str, Any],
    old: str,
    target: dict[str, Any],
    new: str,
    names: dict[str, str],
    prefix: str,
    old_prefix: str = "",
) -> None:
    _put(target, new, source.pop(old), f"{old_prefix}{old}", names, prefix)


def _put(target: dict[str, Any], new: str, value: Any, old: str, names: dict[str, str], prefix: str) -> None:
    # An unset value, or a device of "none", does not disagree with the old name.
    free = (value, "auto", None, "none") if new == "device" else (value, "auto", None)
    if new in target and target[new] not in free:
        raise ConfigError(
            f"config key {old!r} is the old name of {prefix + new!r}, and both are given",
            found=f"{value!r} and {target[new]!r}",
            fix=f"keep {prefix + new!r} and remove {old!r}",
        )
    target[new] = value
    names[old] = f"{prefix}{new}"
