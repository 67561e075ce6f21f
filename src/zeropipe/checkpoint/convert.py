"""Writes a checkpoint anew for another number of ranks, another stage, or for DeepSpeed's own loader.

Nothing of ours needs it: any checkpoint loads at any size. It is for tools that know one layout only.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from zeropipe.checkpoint.commit import build_manifest, commit, prepare
from zeropipe.checkpoint.manifest import FlatEntry, Part
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
    tag: str | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Path:
    """Write ``output/tag`` as ``dp`` ranks at ``stage`` would have saved it, shard by shard.

    Stages 1 and 2 get DeepSpeed's padding, so its ``load_checkpoint``, ``zero_to_fp32`` and universal converter
    take the result. Memory: one rank's shard. ``progress`` gets 1 per rank done. Raises CheckpointError for a
    source with tensor or pipeline parallelism, whose ranks must be converted by their own engine.
    """
    if source.degrees.get("tp", 1) * source.degrees.get("pp", 1) > 1:
        raise CheckpointError(
            describe(
                "only data-parallel checkpoints are converted", expected="tp = pp = 1", found=source.degrees,
                fix="load it in an engine of the shape you want and save it there",
            )
        )  # fmt: skip
    name = check_tag(source.tag if tag is None else tag)
    root = Path(output)
    prepare(root, name)
    parts: list[Part] = []
    local: LocalState | None = None
    for rank in range(dp):
        local = _as_rank(source, rank, dp, stage)
        parts.append(write(work_folder(root, name), collect(local, copy=False)))
        progress(1)
    assert local is not None
    return commit(root, name, build_manifest(name, local, parts), save_latest=True)


def _as_rank(source: Source, rank: int, dp: int, stage: int) -> LocalState:
    shards = dp if stage else 1
    flats: list[FlatState] = []
    by_group: dict[int, list[FlatEntry]] = {}
    sharded: set[str] = set()
    for entry in source.flats:
        if value_key(entry) == FP32:
            by_group.setdefault(entry.group_index, []).append(entry)
        elif value_key(entry) == PARAM and stage >= 3:
            flats.append(_frozen(entry, rank, dp))
            sharded |= {t.name for t in entry.layout.tensors}
    for group, entries in sorted(by_group.items()):
        specs = [spec for entry in entries for spec in entry.layout.tensors]
        together = [(f"group{group}", specs)] if stage < 3 else [(s.name, [s]) for s in specs]
        sharded |= {s.name for s in specs} if stage >= 3 else set()
        for name, members in together:
            layout = FlatShards(tuple(members), shards, PEER_ALIGN if 0 < stage < 3 else 1)
            dtype = getattr(torch, entries[0].keys[FP32])
            tensors = {FP32: torch.zeros(layout.shard_numel, dtype=dtype)}
            flats.append(FlatState(name, layout, rank if stage else 0, tensors, {}, group, 0, 1))
    model = _model(source, sharded)
    into = LocalState(
        Grid(rank, dp, rank, dp),
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
    return replace(into, flats=done, train=source.train_state(rank))


def _frozen(entry: FlatEntry, rank: int, dp: int) -> FlatState:
    layout = FlatShards(entry.layout.tensors, dp)
    dtype = getattr(torch, entry.keys[PARAM])
    return FlatState(entry.name, layout, rank, {PARAM: torch.zeros(layout.shard_numel, dtype=dtype)})


def _model(source: Source, sharded: set[str]) -> ModelState:
    """The module's values, still on the disk; below stage 3 those that only shards hold are put together."""
    tensors: dict[str, torch.Tensor] = {}
    buffers: list[str] = []
    frozen: list[str] = []
    for entry in source.module:
        if entry.kind == "frozen":
            frozen.append(entry.name)
        if entry.kind == "buffer":
            buffers.append(entry.name)
        if entry.name not in sharded:
            tensors[entry.name] = source.module_tensor(entry)
    specs: list[TensorSpec] = [s for e in source.flats if value_key(e) for s in e.layout.tensors]
    rest = {s.name: s for s in specs if s.name not in sharded and s.name not in tensors}
    if rest:
        dtype = getattr(torch, source.dtype)
        made = {name: torch.empty(spec.shape, dtype=dtype) for name, spec in rest.items()}
        Reader(source, LocalState(Grid(), 0, source.dtype, ModelState(made))).fill(optimizer=False)
        tensors |= made
    frozen += [s.name for e in source.flats if value_key(e) == PARAM for s in e.layout.tensors]
    return ModelState(tensors, tuple(buffers), tuple(dict.fromkeys(frozen)), dict(source.tied))
