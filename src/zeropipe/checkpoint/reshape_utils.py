"""Lists of checkpoint files, and the merging of states that belong to one rank from now on."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import torch

from zeropipe.checkpoint.constants import (
    BF16_ZERO_FILE_PREFIX,
    FP16_ZERO_FILE_PREFIX,
    MODEL_FILE_PREFIX,
    ZERO_FILE_PREFIX,
)
from zeropipe.errors import CheckpointError


def basic_folder_validation(dir: str) -> None:
    """Raises CheckpointError when ``dir`` is not a folder."""
    if not os.path.isdir(dir):
        raise CheckpointError(f"{dir} is not a folder")


def get_files(dir: str) -> list[str]:
    """Every file below ``dir``, in natural order: 2 before 10."""
    found = [os.path.join(root, name) for root, _, names in os.walk(dir) for name in names]
    return sorted(found, key=_natural)


def get_files_with_prefix(all_files: Sequence[str], prefix: str) -> list[str]:
    """Those whose name starts with ``prefix``, in natural order."""
    return sorted((f for f in all_files if os.path.basename(f).startswith(prefix)), key=_natural)


def validate_files(file_list: Sequence[str]) -> None:
    """Raises CheckpointError naming the first that is not there."""
    for file in file_list:
        if not os.path.isfile(file):
            raise CheckpointError(f"{file} does not exist")


def get_zero_files(dir: str) -> list[str]:
    """The optimizer files of ``dir``, data-parallel rank first, then model-parallel rank; [] where there are none."""
    files = [f for f in get_files(dir) if f.endswith("_optim_states.pt")]
    for prefix in (ZERO_FILE_PREFIX, FP16_ZERO_FILE_PREFIX, BF16_ZERO_FILE_PREFIX):
        found = get_files_with_prefix(files, prefix)
        if found:
            return sort_zero_files(found, prefix)
    return []


def sort_zero_files(files: Sequence[str], prefix: str) -> list[str]:
    def ranks(path: str) -> tuple[int, int]:
        match = re.search(rf"{re.escape(prefix)}(\d+)_{MODEL_FILE_PREFIX}(\d+)", os.path.basename(path))
        if match is None:
            raise CheckpointError(
                "name of an optimizer file", expected=f"{prefix}D_mp_rank_XX...", found=path
            )
        return int(match[1]), int(match[2])

    return sorted(files, key=ranks)


def partition_data(data_list: Sequence[Any], num_partitions: int) -> list[list[Any]]:
    """``num_partitions`` runs of equal length. Raises CheckpointError when the length is no multiple."""
    if num_partitions < 1 or len(data_list) % num_partitions:
        raise CheckpointError(
            "partition_data", expected=f"a divisor of {len(data_list)}", found=num_partitions
        )
    size = len(data_list) // num_partitions
    return (
        [list(data_list[i : i + size]) for i in range(0, len(data_list), size)]
        if size
        else [[]] * num_partitions
    )


def merge_state(state_a: Any, state_b: Any, key_list: Sequence[Any] = ()) -> Any:
    """Two ranks' states as one: dicts key by key, lists item by item, tensors end to end along dim 0.

    Other values, and tensors without dims, are ``state_a``'s. ``key_list``: the path so far. Raises
    CheckpointError, with the path, where the two do not have the same structure.
    """
    path = " -> ".join(map(str, key_list)) or "(top)"
    if isinstance(state_a, torch.Tensor) and isinstance(state_b, torch.Tensor):
        return state_a if state_a.dim() == 0 else torch.cat([state_a, state_b], 0)
    if type(state_a) is not type(state_b):
        raise CheckpointError(
            f"cannot merge states at {path}",
            expected=type(state_a).__name__,
            found=type(state_b).__name__,
        )
    if isinstance(state_a, dict):
        if state_a.keys() != state_b.keys():
            odd = sorted(map(str, state_a.keys() ^ state_b.keys()))
            raise CheckpointError(
                f"cannot merge states at {path}: keys that only one of them has", found=", ".join(odd)
            )
        merged = {key: merge_state(state_a[key], state_b[key], [*key_list, key]) for key in state_a}
        return merged if type(state_a) is dict else type(state_a)(merged)
    if isinstance(state_a, (list, tuple)) and not isinstance(state_a, torch.Size):
        if len(state_a) != len(state_b):
            raise CheckpointError(
                f"cannot merge lists at {path}", expected=f"{len(state_a)} items", found=len(state_b)
            )
        items = [
            merge_state(a, b, [*key_list, i]) for i, (a, b) in enumerate(zip(state_a, state_b, strict=True))
        ]
        return items if isinstance(state_a, list) else type(state_a)(items)
    return state_a


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(t), "") if t.isdigit() else (-1, t) for t in re.split(r"(\d+)", path)]
