"""Writes a checkpoint anew for another number of ranks, another stage, or for DeepSpeed's own loader.

Nothing of ours needs it: any checkpoint loads at any size. It is for tools that know one layout only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from zeropipe.checkpoint.commit import build_manifest, commit, prepare
from zeropipe.checkpoint.constants import LAYER_FILE_PREFIX
from zeropipe.checkpoint.manifest import FlatEntry, Part
from zeropipe.checkpoint.parallel import Place, seen_from
from zeropipe.checkpoint.reader import Reader
from zeropipe.checkpoint.source import Source, value_key
from zeropipe.checkpoint.state import FP32, PARAM, FlatState, Grid, LocalState, ModelState
from zeropipe.checkpoint.tags import check_tag, work_folder
from zeropipe.checkpoint.writer import collect, write
from zeropipe.errors import CheckpointError, describe
from zeropipe.layout.flat import FlatShards, TensorSpec

PEER_ALIGN = 2  # elements: DeepSpeed's shards of stages 1 and 2


def convert(
    source: Source,
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
    saved_pp = int(source.degrees.get("pp", 1))
    tp = int(source.degrees.get("tp", 1)) if tp is None else tp
    pp = saved_pp if pp is None else pp
    if pp not in (1, saved_pp):
        raise CheckpointError(
            describe(
                "pipeline stages of a converted checkpoint",
                expected=" or ".join(map(str, sorted({1, saved_pp}))),
                found=pp,
                fix="load it in a pipeline of the shape you want, and save it there",
            )
        )
    root = Path(output)
    views = {t: seen_from(source, Place(t, tp)) for t in range(tp)}
    grids = list(_grids(dp, tp, pp))
    prepare(root, name)
    parts: list[Part] = []
    local: LocalState | None = None
    for grid in grids:
        view = views[grid.tp_rank]
        if pp > 1:
            view = _Stage(view, grid.pp_rank, source)
        local = _as_rank(view, grid, stage)
        parts.append(write(work_folder(root, name), collect(local, copy=False)))
        progress(1)
    assert local is not None
    return commit(root, name, build_manifest(name, local, parts), save_latest=True)


def _grids(dp: int, tp: int, pp: int) -> Iterator[Grid]:
    """Every rank, tensor-first, then data, then pipeline."""
    world = dp * tp * pp
    for rank in range(world):
        yield Grid(rank, world, rank // tp % dp, dp, rank % tp, tp, rank // (tp * dp), pp)


class _Stage:
    """What one pipeline stage of a view holds."""

    def __init__(self, view: Source, pp_rank: int, source: Source) -> None:
        self._view = view
        tp = int(source.degrees.get("tp", 1))
        held = {e.name for e in source.module if e.mp_rank // tp == pp_rank and not _in_layer_file(e.file)}
        flat_names = {s.name for f in source.flats if f.mp_rank // tp == pp_rank for s in f.layout.tensors}
        layers = {name.split(".", 1)[0] for name in held | flat_names}
        self.module = tuple(
            e
            for e in view.module
            if e.name in held | flat_names or (_in_layer_file(e.file) and e.name.split(".", 1)[0] in layers)
        )
        self.flats = tuple(
            f for f in view.flats if f.layout.tensors and f.layout.tensors[0].name in flat_names
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._view, name)


def _in_layer_file(file: str) -> bool:
    return file.startswith(LAYER_FILE_PREFIX)


def _as_rank(source: Source, grid: Grid, stage: int) -> LocalState:
    shards = grid.dp_degree if stage else 1
    flats: list[FlatState] = []
    by_group: dict[int, list[FlatEntry]] = {}
    sharded: set[str] = set()
    for entry in source.flats:
        if value_key(entry) == FP32:
            by_group.setdefault(entry.group_index, []).append(entry)
        elif value_key(entry) == PARAM and stage >= 3:
            flats.append(_frozen(entry, grid))
            sharded |= {t.name for t in entry.layout.tensors}
    for group, entries in sorted(by_group.items()):
        # Pipeline stages that share a tied tensor each hold it.
        specs = list(
            {spec.name: spec for entry in reversed(entries) for spec in entry.layout.tensors}.values()
        )
        order = {spec.name: i for i, spec in enumerate(s for e in entries for s in e.layout.tensors)}
        specs.sort(key=lambda spec: order[spec.name])
        together = [(f"group{group}", specs)] if stage < 3 else [(s.name, [s]) for s in specs]
        sharded |= {s.name for s in specs} if stage >= 3 else set()
        for name, members in together:
            layout = FlatShards(tuple(members), shards, PEER_ALIGN if 0 < stage < 3 else 1)
            dtype = getattr(torch, entries[0].keys[FP32])
            tensors = {FP32: torch.zeros(layout.shard_numel, dtype=dtype)}
            flats.append(FlatState(name, layout, grid.dp_rank if stage else 0, tensors, {}, group, 0, 1))
    model = _model(source, sharded, stage)
    into = LocalState(
        grid,
        stage,
        source.dtype,
        model,
        tuple(flats),
        source.param_groups,
        source.optimizer,
    )
    filled = Reader(source, replace(into, model=replace(model, tensors={}))).fill(optimizer=True)
    done = tuple(
        replace(f, tensors=filled.flats[f.name].tensors, scalars=filled.flats[f.name].scalars) for f in flats
    )
    return replace(into, flats=done, train=source.train_state(grid.rank))


def _frozen(entry: FlatEntry, grid: Grid) -> FlatState:
    layout = FlatShards(entry.layout.tensors, grid.dp_degree)
    dtype = getattr(torch, entry.keys[PARAM])
    return FlatState(entry.name, layout, grid.dp_rank, {PARAM: torch.zeros(layout.shard_numel, dtype=dtype)})


def _model(source: Source, sharded: set[str], stage: int) -> ModelState:
    """The module's values, still on the disk; below stage 3 those that only shards hold are put together."""
    tensors: dict[str, torch.Tensor] = {}
    buffers: list[str] = []
    frozen: list[str] = []
    layers: list[tuple[int, str, str]] = []
    for entry in source.module:
        if entry.kind == "frozen":
            frozen.append(entry.name)
        if entry.kind == "buffer":
            buffers.append(entry.name)
        if entry.name not in sharded:
            tensors.setdefault(entry.name, source.module_tensor(entry))
            if _in_layer_file(entry.file) and stage < 3:
                number, key = entry.name.split(".", 1)
                layers.append((int(number), key, entry.name))
    specs: list[TensorSpec] = [s for e in source.flats if value_key(e) for s in e.layout.tensors]
    rest = {s.name: s for s in specs if s.name not in sharded and s.name not in tensors}
    if rest:
        dtype = getattr(torch, source.dtype)
        made = {name: torch.empty(spec.shape, dtype=dtype) for name, spec in rest.items()}
        Reader(source, LocalState(Grid(), 0, source.dtype, ModelState(made))).fill(optimizer=False)
        tensors |= made
    frozen += [s.name for e in source.flats if value_key(e) == PARAM for s in e.layout.tensors]
    held = {*tensors, *sharded}
    tied = {other: name for other, name in source.tied.items() if name in held}
    if layers:
        layers += [
            (int(other.split(".", 1)[0]), other.split(".", 1)[1], name) for other, name in tied.items()
        ]
    return ModelState(
        tensors,
        tuple(buffers),
        tuple(dict.fromkeys(frozen)),
        tied,
        universal_info=None if source.universal_info is None else dict(source.universal_info),
        layers=tuple(layers),
    )
