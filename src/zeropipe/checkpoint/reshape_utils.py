"""Lists of checkpoint files, and the states of several old ranks as one new rank's.

    share        who takes from whom when a degree changes, for every degree alike
    slice_of     a tensor's slices, by tensor-parallel rank
    unite        whole entries, by pipeline stage
    merge_state  anything end to end, replicated tensors too: DeepSpeed's public function, kept as users know it

How a tensor is sliced is said by ``universal_checkpoint_info`` where the files carry it, else by Megatron's names. A
tensor of which neither says it is refused by name where it would have to be cut.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import torch

from zeropipe.checkpoint import constants as k
from zeropipe.checkpoint.save.contents import OURS
from zeropipe.checkpoint.save.files import load_torch
from zeropipe.checkpoint.universal_checkpoint import MEGATRON, Joining, Rule, join, joining_of, split
from zeropipe.errors import CheckpointError
from zeropipe.given import Json, Tree

# Parameters of Megatron's layers that are cut along dim 0.
_ROWS = (
    "word_embeddings.weight",
    "query_key_value.weight",
    "query_key_value.bias",
    "mlp.dense_h_to_4h.weight",
    "mlp.dense_h_to_4h.bias",
    "lm_head.weight",
    "output_layer.weight",
)
_Item = TypeVar("_Item")


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
    # DeepSpeed has named them by the precision too; one folder has one kind.
    for prefix in (k.ZERO_FILE_PREFIX, k.FP16_ZERO_FILE_PREFIX, k.BF16_ZERO_FILE_PREFIX):
        found = get_files_with_prefix(files, prefix)
        if found:
            return sort_zero_files(found, prefix)
    return []


def sort_zero_files(files: Sequence[str], prefix: str) -> list[str]:
    def ranks(path: str) -> tuple[int, int]:
        match = re.search(rf"{re.escape(prefix)}(\d+)_{k.MODEL_FILE_PREFIX}(\d+)", os.path.basename(path))
        if match is None:
            raise CheckpointError(
                "name of an optimizer file", expected=f"{prefix}D_mp_rank_XX...", found=path
            )
        return int(match[1]), int(match[2])

    return sorted(files, key=ranks)


def rank_file(path: str) -> dict[str, Any]:
    """A rank's model or optimizer file without what only describes that file."""
    return {key: value for key, value in load_torch(Path(path)).items() if key != OURS}


def partition_data(data_list: Sequence[Any], num_partitions: int) -> list[list[Any]]:
    """``num_partitions`` runs of equal length. Raises CheckpointError when the length is no multiple."""
    if num_partitions < 1 or len(data_list) % num_partitions:
        raise CheckpointError(
            "partition_data", expected=f"a divisor of {len(data_list)}", found=num_partitions
        )
    return share(data_list, num_partitions)


