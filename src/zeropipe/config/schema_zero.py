"""The ``zero_optimization`` section: what is sharded, how it is communicated, and where it lives."""

from __future__ import annotations

from typing import Annotated, Literal

from zeropipe.config.fields import Count, Lowercase, Section, key, with_keys_without_effect

Device = Annotated[Literal["none", "cpu", "nvme"], Lowercase]
_UNLIMITED = 2**63 - 1


@with_keys_without_effect("zero_optimization.offload_param")
class OffloadParam(Section):
    """Where the shards of parameters live between uses (stage 3)."""

    device: Device = key("none", "none, cpu, or nvme (files under nvme_path).")
    nvme_path: str | None = key(None, "A folder on a fast local disk; needed with nvme.")
    pin_memory: bool = key(True, "Pin CPU memory, so that copies to the GPU run beside computation.")


@with_keys_without_effect("zero_optimization.offload_optimizer")
class OffloadOptimizer(Section):
    """Where masters and optimizer state live, and where the optimizer steps (stages 1 to 3)."""

    device: Device = key("none", "none, cpu, or nvme (files under nvme_path; stage 3).")
    nvme_path: str | None = key(None, "A folder on a fast local disk; needed with nvme.")
    pin_memory: bool = key(True, "Pin CPU memory, so that copies run beside computation.")


class LeafModule(Section):
    """Modules that stage 3 gathers whole, because which of their children run depends on the data."""

    classes: list[str] = key(
        [
            "transformers.models.mixtral.modeling_mixtral.MixtralSparseMoeBlock",
            "transformers.models.qwen2_moe.modeling_qwen2_moe.Qwen2MoeSparseMoeBlock",
            "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock",
        ],
        "Class names, with or without their module path.",
    )
    names: list[str] = key([], "Full names of modules in the model.")
    name_suffixes: list[str] = key([], "Ends of names of modules in the model.")


@with_keys_without_effect("zero_optimization")
class ZeroOptimization(Section):
    """What each rank holds only a shard of, and the budgets of its communication."""

    stage: Count = key(
        0, "Shard nothing (0), optimizer state (1), gradients too (2), parameters too (3).", ge=0, le=3
    )
    overlap_comm: bool = key(
        True,
        "Communicate while backward computes. DeepSpeed's default is false below stage 3; "
        "the numbers are the same.",
    )
    reduce_bucket_size: Count = key(
        500_000_000, "Elements of gradients that are reduced together; 0: each parameter alone.", ge=0
    )
    allgather_bucket_size: Count = key(
        500_000_000,
        "Elements of each rank's updated shard that one message holds, at most (gloo; 2**21 at any rate).",
        gt=0,
    )
    ignore_unused_parameters: bool = key(
        True, "A parameter that gets no gradient is left out of the step; false: it is an error."
    )
    sub_group_size: Count = key(
        1_000_000_000,
        "Elements that the optimizer steps at a time, from files (stage 3); default 2**24.",
        ge=0,
    )
    offload_param: OffloadParam = key(OffloadParam(), "Move parameter shards off the device (stage 3).")
    offload_optimizer: OffloadOptimizer = key(OffloadOptimizer(), "Move optimizer state off the device.")

    stage3_max_live_parameters: Count = key(
        1_000_000_000,
        "Gathered elements that may live at once; more are released; unset: chosen from the model (docs/zero.md).",
        ge=0,
    )
    stage3_max_reuse_distance: Count = key(
        1_000_000_000,
        "A unit used again within this many elements is not released; unset: chosen from the model (docs/zero.md).",
        ge=0,
    )
    stage3_prefetch_bucket_size: Count = key(
        50_000_000,
        "Elements that are gathered ahead of their use; unset: chosen from the model (docs/zero.md).",
        ge=0,
    )
    stage3_param_persistence_threshold: Count = key(
        100_000, "Parameters of at most this many elements stay gathered.", ge=0
    )
    stage3_model_persistence_threshold: Count = key(
        _UNLIMITED, "Elements of the whole model that may stay gathered.", ge=0
    )
    stage3_gather_16bit_weights_on_model_save: bool = key(
        False, "save_16bit_model gathers the whole model; needed for it at stage 3."
    )
    leaf_module: LeafModule = key(LeafModule(), "Modules that are gathered whole (stage 3).")

    mics_shard_size: Count = key(
        -1, "Ranks that share one copy of the shards (MiCS, stage 3); -1: all of them.", ge=-1
    )
    mics_hierarchical_params_gather: bool = key(
        False, "Gather first between nodes, then inside each, where a shard group spans nodes (stage 3)."
    )
    zero_hpz_partition_size: Count = key(
        1, "Another name for mics_shard_size, for those who know hpZ (stage 3); 1: off.", ge=0
    )
    load_from_fp32_weights: bool = key(
        True, "Masters are restored as they were saved; false: a load in bf16 or fp16 is refused."
    )
    override_module_apply: bool = key(
        True, "Module.apply sees whole parameters, and what it writes reaches the shards (stage 3)."
    )
