"""Two checkpoints: one written anew from the other (``convert``), and what differs between them (``compare``).

Nothing of ours needs a conversion to another number of ranks, another stage, or for DeepSpeed's own loader: any
checkpoint loads at any size. It is for tools that know one layout only. A comparison knows no layout at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zeropipe.checkpoint.reader import Reader
from zeropipe.checkpoint.save.contents import collect, write
from zeropipe.checkpoint.save.ownership import whole_or_nothing
from zeropipe.checkpoint.save.records import (
    FP32,
    PARAM,
    FlatState,
    Grid,
    LocalState,
    Manifest,
    ModelState,
    united,
)
from zeropipe.checkpoint.save.tags import check_tag, commit, prepare
from zeropipe.checkpoint.sources import Checkpoint, Flat, Value
from zeropipe.checkpoint.sources.deepspeed import ALIGN, LAYER
from zeropipe.checkpoint.sources.parallel import joined, seen_from, weights
from zeropipe.errors import CheckpointError
from zeropipe.layout.flat import FlatShards, TensorSpec

Rows = tuple[tuple[int, str, str], ...]  # (layer, key in its file, name)


def convert(
    source: Checkpoint,
    output: str | os.PathLike[str],
    *,
    stage: int,
    dp: int,
    tp: int | None = None,
    pp: int | None = None,
    tag: str | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Path:
    """Write ``output/tag`` as ``dp * tp * pp`` ranks at ``stage`` would have saved it, shard by shard.

    Stages 1 and 2 get DeepSpeed's padding, so its ``load_checkpoint``, ``zero_to_fp32`` and universal converter
    take the result. ``tp``, ``pp``: default as saved. Slices are cut anew as ``universal_checkpoint_info`` says;
    pipeline stages stay as they are or become one (how layers are shared out is the pipeline's to say: load in
    one for another number of stages). Memory: one rank's shard and one whole tensor. ``progress`` gets 1 per rank
    done. Raises CheckpointError for another ``pp``, and where the checkpoint does not say how its slices are cut.
    """
    name = check_tag(source.tag if tag is None else tag)
    tp = source.tp if tp is None else tp
    pp = source.pp if pp is None else pp
    if pp not in (1, source.pp):
        raise CheckpointError(
            "pipeline stages of a converted checkpoint",
            expected=" or ".join(map(str, sorted({1, source.pp}))),
            found=pp,
            fix="load it in a pipeline of the shape you want, and save it there",
        )
    root = Path(output)
    # A view for each tensor-parallel rank; the data-parallel ranks and stages of one share it, and what it has read.
    views = [seen_from(source, Grid(tp_rank=t, tp_degree=tp)) for t in range(tp)]
    tied_first = _tied_layers(source)
    parts: list[Manifest] = []
    with whole_or_nothing(root / name, lambda: prepare(root, name)) as work:
        # Ranks are numbered tensor-first, then data, then pipeline.
        for rank, (stage_rank, dp_rank, tp_rank) in enumerate(product(range(pp), range(dp), range(tp))):
            grid = Grid(rank, dp * tp * pp, dp_rank, dp, tp_rank, tp, stage_rank, pp)
            view, rows = views[grid.tp_rank], None
            if pp > 1:
                view, rows = _stage_of(view, grid.pp_rank, source)
            local = _as_rank(view, rows, grid, stage, tied_first)
            parts.append(write(work, collect(local, name, copy=False)))
            progress(1)
        return commit(root, work, united(parts), save_latest=True)


def _stage_of(view: Checkpoint, pp_rank: int, source: Checkpoint) -> tuple[Checkpoint, Rows]:
    """What one pipeline stage of a view holds, and its rows of layer files."""
    tp = source.tp
    flat_names = {s.name for f in source.flats if f.mp_rank // tp == pp_rank for s in f.layout.tensors}
    if any(value.mp_rank >= tp for value in source.module):
        own = [value for value in source.module if value.mp_rank // tp == pp_rank]
    else:  # DeepSpeed's layer files do not say which stage wrote them, but its optimizer files do
        layers = {name.split(".", 1)[0] for name in flat_names}
        own = [value for value in source.module if value.name.split(".", 1)[0] in layers]
    names = {value.name for value in own} | flat_names
    # Cut anew, there is a flat for every tensor, of no stage any more.
    if view.tp == tp:
        flats = tuple(f for f in view.flats if f.mp_rank // tp == pp_rank)
    else:
        flats = tuple(f for f in view.flats if f.name in flat_names)
    module = tuple(value for value in view.module if value.name in names)
    return replace(view, module=module, flats=flats), _layer_rows(own)


def _layer_rows(entries: Iterable[Value]) -> Rows:
    """(layer, key in its file, name) of what pipeline layers keep in files of their own; a tied name comes often."""
    files = ((LAYER.match(entry.file), entry.name) for entry in entries)
    return tuple(dict.fromkeys((int(m[1]), name.split(".", 1)[1], name) for m, name in files if m))


def _tied_layers(source: Checkpoint) -> set[str]:
    """Parameters of pipelines that several layers share."""
    if not _layer_rows(source.module):
        return set()
    # Ours names tied tensors; DeepSpeed's stages hold copies of one name.
    stages = {name: {flat.mp_rank // source.tp for flat in held} for name, held in source.holders.items()}
    return set(source.tied.values()) | {name for name, found in stages.items() if len(found) > 1}


def _as_rank(
    source: Checkpoint, rows: Rows | None, grid: Grid, stage: int, tied_first: set[str]
) -> LocalState:
    shards = grid.dp_degree if stage else 1
    # [1] What stage 3 shards one by one: frozen parameters, whether they lie in shards now or not.
    frozen: dict[str, TensorSpec] = {}
    if stage >= 3:
        kept = (flat for flat in source.flats if flat.value_key == PARAM)
        frozen = {s.name: replace(s, dtype=f.keys[PARAM]) for f in kept for s in f.layout.tensors}
        whole = (value for value in source.module if value.kind == "frozen" and value.name not in frozen)
        frozen |= {value.name: TensorSpec(value.name, value.shape, value.dtype) for value in whole}
    flats = [_blank(name, (spec,), PARAM, spec.dtype, grid) for name, spec in frozen.items()]
    # [2] What is trained: param group by param group, at stage 3 tensor by tensor.
    by_group: dict[int, list[Flat]] = {}
    for flat in source.flats:
        if flat.value_key == FP32:
            by_group.setdefault(flat.group_index, []).append(flat)
    for group, entries in sorted(by_group.items()):
        every = [spec for flat in entries for spec in flat.layout.tensors]
        # Pipeline stages that share a tied tensor each hold it. DeepSpeed's pipelines have the tied layers before all
        # others, and know parameters by position.
        order = {spec.name: position for position, spec in enumerate(every)}
        specs = sorted(
            {spec.name: spec for spec in reversed(every)}.values(),
            key=lambda spec: (spec.name not in tied_first, order[spec.name]),
        )
        dtype = entries[0].keys[FP32]
        together = (
            [(spec.name, (spec,)) for spec in specs] if stage >= 3 else [(f"group{group}", tuple(specs))]
        )
        align = ALIGN if 0 < stage < 3 else 1
        flats += [_blank(name, own, FP32, dtype, grid, shards, align, group) for name, own in together]
    # [3] All of it is filled as a rank of a run fills its own; the module's values stay on the disk until then.
    sharded = {spec.name for flat in flats for spec in flat.layout.tensors} if stage >= 3 else set()
    model = _model(source, rows, sharded, stage)
    groups = _groups(source, flats, grid)
    into = LocalState(grid, stage, source.dtype, model, tuple(flats), groups, source.optimizer)
    found = Reader(source, replace(into, model=replace(model, tensors={}))).fill()
    done = (
        replace(f, tensors=found.flats[f.name].tensors, scalars=found.flats[f.name].scalars) for f in flats
    )
    return replace(into, flats=tuple(done), train=found.train)


def _blank(
    name: str,
    specs: tuple[TensorSpec, ...],
    key: str,
    dtype: str,
    grid: Grid,
    shards: int | None = None,
    align: int = 1,
    group: int = 0,
) -> FlatState:
    """A flat of this rank to fill, cut for all data-parallel ranks unless ``shards`` says otherwise."""
    layout = FlatShards(specs, grid.dp_degree if shards is None else shards, align)
    shard = grid.dp_rank if layout.num_shards > 1 else 0
    values = torch.zeros(layout.shard_numel, dtype=getattr(torch, dtype))
    return FlatState(name, layout, shard, {key: values}, {}, group)


def _groups(source: Checkpoint, flats: list[FlatState], grid: Grid) -> tuple[dict[str, Any], ...]:
    """Hyperparameters; of a pipeline's, with the names that this stage has."""
    if grid.pp_degree == source.pp == 1:
        return source.param_groups
    return tuple(
        group | {"param_names": [s.name for f in flats if f.group_index == i for s in f.layout.tensors]}
        for i, group in enumerate(source.param_groups)
    )


