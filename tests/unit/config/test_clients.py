"""Configurations as real clients build them must parse, and mean what they mean there."""

from __future__ import annotations

import pytest

from zeropipe.config.parse import parse_config
from zeropipe.config.schema import Config

HF_AUTO = {
    "fp16": {
        "enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}  # fmt: skip

ACCELERATE_PLUGIN = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "none", "nvme_path": None},
        "offload_param": {"device": "none", "nvme_path": None},
        "stage3_gather_16bit_weights_on_model_save": False,
    },
    "gradient_clipping": 1.0,
    "steps_per_print": float("inf"),
    "fp16": {"enabled": True, "auto_cast": True},
    "bf16": {"enabled": False},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "communication_data_type": "fp32",
    "msamp": {"enabled": False},
    "checkpoint": {"use_node_local_storage": False},
}

LIGHTNING_DEFAULT = {
    "activation_checkpointing": {
        "partition_activations": False,
        "cpu_checkpointing": False,
        "contiguous_memory_optimization": False,
        "synchronize_checkpoint_boundary": False,
    },
    "aio": {"block_size": 1048576, "queue_depth": 8, "single_submit": False, "overlap_events": True, "thread_count": 1},
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {
        "stage": 2,
        "contiguous_gradients": True,
        "overlap_comm": True,
        "allgather_partitions": True,
        "reduce_scatter": True,
        "allgather_bucket_size": 200_000_000,
        "reduce_bucket_size": 200_000_000,
        "sub_group_size": 1_000_000_000_000,
        "offload_optimizer": {"device": "nvme", "nvme_path": "/local_nvme", "buffer_count": 4, "pin_memory": False},
        "offload_param": {
            "device": "nvme", "nvme_path": "/local_nvme", "buffer_count": 5, "buffer_size": 100_000_000,
            "max_in_cpu": 1_000_000_000, "pin_memory": False,
        },
    },
    "fp16": {
        "enabled": True, "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.0,
}  # fmt: skip
LIGHTNING_DEFAULT["zero_optimization"]["stage"] = 3  # it writes nvme only for stage 3  # type: ignore[index]

TRL_REFERENCE = {
    **ACCELERATE_PLUGIN,
    "zero_optimization": {**HF_AUTO["zero_optimization"], "stage": 0},  # type: ignore[dict-item]
    "zero_optimization.reduce_bucket_size": 4096,
    "zero_optimization.stage3_param_persistence_threshold": 640,
    "zero_optimization.stage3_prefetch_bucket_size": 3686.4,
}

INFERENCE = {"zero_optimization": {"stage": 3}}


@pytest.mark.parametrize("config", [HF_AUTO, ACCELERATE_PLUGIN, LIGHTNING_DEFAULT, INFERENCE, TRL_REFERENCE])
def test_it_parses_and_keeps_the_dict(config: dict) -> None:
    assert parse_config(config).raw is config


def test_a_usual_client_config_says_nothing() -> None:
    for config in (HF_AUTO, ACCELERATE_PLUGIN, LIGHTNING_DEFAULT, INFERENCE):
        assert parse_config(config).notices == ()


# Facts read off deepspeed 0.19.8's running configuration objects.
DEEPSPEED_DEFAULTS = {
    "gradient_clipping": 1.0, "prescale_gradients": False, "gradient_predivide_factor": 1.0,
    "communication_data_type": None, "steps_per_print": None, "wall_clock_breakdown": False,
    "memory_breakdown": False, "dump_state": False, "dataloader_drop_last": False,
    "zero_allow_untested_optimizer": False, "zero_force_ds_cpu_optimizer": True,
    "data_types.grad_accum_dtype": None,
    "fp16.enabled": False, "fp16.auto_cast": False, "fp16.loss_scale": 0, "fp16.initial_scale_power": 16,
    "fp16.loss_scale_window": 1000, "fp16.hysteresis": 2, "fp16.consecutive_hysteresis": False,
    "fp16.min_loss_scale": 1, "bf16.enabled": False, "bf16.check_grad_overflow": True,
    "bf16.immediate_grad_update": False, "torch_autocast.enabled": False,
    "zero_optimization.stage": 0, "zero_optimization.contiguous_gradients": True,
    "zero_optimization.reduce_scatter": True, "zero_optimization.reduce_bucket_size": 500_000_000,
    "zero_optimization.allgather_partitions": True, "zero_optimization.allgather_bucket_size": 500_000_000,
    "zero_optimization.load_from_fp32_weights": True, "zero_optimization.elastic_checkpoint": False,
    "zero_optimization.sub_group_size": 1_000_000_000,
    "zero_optimization.stage3_prefetch_bucket_size": 50_000_000,
    "zero_optimization.stage3_param_persistence_threshold": 100_000,
    "zero_optimization.stage3_model_persistence_threshold": 2**63 - 1,
    "zero_optimization.stage3_max_live_parameters": 1_000_000_000,
    "zero_optimization.stage3_max_reuse_distance": 1_000_000_000,
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": False,
    "zero_optimization.ignore_unused_parameters": True, "zero_optimization.round_robin_gradients": False,
    "zero_optimization.zero_hpz_partition_size": 1, "zero_optimization.memory_efficient_linear": True,
    "zero_optimization.override_module_apply": True,
    "zero_optimization.offload_param.device": "none", "zero_optimization.offload_param.buffer_count": 5,
    "zero_optimization.offload_param.buffer_size": 100_000_000,
    "zero_optimization.offload_param.max_in_cpu": 1_000_000_000, "zero_optimization.offload_param.pin_memory": True,
    "zero_optimization.offload_optimizer.device": "none", "zero_optimization.offload_optimizer.buffer_count": 4,
    "zero_optimization.offload_optimizer.pin_memory": True, "zero_optimization.offload_optimizer.ratio": 1.0,
    "tensorboard.enabled": False, "tensorboard.output_path": "", "tensorboard.job_name": "DeepSpeedJobName",
    "wandb.project": "deepspeed", "wandb.group": None, "wandb.team": None,
    "csv_monitor.output_path": "", "csv_monitor.job_name": "DeepSpeedJobName",
    "checkpoint.load_universal": False, "checkpoint.use_node_local_storage": False,
    "checkpoint.tag_validation": "warn", "pipeline.partition": "best", "pipeline.seed_layers": False,
    "pipeline.activation_checkpoint_interval": 0, "aio.block_size": 1_048_576, "aio.queue_depth": 8,
}  # fmt: skip


@pytest.mark.parametrize("path", DEEPSPEED_DEFAULTS)
def test_the_default_is_what_users_know(path: str) -> None:
    assert Config().settings()[path] == DEEPSPEED_DEFAULTS[path]
