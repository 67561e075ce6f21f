"""What is saved, as plain data: what an engine hands over and gets back, and the manifest that says where it lies.

Each rank describes only what it holds. Replicas hold the same bytes; ``contents`` decides which of them writes.

    engine --LocalState--> save()          load(into=LocalState) --LoadedState--> engine

The manifest is JSON beside the tensors, so that no reader ever guesses. It is written last inside the folder and
carries its own checksum; a folder without a whole manifest is not a complete checkpoint of ours.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from zeropipe.checkpoint.save.files import FileRecord, checksum_text, missing_text
from zeropipe.errors import CheckpointError
from zeropipe.frozen import from_json, to_json
from zeropipe.layout.flat import FlatShards
from zeropipe.paths import inside

FP32 = "fp32"  # key of the fp32 master shard in FlatState.tensors
COMPUTED = "computed"  # kind of a value that a hook of the module put into its state dict
CLIENT = "client_state"
PARAM = "param"  # key of the shard of a parameter that has no master (frozen, stage 3)


@dataclass(frozen=True, slots=True)
class Grid:
    """This rank's place in the process grid and the size of each axis."""

    rank: int = 0  # index in the group that saves and loads together
    world: int = 1
    dp_rank: int = 0
    dp_degree: int = 1
    tp_rank: int = 0
    tp_degree: int = 1
    pp_rank: int = 0
    pp_degree: int = 1

    @property
    def mp_rank(self) -> int:
        """The number in ``mp_rank_XX``: tensor-parallel ranks of stage 0, then of stage 1, ..."""
        return self.pp_rank * self.tp_degree + self.tp_rank


@dataclass(frozen=True, slots=True)
class FlatState:
    """One flat layout as this rank holds it: its shard of the masters and of each optimizer moment.

    Stage 0 is ``num_shards = 1`` on every rank, ZeRO-1/2 one of these per (param group, dtype), ZeRO-3 one per
    parameter or unit; MiCS sets ``num_replicas``. Names in ``layout`` are those of the module's state dict
    (the first name of a tied tensor). Frozen parameters of stage 3 have only the key ``PARAM``.
    """

    name: str  # the same on all ranks that hold a shard or a replica of it, unique among a rank's flats
    layout: FlatShards
    shard: int
    tensors: dict[str, torch.Tensor]  # each 1D [layout.shard_numel]: FP32, "exp_avg", "exp_avg_sq", ...
    scalars: dict[str, Any] = field(default_factory=dict)  # state with one value per flat: {"step": 10}
    group_index: int = 0  # optimizer param group
    replica: int = 0  # which of the ranks that hold this very shard
    num_replicas: int = 1


