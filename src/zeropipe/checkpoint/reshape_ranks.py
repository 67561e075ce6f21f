"""States of several old ranks as one new rank's: slices of tensors by tensor rank, whole entries by pipeline stage.

How a tensor is sliced is said by ``universal_checkpoint_info`` where the files carry it, else by Megatron's names. A
tensor of which neither says it is refused by name where it would have to be cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from zeropipe.checkpoint import constants as k
from zeropipe.checkpoint.universal.patterns import Joining, Rule, join, joining_of, split
from zeropipe.errors import CheckpointError

# Parameters of Megatron's layers that every tensor-parallel rank has whole; they are not joined end to end.
SEQUENTIAL_LAYERS = (
    "input_layernorm.weight",
    "input_layernorm.bias",
    "self_attention.dense.bias",
    "attention.dense.bias",
    "post_attention_layernorm.weight",
    "post_attention_layernorm.bias",
    "mlp.dense_4h_to_h.bias",
    "position_embeddings.weight",
    "final_layernorm.weight",
    "final_layernorm.bias",
    "norm.weight",
    "norm.bias",
)
# ... those that are cut along dim 1 ...
LAYER_CONCAT_DIM = ("self_attention.dense.weight", "attention.dense.weight", "mlp.dense_4h_to_h.weight")
# ... and those that are cut along dim 0.
_ROWS = (
    "word_embeddings.weight",
    "query_key_value.weight",
    "query_key_value.bias",
    "mlp.dense_h_to_4h.weight",
    "mlp.dense_h_to_4h.bias",
    "lm_head.weight",
    "output_layer.weight",
)


def slice_of(
    name: str, slices: Sequence[torch.Tensor], index: int, count: int, rules: Mapping[str, Any] | None
) -> torch.Tensor:
    """Rank ``index``'s part of ``count`` of a tensor that ``slices`` make up.

    Raises CheckpointError, with the name, for a tensor that cannot be cut so, or of which nobody says how.
    """
    old = len(slices)
    if old == count or slices[0].dim() == 0:
        return slices[index if old == count else 0]
    how = _how(name, slices, rules, up=count > old)
    if how.rule in (Rule.REPLICATED, Rule.AVERAGE):
        return join(slices, how) if rules is not None else slices[0]
    if how.rule is Rule.CONCAT and how.vocabulary is None:
        if count < old:
            size = old // count
            return torch.cat(list(slices[index * size : (index + 1) * size]), how.dim)
        own, parts = slices[index * old // count], count // old
        if how.dim >= own.dim() or own.shape[how.dim] % parts:
            raise CheckpointError(
                f"{name} cannot be cut for {count} tensor-parallel ranks",
                expected=f"a multiple of {parts} in dim {how.dim} of a slice",
                found=tuple(own.shape),
                fix="ask for a tensor-parallel degree that divides it",
            )
        return own.chunk(parts, how.dim)[index % parts]
    return split(join(slices, how), how, index, count)


def _how(name: str, slices: Sequence[torch.Tensor], rules: Mapping[str, Any] | None, *, up: bool) -> Joining:
    if rules is not None:
        return joining_of(name, rules, [tuple(s.shape) for s in slices])
    if name.endswith(SEQUENTIAL_LAYERS):
        return Joining(Rule.REPLICATED)
    if name.endswith(LAYER_CONCAT_DIM):
        return Joining(Rule.CONCAT, 1)
    # Slices that differ are no copies. Equal ones (biases at their start) may be either.
    if up and not name.endswith(_ROWS) and all(torch.equal(slices[0], other) for other in slices):
        raise CheckpointError(
            f"nothing says whether {name} is cut among tensor-parallel ranks or whole on each",
            expected="a name of Megatron's layers, or universal_checkpoint_info in the checkpoint",
            fix="save it again from a module with `universal_checkpoint_info`, or with Megatron's marks "
            "`tensor_model_parallel` and `partition_dim` on its parameters",
        )
    return Joining(Rule.CONCAT)


def unite(left: Any, right: Any, path: str = "") -> Any:
    """The states of two pipeline stages as one: the entries of both; what both have is the same, or is ``left``'s.

    Raises CheckpointError for a tensor that both have and that differs: a tied layer that has drifted apart.
    """
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
        if all(isinstance(entry, str) for entry in (*left, *right)):
            return list(dict.fromkeys((*left, *right)))
        pairs = zip(left, right, strict=False)
        longer = left if len(left) > len(right) else right
        return [
            *(unite(a, b, f"{path}[{i}]") for i, (a, b) in enumerate(pairs)),
            *longer[min(len(left), len(right)) :],
        ]
    return right if left is None else left


def _is_optimizer(value: Any) -> bool:
    """Whether it is the state dict of a torch optimizer, which knows parameters by their position."""
    return isinstance(value, dict) and {"state", k.PARAM_GROUPS} <= value.keys()


def _unite_optimizers(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    """Each group's parameters of the left stage and then of the right one, numbered anew in this order."""
    groups: list[dict[str, Any]] = []
    state: dict[int, Any] = {}
    number = 0
    empty: dict[str, Any] = {"params": []}
    for index in range(max(len(left[k.PARAM_GROUPS]), len(right[k.PARAM_GROUPS]))):
        members: list[int] = []
        named: list[str] = []
        group = dict(empty)
        for side in (right, left):  # the left one's hyperparameters
            group |= (side[k.PARAM_GROUPS][index : index + 1] or [empty])[0]
        for side in (left, right):
            own = (side[k.PARAM_GROUPS][index : index + 1] or [empty])[0]
            named += own.get("param_names", [])
            for old in own["params"]:
                if old in side["state"]:
                    state[number] = side["state"][old]
                members.append(number)
                number += 1
        groups.append(group | {"params": members} | ({"param_names": named} if named else {}))
    return dict(left) | {"state": state, k.PARAM_GROUPS: groups}
