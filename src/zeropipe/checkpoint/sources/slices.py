"""What ``universal_checkpoint_info`` says about each parameter: how tensor-parallel slices make a whole, and back.

Each rule is data; ``join`` and ``split`` are inverse to each other, but for averaged parameters, whose slices
need not be equal, and for vocabulary padding, which is dropped and comes back as zeros.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from zeropipe.checkpoint import constants as k
from zeropipe.errors import CheckpointError
from zeropipe.layout.flat import FlatShards, TensorSpec


@dataclass(frozen=True, slots=True)
class SubparamShape:
    """Parameters made of several fused ones, each sliced by itself.

    ``shape``: the whole tensor's, where a tuple in place of a size lists the sub-parameters' sizes in that dim:
    ``((q, k, v), hidden)``. ``partition_dim``: the dim that is sliced.
    """

    patterns: list[str]
    shape: tuple[tuple[int, ...] | int, ...]
    partition_dim: int


class Rule(Enum):
    """How the slices of one parameter relate."""

    CONCAT = "slices lie end to end in one dim"
    REPLICATED = "all slices are equal"
    AVERAGE = "slices are averaged"
    SUB_PARAMS = "each fused sub-parameter is sliced by itself"


@dataclass(frozen=True, slots=True)
class Joining:
    """How one parameter is joined. ``widths``: sizes of the slices where they are uneven,
    for the number of ranks that they list; other numbers of ranks share as evenly as can be."""

    rule: Rule
    dim: int = 0
    sub_sizes: tuple[int, ...] = ()  # sizes of the fused parameters in ``dim``
    sub_count: int = 0  # equal fused parameters, where only their number is known
    vocabulary: int | None = None  # rows without padding
    widths: tuple[tuple[int, ...], ...] = ()  # [sub-parameter][rank]


def joining_of(name: str, info: Mapping[str, Any], shapes: Sequence[tuple[int, ...]] = ()) -> Joining:
    """The rule for parameter ``name``; the first pattern that matches decides, the default is dim 0, end to end."""

    def listed(key: str) -> bool:
        return any(re.match(pattern, name) for pattern in info.get(key) or ())

    # [1] Not cut at all.
    if listed(k.TP_REPLICATED_PARAMETER_PATTERNS):
        return Joining(Rule.REPLICATED)
    if listed(k.PARAMETER_TO_AVERAGE_PATTERNS):
        return Joining(Rule.AVERAGE)
    # [2] Fused: each of the parameters in it is cut by itself.
    if listed(k.PARAMETER_WITH_2_SUB_PARAMS_CAT_DIM_0):
        return Joining(Rule.SUB_PARAMS, 0, sub_count=2)
    for entry in info.get(k.PARAMETER_WITH_SUB_PARAMS) or ():
        given = dict(entry) if isinstance(entry, Mapping) else {}
        widths = tuple(map(tuple, given.pop(k.SUB_PARAM_SHARD_WIDTHS, None) or ()))
        fused = SubparamShape(**given) if given else entry
        if any(re.match(pattern, name) for pattern in fused.patterns):
            sizes = fused.shape[fused.partition_dim]
            sub_sizes = tuple(sizes) if isinstance(sizes, (tuple, list)) else (sizes,)
            return Joining(Rule.SUB_PARAMS, fused.partition_dim, sub_sizes, widths=widths)
    # [3] All others lie end to end; a vocabulary without the rows that pad it.
    dim = 1 if listed(k.PARAMETER_WITH_ROW_PARALLELISM_PATTERNS) else 0
    rows = info.get(k.ORIGINAL_VOCAB_SIZE) if listed(k.VOCABULARY_PARAMETER_PATTERNS) else None
    if len(shapes) > 1 and len({len(s) for s in shapes}) == 1 and len(shapes[0]) == 1 and dim == 1:
        return Joining(Rule.REPLICATED)  # a row-parallel layer's bias is whole on every rank
    return Joining(Rule.CONCAT, dim, vocabulary=rows)


def rules_in(tree: Mapping[str, Any]) -> dict[str, Any] | None:
    """The rules that a model file carries; None where it has only the format's version, or nothing."""
    found = tree.get(k.UNIVERSAL_CHECKPOINT_INFO)
    if not isinstance(found, Mapping) or not set(found) - {k.UNIVERSAL_CHECKPOINT_VERSION_KEY}:
        return None
    return dict(found)


