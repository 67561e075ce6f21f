"""What an engine answers about its configuration, and where it runs: questions that scripts put to the engine itself.

Each is one look into the parsed configuration; a key that has no effect here is answered as it was given.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from zeropipe.comm.group import world
from zeropipe.given import ProcessGroup
from zeropipe.runtime.engine.parts import Parts
from zeropipe.runtime.sequence_parallel.place import get_sequence_parallel_group


def _says(path: str) -> Callable[[Settings], Any]:
    """A method that returns the configuration's value at a dotted path."""

    def said(engine: Settings) -> Any:
        value: Any = engine._parts.config
        for key in path.split("."):
            value = getattr(value, key)
        return value

    return said


def _moving(section: Any) -> Any:
    return None if section.device == "none" else section


def _zero(key: str) -> Callable[[Settings], Any]:
    return _says(f"zero_optimization.{key}")


class Settings(torch.nn.Module):
    """The part of an engine's interface that only reads."""

    _parts: Parts  # made by the engine itself
    pipeline_parallelism = False

    @property
    def config(self) -> dict[str, Any]:
        """The configuration as it was given: the same dict."""
        return self._parts.config.raw

    # Where it runs.

    @property
    def local_rank(self) -> int:
        """This process's number on its node, as torchrun says it; 0 without torchrun."""
        return int(os.environ.get("LOCAL_RANK", "0"))

    @property
    def global_rank(self) -> int:
        return world().rank

    @property
    def world_size(self) -> int:
        return world().size

    @property
    def data_parallel_group(self) -> ProcessGroup:
        """The torch process group that this engine's gradients are averaged over."""
        return self._parts.group.pg

    def get_sequence_parallel_group(self) -> ProcessGroup:
        """The torch process group of the ranks that share this rank's sequence. Raises UsageError where none do."""
        return get_sequence_parallel_group()

    @property
    def dp_world_size(self) -> int:
        """How many ranks see different samples."""
        return self._parts.samples.size

    @property
    def mp_world_size(self) -> int:
        """Ranks that hold different parts of one copy of the model: slices and stages."""
        return max(1, world().size // self._parts.group.size)

    # What it trains with.

    def zero_optimization(self) -> bool:
        return self._parts.config.zero_optimization.stage > 0

    def zero_optimization_partition_gradients(self) -> bool:
        return self._parts.config.zero_optimization.stage >= 2

    def zero_optimization_partition_weights(self) -> bool:
        return self._parts.config.zero_optimization.stage >= 3

    def fp16_enabled(self) -> bool:
        return self._parts.config.precision == "fp16"

    def bfloat16_enabled(self) -> bool:
        return self._parts.config.precision == "bf16"

    def dynamic_loss_scale(self) -> bool:
        return self._parts.config.fp16.enabled and self._parts.config.fp16.loss_scale == 0

    def optimizer_name(self) -> str | None:
        """As the configuration has it; None where it names none."""
        return self._parts.config.optimizer.type

    def scheduler_name(self) -> str | None:
        return self._parts.config.scheduler.type

    def zero_offload_optimizer(self) -> Any:
        """The section where it moves anything, else None."""
        return _moving(self._parts.config.zero_optimization.offload_optimizer)

    def zero_offload_param(self) -> Any:
        """The section where it moves anything, else None."""
        return _moving(self._parts.config.zero_optimization.offload_param)

    optimizer_params = _says("optimizer.params")
    scheduler_params = _says("scheduler.params")
    gradient_clipping = _says("gradient_clipping")
    gradient_predivide_factor = _says("gradient_predivide_factor")
    managed_gradient_accumulation = _says("managed_gradient_accumulation")
    sparse_gradients_enabled = _says("sparse_gradients")
    fp16_auto_cast = _says("fp16.auto_cast")
    torch_autocast_enabled = _says("torch_autocast.enabled")
    torch_autocast_dtype = _says("torch_autocast.dtype")
    curriculum_enabled_legacy = _says("curriculum_learning.enabled")
    curriculum_learning_enabled = _says("data_efficiency.data_sampling.curriculum_learning.enabled")
    data_efficiency_enabled = _says("data_efficiency.enabled")
    data_sampling_enabled = _says("data_efficiency.data_sampling.enabled")
    flops_profiler_enabled = _says("flops_profiler.enabled")
    flops_profiler_profile_step = _says("flops_profiler.profile_step")
    pld_enabled = _says("progressive_layer_drop.enabled")
    pld_theta = _says("progressive_layer_drop.theta")
    pld_gamma = _says("progressive_layer_drop.gamma")
    dataloader_drop_last = _says("dataloader_drop_last")
    zero_allow_untested_optimizer = _says("zero_allow_untested_optimizer")
    zero_force_ds_cpu_optimizer = _says("zero_force_ds_cpu_optimizer")
    zero_optimization_stage = _zero("stage")
    zero_allgather_bucket_size = _zero("allgather_bucket_size")
    zero_allgather_partitions = _zero("allgather_partitions")
    zero_contiguous_gradients = _zero("contiguous_gradients")
    zero_elastic_checkpoint = _zero("elastic_checkpoint")
    zero_gather_16bit_weights_on_model_save = _zero("stage3_gather_16bit_weights_on_model_save")
    zero_hpz_partition_size = _zero("zero_hpz_partition_size")
    zero_ignore_unused_parameters = _zero("ignore_unused_parameters")
    zero_load_from_fp32_weights = _zero("load_from_fp32_weights")
    zero_max_live_parameters = _zero("stage3_max_live_parameters")
    zero_max_reuse_distance = _zero("stage3_max_reuse_distance")
    zero_model_persistence_threshold = _zero("stage3_model_persistence_threshold")
    zero_overlap_comm = _zero("overlap_comm")
    zero_param_persistence_threshold = _zero("stage3_param_persistence_threshold")
    zero_prefetch_bucket_size = _zero("stage3_prefetch_bucket_size")
    zero_reduce_bucket_size = _zero("reduce_bucket_size")
    zero_reduce_scatter = _zero("reduce_scatter")
    zero_round_robin_gradients = _zero("round_robin_gradients")
    zero_sub_group_size = _zero("sub_group_size")

    # What it tells.

    wall_clock_breakdown = _says("wall_clock_breakdown")
    memory_breakdown = _says("memory_breakdown")
    dump_state = _says("dump_state")
