"""Pipeline parallelism: plan a schedule, simulate it, execute it. The public names come on demand."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "PipelineModule": "module",
    "LayerSpec": "specs",
    "TiedLayerSpec": "specs",
    "ProcessTopology": "topology",
    "PipeDataParallelTopology": "topology",
    "PipeModelDataParallelTopology": "topology",
    "PipelineParallelGrid": "grid",
    "Schedule": "instructions",
    "Instruction": "instructions",
    "make_schedule": "schedule",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name in ("engine", "module", "schedule", "topology"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
