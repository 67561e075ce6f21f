"""Which object of zeropipe stands behind each name of the package ``deepspeed``: data, read by the finder."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

import zeropipe
from zeropipe.names import homes

PEER_VERSION: Final = "0.19.8"  # whose interface this is; clients compare against it
VERSION: Final = f"{PEER_VERSION}+zeropipe.{zeropipe.__version__}"

# Modules that have the same path here as there.
_SAME = """
    checkpoint checkpoint.constants checkpoint.deepspeed_checkpoint checkpoint.reshape_3d_utils
    checkpoint.reshape_meg_2d checkpoint.reshape_utils checkpoint.universal_checkpoint checkpoint.utils
    checkpoint.zero_checkpoint checkpointing comm pipe runtime.base_optimizer runtime.dataloader runtime.engine
    runtime.fp16 runtime.fp16.loss_scaler runtime.fp16.onebit runtime.fp16.onebit.adam runtime.fp16.onebit.lamb
    runtime.fp16.onebit.zoadam runtime.lr_schedules runtime.pipe runtime.pipe.engine runtime.pipe.module
    runtime.pipe.schedule runtime.pipe.topology runtime.sequence_parallel
    runtime.sequence_parallel.ulysses_sp runtime.utils runtime.zero runtime.zero.config runtime.zero.mics
    runtime.zero.partition_parameters runtime.zero.tiling utils utils.groups utils.init_on_device utils.logging
    utils.tensor_fragment utils.zero_to_fp32
