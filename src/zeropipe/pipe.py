"""``from zeropipe.pipe import PipelineModule, LayerSpec``: the names under which users know pipeline parallelism."""

from zeropipe.runtime.pipe.grid import PipelineParallelGrid
from zeropipe.runtime.pipe.module import PipelineModule
from zeropipe.runtime.pipe.specs import LayerSpec, TiedLayerSpec
from zeropipe.runtime.pipe.topology import (
    PipeDataParallelTopology,
    PipeModelDataParallelTopology,
    ProcessTopology,
)

__all__ = [
    "LayerSpec",
    "PipeDataParallelTopology",
    "PipeModelDataParallelTopology",
    "PipelineModule",
    "PipelineParallelGrid",
    "ProcessTopology",
    "TiedLayerSpec",
]
