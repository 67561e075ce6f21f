"""Lets a parameter load its own state from a universal folder, for models that handle their loading themselves."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import torch

from zeropipe.checkpoint import constants as k
from zeropipe.checkpoint.files import load_torch
from zeropipe.checkpoint.sources.slices import Joining, Rule, split
from zeropipe.checkpoint.sources.slices import SubparamShape as SubparamShape
from zeropipe.errors import CheckpointError


def enable_universal_checkpoint(param_list: Iterable[torch.nn.Parameter]) -> None:
    """Give each parameter the method ``load_hp_checkpoint_state(folder, tp_rank, tp_world_size)``."""
    for param in param_list:
        param.load_hp_checkpoint_state = MethodType(load_hp_checkpoint_state, param)  # type: ignore[attr-defined]


def load_hp_checkpoint_state(
    self: torch.nn.Parameter, folder: str | os.PathLike[str], tp_rank: int, tp_world_size: int
) -> float | None:
    """Read this parameter's folder and take this tensor-parallel rank's slice of its fp32 value and moments.

    The value is written into the parameter; the fp32 slice and the moments are left in ``self.hp_state`` (1D).
    Returns the step count, None where there is none. Raises CheckpointError for a slice of another shape.
    """
    path = Path(folder)
    state: dict[str, torch.Tensor] = {}
    step: float | None = None
    for file in sorted(path.glob("*.pt")):
        held = load_torch(file)
        if file.stem == "step":
            step = float(held)
            continue
        whole = held[k.PARAM] if isinstance(held, Mapping) else held
        how = _joining(held if isinstance(held, Mapping) else {})
        rows = self.shape[0] * tp_world_size if how.vocabulary is not None and self.dim() else None
        part = split(whole, how, tp_rank, tp_world_size, rows)
        if part.numel() != self.numel():
            raise CheckpointError(
                f"{file} does not fit the parameter on tensor-parallel rank {tp_rank} of {tp_world_size}",
                expected=tuple(self.shape),
                found=tuple(part.shape),
                fix="load at a tensor-parallel degree that divides the parameter",
            )
        state[file.stem] = part.reshape(-1).clone()
    if k.FP32_WEIGHT_KEY not in state:
        raise CheckpointError(f"{path} has no fp32.pt")
    with torch.no_grad():
        self.copy_(state[k.FP32_WEIGHT_KEY].view(self.shape))
    self.hp_state = state  # type: ignore[attr-defined]
    return step


def _joining(held: Mapping[str, Any]) -> Joining:
    """What a parameter's file says about how it is sliced."""
    dim = int(held.get(k.CAT_DIM, 0)) if held.get(k.CAT_DIM) is not None else None
    fused = held.get(k.SUB_PARAM_SHAPE)
    if fused is not None:
        shape = fused.shape if isinstance(fused, SubparamShape) else tuple(fused["shape"])
        at = fused.partition_dim if isinstance(fused, SubparamShape) else int(fused["partition_dim"])
        sizes = shape[at]
        return Joining(Rule.SUB_PARAMS, at, tuple(sizes) if isinstance(sizes, (list, tuple)) else (sizes,))
    if held.get(k.PARAM_N_SUB_PARAMS):
        return Joining(Rule.SUB_PARAMS, dim or 0, sub_count=int(held[k.PARAM_N_SUB_PARAMS]))
    if dim is None and held:
        return Joining(Rule.REPLICATED)
    vocabulary = held.get(k.VOCAB_TENSOR)
    rows = held[k.PARAM].shape[0] if vocabulary else None
    return Joining(Rule.CONCAT, dim or 0, vocabulary=rows)
