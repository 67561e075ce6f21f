"""The state dict that a module gave when it was saved: put together from a source, tensors read when they are used.

It is needed where loading is more than copying values to their names: a module with hooks, with state of its own, or
that loads itself, gets what ``module.load_state_dict`` would give it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from zeropipe.checkpoint.manifest import FlatEntry, TensorEntry
from zeropipe.checkpoint.regions import Regions
from zeropipe.checkpoint.source import Source, value_key
from zeropipe.checkpoint.state import COMPUTED, ModelState, ModuleRest
from zeropipe.checkpoint.stored import Read, stored


def saved_module(
    source: Source, model: ModelState, rest: ModuleRest, dtypes: Mapping[str, torch.dtype]
) -> dict[str, Any]:
    """Key -> tensor or extra state, for the keys inside of the regions of ``model`` (see there).

    ``rest``: the source's. ``dtypes``: of the parameters that will take the values; what was saved in another one is
    read from its master.
    """
    inside = Regions(model.regions)
    tensors: dict[str, Any] = {}
    entries: dict[str, TensorEntry] = {}
    flats: dict[str, FlatEntry] = {}
    for entry in source.module:
        if entry.file:
            entries.setdefault(entry.name, entry)
    for flat in source.flats:
        if value_key(flat) is not None:
            for spec in flat.layout.tensors:
                flats.setdefault(spec.name, flat)
    names = dict.fromkeys([*entries, *(n for n in flats if n not in rest.hidden)])
    aliases = {name: name for name in names}
    aliases |= {other: first for other, first in source.tied.items() if first in entries or first in flats}
    aliases |= {ours: peer for peer, ours in model.peer_names.items() if peer in names and ours not in names}
    for key, name in aliases.items():
        if inside.of(key) is None:
            continue
        held, flat_of = entries.get(name), flats.get(name)
        wanted = dtypes.get(key)
        other = wanted is not None and held is not None and getattr(torch, held.dtype) != wanted
        if held is not None and (flat_of is None or held.kind in ("buffer", COMPUTED) or not other):
            tensors[key] = stored(held.shape, getattr(torch, held.dtype), _from_entry(source, held))
        elif flat_of is not None:
            tensors[key] = _from_flat(source, flat_of, name)
    return tensors | {key: value for key, value in rest.extra.items() if inside.of(key) is not None}


def _from_entry(source: Source, entry: TensorEntry) -> Read:
    return lambda start, stop: source.module_tensor(entry).reshape(-1)[start:stop].clone()


def _from_flat(source: Source, flat: FlatEntry, name: str) -> torch.Tensor:
    index = flat.layout.index(name)
    key = value_key(flat)
    assert key is not None
    first, dtype = flat.layout.offsets[index], getattr(torch, flat.keys[key])

    def read(start: int, stop: int) -> torch.Tensor:
        run = torch.empty(stop - start, dtype=dtype)
        done = 0
        for piece in flat.layout.cut(first + start, first + stop):
            shard = source.flat_tensor(flat, piece.shard, key)
            run[done : done + piece.numel] = shard[piece.offset : piece.offset + piece.numel]
            done += piece.numel
        return run

    return stored(flat.layout.tensors[index].shape, dtype, read)
