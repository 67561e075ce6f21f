"""Every form of ds_config that the documentation of Transformers, Accelerate, PEFT, TRL and Lightning shows.

``test_clients.py`` has what their code writes; here is what their pages tell people to write.
"""

from __future__ import annotations

from typing import Any

import pytest

from zeropipe.config.parse import parse_config
from zeropipe.config.schema import NoticeKind
from zeropipe.errors import ConfigError

FP16 = {
    "enabled": True, "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2,
    "min_loss_scale": 1,
}  # fmt: skip
ADAMW = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}
WARMUP = {
    "type": "WarmupLR",
    "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
}
DECAY = {"type": "WarmupDecayLR", "params": {**WARMUP["params"], "total_num_steps": "auto"}}  # type: ignore[dict-item]
REST = {
    "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2000,
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": False,
}  # fmt: skip
AIO = {
    "block_size": 262144, "queue_depth": 32, "thread_count": 1, "single_submit": False, "overlap_events": True
}  # fmt: skip
CPU = {"device": "cpu", "pin_memory": True}
NVME = {"device": "nvme", "nvme_path": "/local_nvme", "pin_memory": True}
STAGE_2 = {
    "stage": 2, "allgather_partitions": True, "allgather_bucket_size": 2e8, "overlap_comm": True,
    "reduce_scatter": True, "reduce_bucket_size": "auto", "contiguous_gradients": True,
}  # fmt: skip
STAGE_3 = {
    "stage": 3, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9, "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
    "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
}  # fmt: skip


def zero(**keys: Any) -> dict[str, Any]:
    return {"zero_optimization": keys}


def whole(zero_optimization: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "fp16": FP16,
        "optimizer": ADAMW,
        "scheduler": WARMUP,
        **zero(**zero_optimization),
        **REST,
        **more,
    }


QUIET = {
    "stage 0": zero(stage=0),
    "stage 1": zero(stage=1),
    "stage 2": whole(STAGE_2),
    "stage 2, optimizer on the CPU": whole({**STAGE_2, "offload_optimizer": CPU}),
    "stage 3": whole(STAGE_3),
    "stage 3 on the CPU": whole({**STAGE_3, "offload_optimizer": CPU, "offload_param": CPU}, scheduler=DECAY),
    "stage 3 in files": whole(
        {
            **STAGE_3,
            "offload_optimizer": {**NVME, "buffer_count": 4, "fast_init": False},
            "offload_param": {**NVME, "buffer_count": 5, "buffer_size": 1e8, "max_in_cpu": 1e9},
        },
    ),
    "stage 3, everything auto": whole(
        {**STAGE_3, "stage3_max_live_parameters": "auto", "stage3_max_reuse_distance": "auto",
         "stage3_gather_16bit_weights_on_model_save": "auto"}
    ),
    "stage 3 of the tests of Transformers": whole(
        {**STAGE_3, "sub_group_size": 1e14, "reduce_bucket_size": 0, "stage3_prefetch_bucket_size": 0,
         "stage3_param_persistence_threshold": 0}
    ),
    "torch's Adam": whole(
        STAGE_2,
        optimizer={
            "type": "AdamW",
            "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True, "adam_w_mode": True},
        },
        scheduler=DECAY,
    ),
    "fp32": {"fp16": {"enabled": False}},
    "fp16 by the client": {"fp16": {**FP16, "enabled": "auto"}},
    "Apex by the client": {"amp": {"enabled": "auto", "opt_level": "auto"}},
    "bf16 by the client": {"bf16": {"enabled": "auto"}},
    "bf16": {"bf16": {"enabled": True}, **zero(stage=3)},
    "reduced in fp32": {"communication_data_type": "fp32"},
    "an optimizer that is not known": {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False},
    "a universal checkpoint": {"checkpoint": {"load_universal": True}},
    "the stages of the pipeline by themselves": {"pipeline": {"stages": "auto"}},
    "inference": zero(stage=3, offload_param=CPU),
    "1-bit Adam": {
        "zero_allow_untested_optimizer": True,
        "optimizer": {
            "type": "OneBitAdam",
            "params": {"lr": 3e-5, "betas": [0.998, 0.999], "eps": 1e-5, "weight_decay": 1e-9, "cuda_aware": True},
        },
        "scheduler": {
            "type": "WarmupLR",
            "params": {"last_batch_iteration": -1, "warmup_min_lr": 0, "warmup_max_lr": 3e-5, "warmup_num_steps": 100},
        },
    },
    "one dtype per thing": {"data_types": {"grad_accum_dtype": "fp32"}, "bf16": {"enabled": True}},
    "activation checkpointing": {"activation_checkpointing": {"cpu_checkpointing": True}},
    "one GPU": zero(
        stage=2, offload_optimizer=CPU, allgather_partitions=True, allgather_bucket_size=2e8, reduce_scatter=True,
        reduce_bucket_size=2e8, overlap_comm=True, contiguous_gradients=True,
    ),
}  # fmt: skip

