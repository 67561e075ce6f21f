"""``MiCS_Init``: zero.Init for shards inside groups of ranks (see replication.py)."""

from __future__ import annotations

from typing import Any

import torch

from zeropipe.config.parse import parse_config
from zeropipe.errors import ConfigError
from zeropipe.runtime.zero.gather.init import Init
from zeropipe.runtime.zero.replication import shard_size


class MiCS_Init(Init):
    """As ``zero.Init`` with a config whose ``mics_shard_size`` is set, which it insists on.

    Raises ConfigError where the config does not say how many ranks share one copy of the shards.
    """

    def __init__(
        self,
        module: torch.nn.Module | None = None,
        data_parallel_group: Any = None,
        sequence_data_parallel_group: Any = None,
        mem_efficient_linear: bool = True,
        remote_device: str | None = None,
        pin_memory: bool = False,
        config_dict_or_path: Any = None,
        config: Any = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        mpu: Any = None,
    ) -> None:
        source = config_dict_or_path if config_dict_or_path is not None else config
        if enabled and (source is None or shard_size(parse_config(source).zero_optimization) is None):
            raise ConfigError(
                "MiCS_Init: config key 'zero_optimization.mics_shard_size'",
                expected="a number of ranks",
                found="no config" if source is None else "none in the config",
                fix="pass config_dict_or_path= the engine's config with mics_shard_size, or use zero.Init",
            )
        super().__init__(
            module,
            data_parallel_group=data_parallel_group,
            sequence_data_parallel_group=sequence_data_parallel_group,
            mem_efficient_linear=mem_efficient_linear,
            remote_device=remote_device,
            pin_memory=pin_memory,
            config_dict_or_path=source,
            enabled=enabled,
            dtype=dtype,
            mpu=mpu,
        )
