"""A checkpoint of several model-parallel ranks as one of them sees it, at the saved tensor-parallel degree or another.

    same degree      this rank's own files; what only other pipeline stages hold follows
    other degree     each tensor is joined from the slices of all tensor-parallel ranks and cut anew

How slices make a whole is what ``universal_checkpoint_info`` says: the model's, or the one in the checkpoint.
At most one whole tensor is in memory at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from zeropipe.checkpoint import constants as k
from zeropipe.checkpoint.manifest import FlatEntry, TensorEntry
from zeropipe.checkpoint.numbers import Numbers
from zeropipe.checkpoint.source import Source, read_full
from zeropipe.checkpoint.state import ModuleRest, TrainState
from zeropipe.checkpoint.universal.patterns import Joining, Rule, join, joining_of, split
from zeropipe.errors import CheckpointError
from zeropipe.layout.flat import FlatShards, TensorSpec

_Entry = TypeVar("_Entry", TensorEntry, FlatEntry)


@dataclass(frozen=True, slots=True)
class Place:
    """A model-parallel rank of a run. ``shapes``: what it holds, where known: vocabularies are padded to fit."""

    tp_rank: int = 0
    tp_degree: int = 1
    pp_rank: int = 0
    shapes: Mapping[str, tuple[int, ...]] | None = None


WHOLE = Place()


def seen_from(source: Source, place: Place, info: Mapping[str, Any] | None = None) -> Source:
    """``source`` with the names and shapes of one model-parallel rank.

    ``info``: ``universal_checkpoint_info`` of the model that loads; the checkpoint's own is used where it is None.
    Raises CheckpointError where slices must be cut anew and neither says how.
    """
    saved = int(source.degrees.get("tp", 1))
    if saved == place.tp_degree == 1 and source.degrees.get("pp", 1) == 1:
        return source
    if saved == place.tp_degree:
        return _Own(source, place)
    rules = info if info is not None else source.universal_info
    if rules is None:
        raise CheckpointError(
            f"{source.folder} holds slices of tensors, and nothing says how they make a whole",
            expected=f"tensor-parallel degree {saved}, as saved",
            found=place.tp_degree,
            fix="give the module a `universal_checkpoint_info` (a dict of patterns, or a function that returns "
            "it), or mark its parameters with Megatron's `tensor_model_parallel` and `partition_dim`",
        )
    return _Cut(source, place, rules)


def joined(source: Source) -> Source:
    """``source`` with whole tensors, whatever it was saved at."""
    return seen_from(source, WHOLE)


class _View:
    """Everything of a source but its tensors, passed on."""

    def __init__(self, source: Source, place: Place) -> None:
        self._source = source
        self.folder = source.folder
        self.tag = source.tag
        self.stage = source.stage
        self.dtype = source.dtype
        self.optimizer = source.optimizer
        self.world = source.world
        self.degrees = dict(source.degrees) | {"tp": place.tp_degree}
        self.tied = source.tied
        self.universal_info = source.universal_info
        self.left_out = getattr(source, "left_out", "")
        self._tp_rank = place.tp_rank

    @property
    def param_groups(self) -> tuple[dict[str, Any], ...]:
        return self._source.param_groups

    def rest(self, tp_rank: int | None = None) -> ModuleRest:
        return self._source.rest(self._tp_rank if tp_rank is None else tp_rank)

    def train_state(self, rank: int) -> TrainState:
        return self._source.train_state(rank)


class _Own(_View):
    """At the saved tensor-parallel degree: the entries of this tensor-parallel rank, its own stage's first."""

    def __init__(self, source: Source, place: Place) -> None:
        super().__init__(source, place)
        self.module = tuple(_mine(source.module, place))
        self.flats = tuple(_mine(source.flats, place))

    def flat_tensor(self, entry: FlatEntry, shard: int, key: str) -> torch.Tensor:
        return self._source.flat_tensor(entry, shard, key)

    def flat_scalars(self, entry: FlatEntry) -> dict[str, Any]:
        return self._source.flat_scalars(entry)

    def module_tensor(self, entry: TensorEntry) -> torch.Tensor:
        return self._source.module_tensor(entry)


