"""A run's state as pieces: what of it each rank keeps, and the checkpoint that all pieces together are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from zeropipe.checkpoint.reader import Regions
from zeropipe.checkpoint.save.contents import Outgoing, lay_out
from zeropipe.checkpoint.save.files import FileRecord
from zeropipe.checkpoint.save.records import COMPUTED, FP32, FlatState, LocalState, Manifest, united
from zeropipe.checkpoint.sources import Checkpoint
from zeropipe.checkpoint.sources.ours import parse_ours


def share_of(local: LocalState, replicas_agree: bool) -> Outgoing:
    """What this rank keeps of the state, of its own tensors. ``replicas_agree``: as they do but for 1-bit optimizers.

    What a checkpoint on disk holds twice is kept once: weights are the rounded masters, and of a state that every rank
    has whole (stage 0) each keeps a part.
    """
    if not local.stage and replicas_agree and local.flats:
        local = replace(local, stage=1, flats=tuple(map(_own_part, local.flats)))
    laid = lay_out(_without_weights(local), f"global_step{local.train.global_steps}", peers=False)
    return replace(laid, part=replace(laid.part, files=tuple(FileRecord(n, 0, "") for n in laid.trees)))


def whole_of(folder: Path, parts: Iterable[Manifest], pieces: Iterable[Mapping[str, Any]]) -> Checkpoint:
    """The checkpoint of which every rank's ``parts`` tell, in their order; ``pieces``: what of it can be read here.

    Raises CheckpointError where a shard is of no rank.
    """
    trees = {name: tree for piece in pieces for name, tree in piece.items()}
    return parse_ours(folder, united(list(parts)), trust=True, opened=trees)


def _own_part(flat: FlatState) -> FlatState:
    """This replica's equal part of a flat that all have whole, as one shard of as many."""
    layout = flat.layout.reshard(flat.num_replicas)
    part = slice(*layout.shard_range(flat.replica))
    tensors = {key: tensor[part] for key, tensor in flat.tensors.items()}
    return replace(flat, layout=layout, shard=flat.replica, tensors=tensors, replica=0, num_replicas=1)


def _without_weights(local: LocalState) -> LocalState:
    # The code of a region may have made another value of a parameter than its master says.
    model, regions = local.model, Regions(local.model.regions)
    masters = {spec.name for flat in local.flats if FP32 in flat.tensors for spec in flat.layout.tensors}
    tensors = {
        name: tensor
        for name, tensor in model.tensors.items()
        if name not in masters or regions.of(name) is not None or model.kinds.get(name) == COMPUTED
    }
    layers = tuple(entry for entry in model.layers if entry[2] in tensors)
    return replace(local, model=replace(model, tensors=tensors, layers=layers))
