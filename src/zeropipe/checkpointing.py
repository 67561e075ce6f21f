"""Activation checkpointing under its public name; see zeropipe.runtime.activation_checkpointing."""

from zeropipe.runtime.activation_checkpointing import (
    checkpoint,
    configure,
    get_cuda_rng_tracker,
    is_configured,
    model_parallel_cuda_manual_seed,
    non_reentrant_checkpoint,
    reset,
)
from zeropipe.runtime.rng_tracker import CudaRNGStatesTracker

__all__ = [
    "CudaRNGStatesTracker",
    "checkpoint",
    "configure",
    "get_cuda_rng_tracker",
    "is_configured",
    "model_parallel_cuda_manual_seed",
    "non_reentrant_checkpoint",
    "reset",
]