@dataclass(frozen=True, slots=True)
class ModelState:
    """The module's state dict on this rank: full tensors (of this tp and pp rank), tied names share a tensor.

    Stage 3 leaves sharded parameters out (their values are in the flats) and keeps buffers and plain parameters.
    """

    tensors: dict[str, torch.Tensor]
    buffers: tuple[str, ...] = ()  # which of them are buffers
    frozen: tuple[str, ...] = ()  # parameters without gradient, wherever they are held
    tied: dict[str, str] = field(
        default_factory=dict
    )  # other name -> the name that the tensor is saved under
    # How slices of tensor-parallel ranks make a whole (``universal_checkpoint_info``); None: not known.
    universal_info: dict[str, Any] | None = None
    excluded: tuple[str, ...] = ()  # left out on purpose (exclude_frozen_parameters)
    extra: dict[str, Any] = field(default_factory=dict)  # non-tensor entries (get_extra_state)
    # DeepSpeed's name -> ours, where they differ: tied layers of pipelines. Only loads look at it.
    peer_names: dict[str, str] = field(default_factory=dict)
    # Prefixes of the modules (with all below them) whose own code takes part in saving or loading. A load leaves their
    # values to that code (``saved_module``); masters and moments are found by the parameters' names all the same.
    regions: tuple[str, ...] = ()
    computed: tuple[str, ...] = ()  # which of ``tensors`` are neither parameters nor buffers
    hidden: tuple[str, ...] = ()  # parameters that are no keys of the state dict
    versions: dict[str, dict[str, Any]] = field(
        default_factory=dict
    )  # the state dict's metadata, if not version 1
    # Pipelines only: (layer, key in that layer's file, name in ``tensors``); such tensors go to files by layer.
    layers: tuple[tuple[int, str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class ModuleRest:
    """What a saved state dict held beside its tensors. ``versions``: None where the checkpoint does not say."""

    extra: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Mapping[str, Any]] | None = None
    hidden: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class TrainState:
    """Everything that is not a tensor of the model or the optimizer."""

    global_steps: int = 0
    global_samples: int = 0
    skipped_steps: int = 0
    micro_steps: int = 0
    lr_scheduler: dict[str, Any] | None = None
    loss_scaler: dict[str, Any] | None = None  # cur_scale, cur_iter, ...
    per_rank: dict[str, Any] = field(default_factory=dict)  # RNG states, data position, error feedback
    common: dict[str, Any] = field(default_factory=dict)  # the same on all ranks; plain values and tensors
    client_state: dict[str, Any] = field(default_factory=dict)
    ds_config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LocalState:
    """All that one rank saves, or the tensors that a load fills in place."""

    grid: Grid
    stage: int
    dtype: str  # working precision, torch's name without the prefix: float32, bfloat16, float16
    model: ModelState
    flats: tuple[FlatState, ...] = ()
    param_groups: tuple[dict[str, Any], ...] = ()  # hyperparameters of each group, without tensors
    optimizer_name: str = ""
    train: TrainState = field(default_factory=TrainState)


@dataclass(frozen=True, slots=True)
class LoadedFlat:
    """``tensors`` holds the destination's own tensors where it gave them, new 1D CPU ones where it did not."""

    tensors: dict[str, torch.Tensor]  # each 1D [shard_numel]
    scalars: dict[str, Any]


@dataclass(frozen=True, slots=True)
class LoadedState:
    """What a load found; tensors are already in place."""

    path: str
    tag: str
    stage: int
    flats: Mapping[
        str, LoadedFlat
    ]  # by the destination's flat name; empty if the optimizer was not asked for
    param_groups: tuple[dict[str, Any], ...]
    train: TrainState  # per_rank is {} where no saved rank corresponds to this one
    missing: tuple[str, ...] = ()  # wanted and not there
    unexpected: tuple[str, ...] = ()  # there and not wanted
    notices: tuple[str, ...] = ()  # what was skipped or decided, for the log


# The manifest.

MANIFEST_NAME = "zeropipe_manifest.json"
FORMAT = 1
_BLANK = checksum_text(0)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of the module as one model-parallel rank holds it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str  # "param", "frozen", "buffer" or "computed" (by a hook)
    file: str
    mp_rank: int = 0


@dataclass(frozen=True, slots=True)
class FlatEntry:
    """One flat layout: what is stored for it and in which file each shard is."""

    name: str
    mp_rank: int
    group_index: int
    layout: FlatShards
    keys: dict[str, str]  # "fp32", "exp_avg", ... -> dtype
    scalars: dict[str, Any]  # plain values
    files: tuple[str, ...]  # by shard; "" where nobody has reported it yet


@dataclass(frozen=True, slots=True)
class Manifest:
    """``degrees``: sizes of the axes, ``{"dp": 2, "tp": 1, "pp": 1}``. ``versions``: of the writers."""

    tag: str
    stage: int
    dtype: str
    optimizer: str
    world: int
    degrees: dict[str, int]
    global_steps: int
    versions: dict[str, str]
    rank_files: tuple[str, ...]  # by rank: where its RNG and data position are
    tied: dict[str, str]
    excluded: tuple[str, ...]
    files: tuple[FileRecord, ...]
    module: tuple[TensorEntry, ...]
    flats: tuple[FlatEntry, ...]

    def to_text(self) -> str:
        said = to_json(self)
        # By name, and before what the ranks say: the order that the format has had from its first version on.
        files = {record.pop("name"): record for record in said.pop("files")}
        items = [("format", FORMAT), *said.items(), ("checksum", _BLANK)]
        items.insert([name for name, _ in items].index("rank_files"), ("files", files))
        text = json.dumps(dict(items), indent=1)
        return text.replace(_own(_BLANK), _own(checksum_text(zlib.crc32(text.encode()))))

    def check_names(self, folder: Path) -> None:
        """Raises CheckpointError for a file that would be outside of ``folder``, or that nothing checks."""
        known = {record.name for record in self.files}
        for name in known:
            inside(folder, name, "a file of the manifest")
        used = {entry.file for entry in self.module} | set(self.rank_files)
        used |= {file for flat in self.flats for file in flat.files}
        if used - known:
            raise ValueError(f"it has no size and checksum for {min(used - known)!r}")

    @classmethod
    def from_text(cls, text: str, path: Path) -> Manifest:
        """Raises CheckpointError when the text is not, to the byte, what ``to_text`` gave, or is newer than us."""
        try:
            data = json.loads(text)
            found = data["checksum"]
            # The checksum is of the text with a blank in its own place.
            blank = text.replace(_own(found), _own(_BLANK))
            if checksum_text(zlib.crc32(blank.encode())) != found:
                raise ValueError("its checksum does not match")
            if data["format"] > FORMAT:
                raise CheckpointError(
                    f"{path} was written by a newer zeropipe ({data['versions'].get('zeropipe')})",
                    expected=f"format {FORMAT} or older",
                    found=data["format"],
                    fix="update zeropipe",
                )
            records = [{"name": name, **record} for name, record in data["files"].items()]
            manifest: Manifest = from_json(cls, data | {"files": records})
            manifest.check_names(path.parent)
            return manifest
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} is damaged: {error}",
                fix="use an earlier checkpoint, or copy this one again from where it is whole",
            ) from error