# Known keys that change nothing here, and those of other software: one notice, which names them.
TOLD = {
    "stage 2, optimizer on the CPU, gradients dealt out": (
        whole({**STAGE_2, "offload_optimizer": CPU, "round_robin_gradients": True}), NoticeKind.NO_EFFECT,
        ("zero_optimization.round_robin_gradients",),
    ),
    "what this project does in any case": (
        {
            **zero(
                reduce_scatter=False, allgather_partitions=False, contiguous_gradients=False,
                memory_efficient_linear=False,
            ),
            "checkpoint": {"parallel_write": {"pipeline_stage": True}},
        },
        NoticeKind.NO_EFFECT,
        (
            "zero_optimization.reduce_scatter", "zero_optimization.allgather_partitions",
            "zero_optimization.contiguous_gradients", "zero_optimization.memory_efficient_linear",
            "checkpoint.parallel_write.pipeline_stage",
        ),
    ),
    "tuning of files": ({"aio": AIO}, NoticeKind.NO_EFFECT, ("aio.block_size", "aio.queue_depth")),
    "files tuned inside zero_optimization": (
        whole({**STAGE_3, "offload_param": NVME, "aio": AIO}), NoticeKind.RENAMED, ("zero_optimization.aio",)
    ),
    "old name of the gather at a save": (
        zero(stage=3, stage3_gather_fp16_weights_on_model_save=True), NoticeKind.RENAMED,
        ("zero_optimization.stage3_gather_fp16_weights_on_model_save",),
    ),
    "traffic of sequence parallelism": (
        {"bf16": {"enabled": True}, **zero(stage=3), "seq_parallel_communication_data_type": "bf16"},
        NoticeKind.NO_EFFECT, ("seq_parallel_communication_data_type",),
    ),
    "flops and tuning": (
        {"flops_profiler": {"enabled": True, "profile_step": 1}, "autotuning": {"enabled": True}},
        NoticeKind.NO_EFFECT, ("autotuning",),
    ),
    "another engine for generation": (
        {"hybrid_engine": {"enabled": True, "max_out_tokens": 512}}, NoticeKind.NO_EFFECT, ("hybrid_engine",)
    ),
    "tensor parallelism for inference": (
        {**zero(stage=3), "inference": {"tensor_parallel": {"tp_size": 1}}}, NoticeKind.FOREIGN, ("inference",)
    ),
    "keys of other software": (
        {"is_deepspeed_zero3_enabled": True, "torch_dtype": "bf16"},
        NoticeKind.FOREIGN, ("is_deepspeed_zero3_enabled", "torch_dtype"),
    ),
}  # fmt: skip

