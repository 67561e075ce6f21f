"""A checkpoint opened for reading: layouts first, tensors on demand, whoever wrote it.

``Source`` is what every reader works on (load, export, diff, convert). Ours is described by the manifest;
``legacy.py`` describes DeepSpeed's files in the same terms.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from zeropipe.checkpoint.constants import LAYER_FILE_PREFIX
from zeropipe.checkpoint.files import THREADS, load_torch
from zeropipe.checkpoint.manifest import FlatEntry, Manifest, TensorEntry
from zeropipe.checkpoint.plain import decode, settle
from zeropipe.checkpoint.state import CLIENT, FP32, PARAM, ModuleRest, TrainState, rest_back, training_back
from zeropipe.checkpoint.universal.patterns import rules_in
from zeropipe.checkpoint.writer import CODE_FILE, OURS, code_file
from zeropipe.errors import CheckpointError

_MODEL_FILE = re.compile(r"^(?:zero_pp_rank_0_)?mp_rank_(\d+)_model_states\.pt$")


class Files:
    """Opened files of one folder; tensors in them are mapped, not read."""

    def __init__(self, folder: Path, trust: bool = False) -> None:
        self.folder = folder
        self.trust = trust
        self._open: dict[str, Any] = {}
        self._opening = threading.Lock()

    def __getitem__(self, name: str) -> Any:
        with self._opening:
            if name not in self._open:
                self._open[name] = load_torch(self.folder / name, trust=self.trust)
            return self._open[name]

    def close(self, name: str) -> None:
        self._open.pop(name, None)


class Source(Protocol):
    """What any checkpoint can tell."""

    folder: Path
    tag: str
    stage: int
    dtype: str
    optimizer: str
    world: int
    degrees: dict[str, int]
    module: tuple[TensorEntry, ...]
    flats: tuple[FlatEntry, ...]
    tied: Mapping[str, str]

    @property
    def universal_info(self) -> Mapping[str, Any] | None:
        """How slices of tensor-parallel ranks make a whole; None where the checkpoint does not say."""
        ...

    def rest(self, tp_rank: int = 0) -> ModuleRest:
        """What the state dict held beside its tensors, on all pipeline stages of one tensor-parallel rank."""
        ...

    @property
    def param_groups(self) -> tuple[dict[str, Any], ...]:
        """Hyperparameters of each param group."""
        ...

    def flat_tensor(self, entry: FlatEntry, shard: int, key: str) -> torch.Tensor:
        """1D; holds at least the shard's pieces (the padding may be absent)."""
        ...

    def flat_scalars(self, entry: FlatEntry) -> dict[str, Any]: ...

    def module_tensor(self, entry: TensorEntry) -> torch.Tensor: ...

    def train_state(self, rank: int) -> TrainState:
        """``per_rank`` is {} where there was no such rank."""
        ...


