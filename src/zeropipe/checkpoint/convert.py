"""Writes a checkpoint anew for another number of ranks, another stage, or for DeepSpeed's own loader.

Nothing of ours needs it: any checkpoint loads at any size. It is for tools that know one layout only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from zeropipe.checkpoint.constants import LAYER_FILE_PREFIX
from zeropipe.checkpoint.reader import Reader
from zeropipe.checkpoint.save.contents import collect, write
from zeropipe.checkpoint.save.ownership import cannot_write, discard
from zeropipe.checkpoint.save.records import (
    COMPUTED,
    FP32,
    PARAM,
    FlatState,
    Grid,
    LocalState,
    ModelState,
    Part,
)
from zeropipe.checkpoint.save.tags import build_manifest, check_tag, commit, prepare
from zeropipe.checkpoint.sources.data import Checkpoint, Flat, Value
from zeropipe.checkpoint.sources.deepspeed import ALIGN
from zeropipe.checkpoint.sources.parallel import seen_from
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
    views = {t: seen_from(source, Grid(tp_rank=t, tp_degree=tp)) for t in range(tp)}
    grids = list(_grids(dp, tp, pp))
    tied_first = _tied_layers(source)
    parts: list[Part] = []
    local: LocalState | None = None
    work: Path | None = None
    try:
        work, hold = prepare(root, name)
        with hold:
            for grid in grids:
                view, rows = views[grid.tp_rank], None
                if pp > 1:
                    view, rows = _stage_of(view, grid.pp_rank, source)
                local = _as_rank(view, rows, grid, stage, tied_first)
                parts.append(write(work, collect(local, copy=False)))
                progress(1)
            assert local is not None
            return commit(root, name, work, build_manifest(name, local, parts), save_latest=True)
    except BaseException as error:
        if work is not None:
            with suppress(OSError, CheckpointError):
                discard(work)
        if isinstance(error, OSError):
            raise CheckpointError(cannot_write(root / name, error)) from error
        raise


def _grids(dp: int, tp: int, pp: int) -> Iterator[Grid]:
    """Every rank, tensor-first, then data, then pipeline."""
    places = product(range(pp), range(dp), range(tp))
    for rank, (pp_rank, dp_rank, tp_rank) in enumerate(places):
        yield Grid(rank, dp * tp * pp, dp_rank, dp, tp_rank, tp, pp_rank, pp)


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
    if view.tp == tp:
        flats = tuple(f for f in view.flats if f.mp_rank // tp == pp_rank)
    else:  # cut anew, tensor by tensor
        flats = tuple(f for f in view.flats if f.name in flat_names)
    module = tuple(value for value in view.module if value.name in names)
    return replace(view, module=module, flats=flats), _layer_rows(own)


def _layer_rows(entries: Iterable[Value]) -> Rows:
    """(layer, key in its file, name) of what pipeline layers keep in files of their own; a tied name comes often."""
    rows: dict[tuple[int, str, str], None] = {}
    for entry in entries:
        if entry.file.startswith(LAYER_FILE_PREFIX):
            number = entry.file.removeprefix(LAYER_FILE_PREFIX).split("-", 1)[0]
            rows[(int(number), entry.name.split(".", 1)[1], entry.name)] = None
    return tuple(rows)


def _tied_layers(source: Checkpoint) -> set[str]:
    """Parameters of pipelines that several layers share."""
    if not any(entry.file.startswith(LAYER_FILE_PREFIX) for entry in source.module):
        return set()
    stages = {name: {flat.mp_rank // source.tp for flat in held} for name, held in source.holders.items()}
    return set(source.tied.values()) | {name for name, found in stages.items() if len(found) > 1}


def _as_rank(
    source: Checkpoint, rows: Rows | None, grid: Grid, stage: int, tied_first: set[str]
) -> LocalState:
    shards = grid.dp_degree if stage else 1
    flats: list[FlatState] = []
    by_group: dict[int, list[Flat]] = {}
    sharded: set[str] = set()
    for entry in source.flats:
        if entry.value_key == FP32:
            by_group.setdefault(entry.group_index, []).append(entry)
        elif entry.value_key == PARAM and stage >= 3:
            (spec,) = entry.layout.tensors  # frozen parameters are sharded one by one
            flats.append(_frozen_flat(entry.name, replace(spec, dtype=entry.keys[PARAM]), grid))
            sharded.add(spec.name)
    for held in source.module:
        if stage >= 3 and held.kind == "frozen" and held.name not in sharded:
            spec = TensorSpec(held.name, held.shape, held.dtype)
            flats.append(_frozen_flat(held.name, spec, grid))
            sharded.add(held.name)
    for group, entries in sorted(by_group.items()):
        # Pipeline stages that share a tied tensor each hold it.
        specs = list(
            {spec.name: spec for entry in reversed(entries) for spec in entry.layout.tensors}.values()
        )
        order = {spec.name: i for i, spec in enumerate(s for e in entries for s in e.layout.tensors)}
        # DeepSpeed's pipelines have the tied layers before all others, and know parameters by position.
        specs.sort(key=lambda spec: (spec.name not in tied_first, order[spec.name]))
        together = [(f"group{group}", specs)] if stage < 3 else [(s.name, [s]) for s in specs]
        sharded |= {s.name for s in specs} if stage >= 3 else set()
        for name, members in together:
            layout = FlatShards(tuple(members), shards, ALIGN if 0 < stage < 3 else 1)
            dtype = getattr(torch, entries[0].keys[FP32])
            tensors = {FP32: torch.zeros(layout.shard_numel, dtype=dtype)}
            flats.append(FlatState(name, layout, grid.dp_rank if stage else 0, tensors, {}, group, 0, 1))
    model = _model(source, rows, sharded, stage)
    into = LocalState(
        grid,
        stage,
        source.dtype,
        model,
        tuple(flats),
        _groups(source, flats, grid),
        source.optimizer,
    )
    filled = Reader(source, replace(into, model=replace(model, tensors={}))).fill(optimizer=True)
    done = tuple(
        replace(f, tensors=filled.flats[f.name].tensors, scalars=filled.flats[f.name].scalars) for f in flats
    )
    return replace(into, flats=done, train=source.train_state(grid.rank))


def _groups(source: Checkpoint, flats: list[FlatState], grid: Grid) -> tuple[dict[str, Any], ...]:
    """Hyperparameters; of a pipeline's, with the names that this stage has."""
    if grid.pp_degree == source.pp == 1:
        return source.param_groups
    return tuple(
        group | {"param_names": [s.name for f in flats if f.group_index == i for s in f.layout.tensors]}
        for i, group in enumerate(source.param_groups)
    )


