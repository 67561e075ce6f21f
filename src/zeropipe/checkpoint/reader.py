"""What a checkpoint gives to a module and its optimizer: two ways, chosen by what the module is.

    Reader         values by name into the tensors that a rank holds, of any layout, only the bytes that it needs
    saved_module   the state dict that the module gave when it was saved, for the regions of it whose own code loads
                   them (hooks, overridden loading, extra state)

Nothing is read before it is copied; a state dict of a whole model costs no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_map_only

from zeropipe.checkpoint.save.records import (
    FP32,
    PARAM,
    FlatState,
    LoadedFlat,
    LoadedState,
    LocalState,
    ModelState,
    ModuleRest,
)
from zeropipe.checkpoint.sources import Checkpoint, Flat, Value, chosen
from zeropipe.errors import CheckpointError
from zeropipe.layout.copy_plan import copies_of
from zeropipe.layout.flat import Piece, TensorSpec
from zeropipe.runtime.optimizers.state_kinds import Shared, named_numbers

_Entry = TypeVar("_Entry", Value, Flat)
Read = Callable[[int, int], torch.Tensor]  # [start, stop) of the flattened tensor: 1D, new memory

_FACTS = frozenset(
    [
        "shape", "size", "dtype", "device", "layout", "numel", "nelement", "dim", "ndim", "ndimension", "__len__",
        "is_meta", "is_cpu", "is_cuda", "is_sparse", "is_quantized", "is_leaf", "requires_grad", "grad", "grad_fn",
        "is_floating_point", "is_complex", "element_size", "itemsize", "nbytes", "get_device", "is_nested",
        "__hash__", "__format__", "_is_param", "names", "has_names", "is_mps", "is_xpu", "is_mkldnn",
    ]
)  # fmt: skip


def wanted_shapes(into: LocalState) -> dict[str, tuple[int, ...]]:
    """Every tensor that a rank holds something of."""
    shapes = {name: tuple(tensor.shape) for name, tensor in into.model.tensors.items()}
    return shapes | {spec.name: spec.shape for flat in into.flats for spec in flat.layout.tensors}


class Reader:
    """Reads one checkpoint, as this rank sees it (``parallel.seen_from``), for one rank: only the bytes it needs."""

    def __init__(self, source: Checkpoint, into: LocalState) -> None:
        self.source = source
        self._into = into

        # A tensor may be called otherwise there. Name -> its other names: the source's, then the destination's.
        self._aliases: dict[str, list[str]] = {}
        for names in (source.tied, into.model.tied, into.model.peer_names):
            for alias, first in names.items():
                self._aliases.setdefault(first, []).append(alias)
        self._regions = Regions(into.model.regions)  # the values of those are loaded by the modules' own code

        # What the caller is told of.
        self._missing: list[str] = []
        self._notices: list[str] = []

    def fill(self, *, optimizer: bool = True, moments: bool = True) -> LoadedState:
        """Write into the destination's tensors in place.

        ``optimizer``: fill the flats at all; ``moments=False`` fills only the masters.
        """
        source, model = self.source, self._into.model
        wanted_flats = [f for f in self._into.flats if optimizer or PARAM in f.tensors]
        with ThreadPoolExecutor(source.threads) as pool:
            # [1] Weights first: in fp32 the masters are views of them, and theirs is the last word.
            values = pool.map(lambda item: self._fill_tensor(*item), model.tensors.items())
            self._missing += [name for name in values if name]
            # [2] Shards, each kind of tensor on a thread of its own.
            flats = {flat.name: self._fill_flat(flat, moments, pool) for flat in wanted_flats}
        # [3] What the checkpoint has and nobody asked for. A tied tensor is asked for by any of its names, and what
        # lies in a region is the business of its modules' code.
        wanted = {*model.tensors, *model.tied, *model.excluded, *model.peer_names}
        wanted |= {t.name for f in self._into.flats for t in f.layout.tensors}
        asked = wanted | {source.tied.get(name, name) for name in wanted} | source.tied.keys()
        others = {*source.holders, *source.values} - asked
        left_out = source.left_out()
        return LoadedState(
            str(source.folder),
            source.tag,
            source.stage,
            flats,
            source.param_groups,
            source.train_state(self._into.grid.rank),
            tuple(dict.fromkeys(self._missing)),
            tuple(sorted(name for name in others if self._regions.of(name) is None)),
            (*self._notices, left_out) if left_out else tuple(self._notices),
        )

    # Single tensors of the module.

    @torch.no_grad()  # of the thread that it runs in
    def _fill_tensor(self, name: str, out: torch.Tensor) -> str:
        """The module's value if it has the right dtype, else the master's, else the module's cast.

        The name where there is none, "" where there is.
        """
        there, _ = self._held_by(name)
        found = chosen(there, self._module_entry(name), self.source.master(there), out.dtype)
        if found is None:
            return name
        if found.value is not None:
            out.copy_(found.value.read())
        elif out.is_contiguous() and out.device.type == "cpu":
            found.run(0, out.numel(), out.detach().view(-1))  # no second tensor of its size
        else:
            out.copy_(found.read())
        return ""

    def _module_entry(self, name: str) -> Value | None:
        return next(iter(self._there(name, self.source.values)[1]), None)

    def _held_by(self, name: str) -> tuple[str, list[Flat]]:
        return self._there(name, self.source.holders)

    def _there(self, name: str, index: Mapping[str, list[_Entry]]) -> tuple[str, list[_Entry]]:
        """A tensor's name in an index of the source, which keeps a tied one under one of its names, and its entries."""
        there = name
        if name not in index:
            known = (alias for alias in self._aliases.get(name, ()) if alias in index)
            there = self.source.tied.get(name) or next(known, name)
        return there, index.get(there, [])

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
        for key, filled in zip(asked, found, strict=True):
            lost = [n for n in names if n not in filled and (key in (FP32, PARAM) or n in stepped)]
            if key in (FP32, PARAM):
                self._missing += [n for n in lost if self._regions.of(n) is None]
            elif lost and filled:
                self._notices.append(
                    f"{key} of {len(lost)} parameter(s) is not in the checkpoint and starts at zero: {lost[0]}"
                )
        if stepped and len(stepped) < len(names):
            new = [name for name in names if name not in stepped]
            self._notices.append(
                f"{len(new)} parameter(s) have no optimizer state in the checkpoint and start as new ones: {new[0]}"
            )
        return LoadedFlat(tensors, self._scalars(flat, shared) if moments else {})

    @torch.no_grad()
    def _fill_key(self, flat: FlatState, key: str, out: torch.Tensor, stepped: Set[str]) -> set[str]:
        """Copy one kind of tensor, moments only of what was ``stepped``; the names that it was found for."""
        layout = flat.layout
        found: dict[int, tuple[Flat, str, int]] = {}
        for at, spec in enumerate(layout.tensors):
            holder = self._holder(spec, key) if key in (FP32, PARAM) or spec.name in stepped else None
            if holder is not None:
                found[at] = holder
        # By source, so that neighbours that lie together there too are one copy.
        wanted: dict[tuple[Flat, str], list[tuple[Piece, int]]] = {}
        for piece in layout.pieces(flat.shard) if found else ():
            if piece.tensor in found:
                held, source_key, tensor = found[piece.tensor]
                wanted.setdefault((held, source_key), []).append((piece, tensor))
        for (held, source_key), pieces in wanted.items():
            for copy in copies_of(pieces, held.layout):
                shard = held.read(copy.src_shard, source_key)
                out[copy.dst_offset : copy.dst_offset + copy.numel].copy_(
                    shard[copy.src_offset : copy.src_offset + copy.numel]
                )
        return {layout.tensors[at].name for at in found}

    def _holder(self, spec: TensorSpec, key: str) -> tuple[Flat, str, int] | None:
        """The first flat that has ``key`` of a tensor, its own word for that, and the tensor's index there."""
        name, holders = self._held_by(spec.name)
        for held in holders:
            there = held.value_key if key in (FP32, PARAM) else key
            # In a region code may reshape; elsewhere ``check_shapes`` has refused other shapes.
            if there is not None and there in held.keys and _fits(held.shape_of(name), spec.shape):
                return held, there, held.layout.index(name)
        # Masters that were not saved (without an optimizer, or frozen) come from the module, but in a region.
        value = self._module_entry(spec.name) if key in (FP32, PARAM) else None
        if value is None or self._regions.of(spec.name) is not None:
            return None
        return value.as_flat(), PARAM, 0

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
            for key, value in (item for held in holders for item in held.further(name, spec.name).items()):
                numbers.setdefault(key, value)
        return numbers

    def check_shapes(self, wanted: Mapping[str, tuple[int, ...]]) -> None:
        """Raises CheckpointError for a tensor of another shape, so that a refused load leaves the engine as it was."""
        source = self.source
        for name, shape in wanted.items():
            if self._regions.of(name) is not None:
                continue
            found = [value.shape for value in source.values.get(name, ())]
            for there in (*found, *(flat.shape_of(name) for flat in source.holders.get(name, ()))):
                if not _fits(there, shape):
                    raise CheckpointError(
                        f"{name} in {source.folder} does not fit the model",
                        expected=shape,
                        found=there,
                        fix="load into the model that was saved; nothing has been changed",
                    )


