"""The name ``deepspeed``, answered by zeropipe: for scripts and libraries that were written for DeepSpeed."""

from zeropipe.compat.finder import install_as_deepspeed
from zeropipe.compat.table import VERSION

__all__ = ["VERSION", "install_as_deepspeed"]
