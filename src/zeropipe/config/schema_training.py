"""The sections about one training run: optimizer, schedule, pipeline, activation checkpointing, files."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from zeropipe.config.fields import Count, Lowercase, Section, key
from zeropipe.config.without_effect import with_keys_without_effect


@with_keys_without_effect("optimizer")
class Optimizer(Section):
    """An optimizer made from its name."""

    type: str | None = key(
        None, "Adam, AdamW, FusedAdam, CPUAdam, SGD, Adagrad, Lion, Lamb, Muon, OnebitAdam, ..."
    )
    params: dict[str, Any] = key({}, "Keyword arguments of the optimizer, such as lr.")


class Scheduler(Section):
    """A learning rate schedule made from its name; ignored in an engine without an optimizer."""

    type: str | None = key(
        None, "LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR, or one of torch's."
    )
    params: dict[str, Any] = key({}, "Keyword arguments of the schedule.")


@with_keys_without_effect("activation_checkpointing")
class ActivationCheckpointing(Section):
    """Defaults for ``zeropipe.checkpointing``."""

    cpu_checkpointing: bool = key(False, "Keep saved activations in CPU memory.")


@with_keys_without_effect("pipeline")
class Pipeline(Section):
    """Defaults for ``PipelineModule`` and its engine."""

    schedule: Annotated[str, Lowercase] = key("1f1b", "The schedule by name.")
    num_chunks: Count = key(1, "Pieces of the model per stage (interleaved schedules).", ge=1)
    stages: Count | None = key(None, 'Number of stages; unset or "auto": as the module says.', ge=1)
    partition: str = key("best", "How layers are dealt out to stages; best: as the module says.")
    seed_layers: bool = key(False, "Seed the random numbers of each layer by its index.")
    activation_checkpoint_interval: Count = key(
        0, "Layers per activation checkpoint; 0: as the module says.", ge=0
    )


@with_keys_without_effect("checkpoint.parallel_write")
class ParallelWrite(Section):
    """Which ranks write which layers of a pipeline's checkpoint."""


@with_keys_without_effect("checkpoint")
class Checkpoint(Section):
    """How checkpoints are written and read."""

    load_universal: bool = key(False, "Read a universal checkpoint; zeropipe recognises one by itself.")
    parallel_write: ParallelWrite = key(ParallelWrite(), "Which ranks write.")
    async_save: bool = key(False, "save_checkpoint copies the state and returns; files are written behind.")
    tag_validation: Annotated[Literal["ignore", "warn", "fail"], Lowercase] = key(
        "warn", "When ranks save under different tags: take rank 0's, take it with a warning, or raise."
    )


@with_keys_without_effect("aio")
class Aio(Section):
    """Tuning of file input and output for nvme offload."""
