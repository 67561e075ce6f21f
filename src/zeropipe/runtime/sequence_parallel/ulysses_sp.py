"""What users of transformers and accelerate call of sequence parallelism, under the path that they know."""

from __future__ import annotations

from zeropipe.runtime.sequence_parallel.data import UlyssesSPDataLoaderAdapter
from zeropipe.runtime.sequence_parallel.hugging_face import UlyssesSPAttentionHF
from zeropipe.runtime.sequence_parallel.tiled import (
    SequenceTiledCompute,
    TiledFusedLogitsLoss,
    TiledMLP,
    sequence_tiled_compute,
)

__all__ = [
    "SequenceTiledCompute",
    "TiledFusedLogitsLoss",
    "TiledMLP",
    "UlyssesSPAttentionHF",
    "UlyssesSPDataLoaderAdapter",
    "sequence_tiled_compute",
]
