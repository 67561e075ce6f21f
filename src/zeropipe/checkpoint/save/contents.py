"""Decides which files a rank writes and what is in each: DeepSpeed's names and keys, ours beside them.

Tensors that stand under two names (ours and DeepSpeed's) share their storage, so they are written once.
``zeropipe`` is our key in each file; what the manifest points at is there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from zeropipe.checkpoint.constants import LAYER_FILE_PREFIX
from zeropipe.checkpoint.save.files import FileRecord, write_torch
from zeropipe.checkpoint.save.peer_keys import model_keys, optimizer_keys, whole_optimizer
from zeropipe.checkpoint.save.plain import is_plain, lowered
from zeropipe.checkpoint.save.records import COMPUTED, FlatEntry, FlatState, LocalState, Part, TensorEntry
from zeropipe.checkpoint.save.words import groups_words, module_words, objects, scalars_words, training_words
from zeropipe.checkpoint.utils import (
    get_model_ckpt_name_for_rank,
    get_zero3_model_ckpt_name_for_rank,
    get_zero_ckpt_name_for_rank,
    mapped,
)

OURS = "zeropipe"
CODE_FILE = "zeropipe_client_states.pt"  # what only unpickling with code can read back
_MAX_WASTE = 1.25  # a hull may be this much larger than its views before they are copied apart


@dataclass(frozen=True, slots=True)
class Outgoing:
    """The files of one rank, ready to be written, and what they add to the manifest."""

    trees: dict[str, Any]  # file name -> what torch.save gets
    part: Part  # without file records


def collect(local: LocalState, *, copy: bool, buffers: HostBuffers | None = None) -> Outgoing:
    """Lay out this rank's files. With ``copy`` nothing in them shares memory with the training state."""
    grid = local.grid
    trees: dict[str, Any] = {}
    module: list[TensorEntry] = []
    flats: list[FlatEntry] = []
    code: dict[str, Any] = {}
    in_model_file = local.stage == 0
    mine = [f for f in local.flats if _writes(f, grid.dp_rank, in_model_file)]
    model_name = model_file(local)
    optim_name = optimizer_file(local)

    if grid.dp_rank == 0 or local.stage >= 3:
        tree = _model_tree(local, code if grid.dp_rank == 0 else {}, lead=grid.dp_rank == 0)
        if in_model_file and mine:
            tree["optimizer"] = whole_optimizer(local)
            tree[OURS]["flats"] = _flat_trees(mine)
            flats += [_entry(f, local, model_name) for f in mine]
        trees[model_name] = tree
        if grid.dp_rank == 0:
            by_layer = _layer_trees(local)
            files = _layer_file_of(local)
            for name in [n for n in tree["module"] if local.model.tied.get(n, n) in files]:
                del tree["module"][name]
            # DeepSpeed's pipeline looks into the layer files only where there is nothing here.
            tree["module"] = tree["module"] or None
            trees |= by_layer
            module += _module_entries(local, model_name)
    # What belongs to a rank goes into its optimizer file, or into one of its own where it writes none.
    rank_file = optim_name
    rank_state = {"per_rank": local.train.per_rank}
    if in_model_file or not mine:
        rank_file = f"zeropipe_rank_{grid.rank:05d}_states.pt"
        trees[rank_file] = {OURS: rank_state}
    else:
        trees[optim_name] = optimizer_keys(local) | {OURS: rank_state | {"flats": _flat_trees(mine)}}
        flats += [_entry(f, local, optim_name) for f in mine]
    code = objects(code, copy=copy)
    if code and grid.dp_rank == 0:
        trees[code_file(grid.mp_rank)] = {OURS: code}
    part = Part(grid.rank, (), tuple(module), tuple(flats), local.model.tied, local.model.excluded, rank_file)
    # One by one: what two files hold of a storage differs, and each must hold no more than its own.
    host = {name: snapshot(tree, copy=copy, buffers=buffers) for name, tree in trees.items()}
    return Outgoing(host, part)


def write(folder: Path, outgoing: Outgoing) -> Part:
    """Write and sync the files. Raises OSError as it comes."""
    records: list[FileRecord] = []
    for name, tree in outgoing.trees.items():
        records.append(write_torch(folder / name, tree))
    return replace(outgoing.part, files=tuple(records))


def model_file(local: LocalState) -> str:
    mp_rank = local.grid.mp_rank
    if local.stage >= 3:
        return get_zero3_model_ckpt_name_for_rank("", local.grid.dp_rank, mp_rank)
    return get_model_ckpt_name_for_rank("", f"{mp_rank:02d}")


