"""A checkpoint of several model-parallel ranks as one of them sees it, at the saved tensor-parallel degree or another.

    same degree      this rank's own entries; what only other pipeline stages hold follows
    other degree     each tensor is joined from the slices of all tensor-parallel ranks and cut anew

How slices make a whole is what ``universal_checkpoint_info`` says: the model's, or the one in the checkpoint.
At most one whole tensor is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from zeropipe.checkpoint.sources.data import Checkpoint, Flat, Last, Value, lost_file
from zeropipe.checkpoint.sources.slices import Joining, Rule, join, joining_of, split
from zeropipe.checkpoint.state import COMPUTED, PARAM
from zeropipe.errors import CheckpointError
from zeropipe.layout.flat import FlatShards, TensorSpec

_Entry = TypeVar("_Entry", Value, Flat)


@dataclass(frozen=True, slots=True)
class Place:
    """A model-parallel rank of a run. ``shapes``: what it holds, where known: vocabularies are padded to fit."""

    tp_rank: int = 0
    tp_degree: int = 1
    pp_rank: int = 0
    shapes: Mapping[str, tuple[int, ...]] | None = None


WHOLE = Place()


def seen_from(source: Checkpoint, place: Place, info: Mapping[str, Any] | None = None) -> Checkpoint:
    """``source`` with the names and shapes of one model-parallel rank.

    ``info``: ``universal_checkpoint_info`` of the model that loads; the checkpoint's own is used where it is None.
    Raises CheckpointError where slices must be cut anew and neither says how.
    """
    if source.tp == place.tp_degree == source.pp == 1:
        return source
    # [1] As it was saved: entries are chosen, none is made.
    degrees = dict(source.degrees) | {"tp": place.tp_degree}
    if source.tp == place.tp_degree:
        module, flats = _mine(source.module, place), _mine(source.flats, place)
        return replace(source, tp_rank=place.tp_rank, module=module, flats=flats)
    # [2] Cut anew. What the module says now comes before what it said when it was saved.
    rules = info if info is not None else source.universal_info
    if rules is None:
        raise CheckpointError(
            f"{source.folder} holds slices of tensors, and nothing says how they make a whole",
            expected=f"tensor-parallel degree {source.tp}, as saved",
            found=place.tp_degree,
            fix="give the module a `universal_checkpoint_info` (a dict of patterns, or a function that returns "
            "it), or mark its parameters with Megatron's `tensor_model_parallel` and `partition_dim`",
        )
    cut, tp, folder = _Cut(source.folder, place, rules), source.tp, source.folder
    module = tuple(cut.value(name, _slices(name, held, tp, folder)) for name, held in source.values.items())
    last = Last()
    flats = tuple(
        cut.flat(name, _slices(name, held, tp, folder), last) for name, held in source.holders.items()
    )
    # Tensors are put together when they are read: one at a time.
    return replace(source, tp_rank=place.tp_rank, module=module, flats=flats, degrees=degrees, threads=1)


def joined(source: Checkpoint) -> Checkpoint:
    """``source`` with whole tensors, whatever it was saved at."""
    return seen_from(source, WHOLE)


def _mine(entries: Sequence[_Entry], place: Place) -> tuple[_Entry, ...]:
    own = [e for e in entries if e.mp_rank % place.tp_degree == place.tp_rank]
    return tuple(sorted(own, key=lambda e: e.mp_rank // place.tp_degree != place.pp_rank))


def _slices(name: str, held: Iterable[_Entry], count: int, folder: Path) -> list[_Entry]:
    """Of the entries of one name those of all ``count`` tensor-parallel ranks of the first stage that has it."""
    by_rank: dict[int, _Entry] = {}
    for entry in held:
        by_rank.setdefault(entry.mp_rank, entry)
    # Layer files are numbered by tensor-parallel rank alone, others by stage too.
    first = min(by_rank) // count * count
    for rank in range(first, first + count):
        if rank not in by_rank:
            what = f"the slice of {name} of model-parallel rank {rank}"
            raise lost_file(folder, what, f"{count} slices", len(by_rank))
    return [by_rank[rank] for rank in range(first, first + count)]


@dataclass(frozen=True)
class _Cut:
    """Another tensor-parallel degree: every tensor becomes a flat of one shard, joined and cut when it is read."""

    folder: Path
    place: Place
    rules: Mapping[str, Any]

    def value(self, name: str, held: list[Value]) -> Value:
        shape = self._shape(name, [e.shape for e in held])
        read = partial(self._block, name, [e.read for e in held])
        return replace(held[0], shape=shape, mp_rank=self.place.tp_rank, read=read)

    def flat(self, name: str, held: list[Flat], last: Last) -> Flat:
        first = held[0]
        shape = self._shape(name, [flat.shape_of(name) for flat in held])
        spec = first.layout.tensors[first.layout.index(name)]
        layout = FlatShards((TensorSpec(name, shape, spec.dtype),), 1)

        def read(shard: int, key: str) -> torch.Tensor:
            parts = [partial(flat.whole, name, key) for flat in held]
            return last.get((name, key), lambda: self._block(name, parts).reshape(-1))

        # Numbers belong to whole parameters: the first slice's are every slice's.
        numbers = partial(first.all_numbers_of, name)
        return Flat(name, self.place.tp_rank, first.group_index, layout, first.keys, read, numbers)

    def _how(self, name: str, shapes: Sequence[tuple[int, ...]]) -> Joining:
        return joining_of(name, self.rules, shapes) if shapes[0] else Joining(Rule.REPLICATED)

    def _block(self, name: str, reads: Sequence[Callable[[], torch.Tensor]]) -> torch.Tensor:
        slices = [read() for read in reads]
        how = self._how(name, [tuple(s.shape) for s in slices])
        try:
            whole = join(slices, how)
        except CheckpointError as error:
            raise CheckpointError(f"{name} in {self.folder}: {error}") from error
        return self._own_part(name, whole, how)

    def _own_part(self, name: str, whole: torch.Tensor, how: Joining) -> torch.Tensor:
        place = self.place
        if place.tp_degree == 1 and how.vocabulary is None:
            return whole
        # A vocabulary is padded to what this run holds, not to what the saved one did.
        rows = None
        if place.shapes is not None and name in place.shapes and how.vocabulary is not None:
            rows = place.shapes[name][0] * place.tp_degree
        return split(whole, how, place.tp_rank, place.tp_degree, rows)

    def _shape(self, name: str, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        """The shape of this rank's block, without reading a value."""
        how = self._how(name, shapes)
        if how.rule in (Rule.REPLICATED, Rule.AVERAGE):
            return shapes[0]
        # On the meta device, so that shapes follow the one rule that values do.
        whole = join([torch.empty(shape, device="meta") for shape in shapes], how)
        return tuple(self._own_part(name, whole, how).shape)


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor that is read when asked for, from its fp32 master where there is one."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype  # as stored
    kind: str
    flat: Flat | None  # where its elements are; None: in the module
    value: Value | None

    def read(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The whole tensor, new memory; floating values in ``dtype`` where given."""
        if self.flat is not None:
            found = self.flat.whole(self.name, self.flat.value_key or "")
        else:
            assert self.value is not None
            found = self.value.read().clone()
        return found.to(dtype) if dtype is not None and found.is_floating_point() else found

    def contiguous(self) -> torch.Tensor:
        """The whole tensor in fp32: what readers of lazy state dicts call."""
        return self.read(torch.float32)


def weights(source: Checkpoint, *, exclude_frozen: bool = False) -> Iterator[Weight]:
    """Each weight and buffer once and whole, parameters from their fp32 masters where there are any.

    Tied names are not repeated: ``source.tied`` has them. Order: as in the module, then what only shards hold.
    """
    whole = joined(source)
    hidden = whole.rest().hidden
    for name, (value, *_) in whole.values.items():
        if exclude_frozen and value.kind == "frozen":
            continue
        flat = None if value.kind == COMPUTED or name in hidden else whole.master(name)
        dtype = getattr(torch, value.dtype if flat is None else flat.keys[flat.value_key or ""])
        yield Weight(name, value.shape, dtype, value.kind, flat, value)
    for name in whole.holders:
        flat = whole.master(name)
        if flat is None or name in hidden or name in whole.values:
            continue
        key = flat.value_key or ""
        kind = "frozen" if key == PARAM else "param"
        if kind != "frozen" or not exclude_frozen:
            yield Weight(name, flat.shape_of(name), getattr(torch, flat.keys[key]), kind, flat, None)