def _fits(found: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """A scalar may have been stored as one element; anything else must match."""
    return found == shape or (found in ((), (1,)) and shape in ((), (1,)))


# For modules' own code.


class Regions:
    """Parts of a module tree by their prefixes, as in a state dict's keys: ``""`` is all, ``blocks.0.`` a block."""

    def __init__(self, prefixes: Iterable[str]) -> None:
        self._prefixes = frozenset(prefixes)

    def of(self, key: str) -> str | None:
        """The prefix of the topmost region that ``key`` is in."""
        if not self._prefixes:
            return None
        ends = [0, *(at + 1 for at, letter in enumerate(key) if letter == ".")]
        return next((key[:end] for end in ends if key[:end] in self._prefixes), None)


def saved_module(
    source: Checkpoint, model: ModelState, rest: ModuleRest, dtypes: Mapping[str, torch.dtype]
) -> dict[str, Any]:
    """Key -> tensor or extra state, for the keys inside of the regions of ``model`` (see there).

    ``rest``: the source's. ``dtypes``: of the parameters that will take the values; what was saved in another one is
    read from its master.
    """
    inside = Regions(model.regions)
    # A tensor comes under the name that it is kept by, under those that are tied to it, and under ours where DeepSpeed
    # calls it otherwise.
    names = dict.fromkeys((*source.values, *(n for n in source.holders if n not in rest.hidden)))
    aliases = {name: name for name in names}
    aliases |= {
        o: first for o, first in source.tied.items() if first in source.values or source.master(first)
    }
    aliases |= {ours: peer for peer, ours in model.peer_names.items() if peer in names and ours not in names}
    tensors: dict[str, Any] = {}
    for key, name in aliases.items():
        if inside.of(key) is not None:
            value = next(iter(source.values.get(name, ())), None)
            kept = None if value is None else getattr(torch, value.dtype)
            weight = chosen(name, value, source.master(name), dtypes.get(key, kept))
            if weight is not None:
                tensors[key] = stored(weight.shape, weight.dtype, weight.run)
    return tensors | {key: value for key, value in rest.extra.items() if inside.of(key) is not None}


class Stored(torch.Tensor):
    """A tensor of a checkpoint that is read when it is used, so that a state dict of a whole model costs no memory.

    ``shape``, ``dtype`` and ``device`` are known at once. Copying it into a parameter, or a run of its elements into a
    shard, reads what is copied and keeps nothing. Any other use reads the whole and keeps it, as it may be written to.
    """

    _read: Read
    _start: int  # of its elements in what ``_read`` counts
    _value: torch.Tensor | None  # once it was used as a whole

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", name)
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], Stored) else None
        with torch._C.DisableTorchFunctionSubclass():
            if name in _FACTS:
                return func(*args, **kwargs)
            if first is not None and first._value is None:
                # [1] Still nothing is read: another view of the same elements.
                if name == "detach":
                    return first
                if name in ("reshape", "view", "flatten") and args[1:] in ((-1,), ((-1,),), ()):
                    return stored((first.numel(),), first.dtype, first._read, first._start)
                # [2] A run of them is read, and not kept.
                run = args[1] if name == "__getitem__" and first.dim() == 1 else None
                if isinstance(run, slice) and run.step in (None, 1):
                    start, stop, _ = run.indices(len(first))
                    return first._read(first._start + start, first._start + max(start, stop))
            # [3] The whole: not kept where it is only copied from.
            copied = name == "copy_" and first is None
            args, kwargs = tree_map_only(Stored, _once if copied else real, (args, kwargs))
            return func(*args, **kwargs)


def real(value: torch.Tensor) -> torch.Tensor:
    """The tensor itself, in memory; the same one each time. Any other tensor is given back."""
    if not isinstance(value, Stored):
        return value
    if value._value is None:
        value._value = _once(value)
    return value._value


def stored(shape: tuple[int, ...], dtype: torch.dtype, read: Read, start: int = 0) -> Stored:
    """A tensor of that shape whose elements ``read`` gives, counted from ``start``."""
    # One element seen from everywhere: it has the shape without the memory.
    made = torch.empty((), dtype=dtype).expand(shape).as_subclass(Stored)
    made._read, made._start, made._value = read, start, None
    return made


def _once(value: Stored) -> torch.Tensor:
    if value._value is not None:
        return value._value
    shape = tuple(value.shape)
    return value._read(value._start, value._start + torch.Size(shape).numel()).view(shape)
