"""The whole configuration as one frozen object, with the JSON's own names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, PrivateAttr

from zeropipe.config import schema_training as training
from zeropipe.config.fields import (
    Count,
    Dtype,
    Lowercase,
    NoEffect,
    Real,
    Refused,
    Section,
    enabled_somewhere,
    key,
    not_empty,
)
from zeropipe.config.notices import Notice
from zeropipe.config.schema_monitor import CommsLogger, CsvMonitor, TensorBoard, Timers, Wandb
from zeropipe.config.schema_precision import Bf16, DataTypes, Fp16, TorchAutocast
from zeropipe.config.schema_zero import ZeroOptimization

Precision = Literal["fp32", "fp16", "bf16"]
Anything = dict[str, Any]


_AVERAGE = (
    "gradients are averaged in fp32 (gloo), or divided before they are summed (NCCL), so nothing overflows"
)


def _absent(why: str, fix: str = "remove the section") -> Refused:
    return Refused(why, fix, in_use=enabled_somewhere)


def _idle(why: str) -> NoEffect:
    return NoEffect(why, in_use=enabled_somewhere)


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
    prescale_gradients: Annotated[bool, NoEffect(_AVERAGE)] = key(
        False, "Divide gradients by the number of ranks before they are summed."
    )
    gradient_predivide_factor: Annotated[Real, NoEffect(_AVERAGE)] = key(
        1.0, "Without prescale_gradients: divide by this before the sum, and by the rest after it.",
        gt=0, allow_inf_nan=False,
    )  # fmt: skip
    gradient_allreduce_op: Annotated[
        Literal["mean", "sum"],
        Lowercase,
        Refused("gradients are averaged over ranks", "remove the key and multiply the loss by the ranks"),
    ] = key("mean", "How ranks' gradients are combined.")
    managed_gradient_accumulation: Annotated[
        bool, Refused("the engine counts micro-batches", "use set_gradient_accumulation_boundary")
    ] = key(True, "The engine decides where the boundary is.")

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

    # Known to users, without effect here.
    flops_profiler: Annotated[Anything, _idle("use torch.profiler")] = key({}, "Count operations.")
    comet: Annotated[Anything, _idle("use tensorboard, wandb or csv_monitor")] = key({}, "Scalars for Comet.")
    autotuning: Annotated[Anything, _idle("nothing is tuned")] = key({}, "Search for a fast configuration.")
    compile: Annotated[
        Anything, NoEffect("call engine.compile()", in_use=lambda value: bool(_get(value, "deepcompile")))
    ] = key({}, "Compiler passes.")
    graph_harvesting: Annotated[bool, NoEffect("use engine.compile()")] = key(False, "CUDA graphs.")
    hybrid_engine: Annotated[Anything, _idle("generation runs through the module")] = key(
        {}, "Another engine for generation."
    )
    nebula: Annotated[Anything, _idle("use checkpoint.async_save")] = key({}, "Another checkpoint writer.")
    datastates_ckpt: Annotated[Anything, NoEffect("use checkpoint.async_save", in_use=not_empty)] = key(
        {}, "Another checkpoint writer."
    )
    eigenvalue: Annotated[Anything, _idle("it only served quantization")] = key({}, "Eigenvalues of layers.")
    sparse_gradients: Annotated[bool, NoEffect("sparse gradients are reduced as dense ones")] = key(
        False, "Reduce gradients of embeddings as sparse tensors."
    )
    disable_allgather: Annotated[bool, NoEffect("updated parameters are always gathered")] = key(
        False, "Skip the gather after the step."
    )
    disable_python_gc: Annotated[bool, NoEffect("call gc.disable()")] = key(False, "Stop Python's collector.")
    log_level: Annotated[str | None, NoEffect("use logging.getLogger('zeropipe').setLevel")] = key(
        None, "Level of the log."
    )
    seq_parallel_communication_data_type: Annotated[
        str | None, NoEffect("there is no sequence parallelism")
    ] = key(None, "Dtype of sequence-parallel traffic.")
    use_data_before_expert_parallelism: Annotated[bool, NoEffect("there is no expert parallelism")] = key(
        False, "Order of the process grid."
    )
    vocabulary_size: Annotated[Count | None, NoEffect("it only serves DeepSpeed's FLOP count")] = key(
        None, "Size of the vocabulary."
    )

    # Known to users, and refused because a run without them would give other results.
    amp: Annotated[Anything, _absent("NVIDIA Apex is not used", "use bf16, fp16 or torch_autocast")] = key(
        {}, "Mixed precision by NVIDIA Apex."
    )
    msamp: Annotated[Anything, _absent("fp8 training by MS-AMP is not offered")] = key({}, "fp8 by MS-AMP.")
    tensor_parallel: Anything = key({}, "Tensor parallelism; only autotp_size 0 or 1 is accepted.")
    expert_parallel: Annotated[Anything, _absent("expert parallelism is not offered")] = key(
        {}, "Expert parallelism."
    )
    elasticity: Annotated[
        Anything, _absent("the batch sizes do not change with the ranks", "give the batch sizes themselves")
    ] = key({}, "Batch sizes that follow the number of ranks.")
    compression_training: Annotated[Anything, _absent("compression is not offered")] = key(
        {}, "Quantization and pruning while training."
    )
    quantize_training: Annotated[Anything, _absent("quantization is not offered")] = key(
        {}, "Quantization while training."
    )
    weight_quantization: Annotated[
        Anything, Refused("quantization is not offered", "remove the section", in_use=not_empty)
    ] = key({}, "Quantization of weights.")
    sparse_attention: Annotated[
        Anything, Refused("attention kernels are the model's own", "remove the section", in_use=not_empty)
    ] = key({}, "Sparse attention kernels.")
    progressive_layer_drop: Annotated[
        Anything, _absent("layers are not dropped", "drop layers in the model's forward")
    ] = key({}, "Drop layers at random.")
    curriculum_learning: Annotated[
        Anything, _absent("the data is not changed", "order the data in your own dataset")
    ] = key({}, "Sequence lengths that grow.")
    data_efficiency: Annotated[
        Anything, _absent("the data is not changed", "order the data in your own dataset")
    ] = key({}, "Sampling and routing of data.")

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


def _get(value: object, name: str) -> object:
    return value.get(name) if isinstance(value, dict) else None


def _flatten(value: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, inner in value.items():
        path = f"{prefix}{name}"
        if isinstance(inner, dict) and inner:
            yield from _flatten(inner, f"{path}.")
        else:
            yield path, inner
