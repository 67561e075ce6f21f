"""The rules that no single key can state: refused uses, contradictions, and keys without effect."""

from __future__ import annotations

from collections.abc import Collection
from operator import attrgetter
from typing import Any

from zeropipe.config.fields import every_key, mark_of
from zeropipe.config.schema import Config
from zeropipe.errors import ConfigError

_ZERO = "zero_optimization"


def check_config(config: Config, auto: Collection[str]) -> dict[str, str]:
    """Check a validated configuration; return the keys without effect, each with what happens instead.

    ``auto``: paths of the keys that are left to other software, so that it is no contradiction to lack them.
    Raises ConfigError for a use that would change results and is not offered, and for contradictions.
    """
    # [1] Keys one by one. A key without effect is passed over, unless results would differ from what it asks for.
    idle: dict[str, str] = {}
    for path, info, _ in every_key(Config):
        mark, value = mark_of(info.metadata), attrgetter(path)(config)
        if mark is None or not (mark.in_use(value) if mark.in_use else value != info.default):
            continue
        if mark.fix is not None:
            raise ConfigError(
                f"config key {path!r} = {_short(value)} is not offered: {mark.why}", fix=mark.fix
            )
        idle[path] = mark.why
    # [2] Keys together. [3] What another stage would do.
    _check_precision(config)
    _check_parts(config, auto)
    _check_placement(config)
    _check_slots(config)
    return idle | _idle_at_this_stage(config)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _check_precision(config: Config) -> None:
    fp16 = config.fp16
    if fp16.enabled and config.bf16.enabled:
        raise ConfigError(
            "config keys 'fp16.enabled' and 'bf16.enabled' are both true",
            expected="one of them",
            fix="set the one that you do not want to false (bf16 needs no loss scale)",
        )
    if fp16.auto_cast and fp16.enabled and config.torch_autocast.enabled:
        raise ConfigError(
            "config keys 'fp16.auto_cast' and 'torch_autocast.enabled' are both true, and each casts inputs",
            fix="set 'fp16.auto_cast' to false",
        )
    # The key says again what the sections say; where they differ, neither is to be believed.
    chosen = config.data_types.param_dtype
    if chosen not in (None, config.precision):
        raise ConfigError(
            f"config key 'data_types.param_dtype' = {chosen!r} is not the precision of the run",
            expected=f"{config.precision!r}, as the sections 'fp16' and 'bf16' say",
            fix="enable the section of that dtype, or remove the key",
        )
    if fp16.enabled and fp16.loss_scale == 0 and fp16.min_loss_scale > 2.0**fp16.initial_scale_power:
        raise ConfigError(
            f"config key 'fp16.min_loss_scale' = {fp16.min_loss_scale:g} is above the initial loss scale",
            expected=f"at most 2 ** {fp16.initial_scale_power} ('fp16.initial_scale_power')",
            found=f"{fp16.min_loss_scale:g}",
            fix="lower 'fp16.min_loss_scale' or raise 'fp16.initial_scale_power'",
        )


def _check_parts(config: Config, auto: Collection[str]) -> None:
    for name, example in (("optimizer", "AdamW"), ("scheduler", "WarmupLR")):
        part = getattr(config, name)
        if part.type is None and part.params and f"{name}.type" not in auto:
            raise ConfigError(
                f"config key '{name}.type' is missing beside '{name}.params' = {_short(part.params)}",
                fix=f'add "type", for example "{example}", or remove {name!r}',
            )
    # What Accelerate writes for none is taken.
    size = config.tensor_parallel.get("autotp_size", 0)
    if size not in (0, 1, None, "auto"):
        raise ConfigError(
            f"config key 'tensor_parallel.autotp_size' = {size!r} is not offered",
            expected="0 or 1: there is no automatic tensor parallelism",
            fix="remove the section 'tensor_parallel', and use ZeRO stage 3 or the pipeline",
        )
    # Constructors take both, so nothing else would complain: the one is another norm on a shard, the other no number
    # until the first step.
    params = config.optimizer.params
    norm = params.get("max_grad_norm")
    if norm:
        raise ConfigError(
            f"config key 'optimizer.params.max_grad_norm' = {norm!r}: an optimizer sees only its shard of the norm",
            fix=f"remove it and set 'gradient_clipping' to {norm!r}",
        )
    if isinstance(params.get("lr"), str):
        raise ConfigError(
            "config key 'optimizer.params.lr'",
            expected="a number",
            found=repr(params["lr"]),
            fix=f"write it without quotes: {params['lr']}",
        )


