"""Fills the tensors that a rank wants from a source of any layout, reading only the bytes that it needs."""

from __future__ import annotations

from collections.abc import Mapping, Set
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from zeropipe.checkpoint.save.records import FP32, PARAM, FlatState, LoadedFlat, LocalState
from zeropipe.checkpoint.saved_module import Regions
from zeropipe.checkpoint.sources.data import Checkpoint, Flat, Value, chosen
from zeropipe.errors import CheckpointError
from zeropipe.layout.copy_plan import copies_of
from zeropipe.layout.flat import FlatShards, Piece
from zeropipe.runtime.optimizers.state_kinds import Shared, named_numbers


@dataclass(slots=True)
class _Report:
    missing: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Filled:
    flats: dict[str, LoadedFlat]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    notices: tuple[str, ...]


class Reader:
    """Reads one checkpoint, as this rank sees it (``parallel.seen_from``), for one rank."""

    def __init__(self, source: Checkpoint, into: LocalState) -> None:
        self._source = source
        self._into = into
        # Name -> other names of the same tensor: the source's, then the destination's.
        self._aliases: dict[str, list[str]] = {}
        for names in (source.tied, into.model.tied, into.model.peer_names):
            for alias, first in names.items():
                self._aliases.setdefault(first, []).append(alias)
        self._regions = Regions(into.model.regions)  # the values of those are loaded by the modules' own code
        self._report = _Report()

    def fill(self, *, optimizer: bool, moments: bool = True) -> Filled:
        """Write into the destination's tensors in place.

        ``optimizer``: fill the flats at all; ``moments=False`` fills only the masters. Shapes are checked
        before the first byte is written. Raises CheckpointError for a tensor of another shape.
        """
        # [1] Nothing is written before every shape is known to fit: a refused load leaves the engine as it was.
        self.check_shapes()
        wanted_flats = [f for f in self._into.flats if optimizer or PARAM in f.tensors]
        with ThreadPoolExecutor(self._source.threads) as pool:
            # [2] Weights first: in fp32 the masters are views of them, and theirs is the last word.
            values = pool.map(lambda item: self._fill_tensor(*item), self._into.model.tensors.items())
            self._report.missing += [name for name in values if name]
            flats = {flat.name: self._fill_flat(flat, moments, pool) for flat in wanted_flats}
        # [3] What the checkpoint has and nobody asked for. A tied tensor is asked for by any of its names, and what
        # lies in a region is the business of its modules' code.
        model = self._into.model
        wanted = {*model.tensors, *model.tied, *model.excluded, *model.peer_names}
        wanted |= {t.name for f in self._into.flats for t in f.layout.tensors}
        there = {*self._source.holders, *self._source.values}
        first_names = {self._source.tied.get(name, name) for name in wanted}
        others = there - wanted - first_names - set(self._source.tied)
        unexpected = tuple(sorted(name for name in others if self._regions.of(name) is None))
        return Filled(
            flats, tuple(dict.fromkeys(self._report.missing)), unexpected, tuple(self._report.notices)
        )

    # Single tensors of the module.

    @torch.no_grad()  # of the thread that it runs in
    def _fill_tensor(self, name: str, out: torch.Tensor) -> str:
        """The module's value if it has the right dtype, else the master's, else the module's cast.

        The name where there is none, "" where there is.
        """
        there = self._first_name(name, self._source.holders)
        found = chosen(there, self._module_entry(name), self._source.master(there), out.dtype)
        if found is None:
            return name
        if found.flat is not None and out.is_contiguous() and out.device.type == "cpu":
            found.run(0, out.numel(), out.detach().view(-1))  # no second tensor of its size
        else:
            out.copy_(found.read() if found.value is None else found.value.read())
        return ""

    def _module_entry(self, name: str) -> Value | None:
        values = self._source.values
        return next(iter(values.get(self._first_name(name, values), ())), None)

    def _held_by(self, name: str) -> tuple[str, list[Flat]]:
        """A tensor's name in the source, and the flats that have something of it."""
        there = self._first_name(name, self._source.holders)
        return there, self._source.holders.get(there, [])

    def _first_name(self, name: str, index: Mapping[str, Any]) -> str:
        """The name under which the source keeps a tied tensor."""
        if name in index:
            return name
        first = self._source.tied.get(name)
        if first is not None:
            return first
        return next((alias for alias in self._aliases.get(name, ()) if alias in index), name)

    # Flats.

    def _fill_flat(self, flat: FlatState, moments: bool, pool: Executor) -> LoadedFlat:
        # A tensor that was never stepped has zeros for moments in a flat that others of were: they mean nothing.
        names = [spec.name for spec in flat.layout.tensors]
        shared = {name: self._shared(name) if moments else None for name in names}
        stepped = {name for name in names if shared[name] is not None}
        tensors = dict(flat.tensors)
        # Moments that the destination has no memory for: its optimizer makes them at the first step, too late to fill.
        if moments:
            for held in dict.fromkeys(held for name in stepped for held in self._held_by(name)[1]):
                for key, dtype in held.moments.items():
                    if key not in tensors:
                        tensors[key] = torch.zeros(flat.layout.shard_numel, dtype=getattr(torch, dtype))
        asked = {key: out for key, out in tensors.items() if moments or key in (FP32, PARAM)}
        found = pool.map(lambda item: self._fill_key(flat, item[0], item[1], stepped), asked.items())
        for (key, out), filled in zip(asked.items(), found, strict=True):
            lost = [n for n in names if n not in filled and (key in (FP32, PARAM) or n in stepped)]
            if key in (FP32, PARAM):
                lost = [n for n in lost if self._regions.of(n) is None]
                self._report.missing += self._from_module(flat, lost, out)
            elif lost and filled:
                self._report.notices.append(
                    f"{key} of {len(lost)} parameter(s) is not in the checkpoint and starts at zero: {lost[0]}"
                )
        if stepped and len(stepped) < len(names):
            new = [name for name in names if name not in stepped]
            self._report.notices.append(
                f"{len(new)} parameter(s) have no optimizer state in the checkpoint and start as new ones: {new[0]}"
            )
        return LoadedFlat(tensors, self._scalars(flat, shared) if moments else {})

    @torch.no_grad()
    def _fill_key(self, flat: FlatState, key: str, out: torch.Tensor, stepped: Set[str]) -> set[str]:
        """Copy one kind of tensor, moments only of what was ``stepped``; the names that it was found for."""
        layout, found = flat.layout, self._holders(flat.layout, key)
        if key not in (FP32, PARAM):
            found = {at: held for at, held in found.items() if layout.tensors[at].name in stepped}
        # By source, so that neighbours that lie together there too are one copy.
        wanted: dict[tuple[Flat, str], list[tuple[Piece, int]]] = {}
        for piece in layout.pieces(flat.shard):
            if piece.tensor in found:
                held, source_key, tensor = found[piece.tensor]
                wanted.setdefault((held, source_key), []).append((piece, tensor))
        for (held, source_key), pieces in wanted.items():
            for copy in copies_of(pieces, held.layout):
                shard = held.read(copy.src_shard, source_key)
                out[copy.dst_offset : copy.dst_offset + copy.numel].copy_(
                    shard[copy.src_offset : copy.src_offset + copy.numel]
                )
        return {layout.tensors[index].name for index in found}

    def _holders(self, layout: FlatShards, key: str) -> dict[int, tuple[Flat, str, int]]:
        """Tensor of ``layout`` -> (the first source that has ``key`` of it, its own word for it, index there)."""
        found: dict[int, tuple[Flat, str, int]] = {}
        for index, spec in enumerate(layout.tensors):
            name, holders = self._held_by(spec.name)
            for held in holders:
                if not _fits(held.shape_of(name), spec.shape):
                    continue  # in a region, where code may reshape; ``check_shapes`` has refused it elsewhere
                source_key = held.value_key if key in (FP32, PARAM) else key
                if source_key is not None and source_key in held.keys:
                    found[index] = (held, source_key, held.layout.index(name))
                    break
        return found

    def _from_module(self, flat: FlatState, names: list[str], out: torch.Tensor) -> list[str]:
        """Masters that the source does not have (saved without an optimizer, or frozen) from its module; the names
        that it does not have either."""
        entries = {name: self._module_entry(name) for name in names}
        for piece in flat.layout.pieces(flat.shard) if names else ():
            entry = entries.get(flat.layout.tensors[piece.tensor].name)
            if entry is not None:
                values = entry.read().reshape(-1)
                out[piece.offset : piece.offset + piece.numel].copy_(
                    values[piece.start : piece.start + piece.numel]
                )
        return [name for name, entry in entries.items() if entry is None]

    def _shared(self, name: str) -> Shared:
        """What the source has for the tensor that is no tensor itself; None where it was never stepped."""
        there, holders = self._held_by(name)
        found = (held.numbers_of(there) for held in holders)
        return next((shared for shared in found if shared is not None), None)

    def _scalars(self, flat: FlatState, shared: Mapping[str, Shared]) -> dict[str, Any]:
        """What the flat's tensors share, each in its own words where they differ, and what only one has."""
        specs = flat.layout.tensors
        numbers = named_numbers(list(shared), list(shared.values()), [spec.numel for spec in specs])
        for spec in specs:
            name, holders = self._held_by(spec.name)
            for held in holders:
                further = held.further(name, spec.name)
                numbers |= {key: value for key, value in further.items() if key not in numbers}
        return numbers

    def check_shapes(self) -> None:
        """Raises CheckpointError for a tensor of another shape; nothing has been written by then."""
        wanted: dict[str, tuple[int, ...]] = {n: tuple(t.shape) for n, t in self._into.model.tensors.items()}
        for flat in self._into.flats:
            wanted |= {t.name: t.shape for t in flat.layout.tensors}
        for name, shape in wanted.items():
            for found in self._shapes_there(name) if self._regions.of(name) is None else ():
                if not _fits(found, shape):
                    raise CheckpointError(
                        f"{name} in {self._source.folder} does not fit the model",
                        expected=shape,
                        found=found,
                        fix="load into the model that was saved; nothing has been changed",
                    )

    def _shapes_there(self, name: str) -> list[tuple[int, ...]]:
        source = self._source
        shapes = [value.shape for value in source.values.get(name, ())]
        return shapes + [flat.shape_of(name) for flat in source.holders.get(name, ())]


def _fits(found: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """A scalar may have been stored as one element; anything else must match."""
    return found == shape or (found in ((), (1,)) and shape in ((), (1,)))
