"""zeropipe: ZeRO, pipeline parallelism and compressed communication for PyTorch.

Names are looked up when they are first used, so that ``import zeropipe`` stays cheap and without side effects.
"""

from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from zeropipe.comm.startup import init_distributed
    from zeropipe.entry import add_config_arguments, initialize
    from zeropipe.runtime.base_optimizer import DeepSpeedOptimizer
    from zeropipe.runtime.engine import DeepSpeedEngine

_NAMES = MappingProxyType(
    {
        "initialize": "zeropipe.entry",
        "add_config_arguments": "zeropipe.entry",
        "init_distributed": "zeropipe.comm.startup",
        "DeepSpeedEngine": "zeropipe.runtime.engine",
        "DeepSpeedOptimizer": "zeropipe.runtime.base_optimizer",
        "PipelineEngine": "zeropipe.runtime.pipe.engine",
        "PipelineModule": "zeropipe.runtime.pipe.module",
        "add_tuning_arguments": "zeropipe.runtime.lr_schedules",
        "OnDevice": "zeropipe.utils.init_on_device",
        "get_accelerator": "zeropipe.accelerator",
        "log_dist": "zeropipe.utils.logging",
        "logger": "zeropipe.utils.logging",
    }
)
# Attributes that are modules: users write zeropipe.zero.Init or zeropipe.runtime.lr_schedules without importing.
_MODULES = MappingProxyType(
    {
        "zero": "zeropipe.runtime.zero",
        "pipe": "zeropipe.runtime.pipe",
        **{
            name: f"zeropipe.{name}"
            for name in (
                "accelerator",
                "checkpoint",
                "checkpointing",
                "comm",
                "compat",
                "errors",
                "ops",
                "runtime",
                "utils",
            )
        },
    }
)

__all__ = [
    "DeepSpeedEngine",
    "DeepSpeedOptimizer",
    "__version__",
    "add_config_arguments",
    "init_distributed",
    "initialize",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(_MODULES[name])
    if name in _NAMES:
        return getattr(import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'zeropipe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES, *_MODULES})