def share(items: Sequence[_Item], count: int) -> list[list[_Item]]:
    """``items`` shared out in runs among ``count``; where there are fewer than that, several get the same one."""
    # Run i begins at i/count of the items, rounded down, and ends at (i + 1)/count, rounded up. Where the two divide
    # nothing is in two runs; where there are fewer items than runs, each is one item, which neighbours share.
    size = len(items)
    return [list(items[i * size // count : -(-(i + 1) * size // count)]) for i in range(count)]


def merge_state(state_a: Tree, state_b: Tree, key_list: Sequence[Any] = ()) -> Any:
    """Two ranks' states as one: dicts key by key, lists item by item, tensors end to end along dim 0.

    Other values, and tensors without dims, are ``state_a``'s. ``key_list``: the path so far. Raises
    CheckpointError, with the path, where the two do not have the same structure.
    """
    path = " -> ".join(map(str, key_list)) or "(top)"
    # A tensor without dims counts steps: it is the same on both.
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


def slice_of(
    name: str, slices: Sequence[torch.Tensor], index: int, count: int, rules: Mapping[str, Any] | None
) -> torch.Tensor:
    """Rank ``index``'s part of ``count`` of a tensor that ``slices`` make up; may be a view of one of them.

    ``rules``: what ``rules_in`` found in the files; None where they carry none.

    Raises CheckpointError, with the name, for a tensor that cannot be cut so, or of which nobody says how.
    """
    old, first = len(slices), slices[0]
    if old == count or first.dim() == 0:
        return slices[index if old == count else 0]
    how = joining_of(name, MEGATRON if rules is None else rules, tuple(first.shape))
    if how.rule is not Rule.CUT:
        return join(slices, how) if rules is not None else first
    # Slices that differ are no copies. Equal ones (biases at their start) may be either.
    unsaid = rules is None and count > old and how == Joining() and not name.endswith(_ROWS)
    if unsaid and all(torch.equal(first, other) for other in slices):
        raise CheckpointError(
            f"nothing says whether {name} is cut among tensor-parallel ranks or whole on each",
            expected="a name of Megatron's layers, or universal_checkpoint_info in the checkpoint",
            fix="save it again from a module with `universal_checkpoint_info`, or with Megatron's marks "
            "`tensor_model_parallel` and `partition_dim` on its parameters",
        )
    if count > old and how.fused == 1 and how.vocabulary is None and first.shape[how.dim] % (count // old):
        raise CheckpointError(
            f"{name} cannot be cut for {count} tensor-parallel ranks",
            expected=f"a multiple of {count // old} in dim {how.dim} of a slice",
            found=tuple(first.shape),
        )
    return split(join(slices, how), how, index, count)


def unite(left: Json, right: Json, path: str = "") -> Any:
    """The states of two pipeline stages as one: the entries of both; what both have is the same, or is ``left``'s.

    Raises CheckpointError for a tensor that both have and that differs: a tied layer that has drifted apart.
    """
    # Tied layers are on both, and are kept equal by the sum of their gradients.
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        if left.shape != right.shape or not torch.equal(left, right):
            raise CheckpointError(f"two pipeline stages have other values of {path}")
        return left
    if _is_optimizer(left) and _is_optimizer(right):
        return _unite_optimizers(left, right)
    if isinstance(left, dict) and isinstance(right, dict):
        both = dict(left)
        for key, value in right.items():
            both[key] = unite(left[key], value, f"{path}.{key}".lstrip(".")) if key in left else value
        return both
    if isinstance(left, list) and isinstance(right, list):
        if all(isinstance(entry, str) for entry in (*left, *right)):  # names
            return list(dict.fromkeys((*left, *right)))
        joined = [unite(a, b, f"{path}[{i}]") for i, (a, b) in enumerate(zip(left, right, strict=False))]
        return joined + left[len(joined) :] + right[len(joined) :]
    return right if left is None else left


def _is_optimizer(value: Any) -> bool:
    """Whether it is the state dict of a torch optimizer, which knows parameters by their position."""
    return isinstance(value, dict) and {"state", k.PARAM_GROUPS} <= value.keys()


def _unite_optimizers(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    """Each group's parameters of the left stage and then of the right one, numbered anew in this order."""
    groups: list[dict[str, Any]] = []
    state: dict[int, Any] = {}
    number, empty = 0, dict[str, Any](params=[])
    for mine, theirs in zip_longest(left[k.PARAM_GROUPS], right[k.PARAM_GROUPS], fillvalue=empty):
        first, named = number, [*mine.get("param_names", ()), *theirs.get("param_names", ())]
        for side, group in ((left, mine), (right, theirs)):
            for old in group["params"]:
                if old in side["state"]:  # torch has no entry of a parameter that was never stepped
                    state[number] = side["state"][old]
                number += 1
        # The left stage's hyperparameters hold.
        members = {"params": list(range(first, number))} | ({"param_names": named} if named else {})
        groups.append(theirs | mine | members)
    return dict(left) | {"state": state, k.PARAM_GROUPS: groups}


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(t), "") if t.isdigit() else (-1, t) for t in re.split(r"(\d+)", path)]
