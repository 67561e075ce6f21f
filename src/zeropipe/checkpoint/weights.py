"""The weights of a checkpoint one by one, in full precision, whatever the layout that they were saved in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from zeropipe.checkpoint.manifest import FlatEntry, TensorEntry
from zeropipe.checkpoint.parallel import joined
from zeropipe.checkpoint.source import Source, read_full, value_key
from zeropipe.checkpoint.state import COMPUTED


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor that is read when asked for."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype  # as stored
    kind: str  # "param", "frozen", "buffer", "computed"
    source: Source
    flat: FlatEntry | None  # where its elements are; None: in the module
    entry: TensorEntry | None

    def read(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The whole tensor, new memory; floating values in ``dtype`` where given."""
        if self.flat is not None:
            key = value_key(self.flat)
            assert key is not None
            value = read_full(self.source, self.flat, self.name, key)
        else:
            assert self.entry is not None
            value = self.source.module_tensor(self.entry).clone()
        return value.to(dtype) if dtype is not None and value.is_floating_point() else value

    def contiguous(self) -> torch.Tensor:
        """The whole tensor in fp32: what readers of lazy state dicts call."""
        return self.read(torch.float32)


def weights(source: Source, *, exclude_frozen: bool = False) -> Iterator[Weight]:
    """Each weight and buffer once and whole, parameters from their fp32 masters where there are any.

    Tied names are not repeated: ``source.tied`` has them. Order: as in the module, then what only shards hold.
    """
    source = joined(source)
    holders: dict[str, FlatEntry] = {}
    hidden = source.rest().hidden
    for held in source.flats:
        if value_key(held) is not None:
            for spec in held.layout.tensors:
                if spec.name not in hidden:
                    holders.setdefault(spec.name, held)
    seen: set[str] = set()
    for entry in source.module:
        if entry.name in seen or (exclude_frozen and entry.kind == "frozen"):
            continue
        seen.add(entry.name)
        flat = None if entry.kind == COMPUTED else holders.get(entry.name)
        dtype = getattr(torch, entry.dtype if flat is None else flat.keys[value_key(flat) or ""])
        yield Weight(entry.name, entry.shape, dtype, entry.kind, source, flat, entry)
    for name, holder in holders.items():
        key = value_key(holder)
        frozen = key == "param"
        if name in seen or key is None or (frozen and exclude_frozen):
            continue
        shape = holder.layout.tensors[holder.layout.index(name)].shape
        kind = "frozen" if frozen else "param"
        yield Weight(name, shape, getattr(torch, holder.keys[key]), kind, source, holder, None)


def aliases(source: Source) -> dict[str, list[str]]:
    """First name of a tied tensor -> its other names."""
    found: dict[str, list[str]] = {}
    for other, name in source.tied.items():
        found.setdefault(name, []).append(other)
    return found
