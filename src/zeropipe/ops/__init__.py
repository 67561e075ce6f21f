"""Optimizer classes under the paths that DeepSpeed users import; they are defined in ``runtime/optimizers``."""

from zeropipe.names import lazy

__getattr__, __dir__ = lazy(__name__)