def code_file(mp_rank: int) -> str:
    """Where a model-parallel rank keeps what only code restores: the first one's holds the training's state too."""
    return CODE_FILE if mp_rank == 0 else CODE_FILE.replace("states", f"mp_rank_{mp_rank:02d}_states")


def layer_file(layer: int, tp_rank: int) -> str:
    """The file of one pipeline layer, under the name that DeepSpeed's pipeline gives it."""
    return f"{LAYER_FILE_PREFIX}{layer:02d}-model_{tp_rank:02d}-model_states.pt"


def optimizer_file(local: LocalState) -> str:
    name = get_zero_ckpt_name_for_rank("", local.grid.dp_rank, local.grid.mp_rank)
    return f"bf16_{name}" if local.dtype == "bfloat16" else name


def _writes(flat: FlatState, dp_rank: int, in_model_file: bool) -> bool:
    """Replicas take turns, shard by shard, so that they write disjoint parts."""
    if in_model_file:
        return dp_rank == 0
    return flat.replica == flat.shard % flat.num_replicas


def _model_tree(local: LocalState, code: dict[str, Any], lead: bool) -> dict[str, Any]:
    """The model file; only the first data-parallel rank's (``lead``) holds values."""
    train = local.train
    module: OrderedDict[str, Any] = OrderedDict()
    of_module = module_words(local.model, code) if lead else {}
    if lead:
        module.update(local.model.tensors)
        for other, name in local.model.tied.items():
            if name in local.model.tensors:
                module[other] = local.model.tensors[name]
        module.update({k: v for k, v in local.model.extra.items() if is_plain(v)})
    if local.stage >= 3:
        module.update({name: local.model.tensors[name] for name in local.model.buffers})
        # A strict load in DeepSpeed wants every name; it too keeps sharded parameters as empty tensors here.
        held = [s.name for f in local.flats for s in f.layout.tensors if s.name not in local.model.hidden]
        for name in (*held, *local.model.tied):
            module.setdefault(name, torch.empty(0, dtype=getattr(torch, local.dtype)))
    tree = model_keys(local, module, lowered(train.lr_scheduler))
    for key, value in lowered(train.client_state).items():
        tree.setdefault(key, value)
    tree[OURS] = {
        "micro_steps": train.micro_steps,
        "optimizer": local.optimizer_name,
        "param_groups": groups_words(local, code),
        **of_module,
        **training_words(train, code),
    }
    return tree


def _flat_trees(flats: list[FlatState]) -> dict[str, Any]:
    return {f.name: {"tensors": dict(f.tensors), "scalars": scalars_words(f, {})} for f in flats}


def _entry(flat: FlatState, local: LocalState, file: str) -> FlatEntry:
    files = tuple(file if s == flat.shard else "" for s in range(flat.layout.num_shards))
    return FlatEntry(
        flat.name,
        local.grid.mp_rank,
        flat.group_index,
        flat.layout,
        {key: _dtype(tensor) for key, tensor in flat.tensors.items()},
        {key: _figure(value) for key, value in flat.scalars.items() if _figure(value) is not None},
        files,
    )


def _layer_trees(local: LocalState) -> dict[str, dict[str, torch.Tensor]]:
    """The files of this rank's pipeline layers: each holds its layer's state dict and nothing else."""
    trees: dict[str, dict[str, torch.Tensor]] = {}
    for layer, key, name in local.model.layers:
        file = layer_file(layer, local.grid.tp_rank)
        trees.setdefault(file, {})[key] = local.model.tensors[name]
    return trees


def _layer_file_of(local: LocalState) -> dict[str, str]:
    """The layer file in which each tensor is found; a tied one is in several, and the first counts."""
    found: dict[str, str] = {}
    for layer, _, name in local.model.layers:
        found.setdefault(name, layer_file(layer, local.grid.tp_rank))
    return found


def _module_entries(local: LocalState, file: str) -> list[TensorEntry]:
    model = local.model
    kinds = dict.fromkeys(model.frozen, "frozen") | dict.fromkeys(model.buffers, "buffer")
    kinds |= dict.fromkeys(model.computed, COMPUTED)
    layer_files = _layer_file_of(local)
    return [
        TensorEntry(
            name,
            tuple(tensor.shape),
            _dtype(tensor),
            kinds.get(name, "param"),
            layer_files.get(name, file),
            local.grid.mp_rank,
        )
        for name, tensor in model.tensors.items()
    ]


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _figure(value: Any) -> int | float | None:
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else None
    return value if isinstance(value, (int, float)) else None


