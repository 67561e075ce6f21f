"""``from zeropipe.ops.lamb import FusedLamb``."""

from zeropipe.runtime.optimizers.fused import FusedLamb

__all__ = ["FusedLamb"]