def _model(source: Checkpoint, rows: Rows | None, sharded: set[str], stage: int) -> ModelState:
    """The module's values, still on the disk; below stage 3 those that only shards hold are put together."""
    rest = source.rest()
    tensors = {name: held[0].read() for name, held in source.values.items() if name not in sharded}
    for name in source.holders:
        flat = source.master(name)
        if flat is None or name in rest.hidden or name in sharded or name in tensors:
            continue
        tensors[name] = torch.empty(flat.shape_of(name), dtype=getattr(torch, source.dtype))
        flat.run(name, flat.value_key or "", 0, tensors[name].numel(), tensors[name].view(-1))

    kinds = {value.name: value.kind for value in source.module if value.kind != "param"}
    kinds |= {s.name: "frozen" for f in source.flats if f.value_key == PARAM for s in f.layout.tensors}
    tied = {other: name for other, name in source.tied.items() if name in tensors or name in sharded}
    # Files by layer, as a pipeline has them; stage 3 has only shards.
    layers = list(_layer_rows(source.module) if rows is None else rows) if stage < 3 else []
    if layers and rows is None:
        split = ((other.split(".", 1), name) for other, name in tied.items())
        layers += [(int(number), key, name) for (number, key), name in split]
    return ModelState(
        tensors,
        kinds,
        tied,
        replace(rest, versions=rest.versions or {}),
        universal_info=None if source.universal_info is None else dict(source.universal_info),
        layers=tuple(layers),
    )