def _check_slots(config: Config) -> None:
    """What makes results follow the number of ranks, or the count of micro-steps, has no place beside slots."""
    zero = config.zero_optimization
    for path, in_use, why in (
        (
            "communication_data_type",
            config.communication_data_type is not None,
            "sums travel as they were added",
        ),
        (
            "managed_gradient_accumulation",
            not config.managed_gradient_accumulation,
            "slots say where a step ends",
        ),
        (f"{_ZERO}.mics_shard_size", zero.stage == 3 and zero.mics_shard_size > 0, "sums go by groups then"),
        (
            f"{_ZERO}.zero_hpz_partition_size",
            zero.stage == 3 and zero.zero_hpz_partition_size > 1,
            "sums go by groups",
        ),
        ("data_efficiency", config.data_efficiency.chooses_samples, "its sampler deals to ranks"),
    ):
        if config.reproducible.slots is not None and in_use:
            raise ConfigError(
                f"config keys 'reproducible.slots' and {path!r} exclude each other: {why}",
                fix=f"remove {path!r} (data_types.grad_accum_dtype says in which dtype gradients are added), or "
                "'reproducible'",
            )


def _idle_at_this_stage(config: Config) -> dict[str, str]:
    """Settings of a higher stage, each with what happens instead."""
    # They are passed over, not refused: clients derive the configuration of a frozen reference model from the trained
    # one's by setting the stage to 0 and nothing else.
    zero = config.zero_optimization
    idle: dict[str, str] = {}
    if zero.stage < 3:
        whole = f"stage {zero.stage} keeps parameters whole"
        if zero.offload_param.device != "none":
            idle[f"{_ZERO}.offload_param"] = f"{whole}; stage 3 offloads them"
        if zero.mics_shard_size > 0:
            idle[f"{_ZERO}.mics_shard_size"] = whole
        if zero.zero_hpz_partition_size > 1:
            idle[f"{_ZERO}.zero_hpz_partition_size"] = whole
    if zero.stage == 0 and zero.offload_optimizer.device != "none":
        idle[f"{_ZERO}.offload_optimizer"] = "stage 0 keeps the state on the device; stages 1 to 3 offload it"
    return idle


def _check_placement(config: Config) -> None:
    zero = config.zero_optimization
    if zero.mics_shard_size == 0:
        raise ConfigError(
            f"config key '{_ZERO}.mics_shard_size'",
            expected="-1 (off) or a number of ranks",
            found=0,
            fix="write -1 or remove it",
        )
    if zero.stage == 3 and zero.mics_shard_size > 0 and zero.zero_hpz_partition_size > 1:
        raise ConfigError(
            f"config keys '{_ZERO}.mics_shard_size' = {zero.mics_shard_size} and"
            f" '{_ZERO}.zero_hpz_partition_size' = {zero.zero_hpz_partition_size} exclude each other",
            fix="keep one: mics_shard_size shards everything inside a group, hpz only what backward gathers",
        )
    for name, first in (("offload_param", 3), ("offload_optimizer", 1)):
        part, path = getattr(zero, name), f"{_ZERO}.{name}"
        if zero.stage < first or part.device != "nvme":
            continue
        if zero.stage < 3:
            raise ConfigError(
                f"config key '{path}.device' = 'nvme'",
                expected=f"'{_ZERO}.stage' 3",
                found=f"stage {zero.stage}",
                fix="set the stage to 3, or the device to 'cpu'",
            )
        if not part.nvme_path:
            raise ConfigError(
                f"config key '{path}.device' is 'nvme' without a folder",
                expected=f"'{path}.nvme_path'",
                found=repr(part.nvme_path),
                fix=f'add "nvme_path": "/a/folder/on/a/fast/disk" to {path!r}',
            )
