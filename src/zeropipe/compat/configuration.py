"""A configuration with the attributes that DeepSpeed's parsed one has, and the words of its config modules.

Behind ``deepspeed.DeepSpeedConfig``, ``runtime.config``, ``runtime.constants``, ``runtime.zero.config`` and
``runtime.zero.offload_config``.
"""

from __future__ import annotations

from enum import Enum, StrEnum
from typing import Any, Final

import torch

from zeropipe.comm.group import world as all_ranks
from zeropipe.config.batch import solve_batch
from zeropipe.config.parse import Source, parse_config
from zeropipe.config.schema import Config
from zeropipe.config.schema_zero import ZeroOptimization
from zeropipe.errors import ConfigError
from zeropipe.given import Mesh, Mpu

DeepSpeedConfigError = ConfigError
DeepSpeedZeroConfig = ZeroOptimization

ZERO_OPTIMIZATION: Final = "zero_optimization"
PIPE_REPLICATED: Final = "ds_pipe_replicated"
ROUTE_TRAIN, ROUTE_EVAL, ROUTE_PREDICT, ROUTE_ENCODE = "train", "eval", "predict", "encode"
PLD_THETA, PLD_GAMMA = "theta", "gamma"

ADAGRAD_OPTIMIZER, ADAM_OPTIMIZER, ADAMW_OPTIMIZER, LAMB_OPTIMIZER = "adagrad", "adam", "adamw", "lamb"
LION_OPTIMIZER, MUON_OPTIMIZER = "lion", "muon"
ONEBIT_ADAM_OPTIMIZER, ONEBIT_LAMB_OPTIMIZER, ZERO_ONE_ADAM_OPTIMIZER = (
    "onebitadam",
    "onebitlamb",
    "zerooneadam",
)
DEEPSPEED_OPTIMIZERS: Final = [
    *(ADAGRAD_OPTIMIZER, ADAM_OPTIMIZER, ADAMW_OPTIMIZER, LAMB_OPTIMIZER, LION_OPTIMIZER, MUON_OPTIMIZER),
    *(ONEBIT_ADAM_OPTIMIZER, ONEBIT_LAMB_OPTIMIZER, ZERO_ONE_ADAM_OPTIMIZER),
]


class OffloadDeviceEnum(StrEnum):
    """Where offloaded state lives."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class DtypeEnum(Enum):
    """A dtype by any of its names: ``DtypeEnum("bf16") is DtypeEnum.bf16``."""

    fp16 = torch.float16
    fp32 = torch.float32
    bf16 = torch.bfloat16
    int8 = torch.int8

    @classmethod
    def _missing_(cls, value: object) -> DtypeEnum | None:
        known = {
            **dict.fromkeys(("torch.float16", "float16", "fp16", "half"), cls.fp16),
            **dict.fromkeys(("torch.float32", "float32", "fp32", "float"), cls.fp32),
            **dict.fromkeys(("torch.bfloat16", "bfloat16", "bf16"), cls.bf16),
            **dict.fromkeys(("torch.int8", "int8"), cls.int8),
        }
        return known.get(value) if isinstance(value, str) else None


class DeepSpeedConfig(dict[str, Any]):
    """The configuration as it was given, a dict that ``initialize`` takes, with what it means as attributes.

    An attribute that is no name of this class is the section or key of that name, with its default. Raises
    ConfigError for a configuration that cannot be used.
    """

    def __init__(self, config: Source | Config, mpu: Mpu = None, mesh_device: Mesh = None) -> None:
        self._parsed = parse_config(config)
        super().__init__(self._parsed.raw)
        if mpu is not None:
            world = int(mpu.get_data_parallel_world_size())
        else:
            world = all_ranks().size // self._parsed.sequence_parallel_size
        given = self._parsed
        sizes = (
            given.train_batch_size,
            given.train_micro_batch_size_per_gpu,
            given.gradient_accumulation_steps,
        )
        if any(size is not None for size in sizes):
            batch = solve_batch(*sizes, world)
            self.train_batch_size, self.train_micro_batch_size_per_gpu = (
                batch.train_batch_size,
                batch.micro_batch_size,
            )
            self.gradient_accumulation_steps = batch.gradient_accumulation_steps
        self.world_size = world

    @property
    def _param_dict(self) -> dict[str, Any]:
        return self._parsed.raw

    @property
    def zero_config(self) -> ZeroOptimization:
        return self._parsed.zero_optimization

    @property
    def monitor_config(self) -> Config:
        """What ``MonitorMaster`` takes."""
        return self._parsed

    @property
    def zero_optimization_stage(self) -> int:
        return self.zero_config.stage

    @property
    def zero_enabled(self) -> bool:
        return self.zero_config.stage > 0

    @property
    def fp16_enabled(self) -> bool:
        return self._parsed.precision == "fp16"

    @property
    def bfloat16_enabled(self) -> bool:
        return self._parsed.precision == "bf16"

    @property
    def loss_scale(self) -> float:
        """0 where it is dynamic."""
        return self._parsed.fp16.loss_scale

    @property
    def optimizer_name(self) -> str | None:
        """In lower case where it is one of ``DEEPSPEED_OPTIMIZERS``, else as it was given."""
        section = self._parsed.optimizer
        if section is None or section.type is None:
            return None
        return section.type.lower() if section.type.lower() in DEEPSPEED_OPTIMIZERS else section.type

    @property
    def optimizer_params(self) -> dict[str, Any] | None:
        return None if self._parsed.optimizer is None else dict(self._parsed.optimizer.params)

    @property
    def scheduler_name(self) -> str | None:
        return None if self._parsed.scheduler is None else self._parsed.scheduler.type

    @property
    def scheduler_params(self) -> dict[str, Any] | None:
        return None if self._parsed.scheduler is None else dict(self._parsed.scheduler.params)

    def __getattr__(self, name: str) -> Any:
        if name == "_parsed":  # not there yet: a copy or an unpickling under way
            raise AttributeError(name)
        return getattr(self._parsed, name)

    def print(self, name: str) -> None:
        """Log the configuration under the title ``name``."""
        from zeropipe.compat.tools import print_configuration

        print_configuration(self, name)