class OurSource:
    """A folder with a manifest."""

    threads = THREADS  # its tensors are mapped, so several may be copied at once

    def __init__(self, folder: Path, manifest: Manifest, *, trust: bool = False) -> None:
        self.folder = folder
        self.manifest = manifest
        self.files = Files(folder, trust)
        self.tag = manifest.tag
        self.stage = manifest.stage
        self.dtype = manifest.dtype
        self.optimizer = manifest.optimizer
        self.world = manifest.world
        self.degrees = manifest.degrees
        self.module = manifest.module
        self.flats = manifest.flats
        self.tied: Mapping[str, str] = manifest.tied

    @property
    def universal_info(self) -> Mapping[str, Any] | None:
        return rules_in(self._lead())

    @property
    def param_groups(self) -> tuple[dict[str, Any], ...]:
        return tuple(decode(self._lead()[OURS].get("param_groups") or [], "param_groups", self._code()))

    def rest(self, tp_rank: int = 0) -> ModuleRest:
        tp_degree = int(self.degrees.get("tp", 1))
        extra: dict[str, Any] = {}
        versions: dict[str, Any] | None = None
        hidden: set[str] = set()
        for mp_rank, name in self._model_files().items():
            if mp_rank % tp_degree != tp_rank % tp_degree:
                continue
            tree = self.files[name]
            plain = {k: v for k, v in (tree["module"] or {}).items() if not isinstance(v, torch.Tensor)}
            found = rest_back(tree[OURS], plain, self._code(mp_rank))
            extra |= found.extra
            hidden |= found.hidden
            if found.versions is not None:
                versions = (versions or {}) | dict(found.versions)
        return ModuleRest(extra, versions, frozenset(hidden))

    def _model_files(self) -> dict[int, str]:
        """Model-parallel rank -> the model file of its first data-parallel rank."""
        found: dict[int, str] = {}
        for record in self.manifest.files:
            match = _MODEL_FILE.match(record.name)
            if match:
                found[int(match[1])] = record.name
        return dict(sorted(found.items()))

    def flat_tensor(self, entry: FlatEntry, shard: int, key: str) -> torch.Tensor:
        tensor = self._flat(entry, shard)["tensors"][key]
        if tensor.numel() < entry.layout.held(shard):
            raise CheckpointError(
                f"{self.folder / entry.files[shard]}: {key} of {entry.name} is too short for its layout",
                expected=entry.layout.shard_numel,
                found=tensor.numel(),
            )
        return tensor

    def flat_scalars(self, entry: FlatEntry) -> dict[str, Any]:
        value, _ = settle(decode(self._flat(entry, 0)["scalars"]))
        return dict(value)

    def module_tensor(self, entry: TensorEntry) -> torch.Tensor:
        tree = self.files[entry.file]
        if entry.file.startswith(
            LAYER_FILE_PREFIX
        ):  # a pipeline layer's state dict, without the layer's number
            return tree[entry.name.split(".", 1)[1]]
        return tree["module"][entry.name]

    def train_state(self, rank: int) -> TrainState:
        lead = self._lead()
        ours = lead[OURS]
        per_rank = {}
        if rank < len(self.manifest.rank_files):
            per_rank = self.files[self.manifest.rank_files[rank]][OURS]["per_rank"]
        if "lr_scheduler" in ours:
            rest = training_back(ours, self._code())
        else:  # as saved when a part that needed code went to a file of its own whole
            code = self.files[CODE_FILE] if self._has(CODE_FILE) and self.files.trust else {}
            rest = {
                "lr_scheduler": code.get("lr_scheduler", lead["lr_scheduler"]),
                "loss_scaler": ours.get("loss_scaler"),
                "common": ours.get("common") or {},
                CLIENT: ours[CLIENT] | code.get(CLIENT, {}),
            }
        return TrainState(
            global_steps=lead["global_steps"],
            global_samples=lead["global_samples"],
            skipped_steps=lead["skipped_steps"],
            micro_steps=ours["micro_steps"],
            per_rank=per_rank,
            ds_config=lead["ds_config"],
            **rest,
        )

    @property
    def left_out(self) -> str:
        """Why parts of the client state are not read, "" where all of it is, or where each part says so itself."""
        if not self._has(CODE_FILE) or self.files.trust or "lr_scheduler" in self._lead()[OURS]:
            return ""
        return f"{CODE_FILE} holds objects that only running their code can restore; it was not opened"

    def _code(self, mp_rank: int = 0) -> Mapping[str, Any]:
        """The objects that need code, by path; none unless the caller trusts the file."""
        name = code_file(mp_rank)
        if not self._has(name) or not self.files.trust:
            return {}
        return dict(self.files[name].get(OURS) or {})

    def _flat(self, entry: FlatEntry, shard: int) -> Any:
        return self.files[entry.files[shard]][OURS]["flats"][entry.name]

    def _has(self, name: str) -> bool:
        return any(record.name == name for record in self.manifest.files)

    def _lead(self) -> Any:
        """The model file of model-parallel rank 0, as its first data-parallel rank wrote it."""
        return self.files[self._model_files()[0]]


def value_key(entry: FlatEntry) -> str | None:
    """The key under which a flat keeps the values of its parameters, None where it keeps only moments."""
    return next((key for key in (FP32, PARAM) if key in entry.keys), None)


def read_full(source: Source, entry: FlatEntry, name: str, key: str) -> torch.Tensor:
    """One tensor of a flat put together from its shards; a new tensor of the tensor's shape."""
    index = entry.layout.index(name)
    spec = entry.layout.tensors[index]
    whole: torch.Tensor | None = None
    for piece in entry.layout.tensor_pieces(index):
        shard = source.flat_tensor(entry, piece.shard, key)
        if whole is None:
            whole = torch.empty(spec.numel, dtype=shard.dtype)
        whole[piece.start : piece.start + piece.numel] = shard[piece.offset : piece.offset + piece.numel]
    if whole is None:  # an empty tensor has no pieces
        whole = torch.empty(0, dtype=getattr(torch, entry.keys[key]))
    return whole.view(spec.shape)
