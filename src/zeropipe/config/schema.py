"""The whole configuration as one frozen object, with the JSON's own names: a section for each owner.

The section ``zero_optimization``, and those by which a run is watched, have files of their own.
``@with_keys_without_effect`` adds the keys that do nothing here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, PrivateAttr

from zeropipe.config.fields import Count, Dtype, Lowercase, Real, Section, key, with_keys_without_effect
from zeropipe.config.schema_data import Curriculum, DataEfficiency, ProgressiveLayerDrop
from zeropipe.config.schema_watch import (
    CommsLogger,
    CsvMonitor,
    FlopsProfiler,
    Report,
    TensorBoard,
    Timers,
    Wandb,
    Watchdog,
)
from zeropipe.config.schema_zero import ZeroOptimization

Precision = Literal["fp32", "fp16", "bf16"]


# How numbers are kept.


@with_keys_without_effect("fp16")
class Fp16(Section):
    """Train in fp16 with fp32 masters and a loss scale."""

    enabled: bool = key(False, "Turn fp16 training on.")
    auto_cast: bool = key(False, "Cast floating point inputs of the model to fp16.")
    loss_scale: Real = key(0.0, "Static loss scale; 0 means dynamic.", ge=0, allow_inf_nan=False)
    initial_scale_power: Count = key(16, "The dynamic scale starts at 2 to this power.", ge=0, le=126)
    loss_scale_window: Count = key(
        1000, "Steps without overflow after which the dynamic scale doubles.", gt=0
    )
    hysteresis: Count = key(2, "Overflows that are tolerated before the dynamic scale is halved.", ge=1)
    consecutive_hysteresis: bool = key(
        False, "Refill the hysteresis at every step without overflow, not only when the scale grows."
    )
    min_loss_scale: Real = key(1.0, "The dynamic scale never goes below this.", gt=0, allow_inf_nan=False)
    on_min_scale: Annotated[Literal["raise", "skip", "warn"], Lowercase] = key(
        "raise",
        "At the minimum scale and still overflowing: raise an error, skip the step silently, or skip and warn.",
    )


@with_keys_without_effect("bf16")
class Bf16(Section):
    """Train in bf16 with fp32 masters; no loss scale is needed."""

    enabled: bool = key(False, "Turn bf16 training on.")
    check_grad_overflow: bool = key(True, "Skip a step whose gradients hold inf or NaN.")
    bf16_master_weights_and_grads: bool = key(
        False,
        "Parameters are their own masters: no fp32 copy; stochastic rounding lets small updates arrive.",
    )
    bf16_optimizer_states: bool = key(
        False, "Keep moments in bf16, rounded stochastically: half their bytes."
    )


@with_keys_without_effect("torch_autocast")
class TorchAutocast(Section):
    """Run the forward pass under ``torch.autocast``; parameters keep their dtype."""

    enabled: bool = key(False, "Turn torch.autocast on.")
    dtype: Dtype | None = key(None, "The dtype of autocast; unset: torch's default for the device.")


@with_keys_without_effect("data_types")
class DataTypes(Section):
    """Dtypes of gradient sums, parameters and buffers."""

    grad_accum_dtype: Dtype | None = key(
        None, "The dtype in which gradients accumulate; unset: the dtype of the parameters."
    )
    param_dtype: Dtype | None = key(
        None,
        "Cast every floating-point parameter to this dtype, the run's precision; unset: those that the model keeps in"
        " fp32 on purpose stay (see [precision](precision.md#what-keeps-its-dtype)).",
    )
    buffer_dtype: Dtype | None = key(
        None,
        "Cast every floating-point buffer to this dtype; unset: buffers keep the dtype the model gives them.",
    )


# How a run trains and saves.


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


# Of those that a process may hear; true stands for what schedulers send.
Signals = Annotated[
    tuple[Literal["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP", "SIGXCPU"], ...],
    BeforeValidator(
        lambda value: (("SIGTERM", "SIGUSR1") if value else ()) if isinstance(value, bool) else value
    ),
]


class Memory(Section):
    """Copies of the last good steps in memory that outlasts the processes."""

    every: Count = key(0, "Optimizer steps between two copies; 0: none are kept.", ge=0)
    copies: Count = key(
        1, "Other hosts that keep one too, where there are so many: with 1 any one host may be lost.", ge=0
    )
    folder: str | None = key(None, "Where copies lie on each host; unset: /dev/shm.")


@with_keys_without_effect("checkpoint")
class Checkpoint(Section):
    """How checkpoints are written and read."""

    load_universal: bool = key(False, "Read a universal checkpoint; zeropipe recognises one by itself.")
    parallel_write: ParallelWrite = key(ParallelWrite(), "Which ranks write.")
    memory: Memory = key(Memory(), "Copies of the last good steps in memory.")
    async_save: bool = key(False, "save_checkpoint copies the state and returns; files are written behind.")
    tolerate_failed_saves: Count = key(0, "Failed saves in a row that are warnings, no errors.", ge=0)
    folder: str | None = key(
        None, "Where the engine saves by itself; unset: where the program has saved or loaded last."
    )
    on_signal: Signals = key(
        (), "Signals after which all ranks save and end at the next boundary; true: SIGTERM and SIGUSR1."
    )
    save_before: Real | str | None = key(
        None,
        "Save and end before the time is up: minutes since torchrun was started, or the environment variable that "
        "holds the end as Unix time, such as SLURM_JOB_END_TIME.",
    )
    exit_code: Count | None = key(
        None,
        "Exit code of a run that was stopped so; unset: 128 and the signal's number, 143 at the end of its time.",
        ge=0,
        le=255,
    )
    tag_validation: Annotated[Literal["ignore", "warn", "fail"], Lowercase] = key(
        "warn", "When ranks save under different tags: take rank 0's, take it with a warning, or raise."
    )


class Reproducible(Section):
    """The same bits at any number of ranks (see [reproducible](reproducible.md))."""

    slots: Count | None = key(
        None,
        "Micro-batches of a step, whatever the number of ranks; unset: results follow that number.",
        ge=1,
    )
    seed: Count = key(
        0, "With slots: random numbers inside forward follow this, the step and the slot.", ge=0
    )


@with_keys_without_effect("aio")
class Aio(Section):
    """Tuning of file input and output for nvme offload."""


# The whole.


class NoticeKind(Enum):
    """Why a notice exists; the value is the ``logging`` level at which the engine shows it."""

    FOREIGN = logging.WARNING  # could be the misspelling that we did not recognise, so it is shown
    NO_EFFECT = logging.INFO  # on purpose below the default level: nothing is wrong
    RENAMED = logging.DEBUG  # the old name does what it always did


@dataclass(frozen=True, slots=True)
class Notice:
    """One line for the user, about ``keys``."""

    kind: NoticeKind
    keys: tuple[str, ...]
    text: str

    @property
    def level(self) -> int:
        return self.kind.value


@with_keys_without_effect("")
class Config(Section):
    """A parsed configuration: every key has a value, and knows whether the user gave it.

    Made by ``zeropipe.config.parse.parse_config``. ``raw`` is the very dict that was given.
    """

    # Foreign keys are reported by the parser before this model sees the dict.
    model_config = ConfigDict(extra="ignore")

    train_batch_size: Count | None = key(
        None, "Samples per optimizer step over all ranks: micro batch x accumulation x ranks.", gt=0
    )
    train_micro_batch_size_per_gpu: Count | None = key(
        None, "Samples per rank in one forward and backward.", gt=0
    )
    gradient_accumulation_steps: Count | None = key(
        None, "Micro-batches per optimizer step; unset: from the other two, or 1.", gt=0
    )
    optimizer: Optimizer = key(Optimizer(), "An optimizer by name.")
    scheduler: Scheduler = key(Scheduler(), "A learning rate schedule by name.")

    fp16: Fp16 = key(Fp16(), "fp16 training with a loss scale.")
    bf16: Bf16 = key(Bf16(), "bf16 training.")
    torch_autocast: TorchAutocast = key(TorchAutocast(), "torch.autocast around the forward pass.")
    data_types: DataTypes = key(DataTypes(), "Other dtypes.")
    communication_data_type: Dtype | None = key(
        None, "The dtype in which gradients are reduced; unset: the dtype of the parameters."
    )

    gradient_clipping: Real = key(
        1.0, "Clip the global gradient norm to this; 0 turns clipping off.", ge=0, allow_inf_nan=False
    )

    managed_gradient_accumulation: bool = key(
        True, "Count micro-steps and step at every so many; false: every call of step is an optimizer step."
    )
    zero_optimization: ZeroOptimization = key(ZeroOptimization(), "What is sharded.")
    zero_allow_untested_optimizer: bool = key(
        False, "Accept an optimizer that is not known to work on shards."
    )
    zero_force_ds_cpu_optimizer: bool = key(
        True, "With offload_optimizer, clients exchange the optimizer for DeepSpeedCPUAdam."
    )
    pipeline: Pipeline = key(Pipeline(), "Defaults of the pipeline engine.")
    activation_checkpointing: ActivationCheckpointing = key(
        ActivationCheckpointing(), "Defaults of zeropipe.checkpointing."
    )
    checkpoint: Checkpoint = key(Checkpoint(), "How checkpoints are written and read.")
    reproducible: Reproducible = key(Reproducible(), "The same bits at any number of ranks.")
    aio: Aio = key(Aio(), "Tuning of files for nvme offload.")
    dataloader_drop_last: bool = key(False, "Drop a last micro-batch that is not full.")

    curriculum_learning: Curriculum = key(Curriculum(), "A curriculum by the length of sequences.")
    data_efficiency: DataEfficiency = key(DataEfficiency(), "Sampling of the training data.")
    progressive_layer_drop: ProgressiveLayerDrop = key(
        ProgressiveLayerDrop(), "How many layers run, told to the model's forward."
    )

    steps_per_print: Real | None = key(
        None, "Log a line every so many steps; unset or Infinity: never.", gt=0
    )
    wall_clock_breakdown: bool = key(False, "Log the time of forward, backward and step.")
    memory_breakdown: bool = key(False, "Log memory around forward, backward and step.")
    dump_state: bool = key(False, "Log the state of the engine after it is built.")
    tensorboard: TensorBoard = key(TensorBoard(), "Scalars for TensorBoard.")
    wandb: Wandb = key(Wandb(), "Scalars for Weights & Biases.")
    report: Report = key(Report(), "A record of the run, for `zeropipe report`.")
    csv_monitor: CsvMonitor = key(CsvMonitor(), "Scalars in CSV files.")
    timers: Timers = key(Timers(), "Timers of the engine.")
    flops_profiler: FlopsProfiler = key(FlopsProfiler(), "A profile of one forward.")
    watchdog: Watchdog = key(Watchdog(), "Whoever is stuck is named.")
    comms_logger: CommsLogger = key(CommsLogger(), "A log of collectives.")

    sequence_parallel_size: Count = key(1, "Ranks that share one sequence (Ulysses).", gt=0)
    data_parallel_size: Count | None = key(
        None, "Checked: ranks / sequence_parallel_size, the number of different micro-batches.", gt=0
    )
    tensor_parallel: dict[str, Any] = key({}, "Tensor parallelism; only autotp_size 0 or 1 is accepted.")

    # What the JSON itself does not say; no two configurations differ by these.
    # Private to pydantic, so that the model's keys are exactly the JSON's.
    _raw: dict[str, Any] = PrivateAttr(default_factory=dict)
    _auto: frozenset[str] = PrivateAttr(default=frozenset())
    _notices: tuple[Notice, ...] = PrivateAttr(default=())

    def parsed_from(
        self,
        raw: dict[str, Any],
        auto: frozenset[str],
        foreign: dict[str, str],
        idle: dict[str, str],
        renamed: dict[str, str],
    ) -> Config:
        """This configuration, which now knows what it was made from; for the parser.

        ``foreign``: unknown key -> what was probably meant, or "". ``idle``: key -> what happens instead.
        ``renamed``: old -> new name.
        """
        self._raw, self._auto = raw, auto
        self._notices = tuple(_notices(foreign, idle, renamed))
        return self

    @property
    def raw(self) -> dict[str, Any]:
        """The dict that was given (the same object), or what the file held."""
        return self._raw

    @property
    def notices(self) -> tuple[Notice, ...]:
        """What the user should hear, for rank 0 to log once."""
        return self._notices

    @property
    def auto(self) -> frozenset[str]:
        """Dotted paths of the keys that were "auto"."""
        return self._auto

    def is_auto(self, path: str) -> bool:
        """Whether the key at this dotted path was "auto", that is, left to the software in between."""
        return path in self._auto

    @property
    def precision(self) -> Precision:
        """The dtype of the parameters that the model computes with."""
        if self.bf16.enabled:
            return "bf16"
        return "fp16" if self.fp16.enabled else "fp32"

    def settings(self, *, changed: bool = False) -> dict[str, Any]:
        """Every key by dotted path with its value; with ``changed``, those that differ from the default."""
        return dict(_flatten(self.model_dump(exclude_defaults=changed), ""))


def _flatten(value: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, inner in value.items():
        path = f"{prefix}{name}"
        if isinstance(inner, dict) and inner:
            yield from _flatten(inner, f"{path}.")
        else:
            yield path, inner


def _notices(foreign: dict[str, str], idle: dict[str, str], renamed: dict[str, str]) -> Iterator[Notice]:
    if foreign:
        listed = ", ".join(name + (f" (meant: {meant}?)" if meant else "") for name, meant in foreign.items())
        text = f"passed over {len(foreign)} key(s) that zeropipe does not know: {listed}"
        dotted = next((name for name in foreign if "." in name), None)
        if dotted:
            nested = dotted.replace(".", " -> ")
            text += f" (a dotted name is not read as a path: write {nested} as nested objects)"
        yield Notice(NoticeKind.FOREIGN, tuple(foreign), f"configuration: {text}")
    if idle:
        listed = "; ".join(f"{name} ({why})" for name, why in idle.items())
        text = f"configuration: these keys have no effect here: {listed}"
        yield Notice(NoticeKind.NO_EFFECT, tuple(idle), text)
    if renamed:
        listed = ", ".join(f"{old} -> {new}" for old, new in renamed.items())
        text = f"configuration: old names read as new ones: {listed}"
        yield Notice(NoticeKind.RENAMED, tuple(renamed), text)
