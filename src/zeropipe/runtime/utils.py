"""Small tools under the path where DeepSpeed users look for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def move_to_device(
    item: Any, device: torch.device | str, criterion_func: Callable[[Any], bool] = torch.is_tensor
) -> Any:
    """``item`` on ``device``: what ``criterion_func`` accepts, also inside lists, tuples and dicts."""
    if criterion_func(item):
        return item.to(device)
    if isinstance(item, (list, tuple)):
        values = [move_to_device(value, device, criterion_func) for value in item]
        return type(item)(*values) if hasattr(item, "_fields") else type(item)(values)
    if isinstance(item, dict):
        return {key: move_to_device(value, device, criterion_func) for key, value in item.items()}
    return item