def info_of(module: torch.nn.Module) -> dict[str, Any] | None:
    """What a module says of its slices: its ``universal_checkpoint_info``, else Megatron's marks on its parameters.

    None where it says nothing. Parameters that Megatron does not mark as ``tensor_model_parallel`` are whole.
    """
    given = plain_info(getattr(module, "universal_checkpoint_info", None))
    if given is not None:
        return given
    params = dict(module.named_parameters())
    if not any(getattr(p, "tensor_model_parallel", False) for p in params.values()):
        return None
    patterns: dict[str, list[str]] = {}
    for name, param in params.items():
        sliced = bool(getattr(param, "tensor_model_parallel", False))
        dim = int(getattr(param, "partition_dim", 0)) if sliced else -1
        key = {0: "", 1: k.PARAMETER_WITH_ROW_PARALLELISM_PATTERNS}.get(
            dim, k.TP_REPLICATED_PARAMETER_PATTERNS
        )
        if sliced and int(getattr(param, "partition_stride", 1)) == 2 and dim == 0:
            key = k.PARAMETER_WITH_2_SUB_PARAMS_CAT_DIM_0
        if key:
            patterns.setdefault(key, []).append(re.escape(name) + "$")
    return patterns


def plain_info(info: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None) -> dict[str, Any] | None:
    """``universal_checkpoint_info`` as plain values, so that files that hold it load without running code."""
    if info is None:
        return None
    given = info() if callable(info) else info
    return {str(key): _plain(value) for key, value in given.items()}


def _plain(value: Any) -> Any:
    if hasattr(value, "patterns") and hasattr(value, "partition_dim"):  # a SubparamShape, DeepSpeed's or ours
        return {
            "patterns": list(value.patterns),
            "shape": tuple(value.shape),
            "partition_dim": int(value.partition_dim),
        }
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value


def join(slices: Sequence[torch.Tensor], how: Joining) -> torch.Tensor:
    """The whole tensor of the ranks' slices, in order of ranks.

    Raises CheckpointError where replicas differ.
    """
    if len(slices) == 1 and how.rule is not Rule.CONCAT:
        return slices[0]
    if how.rule is Rule.REPLICATED:
        for rank, other in enumerate(slices):
            if not torch.equal(slices[0], other):
                raise CheckpointError(
                    f"a replicated parameter differs on tensor-parallel rank {rank}", fix="average it"
                )
        return slices[0]
    if how.rule is Rule.AVERAGE:
        return torch.stack([s.double() for s in slices]).mean(0).to(slices[0].dtype)
    if how.rule is Rule.SUB_PARAMS:
        parts = [
            s.split(list(_own_sizes(how, s.shape[how.dim], len(slices), r)), how.dim)
            for r, s in enumerate(slices)
        ]
        return torch.cat([torch.cat(same, how.dim) for same in zip(*parts, strict=True)], how.dim)
    whole = torch.cat(list(slices), how.dim)
    return whole if how.vocabulary is None else whole[: how.vocabulary]


def split(
    whole: torch.Tensor, how: Joining, rank: int, count: int, padded_rows: int | None = None
) -> torch.Tensor:
    """Rank ``rank``'s slice of ``count``; the inverse of ``join``. ``padded_rows``: of a vocabulary, over all ranks."""
    if how.rule in (Rule.REPLICATED, Rule.AVERAGE):
        return whole
    if how.rule is Rule.SUB_PARAMS:
        total = whole.shape[how.dim]
        sizes = how.sub_sizes or (total // how.sub_count,) * how.sub_count
        subs = whole.split(list(sizes), how.dim)
        # Uneven widths hold for the number of ranks that they were saved at; others share as evenly as can be.
        if how.widths and len(how.widths[0]) == count:
            cuts = zip(subs, how.widths, strict=True)
            return torch.cat([sub.split(list(width), how.dim)[rank] for sub, width in cuts], how.dim)
        return torch.cat([_part(sub, how.dim, rank, count) for sub in subs], how.dim)
    if how.vocabulary is not None:
        even = FlatShards((TensorSpec("rows", (whole.shape[0],), ""),), count).padded_numel
        rows = padded_rows or even
        padding = whole.new_zeros((rows - whole.shape[0], *whole.shape[1:]))
        whole = torch.cat([whole, padding])
    return _part(whole, how.dim, rank, count)


def _part(tensor: torch.Tensor, dim: int, rank: int, count: int) -> torch.Tensor:
    """Slices differ by one at most where the size is no multiple, the first ones being larger."""
    return tensor.tensor_split(count, dim)[rank]


def _own_sizes(how: Joining, size: int, count: int, rank: int) -> tuple[int, ...]:
    """Sizes of the sub-parameters inside one rank's slice."""
    if how.widths and len(how.widths[0]) == count:
        return tuple(width[rank] for width in how.widths)
    if not how.sub_sizes:
        return (size // how.sub_count,) * how.sub_count
    return tuple(total // count + (rank < total % count) for total in how.sub_sizes)
