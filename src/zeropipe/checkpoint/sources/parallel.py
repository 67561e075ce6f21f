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

from zeropipe.checkpoint.save.records import Grid
from zeropipe.checkpoint.sources import Checkpoint, Flat, Last, Value, Weight, chosen, lost_file
from zeropipe.checkpoint.universal_checkpoint import join, joining_of, split
from zeropipe.errors import CheckpointError
from zeropipe.layout.flat import FlatShards, TensorSpec

_Entry = TypeVar("_Entry", Value, Flat)


def seen_from(
    source: Checkpoint,
    place: Grid,
    info: Mapping[str, Any] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Checkpoint:
    """``source`` with the names and shapes of one model-parallel rank.

    ``info``: ``universal_checkpoint_info`` of the model that loads; the checkpoint's own is used where it is None.
    ``shapes``: what the rank holds, where known: vocabularies are padded to fit. Raises CheckpointError where slices
    must be cut anew and neither says how.
    """
    tp = source.tp
    if tp == place.tp_degree == source.pp == 1:
        return source
    # [1] As it was saved: entries are chosen, none is made.
    if tp == place.tp_degree:
        module, flats = _mine(source.module, place), _mine(source.flats, place)
        return replace(source, tp_rank=place.tp_rank, module=module, flats=flats)
    # [2] Cut anew. What the module says now comes before what it said when it was saved.
    rules = info if info is not None else source.universal_info
    if rules is None:
        raise CheckpointError(
            f"{source.folder} holds slices of tensors, and nothing says how they make a whole",
            expected=f"tensor-parallel degree {tp}, as saved",
            found=place.tp_degree,
            fix="give the module a `universal_checkpoint_info` (a dict of patterns, or a function that returns "
            "it), or mark its parameters with Megatron's `tensor_model_parallel` and `partition_dim`",
        )
    cut, folder = _Cut(source.folder, place, rules, shapes or {}, Last()), source.folder
    return replace(
        source,
        tp_rank=place.tp_rank,
        degrees=dict(source.degrees) | {"tp": place.tp_degree},
        module=tuple(
            cut.value(name, _slices(name, held, tp, folder)) for name, held in source.values.items()
        ),
        flats=tuple(cut.flat(name, _slices(name, held, tp, folder)) for name, held in source.holders.items()),
        threads=1,  # tensors are put together when they are read: one at a time
    )


def joined(source: Checkpoint) -> Checkpoint:
    """``source`` with whole tensors, whatever it was saved at."""
    return seen_from(source, Grid())


def weights(source: Checkpoint, *, exclude_frozen: bool = False) -> Iterator[Weight]:
    """Each weight and buffer once and whole, parameters from their fp32 masters where there are any.

    Tied names are not repeated: ``source.tied`` has them. Order: as in the module, then what only shards hold.
    """
    whole = joined(source)
    hidden = whole.rest().hidden
    for name in dict.fromkeys((*whole.values, *(name for name in whole.holders if name not in hidden))):
        value = next(iter(whole.values.get(name, ())), None)
        weight = chosen(name, value, None if name in hidden else whole.master(name))
        if weight is not None and not (exclude_frozen and weight.kind == "frozen"):
            yield weight


def _mine(entries: Sequence[_Entry], place: Grid) -> tuple[_Entry, ...]:
    # The rank's own stage first, so that of two copies of a tied tensor its own is read.
    own = [e for e in entries if e.mp_rank % place.tp_degree == place.tp_rank]
    return tuple(sorted(own, key=lambda e: e.mp_rank // place.tp_degree != place.pp_rank))


def _slices(name: str, held: Iterable[_Entry], count: int, folder: Path) -> list[_Entry]:
    """Of the entries of one name those of all ``count`` tensor-parallel ranks of the first stage that has it."""
    # A tied tensor is on several stages, and each has all of its slices: one stage's are enough.
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
    place: Grid
    rules: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    last: Last

    def value(self, name: str, held: list[Value]) -> Value:
        shape = self._shape(name, [e.shape for e in held])
        read = partial(self._read, name, [e.read for e in held])
        return replace(held[0], shape=shape, mp_rank=self.place.tp_rank, read=read)

    def flat(self, name: str, held: list[Flat]) -> Flat:
        first = held[0]
        spec = first.layout.tensors[first.layout.index(name)]
        shape = self._shape(name, [flat.shape_of(name) for flat in held])
        layout = FlatShards((TensorSpec(name, shape, spec.dtype),), 1)

        def read(shard: int, key: str) -> torch.Tensor:
            # Its pieces are asked for one after the other: it is put together once for all of them.
            parts = [partial(flat.whole, name, key) for flat in held]
            return self.last.get((name, key), lambda: self._read(name, parts).reshape(-1))

        # Numbers belong to whole parameters: the first slice's are every slice's.
        numbers = partial(first.all_numbers_of, name)
        return Flat(name, self.place.tp_rank, first.group_index, layout, first.keys, read, numbers)

    def _read(self, name: str, reads: Sequence[Callable[[], torch.Tensor]]) -> torch.Tensor:
        return self._own(name, [read() for read in reads])

    def _shape(self, name: str, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """The shape of this rank's slice. On the meta device, so that shapes follow the one rule that values do."""
        return tuple(self._own(name, [torch.empty(shape, device="meta") for shape in shapes]).shape)

    def _own(self, name: str, slices: Sequence[torch.Tensor]) -> torch.Tensor:
        place = self.place
        how = joining_of(name, self.rules, tuple(slices[0].shape))
        try:
            whole = join(slices, how)
        except CheckpointError as error:
            raise CheckpointError(f"{name} in {self.folder}: {error}") from error
        # A vocabulary is padded to what this run holds, not to what the saved one did.
        held = self.shapes.get(name)
        rows = held[0] * place.tp_degree if held and how.vocabulary is not None else None
        return split(whole, how, place.tp_rank, place.tp_degree, rows)
