"""Checkpoints of any size that load at any other: writing, reading, checking and reshaping them.

Names are loaded when they are first asked for.
"""

from zeropipe.checkpoint import constants as _constants
from zeropipe.checkpoint.constants import *  # noqa: F403
from zeropipe.names import homes, lazy

__all__ = [*homes(__name__), *(name for name in vars(_constants) if name.isupper())]

__getattr__, __dir__ = lazy(__name__)
