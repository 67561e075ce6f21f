"""``MiCS_Init``: zero.Init for shards inside groups of ranks (see replication.py)."""

from __future__ import annotations

from typing import Any

import torch

from zeropipe.config.schema_zero import ZeroOptimization
from zeropipe.errors import ConfigError
from zeropipe.given import ProcessGroup
from zeropipe.runtime.zero.gather.init import Init
from zeropipe.runtime.zero.replication import shard_size


class MiCS_Init(Init):
    """As ``zero.Init`` with a config whose ``mics_shard_size`` is set, which it insists on.

    Its arguments are those of ``zero.Init``, but that ``sequence_data_parallel_group`` is the third. Raises ConfigError
    where the config does not say how many ranks share one copy of the shards.
    """

    def __init__(
        self,
        module: torch.nn.Module | None = None,
        data_parallel_group: ProcessGroup = None,
        sequence_data_parallel_group: ProcessGroup = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        # By name: in zero.Init's own order it stands near the end, and ``args`` go on with what is third there.
        kwargs["sequence_data_parallel_group"] = sequence_data_parallel_group
        super().__init__(module, data_parallel_group, *args, **kwargs)

    def _check(self, zero: ZeroOptimization | None) -> None:
        if zero is None or shard_size(zero) is None:
            raise ConfigError(
                "MiCS_Init: config key 'zero_optimization.mics_shard_size'",
                expected="a number of ranks",
                found="no config" if zero is None else "none in the config",
                fix="pass config_dict_or_path= the engine's config with mics_shard_size, or use zero.Init",
            )