"""

# Path below ``deepspeed`` -> the module that it is: the same object, so that patches and pickles agree.
MODULES: Final = MappingProxyType(
    {path: f"zeropipe.{path}" for path in _SAME.split()}
    | {
        "comm.comm": "zeropipe.comm",
        "checkpoint.ds_to_universal": "zeropipe.compat.features.ds_to_universal",
        "launcher.runner": "zeropipe.compat.runner",
        "ops.adagrad.cpu_adagrad": "zeropipe.ops.adagrad",
        "ops.adam.cpu_adam": "zeropipe.ops.adam",
        "ops.adam.fused_adam": "zeropipe.ops.adam",
        "ops.lamb.fused_lamb": "zeropipe.ops.lamb",
        "ops.lion.cpu_lion": "zeropipe.ops.lion",
        "ops.lion.fused_lion": "zeropipe.ops.lion",
        "runtime.activation_checkpointing.checkpointing": "zeropipe.checkpointing",
        "runtime.zero.offload_config": "zeropipe.runtime.zero.hold.offload_states",
        "runtime.zero.parameter_offload": "zeropipe.runtime.zero.gather.hooks",
        "zero": "zeropipe.runtime.zero",
    }
)


def _from(module: str, names: str) -> dict[str, str]:
    """{name: "module:name"} of names that stand in one module of ``zeropipe.compat``."""
    return {name: f"zeropipe.compat.{module}:{name}" for name in names.split()}


_OPTIMIZER_NAMES = """ADAGRAD_OPTIMIZER ADAM_OPTIMIZER ADAMW_OPTIMIZER LAMB_OPTIMIZER LION_OPTIMIZER MUON_OPTIMIZER
    ONEBIT_ADAM_OPTIMIZER ONEBIT_LAMB_OPTIMIZER ZERO_ONE_ADAM_OPTIMIZER DEEPSPEED_OPTIMIZERS"""
_TIMERS = """FORWARD_MICRO_TIMER FORWARD_GLOBAL_TIMER BACKWARD_MICRO_TIMER BACKWARD_GLOBAL_TIMER
    BACKWARD_INNER_MICRO_TIMER BACKWARD_INNER_GLOBAL_TIMER BACKWARD_REDUCE_MICRO_TIMER BACKWARD_REDUCE_GLOBAL_TIMER
    STEP_MICRO_TIMER STEP_GLOBAL_TIMER NoopTimer SynchronizedWallClockTimer ThroughputTimer"""
_RNG = """_MODEL_PARALLEL_RNG_TRACKER_NAME _CUDA_RNG_STATE_TRACKER _set_cuda_rng_state
    model_parallel_reconfigure_tp_seed detach_variable"""


_PLACES = """initialize_sequence_parallel get_sequence_parallel_group get_sequence_parallel_rank
    get_sequence_parallel_world_size get_data_parallel_group get_data_parallel_rank get_data_parallel_world_size
    get_sequence_data_parallel_group get_sequence_data_parallel_rank get_sequence_data_parallel_world_size"""
_ACCELERATOR = {
    name: f"zeropipe.accelerator:{name}"
    for name in ("get_accelerator", "set_accelerator", "is_current_accelerator_supported")
}


_CHECKPOINT_ENGINE = _from(
    "features.checkpoint_files", "CheckpointEngine CheckpointCommitInfo TorchCheckpointEngine"
)
# Of the module ``flops_profiler.profiler``, and of the package around it.
_FLOPS = {
    name: f"zeropipe.runtime.flops:{name}"
    for name in (
        *("FlopsProfiler", "get_model_profile", "number_to_string", "flops_to_string", "macs_to_string"),
        *("params_to_string", "duration_to_string"),
    )
}


_WHOLE = {"unwrap_model_for_generation": "zeropipe.runtime.zero.gather.sharded_model:unsharded"}


_SCHEDULES = """PipeSchedule TrainSchedule InferenceSchedule DataParallelSchedule PipeInstruction BufferOpInstruction
    OptimizerStep ReduceGrads ReduceTiedGrads LoadMicroBatch ForwardPass BackwardPass SendActivation RecvActivation
    SendGrad RecvGrad"""


def _estimators(stage: int) -> dict[str, str]:
    name = f"estimate_zero{stage}_model_states_mem_needs"
    return _from("estimators", f"{name} {name}_all_live {name}_all_cold")


# Path below ``deepspeed`` of a package that only holds others, or names of several -> {name: "module:object"}.
NAMES: Final = MappingProxyType(
    {
        "": {name: f"{module}:{name}" for name, module in homes("zeropipe").items() if name != "zero"}
        | _from("configuration", "DeepSpeedConfigError"),
        "accelerator": _ACCELERATOR,
        "accelerator.real_accelerator": _ACCELERATOR,
        "constants": _from(
            "facts", "TORCH_DISTRIBUTED_DEFAULT_PORT CROSS_RANK CROSS_SIZE default_pg_timeout"
        ),
        "env_report": dict.fromkeys(("main", "cli_main"), "zeropipe.compat.report:main"),
        "git_version_info": _from(
            "facts", "version git_hash git_branch accelerator_name installed_ops compatible_ops torch_info"
        ),
        "launcher": {},
        "ops": {"__compatible_ops__": "zeropipe.compat.facts:compatible_ops"},
        "ops.adagrad": {"DeepSpeedCPUAdagrad": "zeropipe.ops.adagrad:DeepSpeedCPUAdagrad"},
        "ops.adam": {name: f"zeropipe.ops.adam:{name}" for name in ("DeepSpeedCPUAdam", "FusedAdam")},
        "ops.lamb": {"FusedLamb": "zeropipe.ops.lamb:FusedLamb"},
        "ops.lion": {name: f"zeropipe.ops.lion:{name}" for name in ("DeepSpeedCPULion", "FusedLion")},
        "moe": {},
        "moe.utils": _from(
            "features.experts",
            "is_moe_param is_moe_param_group has_moe_layers split_params_into_shared_and_expert_params "
            "split_params_grads_into_shared_and_expert_params configure_moe_param_groups "
            "split_params_into_different_moe_groups_for_optimizer",
        ),
        "monitor": {},
        "monitor.csv_monitor": {"csvMonitor": "zeropipe.runtime.monitor:CsvWriter"},
        "monitor.monitor": _from("features.monitor", "MonitorMaster"),
        "monitor.tensorboard": {"TensorBoardMonitor": "zeropipe.runtime.monitor:TensorBoardWriter"},
        "monitor.wandb": {"WandbMonitor": "zeropipe.runtime.monitor:WandbWriter"},
        "profiling": {},
        "profiling.flops_profiler": _FLOPS,
        "profiling.flops_profiler.profiler": _FLOPS,
        "runtime": _from("optimizers", "ZeROOptimizer"),
        "runtime.activation_checkpointing": {},
        "runtime.bf16_optimizer": _from("optimizers", "BF16_Optimizer"),
        "runtime.checkpoint_engine": {},
        "runtime.checkpoint_engine.checkpoint_engine": _CHECKPOINT_ENGINE,
        "runtime.checkpoint_engine.torch_checkpoint_engine": _CHECKPOINT_ENGINE,
        "runtime.config": _from(
            "configuration", f"DeepSpeedConfig DeepSpeedConfigError DtypeEnum {_OPTIMIZER_NAMES}"
        ),
        "runtime.constants": _from(
            "configuration",
            "PIPE_REPLICATED ROUTE_TRAIN ROUTE_EVAL ROUTE_PREDICT ROUTE_ENCODE PLD_THETA PLD_GAMMA",
        ),
        "runtime.data_pipeline": {},
        "runtime.data_pipeline.curriculum_scheduler": {
            "CurriculumScheduler": "zeropipe.runtime.curriculum:CurriculumScheduler"
        },
        "runtime.data_pipeline.data_routing": {},
        "runtime.data_pipeline.data_routing.helper": _from(
            "tools", "save_without_random_ltd remove_random_ltd_state_dict"
        ),
        "runtime.data_pipeline.data_sampling": {},
        "runtime.data_pipeline.data_sampling.data_analyzer": {
            "DataAnalyzer": "zeropipe.runtime.data_pipeline.analyzer:DataAnalyzer"
        },
        "runtime.data_pipeline.data_sampling.data_sampler": {
            "DeepSpeedDataSampler": "zeropipe.runtime.data_pipeline.sampler:DeepSpeedDataSampler"
        },
        "runtime.data_pipeline.data_sampling.indexed_dataset": {
            name: f"zeropipe.runtime.data_pipeline.indexed:{name}"
            for name in (
                "MMapIndexedDataset",
                "MMapIndexedDatasetBuilder",
                "data_file_path",
                "index_file_path",
            )
        },
        "runtime.fp16.fused_optimizer": _from("optimizers", "FP16_Optimizer"),
        "runtime.fp16.unfused_optimizer": _from("optimizers", "FP16_UnfusedOptimizer"),
        "runtime.progressive_layer_drop": {
            "ProgressiveLayerDrop": "zeropipe.runtime.curriculum:ProgressiveLayerDrop"
        },
        "runtime.sequence_parallel.parallel_state_sp": {
            name: f"zeropipe.runtime.sequence_parallel.place:{name}" for name in _PLACES.split()
        },
        "sequence": {},
        "sequence.layer": {
            "DistributedAttention": "zeropipe.runtime.sequence_parallel.attention:DistributedAttention"
        },
        "runtime.state_dict_factory": _from("features.checkpoint_files", "SDLoaderFactory MegatronSDLoader"),
        "runtime.zero.stage3": _from("optimizers", "DeepSpeedZeroOptimizer_Stage3") | _estimators(3),
        "runtime.zero.stage_1_and_2": _from("optimizers", "DeepSpeedZeroOptimizer") | _estimators(2),
        "utils.comms_logging": _from("features.comms_log", "CommsLogger"),
        "utils.nvtx": _from("tools", "instrument_w_nvtx"),
        "utils.timer": _from("timers", _TIMERS),
        "version": _from("facts", "version"),
    }
)

# Path below ``deepspeed`` of one of zeropipe's own modules -> names that only DeepSpeed users look for there.
BESIDE: Final = MappingProxyType(
    {
        "checkpointing": _from("ranks", _RNG),
        "comm": _from(
            "ranks",
            "get_local_rank get_world_group allgather_fn has_all_gather_into_tensor has_reduce_scatter_tensor "
            "has_coalescing_manager has_all_reduce_coalesced mpi_discovery configure",
        )
        | _from("features.comms_log", "comms_logger"),
        "launcher.runner": {
            "DLTS_HOSTFILE": "zeropipe.compat.runner:DEFAULT_HOSTFILE",
        },
        "runtime.dataloader": {"DeepSpeedDataLoader": "zeropipe.runtime.dataloader:ZeroDataLoader"},
        "runtime.engine": _from("facts", "DeepSpeedOptimizerCallable DeepSpeedSchedulerCallable"),
        "runtime.pipe.schedule": {
            name: f"zeropipe.runtime.pipe.stepwise.words:{name}" for name in _SCHEDULES.split()
        },
        "runtime.utils": _from(
            "tools",
            "set_random_seed partition_uniform partition_balanced is_model_parallel_parameter "
            "bwc_tensor_model_parallel_rank get_global_norm get_global_norm_of_tensors clip_tensors_by_global_norm "
            "clip_grad_norm_ align_dense_tensors all_gather_dp_groups PartitionedTensor empty_cache noop_decorator "
            "get_ma_status ensure_directory_exists inf",
        )
        | _from("optimizers", "DummyOptim"),
        "runtime.zero": _WHOLE,
        "zero": _WHOLE,
        "runtime.zero.config": _from("configuration", "DeepSpeedZeroConfig ZERO_OPTIMIZATION"),
        "runtime.zero.mics": _from("optimizers", "MiCS_Optimizer"),
        "runtime.zero.offload_config": _from("configuration", "OffloadDeviceEnum"),
        "runtime.zero.parameter_offload": _from("optimizers", "DeepSpeedZeRoOffload is_zero_param"),
        "utils": _from("tools", "instrument_w_nvtx set_log_level_from_string")
        | {
            "fragment_address": "zeropipe.utils.tensor_fragment:fragment_address",
            "is_initialized": "zeropipe.comm:is_initialized",
        },
        "utils.groups": _from(
            "ranks",
            "mpu _get_broadcast_src_rank _get_model_parallel_world_size _get_zero_param_intra_parallel_group",
        ),
        "utils.logging": _from("tools", "print_dist print_json_dist print_configuration should_log_le"),
    }
)

_MOE = "write the experts as modules and mark them with set_z3_leaf_modules"
_SERVE = "serve the exported weights with an inference engine"
_LAYERS = "use the model's own layers"
_TP = "use torch.distributed.tensor.parallel"
_LTD = "drop tokens in the model's own forward"
_INSIDE = "the engine does this inside; call its public methods"

# What people ask for and is not here -> what to do instead. These names, and those below them, may be imported: what
# stands in for them says so when it is used.
ABSENT: Final = MappingProxyType(
    {
        "DeepSpeedTransformerConfig": _LAYERS,
        "DeepSpeedTransformerLayer": _LAYERS,
        "autotuning": "measure a few values of train_micro_batch_size_per_gpu with your own script",
        "comm.TorchBackend": "use torch.distributed; deepspeed.comm has its functions",
        "comm.icdf": "use torch.special.ndtri",
        "compile": "engine.compile() compiles the module with torch.compile",
        "compression": "compress the trained model with another library",
        "elasticity": "a checkpoint loads at any number of ranks; torchrun restarts the job",
        "inference": _SERVE,
        "init_inference": _SERVE,
        "io": "checkpoints are written by engine.save_checkpoint, also in the background",
        "linear": "use peft for adapters",
        "model_implementations": _SERVE,
        "module_inject": _TP,
        "moe.experts": _MOE,
        "moe.layer": _MOE,
        "moe.mappings": _MOE,
        "moe.sharded_moe": _MOE,
        "monitor.comet": "use tensorboard, wandb or csv_monitor",
        "nebula": "checkpoints go to a file system",
        "ops.adam.multi_tensor_apply": "use torch's foreach functions",
        "ops.aio": "nothing is compiled here; offload to nvme reads and writes files by itself",
        "ops.deepspeed4science": "use torch.nn.functional.scaled_dot_product_attention",
        "ops.op_builder": "nothing is compiled here, so there is nothing to build",
        "ops.sparse_attention": "use torch.nn.attention.flex_attention",
        "ops.transformer": _LAYERS,
        "replace_transformer_layer": _SERVE,
        "runtime.checkpoint_engine.nebula_checkpoint_engine": "use checkpoint.async_save in the configuration",
        "runtime.data_pipeline.data_routing.basic_layer": _LTD,
        "runtime.data_pipeline.data_routing.helper.convert_to_random_ltd": _LTD,
        "runtime.data_pipeline.data_routing.scheduler": _LTD,
        "runtime.data_pipeline.data_sampling.data_analyzer.DistributedDataAnalyzer": "use DataAnalyzer",
        "runtime.data_pipeline.data_sampling.variable_batch_size_and_lr": "make such batches in your own dataset",
        "runtime.domino": _TP,
        "runtime.eigenvalue": "compute it with torch.func",
        "runtime.engine.MoE": _MOE,
        "runtime.engine.autocast_if_enabled": "use the section torch_autocast of the configuration",
        "runtime.hybrid_engine": "gather with deepspeed.zero.GatheredParameters and generate",
        "runtime.pipe.engine._tensor_bytes": "tensor.numel() * tensor.element_size()",
        "runtime.quantize": "quantize the trained model with another library",
        "runtime.sequence_parallel.ulysses_sp.UlyssesSPFwdLossBwdWithLogits": "use UlyssesSPDataLoaderAdapter",
        "runtime.sequence_parallel.ulysses_sp.TiledLoss": "use TiledFusedLogitsLoss, which has no logits to keep",
        "runtime.sparse_tensor": "use torch.sparse_coo_tensor",
        "runtime.tensor_parallel": _TP,
        "runtime.utils.graph_process": "use torch.cuda.graph",
        "runtime.zero.mics_utils": "set mics_shard_size in the configuration",
        "runtime.zero.partition_parameters.AllGatherCoalescedHandle": _INSIDE,
        "runtime.zero.partition_parameters.shutdown_init_context": "leave the block of deepspeed.zero.Init",
        "runtime.zero.utils": "any torch optimizer is supported, or refused by initialize with the reason",
        "sequence.auto_tp": _TP,
        "sequence.cross_entropy": "compute the loss of each rank's own tokens, and weigh it by their number",
        "sequence.fpdt_layer": "use TiledMLP and TiledFusedLogitsLoss of runtime.sequence_parallel.ulysses_sp",
        "tools": "use hooks of torch.nn.Module",
        "tp_model_init": _TP,
        "utils.debug": "print(zeropipe.zero.describe(model)) shows every parameter",
        "utils.link_hp_params": "use deepspeed.utils.safe_get_full_fp32_param",
        "utils.zero_to_fp32.parse_optim_states": "use get_fp32_state_dict_from_zero_checkpoint",
    }
    | {
        f"utils.groups.{name}": _MOE
        for name in (
            "_create_expert_data_and_model_parallel",
            "_get_expert_broadcast_src_rank",
            "_get_expert_data_parallel_group",
            "_get_expert_data_parallel_group_dict",
            "_get_expert_data_parallel_rank",
            "_get_expert_parallel_group",
            "_get_expert_parallel_group_dict",
            "_get_expert_parallel_rank",
            "_get_expert_parallel_world_size",
            "_get_local_all_to_all_group",
            "_get_max_expert_parallel_group",
            "_get_max_expert_size_name",
        )
    }
)
