"""A checkpoint to read, as data: named entries with their layout, their dtype and a way to read them.

    folder of ours      parse_ours       \\
    DeepSpeed's files   parse_deepspeed   \\  Checkpoint ---seen_from---> Checkpoint ---> load, export, compare, convert
    universal format    parse_universal   /             (as one rank of another shape sees it: other entries,
    torch's DCP         parse_dcp        /               nothing else)

A parser looks at names and layouts alone; bytes are read when an entry's ``read`` is called. Nothing behind this file
knows who wrote the files.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch

from zeropipe.checkpoint.save.files import load_torch
from zeropipe.checkpoint.save.records import COMPUTED, FP32, PARAM, ModuleRest, TrainState
from zeropipe.errors import CheckpointError
from zeropipe.layout.flat import FlatShards, TensorSpec
from zeropipe.layout.numbers import NEVER_STEPPED, number_of, split_numbers
from zeropipe.runtime.optimizers.state_kinds import Shared, of_one

_Item = TypeVar("_Item")
STEP = "step"  # the one number that other formats have a place for


@dataclass(frozen=True, eq=False)
class Value:
    """One tensor of the module, as one model-parallel rank holds it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str  # "param", "frozen", "buffer" or "computed" (by a hook)
    file: str
    mp_rank: int
    read: Callable[[], torch.Tensor]  # may be mapped from the file: to copy from, not to keep

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor, kind: str, file: str, mp_rank: int = 0) -> Value:
        """Of a tensor in an opened file."""
        return cls(name, tuple(tensor.shape), dtype_name(tensor), kind, file, mp_rank, lambda: tensor)

    def as_flat(self) -> Flat:
        """A flat of one shard that holds it, for whoever reads elements."""
        layout = FlatShards((TensorSpec(self.name, self.shape, self.dtype),), 1)
        keys = {PARAM: self.dtype}
        return Flat(self.name, self.mp_rank, 0, layout, keys, lambda *_: self.read().reshape(-1), dict)


