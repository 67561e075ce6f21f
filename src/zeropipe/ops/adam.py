"""``from zeropipe.ops.adam import FusedAdam, DeepSpeedCPUAdam``."""

from zeropipe.runtime.optimizers.fused import DeepSpeedCPUAdam, FusedAdam

__all__ = ["DeepSpeedCPUAdam", "FusedAdam"]
