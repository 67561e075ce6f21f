"""A folder of ours, as its manifest describes it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from zeropipe.checkpoint.constants import LAYER_FILE_PREFIX
from zeropipe.checkpoint.save.contents import CODE_FILE, OURS, code_file
from zeropipe.checkpoint.save.files import THREADS
from zeropipe.checkpoint.save.plain import decode, settle
from zeropipe.checkpoint.save.records import (
    CLIENT,
    FlatEntry,
    Manifest,
    ModuleRest,
    TensorEntry,
    TrainState,
    rest_back,
    training_back,
)
from zeropipe.checkpoint.sources import Checkpoint, Files, Flat, Value, counts_of, plain_of, united
from zeropipe.checkpoint.universal_checkpoint import rules_in
from zeropipe.errors import CheckpointError

_MODEL_FILE = re.compile(r"^(?:zero_pp_rank_0_)?mp_rank_(\d+)_model_states\.pt$")


def parse_ours(
    folder: Path, manifest: Manifest, *, trust: bool = False, opened: Mapping[str, Any] | None = None
) -> Checkpoint:
    """No file is opened before something is read from it; those that are ``opened`` need not be in the folder."""
    there = _Folder(Files(folder, trust, opened or {}), manifest)
    return Checkpoint(
        folder,
        manifest.tag,
        manifest.stage,
        manifest.dtype,
        manifest.optimizer,
        manifest.world,
        manifest.degrees,
        tuple(
            Value(e.name, e.shape, e.dtype, e.kind, e.file, e.mp_rank, partial(there.value, e))
            for e in manifest.module
        ),
        tuple(
            Flat(
                e.name, e.mp_rank, e.group_index, e.layout, e.keys, partial(there.shard, e), partial(there.numbers, e)
            )
            for e in manifest.flats
        ),
        manifest.tied,
        there.groups,
        lambda: rules_in(there.lead),
        there.rest,
        there.train_state,
        left_out=there.left_out,
        threads=THREADS,  # tensors are mapped, so several may be copied at once
    )  # fmt: skip


class _Folder:
    """Where things lie in the files."""

    def __init__(self, files: Files, manifest: Manifest) -> None:
        self._files = files
        self._manifest = manifest
        self._names = {record.name for record in manifest.files}
        # Model-parallel rank -> the model file of its first data-parallel rank.
        found = {int(match[1]): match[0] for match in map(_MODEL_FILE.match, self._names) if match}
        self._models: dict[int, str] = dict(sorted(found.items()))

    @property
    def lead(self) -> Any:
        """The model file of model-parallel rank 0, as its first data-parallel rank wrote it."""
        return self._files[self._models[0]]

    def groups(self) -> Any:
        return decode(self.lead[OURS].get("param_groups") or [], "param_groups", self._code())

    def value(self, entry: TensorEntry) -> torch.Tensor:
        tree = self._files[entry.file]
        # A layer's file is its state dict, whose keys lack the layer's number.
        if entry.file.startswith(LAYER_FILE_PREFIX):
            return tree[entry.name.split(".", 1)[1]]
        return tree["module"][entry.name]

    def shard(self, entry: FlatEntry, shard: int, key: str) -> torch.Tensor:
        tensor: torch.Tensor = self._flat(entry, shard)["tensors"][key]
        # The padding may be absent, elements may not: the file would be one of another save.
        if tensor.numel() < entry.layout.held(shard):
            raise CheckpointError(
                f"{self._files.folder / entry.files[shard]}: {key} of {entry.name} is too short for its layout",
                expected=entry.layout.shard_numel,
                found=tensor.numel(),
            )
        return tensor

    def numbers(self, entry: FlatEntry) -> dict[str, Any]:
        # Equal in all shards. What only code could restore is left out: the optimizer makes it anew.
        value, _ = settle(decode(self._flat(entry, 0)["scalars"]))
        return dict(value)

    def rest(self, tp_rank: int) -> ModuleRest:
        tp = int(self._manifest.degrees.get("tp", 1))
        # Each pipeline stage's file tells of its own modules.
        trees = {mp: self._files[name] for mp, name in self._models.items() if mp % tp == tp_rank % tp}
        return united(
            rest_back(tree[OURS], plain_of(tree["module"] or {}), self._code(mp))
            for mp, tree in trees.items()
        )

    def train_state(self, rank: int) -> TrainState:
        lead, files, ranks = self.lead, self._files, self._manifest.rank_files
        ours = lead[OURS]
        if "lr_scheduler" in ours:
            rest = training_back(ours, self._code())
        else:
            # As earlier versions saved: a part that needed code went whole to a file of its own.
            code = files[CODE_FILE] if CODE_FILE in self._names and files.trust else {}
            rest = {
                "lr_scheduler": code.get("lr_scheduler", lead["lr_scheduler"]),
                "loss_scaler": ours.get("loss_scaler"),
                "common": ours.get("common") or {},
                CLIENT: ours[CLIENT] | code.get(CLIENT, {}),
            }
        per_rank = files[ranks[rank]][OURS]["per_rank"] if rank < len(ranks) else {}
        counts = counts_of(lead) | {"micro_steps": ours["micro_steps"], "per_rank": per_rank}
        return TrainState(**(counts | rest))

    def left_out(self) -> str:
        # Where the words are in the model file, each object that is not restored is named by itself.
        if CODE_FILE not in self._names or self._files.trust or "lr_scheduler" in self.lead[OURS]:
            return ""
        return f"{CODE_FILE} holds objects that only running their code can restore; it was not opened"

    def _code(self, mp_rank: int = 0) -> Mapping[str, Any]:
        """The objects that need code, by path; none unless the caller trusts the file."""
        name = code_file(mp_rank)
        if name not in self._names or not self._files.trust:
            return {}
        return dict(self._files[name].get(OURS) or {})

    def _flat(self, entry: FlatEntry, shard: int) -> Any:
        return self._files[entry.files[shard]][OURS]["flats"][entry.name]