# Entries are themselves, whatever they are called: two flats of one name may lie on different pipeline stages.
@dataclass(frozen=True, eq=False)
class Flat:
    """One flat layout: what is stored for its tensors, and where the shards are."""

    name: str
    mp_rank: int
    group_index: int
    layout: FlatShards
    keys: Mapping[str, str]  # "fp32", "exp_avg", ... -> dtype
    # (shard, key): 1D, the shard's pieces; its padding may be absent.
    read: Callable[[int, str], torch.Tensor]
    read_numbers: Callable[[], Mapping[str, Any]]  # optimizer state with one value per flat

    @classmethod
    def of(
        cls,
        name: str,
        mp_rank: int,
        group: int,
        layout: FlatShards,
        shards: Sequence[Mapping[str, torch.Tensor]],
        numbers: Mapping[str, Any],
    ) -> Flat:
        """Of tensors in opened files, by shard."""
        keys = {key: dtype_name(tensor) for key, tensor in shards[-1].items()}
        return cls(name, mp_rank, group, layout, keys, lambda shard, key: shards[shard][key], lambda: numbers)

    @property
    def value_key(self) -> str | None:
        """The key of the parameters' values, None where only moments are kept."""
        return next((key for key in (FP32, PARAM) if key in self.keys), None)

    @property
    def moments(self) -> dict[str, str]:
        """The optimizer's state with one value per element: key -> dtype."""
        return {key: dtype for key, dtype in self.keys.items() if key not in (FP32, PARAM)}

    def shape_of(self, tensor: str) -> tuple[int, ...]:
        return self.layout.tensors[self.layout.index(tensor)].shape

    def whole(self, tensor: str, key: str) -> torch.Tensor:
        """One tensor put together from its shards; a new tensor of the tensor's shape."""
        shape = self.shape_of(tensor)
        return self.run(tensor, key, 0, torch.Size(shape).numel()).view(shape)

    def run(
        self, tensor: str, key: str, start: int, stop: int, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Elements [start, stop) of one flattened tensor: in ``out``, which is 1D, else in new memory."""
        run = torch.empty(stop - start, dtype=getattr(torch, self.keys[key])) if out is None else out
        first, done = self.layout.offsets[self.layout.index(tensor)], 0
        # Shard by shard: what lies in others is not read.
        for piece in self.layout.cut(first + start, first + stop):
            shard = self.read(piece.shard, key)
            run[done : done + piece.numel] = shard[piece.offset : piece.offset + piece.numel]
            done += piece.numel
        return run

    # State beside tensors. ``layout.numbers`` says which numbers belong to one tensor; each flat is read once.

    # Kept: each tensor of a flat asks, and a flat may hold thousands.
    @cached_property
    def _numbers(self) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        return split_numbers(self.read_numbers(), (spec.name for spec in self.layout.tensors))

    @property
    def shared(self) -> dict[str, Any]:
        """The numbers that hold for all tensors of the flat."""
        return self._numbers[0]

    def own(self, tensor: str) -> dict[str, Any]:
        """Those of one tensor alone, by their keys."""
        return self._numbers[1].get(tensor, {})

    def numbers_of(self, tensor: str) -> Shared:
        """What the tensor has of the numbers that all share; None where it was never stepped."""
        return of_one(self.shared, self.own(tensor)) if self.shared or self.moments else None

    def all_numbers_of(self, tensor: str) -> dict[str, Any]:
        """Everything that is known of one tensor, named as in a flat that holds only it."""
        shared = self.numbers_of(tensor)
        # Said in words, or the flat's moments, which are zeros, would be taken for state.
        known = {number_of(NEVER_STEPPED, tensor): True} if shared is None else shared
        return known | self.further(tensor, tensor)

    def further(self, tensor: str, name: str) -> dict[str, Any]:
        """Those that only this tensor has, by their names in a flat where it is called ``name``."""
        return {
            number_of(key, name): value
            for key, value in self.own(tensor).items()
            if key not in self.shared and key != NEVER_STEPPED
        }


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of the module as it is read, from wherever it is."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype  # as stored
    kind: str
    flat: Flat
    value: Value | None  # the flat's own, where it is one of the module's

    def run(self, start: int, stop: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """As of the flat."""
        return self.flat.run(self.name, self.flat.value_key or "", start, stop, out)

    def read(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The whole tensor, new memory; floating values in ``dtype`` where given."""
        # Not by runs of elements where there is a value: a module's buffer may be sparse.
        numel = torch.Size(self.shape).numel()
        whole = self.run(0, numel).view(self.shape) if self.value is None else self.value.read().clone()
        return whole.to(dtype) if dtype is not None and whole.is_floating_point() else whole

    def contiguous(self) -> torch.Tensor:
        """The whole tensor in fp32: what readers of lazy state dicts call."""
        return self.read(torch.float32)


def chosen(
    name: str, value: Value | None, flat: Flat | None, dtype: torch.dtype | None = None
) -> Weight | None:
    """Where a tensor is read from that may be in both: its master, unless the module has it in ``dtype`` as it is."""
    if value is not None:
        kept: torch.dtype = getattr(torch, value.dtype)
        # A hook's value is no rounded master: it stands for itself.
        if flat is None or value.kind == COMPUTED or kept == dtype:
            return Weight(value.name, value.shape, kept, value.kind, value.as_flat(), value)
    if flat is None:
        return None
    key = flat.value_key or ""
    kind = value.kind if value is not None else "frozen" if key == PARAM else "param"
    shape = flat.shape_of(name) if value is None else value.shape
    return Weight(name, shape, getattr(torch, flat.keys[key]), kind, flat, None)


@dataclass(frozen=True)
class Checkpoint:
    """What any checkpoint can tell. A view of it is ``dataclasses.replace``."""

    # The save as a whole.
    folder: Path
    tag: str
    stage: int
    dtype: str  # working precision
    optimizer: str
    world: int
    degrees: Mapping[str, int]  # sizes of the axes: {"dp": 2, "tp": 1, "pp": 1}

    # Its entries, as a view sees them: all there are, or those of one rank.
    module: tuple[Value, ...]
    flats: tuple[Flat, ...]
    tied: Mapping[str, str]  # other name -> the name that the tensor is kept under

    # What stands beside the tensors, read when it is asked for as they are: a look at layouts opens no file for it.
    read_groups: Callable[[], Sequence[Mapping[str, Any]]]
    read_rules: Callable[[], Mapping[str, Any] | None]
    # Of the state dict, on all pipeline stages of one tensor-parallel rank.
    rest_of: Callable[[int], ModuleRest]
    train_state: Callable[[int], TrainState]  # by rank; ``per_rank`` is {} where there was no such rank

    # What reading it means to whoever reads.
    tp_rank: int = 0  # whose view this is
    # Why parts of the client state are not read; "" where each says so itself.
    left_out: Callable[[], str] = str
    threads: int = 1  # how many entries may be read at once

    @property
    def tp(self) -> int:
        return int(self.degrees.get("tp", 1))

    @property
    def pp(self) -> int:
        return int(self.degrees.get("pp", 1))

    @cached_property
    def param_groups(self) -> tuple[dict[str, Any], ...]:
        """Hyperparameters of each param group."""
        return tuple({key: v for key, v in group.items() if key != "params"} for group in self.read_groups())

    @property
    def hyperparameters(self) -> list[dict[str, Any]]:
        """``param_groups`` without the names of parameters."""
        return [{key: v for key, v in g.items() if key != "param_names"} for g in self.param_groups]

    @cached_property
    def universal_info(self) -> Mapping[str, Any] | None:
        """How slices of tensor-parallel ranks make a whole; None where the checkpoint does not say."""
        return self.read_rules()

    def rest(self) -> ModuleRest:
        """What the state dict held beside its tensors."""
        return self.rest_of(self.tp_rank)

    # By name, made when first asked for: looks at layouts alone need none of it.

    @cached_property
    def values(self) -> dict[str, list[Value]]:
        """By name; several where several model-parallel ranks have it, the rank's own first."""
        return _by_name((value.name, value) for value in self.module)

    @cached_property
    def holders(self) -> dict[str, list[Flat]]:
        """Tensor -> the flats that have something of it."""
        return _by_name((spec.name, flat) for flat in self.flats for spec in flat.layout.tensors)

    @cached_property
    def _others(self) -> dict[str, list[str]]:
        return _by_name((name, other) for other, name in self.tied.items())

    def names_of(self, name: str) -> list[str]:
        """The name that a tensor is kept under, then those that are tied to it."""
        return [name, *self._others.get(name, ())]

    @cached_property
    def trained(self) -> dict[str, Flat]:
        """Parameter -> the flat with its optimizer's state; a tied one's copies on other pipeline stages are equal."""
        flats = (flat for flat in self.flats if flat.keys.keys() - {PARAM})
        return {spec.name: flat for flat in flats for spec in flat.layout.tensors}

    def master(self, name: str) -> Flat | None:
        """The flat that has the values of a tensor."""
        return next((flat for flat in self.holders.get(name, ()) if flat.value_key), None)


def _by_name(items: Iterable[tuple[str, _Item]]) -> dict[str, list[_Item]]:
    found: dict[str, list[_Item]] = {}
    for name, item in items:
        found.setdefault(name, []).append(item)
    return found


# What parsers make entries with.


class Files:
    """Opened files of one folder; tensors in them are mapped, not read."""

    def __init__(
        self, folder: Path, trust: bool = False, opened: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        self.folder = folder
        self.trust = trust
        self._open = dict(opened)
        self._opening = threading.Lock()

    def __getitem__(self, name: str) -> Any:
        # Readers run on several threads; a file that two opened would be mapped twice.
        with self._opening:
            if name not in self._open:
                self._open[name] = load_torch(self.folder / name, trust=self.trust)
            return self._open[name]


class Last:
    """The tensor that was read last, as its pieces are asked for one after the other; there are never two of them."""

    def __init__(self) -> None:
        self._kept: tuple[object, torch.Tensor] | None = None

    def get(self, key: object, read: Callable[[], torch.Tensor]) -> torch.Tensor:
        kept = self._kept
        if kept is None or kept[0] != key:
            kept = self._kept = None  # nobody holds the old one while the new one is read
            # Of two threads that read at once the later one's is kept; each gets its own.
            kept = self._kept = (key, read())
        return kept[1]


def dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def united(rests: Iterable[ModuleRest]) -> ModuleRest:
    """What several files say of one state dict."""
    extra: dict[str, Any] = {}
    versions: dict[str, Any] | None = None
    hidden: set[str] = set()
    for rest in rests:
        extra |= rest.extra
        hidden |= rest.hidden
        if rest.versions is not None:
            versions = (versions or {}) | dict(rest.versions)
    return ModuleRest(extra, versions, frozenset(hidden))


def plain_of(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """What a state dict holds beside its tensors."""
    return {prefix + key: v for key, v in tree.items() if not isinstance(v, torch.Tensor)}


def counts_of(lead: Mapping[str, Any]) -> dict[str, Any]:
    """What every model file says of the run, as fields of a TrainState."""
    counts = {key: int(lead.get(key) or 0) for key in ("global_steps", "global_samples", "skipped_steps")}
    return counts | {"lr_scheduler": lead.get("lr_scheduler"), "ds_config": lead.get("ds_config") or {}}


def lost_file(folder: Path, what: str, expected: str, found: int) -> CheckpointError:
    """What a rank wrote is not there."""
    return CheckpointError(
        f"{folder} lacks {what}", expected=expected, found=found, fix="copy all ranks' files into one folder"
    )
