"""Trains a test model with zeropipe on this rank: the one loop that the multi-process tests share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import zeropipe
from tests.helpers.data import Batch, MakeBatch
from tests.helpers.referee import weights_of

ADAMW = {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}}


def config(stage: int, world: int, *, gas: int = 1, **extra: Any) -> dict[str, Any]:
    """A minimal configuration: AdamW, no clipping, micro-batch 1 (the tests make their own batches)."""
    base = {
        "train_batch_size": gas * world,
        "gradient_accumulation_steps": gas,
        "gradient_clipping": 0.0,
        "optimizer": ADAMW,
        "zero_optimization": {"stage": stage},
    }
    merged = copy.deepcopy(base)
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = {**merged[key], **value}
        else:
            merged[key] = value
    return merged


def train(
    rank: int,
    world: int,
    factory: Callable[[], nn.Module],
    make: MakeBatch,
    settings: dict[str, Any],
    steps: int,
    *,
    plain: bool = False,
    **kwargs: Any,
) -> dict[str, Any]:
    """Weights (by name), losses and norms after ``steps`` optimizer steps; the engine is destroyed."""
    engine, optimizer, _, _ = zeropipe.initialize(model=factory(), config=settings, **kwargs)
    gas = engine.gradient_accumulation_steps()
    losses, norms = [], []
    for step in range(steps):
        for micro in range(gas):
            batch: Batch = make(step, rank, micro)
            loss = engine(*batch)
            loss.backward() if plain else engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        norms.append(engine.get_global_grad_norm())
    weights = weights_of(engine.module)
    engine.destroy()
    return {"weights": weights, "losses": losses, "norms": norms, "skipped": engine.skipped_steps}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