# On the host, without the parts of a storage that nobody asked for. Parameters are views into large flat buffers, and
# ``torch.save`` writes whole storages. Here each storage is narrowed to the hull of the views that are saved; views of
# one storage still share it, so tied tensors stay tied and nothing is written twice.


class HostBuffers:
    """Host memory that an asynchronous save copies into, kept for the next one: first touching it costs most."""

    def __init__(self) -> None:
        self._free: dict[int, list[torch.Tensor]] = {}
        self._used: list[torch.Tensor] = []

    def take(self, nbytes: int, pin: bool) -> torch.Tensor:
        """``nbytes`` of memory, uint8 1D."""
        free = self._free.get(nbytes)
        buffer = free.pop() if free else torch.empty(nbytes, dtype=torch.uint8, pin_memory=pin)
        self._used.append(buffer)
        return buffer

    def give_back(self) -> None:
        """Nobody reads what was taken any more; sizes that were not needed this time are freed."""
        self._free = {}
        for buffer in self._used:
            self._free.setdefault(buffer.numel(), []).append(buffer)
        self._used = []


@dataclass(slots=True)
class _Hull:
    """The part of one storage that is saved, in elements of one dtype."""

    start: int
    stop: int
    numel: int  # sum over the views
    tensor: torch.Tensor  # one of the views


def snapshot(tree: Any, *, copy: bool, buffers: HostBuffers | None = None) -> Any:
    """``tree`` (dicts, lists, tuples, leaves) with host tensors whose storages hold only what is saved.

    ``copy=False`` may alias live CPU memory, so it must be written before anything changes it;
    ``copy=True`` shares nothing with it and takes its memory from ``buffers`` where given.
    """
    hulls: dict[tuple[Any, ...], _Hull] = {}
    for tensor in _tensors(tree):
        if tensor.numel() == 0:
            continue
        first = int(tensor.storage_offset())
        last = first + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        hull = hulls.setdefault(_key(tensor), _Hull(first, last, 0, tensor))
        hull.start, hull.stop = min(hull.start, first), max(hull.stop, last)
        hull.numel += tensor.numel()
    bases = {key: _base(hull, copy, buffers) for key, hull in hulls.items() if _dense(hull)}
    # The copies to pinned memory do not wait; what follows reads them.
    if any(hull.tensor.is_cuda for hull in hulls.values()):
        torch.cuda.synchronize()
    alone: dict[tuple[Any, ...], torch.Tensor] = {}

    def place(tensor: torch.Tensor) -> torch.Tensor:
        key = _key(tensor)
        base = bases.get(key)
        if base is not None and tensor.numel():
            offset = tensor.storage_offset() - hulls[key].start
            return base.as_strided(tensor.shape, tensor.stride(), offset)
        view = (*key, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()))
        if view not in alone:  # the same view twice is a tied tensor
            alone[view] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        return alone[view]

    def host(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if _plain(leaf):
            return place(leaf)
        return leaf.detach().clone().cpu() if copy else leaf.detach().cpu()

    return mapped(tree, host)


def _plain(tensor: torch.Tensor) -> bool:
    """Whether dtype, sizes and strides say all of it, so that another view of the memory is as good."""
    return tensor.layout == torch.strided and not tensor.is_quantized


def _dense(hull: _Hull) -> bool:
    return hull.stop - hull.start <= _MAX_WASTE * hull.numel


def _key(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (tensor.untyped_storage().data_ptr(), tensor.device, tensor.dtype)


def _base(hull: _Hull, copy: bool, buffers: HostBuffers | None) -> torch.Tensor:
    """The hull as a 1D tensor with a storage of exactly its size."""
    tensor = hull.tensor.detach()
    size = tensor.element_size()
    numel = hull.stop - hull.start
    flat = tensor.as_strided((numel,), (1,), hull.start)
    if not copy and tensor.device.type == "cpu":
        storage = tensor.untyped_storage()
        if numel * size != storage.nbytes():
            storage = storage[hull.start * size : hull.stop * size]  # aliases the memory
        return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, (numel,), (1,))
    if buffers is None:
        return flat.to("cpu", copy=True)
    host = buffers.take(numel * size, pin=tensor.is_cuda).view(tensor.dtype)
    return host.copy_(flat, non_blocking=True)


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        if _plain(tree):
            yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _tensors(value)