# What would give other numbers, or another memory than was asked for.
REFUSED = {
    "a disk per node": (
        {"checkpoint": {"use_node_local_storage": True}}, "use_node_local_storage' = True is not.*share"
    ),
    "ZeRO++": (
        zero(stage=3, reduce_bucket_size="auto", zero_quantized_weights=True, zero_hpz_partition_size=8,
             zero_quantized_gradients=True, contiguous_gradients=True, overlap_comm=True),
        "zero_quantized_weights' = True is not offered.*Fix: remove the key",
    ),
    "ZeRO++ for adapters": (
        zero(stage=3, zero_quantized_nontrainable_weights=True), "zero_quantized_nontrainable_weights' = True is not"
    ),
    "tensor parallelism by injection": (
        {**zero(stage=0), "tensor_parallel": {"autotp_size": 4}}, "autotp_size' = 4 is not offered.*Fix"
    ),
    "Apex": ({"amp": {"enabled": True, "opt_level": "O1"}}, "'amp'.*Apex.*Fix: use bf16, fp16 or torch_autocast"),
    "fp8": ({"msamp": {"enabled": True, "opt_level": "O2"}}, "'msamp'.*not offered"),
    "experts": ({"expert_parallel": {"enabled": True}}, "'expert_parallel'.*not offered"),
    "batch sizes that follow the ranks": (
        {"elasticity": {"enabled": True, "max_train_batch_size": 2000, "micro_batch_sizes": [2, 4]}}, "'elasticity'"
    ),
    "quantized training": ({"quantize_training": {"enabled": True}}, "'quantize_training'.*not offered"),
    "sparse attention": ({"sparse_attention": {"mode": "fixed"}}, "'sparse_attention'.*the model's own"),
    "files below stage 3": (zero(stage=2, offload_optimizer=NVME), "expected 'zero_optimization.stage' 3"),
    "stale gradients": (zero(stage=2, zenflow={"topk_ratio": 0.05}), "'zero_optimization.zenflow'.*stale"),
    "Transformers' own flag, misspelt": ({"gradient_acumulation_steps": 2}, "'gradient_accumulation_steps'"),
}  # fmt: skip


@pytest.mark.parametrize("name", QUIET)
def test_it_is_accepted_without_a_word(name: str) -> None:
    config = parse_config(QUIET[name])
    assert config.notices == ()
    assert config.raw is QUIET[name]


@pytest.mark.parametrize("name", TOLD)
def test_it_is_accepted_and_said_once(name: str) -> None:
    written, kind, keys = TOLD[name]
    (notice,) = [notice for notice in parse_config(written).notices if notice.kind is kind]
    assert sorted(notice.keys) == sorted(keys)
    assert "\n" not in notice.text and all(key.split(".")[-1] in notice.text for key in keys)


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_a_way_out(name: str) -> None:
    written, says = REFUSED[name]
    with pytest.raises(ConfigError, match=says):
        parse_config(written)


def test_what_was_written_is_what_is_used() -> None:
    config = parse_config(QUIET["stage 3 in files"])
    settings = config.settings()
    assert settings["zero_optimization.offload_param.nvme_path"] == "/local_nvme"
    assert settings["zero_optimization.sub_group_size"] == 10**9
    assert config.is_auto("optimizer.params.lr") and config.is_auto("zero_optimization.reduce_bucket_size")
    tests = parse_config(QUIET["stage 3 of the tests of Transformers"]).zero_optimization
    assert (tests.reduce_bucket_size, tests.sub_group_size) == (0, 10**14)
    inside = parse_config(TOLD["files tuned inside zero_optimization"][0])
    assert (inside.aio.block_size, inside.aio.queue_depth) == (262144, 32)
    assert QUIET["stage 3"]["fp16"] is FP16 and parse_config(QUIET["stage 3"]).precision == "fp16"
    for client in ("fp16 by the client", "Apex by the client", "bf16 by the client", "fp32"):
        assert parse_config(QUIET[client]).precision == "fp32"


def test_files_tuned_in_two_places_must_agree() -> None:
    with pytest.raises(
        ConfigError, match=r"'zero_optimization.aio' is the old name of 'aio', and both are given"
    ):
        parse_config({"aio": {"queue_depth": 8}, **zero(stage=3, aio=AIO)})
    assert parse_config({"aio": AIO, **zero(stage=3, aio=AIO)}).aio.queue_depth == 32
