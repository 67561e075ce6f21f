"""Configurations as in the clients' documentation."""

from __future__ import annotations

from typing import Any

# Steps that overflow first: gradients of the tiny model times 2**20 are no fp16 numbers.
FP16 = {"enabled": "auto", "initial_scale_power": 20, "hysteresis": 1}


def offloaded(stage: int, device: str = "cpu", path: str | None = None) -> dict[str, Any]:
    """Keys of ``zero_optimization``: all that the stage can keep elsewhere."""
    place = {"device": device, **({"nvme_path": path} if path else {})}
    return {"offload_optimizer": place, **({"offload_param": place} if stage == 3 else {})}


def ds_config(
    stage: int,
    precision: str = "fp32",
    *,
    optimizer: bool = False,
    zero: dict[str, Any] | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """As in the clients' documentation: what the client knows is ``"auto"``. ``zero``: more of its section."""
    config: dict[str, Any] = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9,
            "stage3_gather_16bit_weights_on_model_save": True,
            **(zero or {}),
        },
        **extra,
    }
    if optimizer:
        params = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
        config["optimizer"] = {"type": "AdamW", "params": params}
        config["scheduler"] = {
            "type": "WarmupDecayLR",
            "params": {
                "warmup_min_lr": "auto",
                "warmup_max_lr": "auto",
                "warmup_num_steps": "auto",
                "total_num_steps": "auto",
                "warmup_type": "linear",
            },
        }
    return config
