"""``from zeropipe.ops.adagrad import DeepSpeedCPUAdagrad``."""

from zeropipe.runtime.optimizers.fused import DeepSpeedCPUAdagrad

__all__ = ["DeepSpeedCPUAdagrad"]