def _own(checksum: str) -> str:
    return f'"checksum": "{checksum}"\n}}'


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest, None where it has none. Raises CheckpointError when it is damaged.

    As bytes: reading text would take other ends of lines for the same.
    """
    path = folder / MANIFEST_NAME
    try:
        return Manifest.from_text(path.read_bytes().decode("utf-8"), path)
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is damaged: {error}", fix="use an earlier checkpoint") from error
    except OSError as error:
        raise CheckpointError(missing_text(path, error)) from error


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank contributes to the manifest."""

    rank: int
    files: tuple[FileRecord, ...]
    module: tuple[TensorEntry, ...]
    flats: tuple[FlatEntry, ...]
    tied: dict[str, str]
    excluded: tuple[str, ...]
    rank_file: str


def join_flats(parts: Iterable[FlatEntry]) -> tuple[FlatEntry, ...]:
    """One entry per flat out of those that each rank gave for its own shard.

    Raises CheckpointError when a shard is in no file.
    """
    joined: dict[tuple[int, str], FlatEntry] = {}
    for entry in parts:
        key = (entry.mp_rank, entry.name)
        before = joined.get(key)
        if before is None:
            joined[key] = entry
            continue
        # Each rank names the files of the shards that it has written.
        files = tuple(a or b for a, b in zip(before.files, entry.files, strict=True))
        joined[key] = replace(before, files=files)
    for entry in joined.values():
        if "" in entry.files:
            raise CheckpointError(
                f"no rank has written shard {entry.files.index('')} of {entry.name}",
                expected=f"{entry.layout.num_shards} shards",
                found=len([f for f in entry.files if f]),
                fix="every rank must call save_checkpoint",
            )
    return tuple(joined.values())