def _mine(entries: Sequence[_Entry], place: Place) -> list[_Entry]:
    own = [e for e in entries if e.mp_rank % place.tp_degree == place.tp_rank]
    return sorted(own, key=lambda e: e.mp_rank // place.tp_degree != place.pp_rank)


class _Cut(_View):
    """At another tensor-parallel degree: every tensor is a flat of one shard, joined and cut when it is read."""

    def __init__(self, source: Source, place: Place, rules: Mapping[str, Any]) -> None:
        super().__init__(source, place)
        self._place = place
        self._rules = rules
        self._saved = int(source.degrees["tp"])
        self._values = self._by_name((e.name, e) for e in source.module)
        self._holders = self._by_name((s.name, e) for e in source.flats for s in e.layout.tensors)
        self._kept: tuple[tuple[str, str], torch.Tensor] | None = None
        self._numbers = Numbers(source)
        self.module = tuple(self._entry(name, held) for name, held in self._values.items())
        self.flats = tuple(self._flat(name, held) for name, held in self._holders.items())

    def flat_tensor(self, entry: FlatEntry, shard: int, key: str) -> torch.Tensor:
        if self._kept is None or self._kept[0] != (entry.name, key):
            self._kept = None
            slices = [read_full(self._source, held, entry.name, key) for held in self._holders[entry.name]]
            self._kept = ((entry.name, key), self._block(entry.name, slices).reshape(-1))
        return self._kept[1]

    def flat_scalars(self, entry: FlatEntry) -> dict[str, Any]:
        return self._numbers.all_of(self._holders[entry.name][0], entry.name)

    def module_tensor(self, entry: TensorEntry) -> torch.Tensor:
        return self._block(entry.name, [self._source.module_tensor(e) for e in self._values[entry.name]])

    def _by_name(self, entries: Any) -> dict[str, list[Any]]:
        """Name -> the entries of all tensor-parallel ranks of the first stage that has it, in their order."""
        found: dict[str, dict[int, Any]] = {}
        for name, entry in entries:
            found.setdefault(name, {}).setdefault(entry.mp_rank, entry)
        ranks: dict[str, list[Any]] = {}
        for name, by_rank in found.items():
            # Layer files are numbered by tensor-parallel rank alone, others by stage too.
            stage = min(by_rank) // self._saved
            wanted = range(stage * self._saved, (stage + 1) * self._saved)
            lost = [rank for rank in wanted if rank not in by_rank]
            if lost:
                raise CheckpointError(
                    f"{self.folder} lacks the slice of {name} of model-parallel rank {lost[0]}",
                    expected=f"{self._saved} slices",
                    found=len(by_rank),
                    fix="copy all ranks' files into one folder",
                )
            ranks[name] = [by_rank[rank] for rank in wanted]
        return ranks

    def _how(self, name: str, shapes: Sequence[tuple[int, ...]]) -> Joining:
        if not shapes[0]:
            return Joining(Rule.REPLICATED)
        return joining_of(name, self._rules, shapes)

    def _block(self, name: str, slices: list[torch.Tensor]) -> torch.Tensor:
        how = self._how(name, [tuple(s.shape) for s in slices])
        try:
            whole = join(slices, how)
        except CheckpointError as error:
            raise CheckpointError(f"{name} in {self.folder}: {error}") from error
        return self._own_part(name, whole, how)

    def _own_part(self, name: str, whole: torch.Tensor, how: Joining) -> torch.Tensor:
        place = self._place
        if place.tp_degree == 1 and how.vocabulary is None:
            return whole
        rows = None
        if place.shapes is not None and name in place.shapes and how.vocabulary is not None:
            rows = place.shapes[name][0] * place.tp_degree
        return split(whole, how, place.tp_rank, place.tp_degree, rows)

    def _shape(self, name: str, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        """The shape of this rank's block, without reading a value."""
        how = self._how(name, shapes)
        if how.rule in (Rule.REPLICATED, Rule.AVERAGE):
            return shapes[0]
        whole = join([torch.empty(shape, device="meta") for shape in shapes], how)
        return tuple(self._own_part(name, whole, how).shape)

    def _entry(self, name: str, held: list[TensorEntry]) -> TensorEntry:
        return replace(held[0], shape=self._shape(name, [e.shape for e in held]), mp_rank=self._place.tp_rank)

    def _flat(self, name: str, held: list[FlatEntry]) -> FlatEntry:
        first = held[0]
        specs = [entry.layout.tensors[entry.layout.index(name)] for entry in held]
        shape = self._shape(name, [spec.shape for spec in specs])
        layout = FlatShards((TensorSpec(name, shape, specs[0].dtype),), 1)
        return replace(
            first,
            name=name,
            mp_rank=self._place.tp_rank,
            layout=layout,
            files=first.files[:1],
        )


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
