"""Optimizers by config name, and those that get whole-tensor updates right on shards."""

from zeropipe.runtime.optimizers.fused import (
    DeepSpeedCPUAdagrad,
    DeepSpeedCPUAdam,
    DeepSpeedCPULion,
    FusedAdam,
    FusedLamb,
    FusedLion,
    Lion,
)
from zeropipe.runtime.optimizers.lamb import Lamb
from zeropipe.runtime.optimizers.muon import Muon
from zeropipe.runtime.optimizers.registry import build_optimizer, classify, require_shardable
from zeropipe.runtime.optimizers.shard_view import ShardAware, ShardView

__all__ = [
    "DeepSpeedCPUAdagrad",
    "DeepSpeedCPUAdam",
    "DeepSpeedCPULion",
    "FusedAdam",
    "FusedLamb",
    "FusedLion",
    "Lamb",
    "Lion",
    "Muon",
    "ShardAware",
    "ShardView",
    "build_optimizer",
    "classify",
    "require_shardable",
]