# What differs.


@dataclass(frozen=True, slots=True)
class Difference:
    """``largest``: largest absolute difference of values, None where they cannot be compared."""

    name: str
    what: str  # "weight", "exp_avg", "step", ...
    text: str
    largest: float | None = None


def compare(
    left: Checkpoint, right: Checkpoint, progress: Callable[[int], None] = lambda done: None
) -> Iterator[Difference]:
    """Every difference in weights, moments, scalars, counters and hyperparameters; nothing if they are equal."""
    left, right = joined(left), joined(right)
    # [1] What is read at once.
    one, other = left.train_state(0), right.train_state(0)
    for name in ("global_steps", "global_samples", "skipped_steps", "lr_scheduler", "loss_scaler"):
        yield from _plain(name, "counter", getattr(one, name), getattr(other, name))
    groups = left.hyperparameters, right.hyperparameters
    if len(groups[0]) != len(groups[1]):
        found = " | ".join(f"{len(side)} groups" for side in groups)
        yield Difference("param groups", "hyperparameters", found)
    for number, (x, y) in enumerate(zip(*groups, strict=False)):
        yield from _entries(f"param group {number}", "hyperparameter", x, y)
    yield from _entries("client state", "client state", one.client_state, other.client_state)
    # [2] Tensors, one of each side in memory. A tied one may be kept under another of its names.
    weight, twin = ({w.name: w for w in weights(side)} for side in (left, right))
    for name, only in _both(weight, twin):
        if not only:
            yield from _values(name, "weight", weight[name].read(), twin[name].read())
            progress(1)
        elif right.tied.get(name) not in weight and left.tied.get(name) not in twin:
            yield Difference(name, "weight", only)
    # [3] The optimizer's state, of what was ever stepped.
    mine, theirs = (
        {n: f for n, f in side.trained.items() if f.moments and f.numbers_of(n) is not None}
        for side in (left, right)
    )
    for name, only in _both(mine, theirs):
        if only:
            yield Difference(name, "optimizer state", only)
            continue
        a, b = mine[name], theirs[name]
        for key, lone in _both(a.moments, b.moments):
            if lone:
                yield Difference(name, key, lone)
            else:
                yield from _values(name, key, a.whole(name, key), b.whole(name, key))
        numbers, others = (flat.shared | flat.own(name) for flat in (a, b))
        for key, _ in _both(numbers, others):
            yield from _plain(name, key, numbers.get(key), others.get(key))


def _both(left: Mapping[str, object], right: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """The keys of both, each with which side alone has it, or ""."""
    for key in dict.fromkeys((*left, *right)):
        yield key, "" if key in left and key in right else "only left" if key in left else "only right"


def _entries(name: str, what: str, a: Mapping[str, object], b: Mapping[str, object]) -> Iterator[Difference]:
    for key, only in _both(a, b):
        if only:
            yield Difference(f"{name}: {key}", what, only)
        else:
            yield from _plain(f"{name}: {key}", what, a[key], b[key])


def _plain(name: str, what: str, a: object, b: object) -> Iterator[Difference]:
    if not same(a, b):
        yield Difference(name, what, f"{_short(a)} | {_short(b)}")


def _values(name: str, what: str, a: torch.Tensor, b: torch.Tensor) -> Iterator[Difference]:
    if a.shape != b.shape:
        yield Difference(name, what, f"shape {tuple(a.shape)} | {tuple(b.shape)}")
    elif a.dtype != b.dtype and not torch.equal(a.double(), b.double()):
        yield Difference(name, what, f"dtype {a.dtype} | {b.dtype}", _largest(a, b))
    # ``same`` is asked last: it is slower, and only a NaN makes a difference to it.
    elif not torch.equal(a, b) and not same(a, b):
        count = int((a != b).sum())
        yield Difference(name, what, f"{count} of {a.numel()} elements", _largest(a, b))


def _largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).abs().max())


def same(a: object, b: object) -> bool:
    """Equal bit for bit, through containers; NaN equals NaN."""
    # A step count is a tensor in one format and a number in another.
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        return a.shape == b.shape and bool(
            torch.equal(a.double().nan_to_num(7e77), b.double().nan_to_num(7e77))
        )
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        x, y = np.asarray(a), np.asarray(b)
        return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
    return bool(a == b or (a != a and b != b))


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
