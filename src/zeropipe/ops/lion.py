"""``from zeropipe.ops.lion import FusedLion, DeepSpeedCPULion``."""

from zeropipe.runtime.optimizers.fused import DeepSpeedCPULion, FusedLion

__all__ = ["DeepSpeedCPULion", "FusedLion"]
