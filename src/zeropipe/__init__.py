"""zeropipe: ZeRO, pipeline parallelism and compressed communication for PyTorch.

Names are looked up when they are first used, so that ``import zeropipe`` stays cheap and without side effects.
"""

from typing import TYPE_CHECKING

from zeropipe.names import lazy

__version__ = "0.1.0"

if TYPE_CHECKING:
    from zeropipe.comm.group import init_distributed
    from zeropipe.entry import add_config_arguments, initialize
    from zeropipe.runtime.base_optimizer import DeepSpeedOptimizer
    from zeropipe.runtime.engine import DeepSpeedEngine
    from zeropipe.runtime.resilience.loop import run

__all__ = [
    "DeepSpeedEngine",
    "DeepSpeedOptimizer",
    "__version__",
    "add_config_arguments",
    "init_distributed",
    "initialize",
    "run",
]

__getattr__, __dir__ = lazy(__name__)
