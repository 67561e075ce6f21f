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
    accelerator checkpoint checkpoint.constants checkpoint.deepspeed_checkpoint checkpoint.reshape_3d_utils
    checkpoint.reshape_meg_2d checkpoint.reshape_utils checkpoint.universal_checkpoint checkpoint.utils
    checkpoint.zero_checkpoint checkpointing comm pipe runtime.base_optimizer runtime.dataloader runtime.engine
    runtime.fp16 runtime.fp16.loss_scaler runtime.fp16.onebit runtime.fp16.onebit.adam runtime.fp16.onebit.lamb
    runtime.fp16.onebit.zoadam runtime.lr_schedules runtime.pipe runtime.pipe.engine runtime.pipe.module
    runtime.pipe.schedule runtime.pipe.topology runtime.utils runtime.zero runtime.zero.config runtime.zero.mics
    runtime.zero.partition_parameters runtime.zero.tiling utils utils.groups utils.init_on_device utils.logging
    utils.tensor_fragment utils.zero_to_fp32
"""

# Path below ``deepspeed`` -> the module that it is: the same object, so that patches and pickles agree.
MODULES: Final = MappingProxyType(
    {path: f"zeropipe.{path}" for path in _SAME.split()}
    | {
        "comm.comm": "zeropipe.comm",
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

# Path below ``deepspeed`` of a package that only holds others, or names of several -> {name: "module:object"}.
NAMES: Final = MappingProxyType(
    {
        "": {name: f"{module}:{name}" for name, module in homes("zeropipe").items() if name != "zero"},
        "launcher": {},
        "ops": {},
        "ops.adagrad": {"DeepSpeedCPUAdagrad": "zeropipe.ops.adagrad:DeepSpeedCPUAdagrad"},
        "ops.adam": {name: f"zeropipe.ops.adam:{name}" for name in ("DeepSpeedCPUAdam", "FusedAdam")},
        "ops.lamb": {"FusedLamb": "zeropipe.ops.lamb:FusedLamb"},
        "ops.lion": {name: f"zeropipe.ops.lion:{name}" for name in ("DeepSpeedCPULion", "FusedLion")},
        "runtime": {},
        "runtime.activation_checkpointing": {},
    }
)

# What people ask for and is not here -> what to do instead.
ABSENT: Final = MappingProxyType(
    {
        "autotuning": "measure a few values of train_micro_batch_size_per_gpu with your own script",
        "compression": "compress the trained model with another library",
        "elasticity": "a checkpoint loads at any number of ranks; torchrun restarts the job",
        "inference": "serve the exported weights with an inference engine",
        "init_inference": "serve the exported weights with an inference engine",
        "linear": "use peft for adapters",
        "model_implementations": "serve the exported weights with an inference engine",
        "module_inject": "use torch.distributed.tensor.parallel",
        "moe": "write the experts as modules and mark them with set_z3_leaf_modules",
        "monitor": "use the sections tensorboard, wandb and csv_monitor of the configuration",
        "nebula": "checkpoints go to a file system",
        "ops.op_builder": "nothing is compiled here, so there is nothing to build",
        "ops.sparse_attention": "use torch.nn.attention.flex_attention",
        "ops.transformer": "use the model's own layers",
        "profiling": "use torch.profiler, or wall_clock_breakdown in the configuration",
        "runtime.config": "use zeropipe.config.parse.parse_config",
        "runtime.data_pipeline": "order the data in your own dataset",
        "runtime.sequence_parallel": "use torch.distributed.tensor.experimental.context_parallel",
        "runtime.tensor_parallel": "use torch.distributed.tensor.parallel",
        "runtime.zero.stage3": "engine.memory_report() has each rank's bytes beside the formula",
        "runtime.zero.stage_1_and_2": "engine.memory_report() has each rank's bytes beside the formula",
        "sequence": "use torch.distributed.tensor.experimental.context_parallel",
        "tp_model_init": "use torch.distributed.tensor.parallel",
        "utils.timer": "use wall_clock_breakdown in the configuration, or zeropipe.runtime.timers",
    }
)
