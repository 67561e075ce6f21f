"""``deepspeed.monitor``: scalars of scripts that write their own, by the sections of the configuration."""

from __future__ import annotations

from collections.abc import Mapping

from zeropipe.comm.group import world
from zeropipe.config.parse import Source, parse_config
from zeropipe.config.schema import Config
from zeropipe.runtime import monitor


class MonitorMaster(monitor.MonitorMaster):
    """All writers that the configuration enables, on rank 0. ``monitor_config``: a ``DeepSpeedConfig`` or its
    ``monitor_config``, or a dict with the sections ``csv_monitor``, ``tensorboard``, ``wandb``."""

    def __init__(self, monitor_config: Source | Config) -> None:
        given = dict(monitor_config) if isinstance(monitor_config, Mapping) else monitor_config
        super().__init__(parse_config(given), enabled=world().rank == 0)