def _frozen_flat(name: str, spec: TensorSpec, grid: Grid) -> FlatState:
    layout = FlatShards((spec,), grid.dp_degree)
    values = torch.zeros(layout.shard_numel, dtype=getattr(torch, spec.dtype))
    return FlatState(name, layout, grid.dp_rank, {PARAM: values})


def _model(source: Checkpoint, rows: Rows | None, sharded: set[str], stage: int) -> ModelState:
    """The module's values, still on the disk; below stage 3 those that only shards hold are put together."""
    tensors: dict[str, torch.Tensor] = {}
    buffers: list[str] = []
    frozen: list[str] = []
    computed: list[str] = []
    rest = source.rest()
    for entry in source.module:
        if entry.kind == "frozen":
            frozen.append(entry.name)
        if entry.kind == "buffer":
            buffers.append(entry.name)
        if entry.kind == COMPUTED:
            computed.append(entry.name)
        if entry.name not in sharded:
            tensors.setdefault(entry.name, entry.read())
    specs: list[TensorSpec] = [s for e in source.flats if e.value_key for s in e.layout.tensors]
    without = rest.hidden | sharded
    lacking = {s.name: s for s in specs if s.name not in without and s.name not in tensors}
    # What only shards hold (stage 3), put together once for a model file of a lower stage.
    if lacking:
        dtype = getattr(torch, source.dtype)
        made = {name: torch.empty(spec.shape, dtype=dtype) for name, spec in lacking.items()}
        Reader(source, LocalState(Grid(), 0, source.dtype, ModelState(made))).fill(optimizer=False)
        tensors |= made
    frozen += [s.name for e in source.flats if e.value_key == PARAM for s in e.layout.tensors]
    held = {*tensors, *sharded}
    tied = {other: name for other, name in source.tied.items() if name in held}
    layers = list(_layer_rows(source.module) if rows is None else rows) if stage < 3 else []
    if layers and rows is None:
        layers += [
            (int(other.split(".", 1)[0]), other.split(".", 1)[1], name) for other, name in tied.items()
        ]
    return ModelState(
        tensors,
        tuple(dict.fromkeys(buffers)),
        tuple(dict.fromkeys(frozen)),
        tied,
        universal_info=None if source.universal_info is None else dict(source.universal_info),
        extra=dict(rest.extra),
        computed=tuple(dict.fromkeys(computed)),
        hidden=tuple(sorted(rest.hidden)),
        versions={key: dict(value) for key, value in (rest.versions or {}).items()},
        layers=tuple(layers),
    )
