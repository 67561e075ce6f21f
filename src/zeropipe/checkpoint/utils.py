"""File names of a checkpoint, as users know them, and small helpers around ``torch.save``."""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any, Final

import torch

from zeropipe.checkpoint.constants import (
    LAYER_FILE_PREFIX,
    MODEL_FILE_PREFIX,
    MODEL_FILE_SUFFIX,
    OPTIM_FILE_SUFFIX,
    ZERO_FILE_PREFIX,
)

# The small script that stands beside every checkpoint, where users look for it.
SCRIPT_NAME: Final = "zero_to_fp32.py"
SCRIPT: Final = '''\
#!/usr/bin/env python
"""Write the fp32 weights of a checkpoint in this folder as ordinary files.

    python zero_to_fp32.py . OUTPUT_FOLDER [--tag TAG] [--safe_serialization] [--max_shard_size 5GB]
"""

from zeropipe.utils.zero_to_fp32 import main

if __name__ == "__main__":
    main()
'''


def get_model_ckpt_name_for_rank(base_folder: str, mp_rank_str: str) -> str:
    """``mp_rank_XX_model_states.pt``; ``mp_rank_str`` is the two-digit number."""
    return os.path.join(base_folder, MODEL_FILE_PREFIX + mp_rank_str + MODEL_FILE_SUFFIX)


def get_zero_ckpt_name_for_rank(base_folder: str, dp_rank: int, mp_rank: int) -> str:
    """``zero_pp_rank_D_mp_rank_XX_optim_states.pt``."""
    name = f"{ZERO_FILE_PREFIX}{dp_rank}_{MODEL_FILE_PREFIX}{mp_rank:02d}{OPTIM_FILE_SUFFIX}"
    return os.path.join(base_folder, name)


def get_layer_ckpt_name_for_rank(base_folder: str, layer_id: str | int, tp_rank: int) -> str:
    """``layer_NN-model_TT-model_states.pt``; ``layer_id`` is a number, or a prefix such as ``layer_03``."""
    prefix = f"{LAYER_FILE_PREFIX}{layer_id:02d}" if isinstance(layer_id, int) else str(layer_id)
    return os.path.join(base_folder, f"{prefix}-model_{tp_rank:02d}{MODEL_FILE_SUFFIX}")


def get_zero3_model_ckpt_name_for_rank(base_folder: str, dp_rank: int, mp_rank: int) -> str:
    """``zero_pp_rank_D_mp_rank_XX_model_states.pt``, stage 3 only."""
    name = f"{ZERO_FILE_PREFIX}{dp_rank}_{MODEL_FILE_PREFIX}{mp_rank:02d}{MODEL_FILE_SUFFIX}"
    return os.path.join(base_folder, name)


def clone_tensors_for_torch_save(item: Any, device: torch.device | str = "cpu") -> Any:
    """A copy of ``item`` whose tensors own exactly their elements, on ``device``.

    ``torch.save`` of a view into a flat buffer would write the whole buffer. Containers keep their types.
    """

    def clone(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        own = leaf.detach()
        dense = own.layout == torch.strided
        return (own.clone(memory_format=torch.contiguous_format) if dense else own.clone()).to(device)

    return mapped(item, clone)


def mapped(tree: Any, leaf: Callable[[Any], Any]) -> Any:
    """A copy of ``tree`` with new containers of the same types and ``leaf`` of everything in them but sets' members."""
    kind = type(tree)
    if isinstance(tree, dict):
        items = {key: mapped(value, leaf) for key, value in tree.items()}
        if kind is dict:
            return items
        if isinstance(tree, defaultdict):
            return kind(tree.default_factory, items)
        try:
            return kind(items)
        except TypeError:
            return items
    if kind is torch.Size:
        return tree
    if isinstance(tree, (list, tuple)):
        values = [mapped(value, leaf) for value in tree]
        if hasattr(tree, "_fields"):
            return kind(*values)
        return values if kind is list else kind(values)
    if isinstance(tree, deque):
        return kind((mapped(value, leaf) for value in tree), tree.maxlen)
    return tree.copy() if kind is set else leaf(tree)
