"""How tensor-parallel slices make a whole, and back, as ``universal_checkpoint_info`` and universal folders say it.

    a dict of patterns, ``universal_checkpoint_info``       joining_of      info_of a module writes one
    the words in a universal parameter's own file           Joining.said    Joining.words writes them
    Megatron's marks on parameters                          info_of
    Megatron's names, where a file says nothing             joining_of(name, MEGATRON)

All of it becomes a ``Joining``, and nothing else cuts or joins a slice: ``join`` and ``split`` are inverse to each
other, but for averaged parameters, whose slices need not be equal, and for a vocabulary's padding, which is dropped
and comes back as zeros.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import MethodType
from typing import Any

import torch

from zeropipe.checkpoint import constants as k
from zeropipe.checkpoint.save.files import load_torch
from zeropipe.errors import CheckpointError
from zeropipe.given import Anything
from zeropipe.layout.flat import FlatShards, TensorSpec

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
# ... and those that are cut along dim 1.
LAYER_CONCAT_DIM = ("self_attention.dense.weight", "attention.dense.weight", "mlp.dense_4h_to_h.weight")
# What of Megatron's files that say nothing is known by its name, as if they said it.
MEGATRON = {
    k.TP_REPLICATED_PARAMETER_PATTERNS: [f".*{re.escape(name)}$" for name in SEQUENTIAL_LAYERS],
    k.PARAMETER_WITH_ROW_PARALLELISM_PATTERNS: [f".*{re.escape(name)}$" for name in LAYER_CONCAT_DIM],
}


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

    CUT = "slices lie end to end in one dim, those of each fused parameter by themselves"
    REPLICATED = "all slices are equal"
    AVERAGE = "slices are averaged"


@dataclass(frozen=True, slots=True)
class Joining:
    """How one parameter is joined. An ordinary one is fused of one.

    fused of three, by 2 ranks:   | q | k | v |    ->    | q0 k0 v0 |  | q1 k1 v1 |

    ``widths``: sizes of the slices where they are uneven, for the number of ranks that they list; other numbers of
    ranks share as evenly as can be.
    """

    rule: Rule = Rule.CUT
    dim: int = 0
    fused: tuple[int, ...] | int = 1  # sizes of the fused parameters in ``dim``, or only how many equal ones
    vocabulary: int | None = None  # rows without padding
    widths: tuple[tuple[int, ...], ...] = ()  # [fused parameter][rank]

    @classmethod
    def of_shape(cls, shape: Mapping[str, Any]) -> Joining:
        """By a SubparamShape as plain values, which may have the widths of uneven slices with them."""
        dim = int(shape["partition_dim"])
        sizes = shape["shape"][dim]
        listed = tuple(sizes) if isinstance(sizes, (list, tuple)) else (sizes,)
        return cls(dim=dim, fused=listed, widths=tuple(map(tuple, shape.get(k.SUB_PARAM_SHARD_WIDTHS) or ())))

    @classmethod
    def said(cls, held: Anything) -> Joining:
        """By what a universal parameter's file holds: the tensor alone, or with words beside it."""
        # [1] The moments of some versions are tensors alone; they lie as the default has it.
        if not isinstance(held, Mapping):
            return cls()
        # [2] Fused parameters, then what has no dim to be cut in, then the ordinary.
        fused, dim = held.get(k.SUB_PARAM_SHAPE), held.get(k.CAT_DIM)
        if fused is not None:
            return cls.of_shape(_plain(fused))
        if held.get(k.PARAM_N_SUB_PARAMS):
            return cls(dim=int(dim or 0), fused=int(held[k.PARAM_N_SUB_PARAMS]))
        if dim is None:
            return cls(Rule.REPLICATED)
        rows = held[k.PARAM].shape[0] if held.get(k.VOCAB_TENSOR) else None
        return cls(dim=int(dim), vocabulary=rows)

    def words(self) -> dict[str, Any]:
        """What ``said`` reads."""
        # None for sizes: DeepSpeed keeps those in an object, which is code.
        if self.rule is not Rule.CUT:
            return {}
        if isinstance(self.fused, int) and self.fused > 1:
            return {k.CAT_DIM: self.dim, k.PARAM_N_SUB_PARAMS: self.fused}
        return {k.CAT_DIM: self.dim} | ({k.VOCAB_TENSOR: True} if self.vocabulary is not None else {})

    def sizes(self, total: int, count: int = 1, rank: int = 0) -> list[int]:
        """Of the fused parameters in rank ``rank``'s slice of ``count``, which has ``total`` rows or columns."""
        if self.widths and len(self.widths[0]) == count:
            return [width[rank] for width in self.widths]
        if isinstance(self.fused, int):
            return [total // self.fused] * self.fused
        # As ``tensor_split`` shares: the first ranks have one more where the size is no multiple.
        return [size // count + (rank < size % count) for size in self.fused]


def joining_of(name: str, info: Mapping[str, Any], shape: tuple[int, ...] | None = None) -> Joining:
    """The rule for parameter ``name``, of ``shape`` where that is known; the first pattern that matches decides."""
    how = _listed(name, info)
    # The bias of a layer that is cut along dim 1, and any scalar, is whole on every rank.
    lacks = how.rule is Rule.CUT and shape is not None and how.dim >= len(shape)
    return Joining(Rule.REPLICATED) if lacks else how


def _listed(name: str, info: Mapping[str, Any]) -> Joining:
    def listed(key: str) -> bool:
        return any(re.match(pattern, name) for pattern in info.get(key) or ())

    # [1] Not cut at all.
    if listed(k.TP_REPLICATED_PARAMETER_PATTERNS):
        return Joining(Rule.REPLICATED)
    if listed(k.PARAMETER_TO_AVERAGE_PATTERNS):
        return Joining(Rule.AVERAGE)
    # [2] Fused: each of the parameters in it is cut by itself.
    if listed(k.PARAMETER_WITH_2_SUB_PARAMS_CAT_DIM_0):
        return Joining(fused=2)
    for entry in info.get(k.PARAMETER_WITH_SUB_PARAMS) or ():
        fused = _plain(entry)
        if any(re.match(pattern, name) for pattern in fused["patterns"]):
            return Joining.of_shape(fused)
    # [3] All others lie end to end; a vocabulary without the rows that pad it.
    rows = info.get(k.ORIGINAL_VOCAB_SIZE) if listed(k.VOCABULARY_PARAMETER_PATTERNS) else None
    return Joining(dim=1 if listed(k.PARAMETER_WITH_ROW_PARALLELISM_PATTERNS) else 0, vocabulary=rows)


def rules_in(tree: Mapping[str, Any]) -> dict[str, Any] | None:
    """The rules that a model file carries; None where it has only the format's version, or nothing."""
    found = tree.get(k.UNIVERSAL_CHECKPOINT_INFO)
    if not isinstance(found, Mapping) or not set(found) - {k.UNIVERSAL_CHECKPOINT_VERSION_KEY}:
        return None
    return dict(found)


def as_info(known: Iterable[tuple[str, Joining]]) -> dict[str, Any]:
    """``joining_of`` back: the patterns that say of each named parameter how it is joined."""
    info: dict[str, Any] = {}
    for name, how in known:
        # Patterns are matched from the start: this one is of the name and no longer one.
        pattern: Any = re.escape(name) + "$"
        if how.rule is not Rule.CUT:
            key = k.TP_REPLICATED_PARAMETER_PATTERNS
        elif isinstance(how.fused, tuple):
            key = k.PARAMETER_WITH_SUB_PARAMS
            shape = (0,) * how.dim + (how.fused,)  # sizes of other dims say nothing
            pattern = {"patterns": [pattern], "shape": shape, "partition_dim": how.dim}
        elif how.fused == 2:
            key = k.PARAMETER_WITH_2_SUB_PARAMS_CAT_DIM_0
        elif how.dim == 1:
            key = k.PARAMETER_WITH_ROW_PARALLELISM_PATTERNS
        elif how.vocabulary is not None:
            key = k.VOCABULARY_PARAMETER_PATTERNS
            info[k.ORIGINAL_VOCAB_SIZE] = how.vocabulary
        else:
            continue  # the default
        info.setdefault(key, []).append(pattern)
    return info


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
    return as_info((name, _marked(param)) for name, param in params.items())


def _marked(param: torch.nn.Parameter) -> Joining:
    dim = int(getattr(param, "partition_dim", 0))
    # No pattern says more than dim 1; a parameter that was cut so is refused when its slices turn out to differ.
    if not getattr(param, "tensor_model_parallel", False) or dim not in (0, 1):
        return Joining(Rule.REPLICATED)
    return Joining(dim=dim, fused=2 if dim == 0 and int(getattr(param, "partition_stride", 1)) == 2 else 1)


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
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def join(slices: Sequence[torch.Tensor], how: Joining) -> torch.Tensor:
    """The whole tensor of the ranks' slices, in order of ranks. Of tensors on the meta device: only its shape.

    Raises CheckpointError where replicas differ.
    """
    first = slices[0]
    if how.rule is Rule.REPLICATED:
        for rank, other in enumerate(slices if first.device.type != "meta" else ()):
            if not torch.equal(first, other):
                raise CheckpointError(
                    f"a replicated parameter differs on tensor-parallel rank {rank}", fix="average it"
                )
        return first
    if how.rule is Rule.AVERAGE:
        # In fp64, so that slices that are equal give just that.
        return (
            first if len(slices) == 1 else torch.stack([s.double() for s in slices]).mean(0).to(first.dtype)
        )
    count, dim = len(slices), how.dim
    parts = [s.split(how.sizes(s.shape[dim], count, rank), dim) for rank, s in enumerate(slices)]
    together = [part for same in zip(*parts, strict=True) for part in same]
    whole = first if count == 1 else torch.cat(together, dim)
    return whole if how.vocabulary is None else whole[: how.vocabulary]


def split(
    whole: torch.Tensor, how: Joining, rank: int, count: int, padded_rows: int | None = None
) -> torch.Tensor:
    """Rank ``rank``'s slice of ``count``; the inverse of ``join``. ``padded_rows``: of a vocabulary, over all ranks."""
    if how.rule is not Rule.CUT or (count == 1 and how.vocabulary is None):
        return whole
    # Padded so that all slices are equal, as Megatron's are.
    if how.vocabulary is not None:
        even = FlatShards((TensorSpec("rows", (whole.shape[0],), ""),), count).padded_numel
        rows = padded_rows or even
        whole = torch.cat([whole, whole.new_zeros((rows - whole.shape[0], *whole.shape[1:]))])
    subs = whole.split(how.sizes(whole.shape[how.dim]), how.dim)
    # Uneven widths hold for the number of ranks that they were saved at; others share as evenly as can be.
    if how.widths and len(how.widths[0]) == count:
        cuts = zip(subs, how.widths, strict=True)
        parts = [sub.split(list(width), how.dim)[rank] for sub, width in cuts]
    else:
        parts = [sub.tensor_split(count, how.dim)[rank] for sub in subs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, how.dim)


# A parameter that loads its own state, for models that handle their loading themselves.


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
        how = Joining.said(held)
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
