"""The sections about one training run: optimizer, schedule, pipeline, activation checkpointing, files."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from zeropipe.config.fields import Count, Lowercase, NoEffect, Refused, Section, key, not_empty


class Optimizer(Section):
    """An optimizer made from its name."""

    type: str | None = key(
        None, "Adam, AdamW, FusedAdam, CPUAdam, SGD, Adagrad, Lion, Lamb, Muon, OnebitAdam, ..."
    )
    params: dict[str, Any] = key({}, "Keyword arguments of the optimizer, such as lr.")
    legacy_fusion: Annotated[bool, NoEffect("the step is torch's fused step")] = key(
        False, "An older fused step."
    )


class Scheduler(Section):
    """A learning rate schedule made from its name; ignored in an engine without an optimizer."""

    type: str | None = key(
        None, "LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR, or one of torch's."
    )
    params: dict[str, Any] = key({}, "Keyword arguments of the schedule.")


class ActivationCheckpointing(Section):
    """Defaults for ``zeropipe.checkpointing``."""

    partition_activations: Annotated[
        bool, NoEffect("there are no tensor-parallel ranks to share saved activations")
    ] = key(False, "Share saved activations between model-parallel ranks.")
    cpu_checkpointing: bool = key(False, "Keep saved activations in CPU memory.")
    contiguous_memory_optimization: Annotated[bool, NoEffect("torch's allocator keeps them")] = key(
        False, "Copy saved activations into one buffer."
    )
    # Any: configurations in use have false here.
    number_checkpoints: Annotated[Any, NoEffect("no buffer is allocated ahead", in_use=not_empty)] = key(
        None, "Checkpointed layers, for the one buffer."
    )
    synchronize_checkpoint_boundary: Annotated[bool, NoEffect("streams order the work")] = key(
        False, "Synchronize the device at each checkpointed layer."
    )
    profile: Annotated[bool, NoEffect("use torch.profiler")] = key(False, "Time each checkpointed layer.")


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
    pipe_partitioned: Annotated[bool, NoEffect("activations are sent whole")] = key(
        True, "Split activations between model-parallel ranks before sending."
    )
    grad_partitioned: Annotated[bool, NoEffect("gradients of activations are sent whole")] = key(
        True, "Split gradients of activations between model-parallel ranks before sending."
    )


class ParallelWrite(Section):
    """Which ranks write which layers of a pipeline's checkpoint."""

    pipeline_stage: Annotated[bool, NoEffect("replicas always write different parts")] = key(
        False, "Replicas of one stage write different layers."
    )


class Checkpoint(Section):
    """How checkpoints are written and read."""

    tag_validation: Annotated[
        Literal["ignore", "warn", "fail"],
        Lowercase,
        NoEffect("ranks that give different tags always get an error"),
    ] = key("warn", "What to do when ranks give different tags.")
    load_universal: bool = key(False, "Read a universal checkpoint; zeropipe recognises one by itself.")
    use_node_local_storage: Annotated[
        bool,
        Refused(
            "a checkpoint is complete when the files of all ranks are in one folder",
            "save to a folder that all nodes share and remove the key",
        ),
    ] = key(False, "Every node writes to its own disk.")
    parallel_write: ParallelWrite = key(ParallelWrite(), "Which ranks write.")
    async_save: bool = key(False, "save_checkpoint copies the state and returns; files are written behind.")
    checkpoint_serialization: Annotated[bool, NoEffect("files are always torch's zip format")] = key(
        True, "Write torch's zip format."
    )
    writer: Annotated[dict[str, Any] | None, NoEffect("files are written by one bounded writer")] = key(
        None, "A faster writer."
    )


_AIO = NoEffect("files are read and written through the operating system's cache")


class Aio(Section):
    """Tuning of file input and output for nvme offload."""

    block_size: Annotated[Count, _AIO] = key(1_048_576, "Bytes of one request.", gt=0)
    queue_depth: Annotated[Count, _AIO] = key(8, "Requests in flight.", gt=0)
    intra_op_parallelism: Annotated[Count, _AIO] = key(1, "Threads per request.", gt=0)
    thread_count: Annotated[Count, _AIO] = key(1, "Threads per request (older name).", gt=0)
    single_submit: Annotated[bool, _AIO] = key(False, "Submit requests one by one.")
    overlap_events: Annotated[bool, _AIO] = key(True, "Submit while others complete.")
    use_gds: Annotated[bool, _AIO] = key(False, "Read from the disk into GPU memory.")
