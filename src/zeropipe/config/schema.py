"""The whole configuration as one frozen object, with the JSON's own names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import ConfigDict, PrivateAttr

from zeropipe.config import schema_training as training
from zeropipe.config.fields import (
    Count,
    Dtype,
    Real,
    Section,
    key,
)
from zeropipe.config.notices import Notice
from zeropipe.config.schema_monitor import CommsLogger, CsvMonitor, TensorBoard, Timers, Wandb
from zeropipe.config.schema_precision import Bf16, DataTypes, Fp16, TorchAutocast
from zeropipe.config.schema_zero import ZeroOptimization
from zeropipe.config.without_effect import with_keys_without_effect

Precision = Literal["fp32", "fp16", "bf16"]
Anything = dict[str, Any]


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
    optimizer: training.Optimizer = key(training.Optimizer(), "An optimizer by name.")
    scheduler: training.Scheduler = key(training.Scheduler(), "A learning rate schedule by name.")

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

    zero_optimization: ZeroOptimization = key(ZeroOptimization(), "What is sharded.")
    zero_allow_untested_optimizer: bool = key(
        False, "Accept an optimizer that is not known to work on shards."
    )
    zero_force_ds_cpu_optimizer: bool = key(
        True, "With offload_optimizer, clients exchange the optimizer for DeepSpeedCPUAdam."
    )
    pipeline: training.Pipeline = key(training.Pipeline(), "Defaults of the pipeline engine.")
    activation_checkpointing: training.ActivationCheckpointing = key(
        training.ActivationCheckpointing(), "Defaults of zeropipe.checkpointing."
    )
    checkpoint: training.Checkpoint = key(training.Checkpoint(), "How checkpoints are written and read.")
    aio: training.Aio = key(training.Aio(), "Tuning of files for nvme offload.")
    dataloader_drop_last: bool = key(False, "Drop a last micro-batch that is not full.")

    steps_per_print: Real | None = key(
        None, "Log a line every so many steps; unset or Infinity: never.", gt=0
    )
    wall_clock_breakdown: bool = key(False, "Log the time of forward, backward and step.")
    memory_breakdown: bool = key(False, "Log memory around forward, backward and step.")
    dump_state: bool = key(False, "Log the state of the engine after it is built.")
    tensorboard: TensorBoard = key(TensorBoard(), "Scalars for TensorBoard.")
    wandb: Wandb = key(Wandb(), "Scalars for Weights & Biases.")
    csv_monitor: CsvMonitor = key(CsvMonitor(), "Scalars in CSV files.")
    timers: Timers = key(Timers(), "Timers of the engine.")
    comms_logger: CommsLogger = key(CommsLogger(), "A log of collectives.")

    tensor_parallel: Anything = key({}, "Tensor parallelism; only autotp_size 0 or 1 is accepted.")

    _raw: dict[str, Any] = PrivateAttr(default_factory=dict)
    _auto: frozenset[str] = PrivateAttr(default=frozenset())
    _notices: tuple[Notice, ...] = PrivateAttr(default=())

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
