"""Writes the universal format: ``zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt``, one parameter in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from zeropipe.checkpoint import constants as k
from zeropipe.checkpoint.files import replace_text, write_torch
from zeropipe.checkpoint.manifest import FlatEntry
from zeropipe.checkpoint.numbers import STEP, Numbers
from zeropipe.checkpoint.ownership import replacing
from zeropipe.checkpoint.parallel import joined
from zeropipe.checkpoint.peer_keys import PEER_VERSION
from zeropipe.checkpoint.plain import encode, is_plain, lowered
from zeropipe.checkpoint.source import Source, read_full
from zeropipe.checkpoint.state import FP32, PARAM, rest_words, training_words
from zeropipe.checkpoint.tags import LATEST_UNIVERSAL
from zeropipe.checkpoint.universal.patterns import Joining, Rule, joining_of
from zeropipe.checkpoint.universal.read import OUR_FILE
from zeropipe.checkpoint.weights import Weight, weights
from zeropipe.checkpoint.writer import OURS
from zeropipe.paths import inside


def write_universal(
    source: Source,
    output: str | os.PathLike[str],
    *,
    workers: int = 2,
    progress: Callable[[int], None] = lambda done: None,
) -> Path:
    """Write the folder ``output`` and name it in ``latest_universal`` beside it.

    No temporary copy of the data is made; at most ``workers`` parameters are in memory. ``progress`` gets 1 per
    parameter. Returns ``output``. What an earlier call wrote there is replaced once the new one is whole; anything
    else that is there is a CheckpointError, before a byte is written.
    """
    source = joined(source)
    rules = source.universal_info
    final = Path(output)
    holders: dict[str, FlatEntry] = {
        s.name: f for f in source.flats if FP32 in f.keys for s in f.layout.tensors
    }
    everything = list(weights(source))
    numbers = Numbers(source)
    folders = {w.name: inside(Path("zero"), w.name, "a tensor's name") for w in everything}

    def one(weight: Weight, folder: Path) -> None:
        cut = joining_of(weight.name, rules or {})
        if cut.dim >= len(weight.shape):
            cut = Joining(Rule.REPLICATED)
        _parameter(source, numbers, weight, holders.get(weight.name), folder, _slicing(cut))
        progress(1)

    with replacing(final, "universal", source.folder) as work:
        (work / "zero").mkdir()
        with ThreadPoolExecutor(workers) as threads:
            list(threads.map(lambda weight: one(weight, work / folders[weight.name]), everything))
        write_torch(work / "zero" / "optimizer_state.pt", _common(source))
        write_torch(work / OUR_FILE, _ours(source, holders))
        write_torch(work / "mp_rank_00_model_states.pt", _model(source, everything))
    replace_text(final.parent / LATEST_UNIVERSAL, final.name)
    return final


def _slicing(how: Joining) -> dict[str, Any]:
    """What a parameter's file tells DeepSpeed of how tensor-parallel ranks slice it."""
    if how.rule in (Rule.REPLICATED, Rule.AVERAGE):
        return {}
    if how.rule is Rule.SUB_PARAMS and how.sub_count:
        return {k.CAT_DIM: how.dim, k.PARAM_N_SUB_PARAMS: how.sub_count}
    return {k.CAT_DIM: how.dim} | ({k.VOCAB_TENSOR: True} if how.vocabulary is not None else {})


def _parameter(
    source: Source,
    numbers: Numbers,
    weight: Weight,
    flat: FlatEntry | None,
    folder: Path,
    slicing: dict[str, Any],
) -> None:
    folder.mkdir(parents=True)  # a name may have a slash in it
    write_torch(folder / "fp32.pt", {k.PARAM: weight.contiguous()} | slicing)
    shared = None if flat is None else numbers.of(flat, weight.name)
    if flat is None or shared is None:  # never stepped
        return
    for key in flat.keys:
        if key not in (FP32, PARAM):
            file = inside(folder, f"{key}.pt", "a key of the optimizer's state")
            write_torch(file, {k.PARAM: read_full(source, flat, weight.name, key)} | slicing)
    step = shared.get(STEP)
    if step is not None:
        write_torch(folder / f"{STEP}.pt", torch.as_tensor(step, dtype=torch.float32))


def _common(source: Source) -> dict[str, Any]:
    groups = [
        {key: v for key, v in lowered(group).items() if key != "param_names"} | {"params": [index]}
        for index, group in enumerate(source.param_groups)
    ]
    return {k.PARAM_GROUPS: groups, k.ZERO_STAGE: source.stage, k.DS_VERSION: PEER_VERSION}


def _ours(source: Source, holders: Mapping[str, FlatEntry]) -> dict[str, Any]:
    """What DeepSpeed's form has no place for: numbers of a parameter other than ``step`` (any other file in its folder
    is a tensor to DeepSpeed), and what each rank keeps for itself."""
    numbers = Numbers(source)
    of_each = {name: numbers.all_of(flat, name) for name, flat in holders.items()}
    further = {n: {key: v for key, v in found.items() if key != STEP} for n, found in of_each.items()}
    return {
        "numbers": encode(further, "numbers", {}),
        "micro_steps": source.train_state(0).micro_steps,
        "per_rank": [source.train_state(rank).per_rank for rank in range(source.world)],
    }


def _model(source: Source, everything: list[Weight]) -> dict[str, Any]:
    """A model file: buffers and counters; parameters are in their folders."""
    train = source.train_state(0)
    shapes: dict[int, dict[str, torch.Size]] = {}
    for flat in source.flats:
        if FP32 in flat.keys:
            for spec in flat.layout.tensors:
                shapes.setdefault(flat.group_index, {})[spec.name] = torch.Size(spec.shape)
    dtype = getattr(torch, source.dtype)
    module = {w.name: w.read(dtype if w.kind != "buffer" else None) for w in everything}
    module |= {other: module[name] for other, name in source.tied.items() if name in module}
    rest = source.rest()
    module |= {key: value for key, value in rest.extra.items() if is_plain(value)}
    return {
        "module": module,
        k.BUFFER_NAMES: [w.name for w in everything if w.kind == "buffer"],
        "optimizer": None,
        k.PARAM_SHAPES: [shapes[group] for group in sorted(shapes)],
        "frozen_param_shapes": {w.name: torch.Size(w.shape) for w in everything if w.kind == "frozen"},
        "frozen_param_fragments": None,
        "shared_params": dict(source.tied),
        "lr_scheduler": lowered(train.lr_scheduler),
        "data_sampler": None,
        "random_ltd": None,
        "sparse_tensor_module_names": [],
        "skipped_steps": train.skipped_steps,
        "global_steps": train.global_steps,
        "global_samples": train.global_samples,
        "dp_world_size": source.degrees.get("dp", 1),
        "mp_world_size": 1,
        k.CHECKPOINT_PARALLEL_DIMS: {k.CHECKPOINT_PP_DEGREE: 1, k.CHECKPOINT_TP_DEGREE: 1},
        "ds_config": train.ds_config,
        k.DS_VERSION: PEER_VERSION,
        k.UNIVERSAL_CHECKPOINT_INFO: {
            k.UNIVERSAL_CHECKPOINT_VERSION_KEY: k.UNIVERSAL_CHECKPOINT_VERSION_VALUE
        }
        | dict(source.universal_info or {}),
        OURS: training_words(train, {}) | rest_words(rest),
        **{key: v for key, v in lowered(train.client_state).items() if key != k.UNIVERSAL_CHECKPOINT_INFO},
    }
