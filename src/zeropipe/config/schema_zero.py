"""The ``zero_optimization`` section: what is sharded, how it is communicated, and where it lives."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from zeropipe.config.fields import Count, Lowercase, NoEffect, Real, Refused, Section, key

Device = Annotated[Literal["none", "cpu", "nvme"], Lowercase]
_QUANTIZED = Refused(
    "zeropipe sends parameters and gradients unquantized, so that numbers do not depend on the number of ranks",
    "remove the key or set it to false",
)
_MAPPED = NoEffect("files are mapped into memory and need no buffers")
_CACHED = NoEffect("the system keeps as much of the files in memory as is free")
_PIPELINED = NoEffect("the next piece is read, and the last one written, while the current one steps")
_TRAFFIC = NoEffect("the fastest way that the backend has is taken, and the numbers are the same in each")
_UNLIMITED = 2**63 - 1


class OffloadParam(Section):
    """Where the shards of parameters live between uses (stage 3)."""

    device: Device = key("none", "none, cpu, or nvme (files under nvme_path).")
    nvme_path: str | None = key(None, "A folder on a fast local disk; needed with nvme.")
    buffer_count: Annotated[Count, _MAPPED] = key(5, "Buffers for reading and writing files.", ge=0)
    buffer_size: Annotated[Count, _MAPPED] = key(100_000_000, "Elements of one file buffer.", ge=0)
    max_in_cpu: Annotated[Count, _CACHED] = key(
        1_000_000_000, "Elements that stay in CPU memory beside files.", ge=0
    )
    pin_memory: bool = key(True, "Pin CPU memory, so that copies to the GPU run beside computation.")


class OffloadOptimizer(Section):
    """Where masters and optimizer state live, and where the optimizer steps (stages 1 to 3)."""

    device: Device = key("none", "none, cpu, or nvme (files under nvme_path; stage 3).")
    nvme_path: str | None = key(None, "A folder on a fast local disk; needed with nvme.")
    buffer_count: Annotated[Count, _MAPPED] = key(4, "Buffers for reading and writing files.", ge=0)
    pin_memory: bool = key(True, "Pin CPU memory, so that copies run beside computation.")
    pipeline_read: Annotated[bool, _PIPELINED] = key(
        False, "Read the next piece of state while the current one steps."
    )
    pipeline_write: Annotated[bool, _PIPELINED] = key(
        False, "Write the last piece of state while the current one steps."
    )
    pipeline: Annotated[bool, _PIPELINED] = key(False, "Both pipeline_read and pipeline_write.")
    fast_init: Annotated[bool, NoEffect("files are written once, at the first step")] = key(
        False, "Write the files quickly at the start."
    )
    ratio: Annotated[Real, NoEffect("all of the optimizer state is offloaded")] = key(
        1.0, "The share of parameters that step on the CPU.", ge=0, le=1
    )
    super_offload: Annotated[bool, NoEffect("the CPU step is torch's fused step")] = key(
        False, "Overlap the CPU step with backward."
    )
    cpuadam_cores_perc: Annotated[Real, NoEffect("the CPU step uses torch's threads")] = key(
        0.8, "The share of cores for the CPU step.", ge=0, le=1
    )


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
    reduce_scatter: Annotated[bool, _TRAFFIC] = key(
        True, "Reduce gradients to their owner only, instead of to all ranks."
    )
    reduce_bucket_size: Count = key(
        500_000_000, "Elements of gradients that are reduced together; 0: each parameter alone.", ge=0
    )
    allgather_partitions: Annotated[bool, _TRAFFIC] = key(
        True, "Collect updated parameters by all-gather, instead of by one broadcast from each rank."
    )
    allgather_bucket_size: Count = key(
        500_000_000,
        "Elements of each rank's updated shard that one message holds, at most (gloo; 2**21 at any rate).",
        gt=0,
    )
    contiguous_gradients: Annotated[bool, _TRAFFIC] = key(
        True, "Copy gradients into one buffer as they are produced."
    )
    round_robin_gradients: Annotated[bool, _TRAFFIC] = key(
        False,
        "Deal gradients out to ranks in turn, so that copies to an offloaded optimizer run in parallel.",
    )
    ignore_unused_parameters: bool = key(
        True, "A parameter that gets no gradient is left out of the step; false: it is an error."
    )
    load_from_fp32_weights: Annotated[
        bool, Refused("masters are restored as they were saved", "remove the key or set it to true")
    ] = key(True, "Restore fp32 masters from the checkpoint, instead of from its 16-bit weights.")
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
    stage3_use_all_reduce_for_fetch_params: Annotated[
        bool, NoEffect("the way to gather is chosen per backend")
    ] = key(False, "Gather parameters by all-reduce.")
    stage3_module_granularity_threshold: Annotated[
        Count, NoEffect("mark modules with set_z3_leaf_modules or leaf_module")
    ] = key(0, "Gather modules whole below this ratio of elements to children.", ge=0)
    stage3_allgather_sequential: Annotated[bool, NoEffect("gathers are ordered by the recorded plan")] = key(
        False, "Gather parameters one after the other."
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
    memory_efficient_linear: Annotated[bool, NoEffect("torch's linear layers save only their inputs")] = key(
        True, "zero.Init makes linear layers save only their inputs."
    )
    override_module_apply: bool = key(
        True, "Module.apply sees whole parameters, and what it writes reaches the shards (stage 3)."
    )

    zero_quantized_weights: Annotated[bool, _QUANTIZED] = key(False, "Gather quantized parameters.")
    zero_quantized_nontrainable_weights: Annotated[bool, _QUANTIZED] = key(
        False, "Gather quantized frozen parameters."
    )
    zero_quantized_gradients: Annotated[bool, _QUANTIZED] = key(False, "Reduce quantized gradients.")
    zenflow: Annotated[
        dict[str, Any] | None,
        Refused("steps with stale gradients change results", "remove the section"),
    ] = key(None, "Delayed updates of unimportant gradients.")

    elastic_checkpoint: Annotated[bool, NoEffect("every checkpoint loads at any number of ranks")] = key(
        False, "Write checkpoints that load at another number of ranks."
    )
    pipeline_loading_checkpoint: Annotated[bool, NoEffect("only what a rank needs is read")] = key(
        False, "Read the checkpoint file by file."
    )
    use_multi_rank_bucket_allreduce: Annotated[bool, NoEffect("reduction is chosen per backend")] = key(
        True, "Reduce buckets of several ranks together."
    )
    compute_grad_norm: Annotated[bool, NoEffect("the norm is computed when clipping or the user asks")] = key(
        True, "Compute the global gradient norm at every step."
    )
    legacy_stage1: Annotated[bool, NoEffect("there is one way to do stage 1")] = key(
        False, "An older stage 1."
    )
    parameter_alignment: Annotated[bool, NoEffect("the layout pads once, at its end")] = key(
        False, "Align parameters in the flat buffer."
    )
    log_trace_cache_warnings: Annotated[bool, NoEffect("a changed order re-plans and is counted")] = key(
        False, "Log when the recorded order of modules changes."
    )
    enable_sanity_checks: Annotated[bool, NoEffect("the checks are always on")] = key(
        False, "Check the state of parameters at each step."
    )
    save_muon_momentum_buffer_in_memory: Annotated[
        bool, NoEffect("the state lives where it is offloaded to")
    ] = key(False, "Keep Muon's momentum on the device.")
