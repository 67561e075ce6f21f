"""zeropipe: ZeRO, pipeline parallelism and compressed communication for PyTorch.

Names are looked up when they are first used, so that ``import zeropipe`` stays cheap and without side effects.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from zeropipe.comm.startup import init_distributed
    from zeropipe.entry import add_config_arguments, initialize
    from zeropipe.runtime.engine import DeepSpeedEngine

_NAMES = {
    "initialize": "zeropipe.entry",
    "add_config_arguments": "zeropipe.entry",
    "init_distributed": "zeropipe.comm.startup",
    "DeepSpeedEngine": "zeropipe.runtime.engine",
}
_MODULES = {
    "comm": "zeropipe.comm",
    "zero": "zeropipe.runtime.zero",
    "pipe": "zeropipe.runtime.pipe",
    "checkpointing": "zeropipe.checkpointing",
    "utils": "zeropipe.utils",
}

__all__ = ["DeepSpeedEngine", "__version__", "add_config_arguments", "init_distributed", "initialize"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(_MODULES[name])
    if name in _NAMES:
        return getattr(import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'zeropipe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES, *_MODULES})
