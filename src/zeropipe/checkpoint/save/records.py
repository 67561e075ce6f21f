"""What is saved, as plain data: what an engine hands over and gets back, and the manifest that says where it lies.

Each rank describes only what it holds. Replicas hold the same bytes; ``contents`` decides which of them writes.

    engine --LocalState--> save()          load(into=LocalState) --LoadedState--> engine

The manifest is JSON beside the tensors, so that no reader ever guesses. It is written last inside the folder and
carries its own checksum; a folder without a whole manifest is not a complete checkpoint of ours.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from zeropipe.checkpoint.save.files import FileRecord, checksum_text, missing_text
from zeropipe.checkpoint.save.plain import decode, encode
from zeropipe.errors import CheckpointError
from zeropipe.frozen import from_json, to_json
from zeropipe.layout.flat import FlatShards
from zeropipe.paths import inside

FP32 = "fp32"  # key of the fp32 master shard in FlatState.tensors
PARAM = "param"  # key of the shard of a parameter that has no master (frozen, stage 3)
COMPUTED = "computed"  # kind of a value that a hook of the module put into its state dict
CLIENT = "client_state"
_WORDED = (
    "lr_scheduler",
    "loss_scaler",
    "common",
    CLIENT,
)  # of a TrainState; the rest are counts and plain values
MANIFEST_NAME = "zeropipe_manifest.json"
_FORMAT = 1
_BLANK = checksum_text(0)


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
class ModuleRest:
    """What a saved state dict held beside its tensors. ``versions``: None where the checkpoint does not say."""

    extra: Mapping[str, Any] = field(default_factory=dict)  # non-tensor entries (get_extra_state)
    versions: Mapping[str, Mapping[str, Any]] | None = None  # the state dict's metadata, if not version 1
    hidden: frozenset[str] = frozenset()  # parameters that are no keys of it


@dataclass(frozen=True, slots=True)
class ModelState:
    """The module's state dict on this rank: full tensors (of this tp and pp rank), tied names share a tensor.

    Stage 3 leaves sharded parameters out (their values are in the flats) and keeps buffers and plain parameters.
    """

    tensors: dict[str, torch.Tensor]
    # Name -> "buffer", COMPUTED or, wherever the parameter is held, "frozen". What is not named is trained.
    kinds: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(
        default_factory=dict
    )  # other name -> the name that the tensor is saved under
    rest: ModuleRest = ModuleRest(versions={})
    # How slices of tensor-parallel ranks make a whole (``universal_checkpoint_info``); None: not known.
    universal_info: dict[str, Any] | None = None
    excluded: tuple[str, ...] = ()  # left out on purpose (exclude_frozen_parameters)
    # DeepSpeed's name -> ours, where they differ: tied layers of pipelines. Only loads look at it.
    peer_names: dict[str, str] = field(default_factory=dict)
    # Prefixes of the modules (with all below them) whose own code takes part in saving or loading. A load leaves their
    # values to that code (``saved_module``); masters and moments are found by the parameters' names all the same.
    regions: tuple[str, ...] = ()
    # Pipelines only: (layer, key in that layer's file, name in ``tensors``); such tensors go to files by layer.
    layers: tuple[tuple[int, str, str], ...] = ()

    def of_kind(self, kind: str) -> list[str]:
        return [name for name, found in self.kinds.items() if found == kind]


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


# In words, as they stand in the files: ``code`` gets, by its path, what only code can restore.


def training_words(train: TrainState, code: dict[str, Any]) -> dict[str, Any]:
    return {name: encode(getattr(train, name), name, code) for name in _WORDED}


def training_back(words: Mapping[str, Any], code: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a TrainState that ``training_words`` gave words for."""
    return {name: decode(words[name], name, code) for name in _WORDED if name in words}


def rest_words(rest: ModuleRest, code: dict[str, Any]) -> dict[str, Any]:
    extra = {key: encode(value, key, code) for key, value in rest.extra.items()}
    words: dict[str, Any] = {"extra": extra, "hidden": sorted(rest.hidden)}
    return words if rest.versions is None else words | {"versions": encode(rest.versions, "versions", {})}


def rest_back(
    words: Mapping[str, Any], plain: Mapping[str, Any], code: Mapping[str, Any] | None = None
) -> ModuleRest:
    """Back from ``rest_words``; ``plain``: extra state that stands in the state dict itself."""
    extra = {key: decode(value, key, code) for key, value in (words.get("extra") or {}).items()}
    versions = decode(words["versions"]) if "versions" in words else None
    return ModuleRest(dict(plain) | extra, versions, frozenset(words.get("hidden") or ()))


# The manifest. Each rank makes one of what it has written, and the whole is their union.


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
    scalars: dict[
        str, Any
    ]  # for readers of the manifest alone: loads take them from the file, with their types
    files: tuple[str, ...]  # by shard; "" where nobody has reported it yet


@dataclass(frozen=True, slots=True)
class Manifest:
    # The same on all ranks.
    tag: str
    stage: int
    dtype: str
    optimizer: str
    world: int
    degrees: dict[str, int]  # sizes of the axes: {"dp": 2, "tp": 1, "pp": 1}
    global_steps: int
    versions: dict[str, str]  # of the writers

    # What each rank adds.
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
        items = [("format", _FORMAT), *said.items(), ("checksum", _BLANK)]
        items.insert([name for name, _ in items].index("rank_files"), ("files", files))
        text = json.dumps(dict(items), indent=1)
        return text.replace(_own(_BLANK), _own(checksum_text(zlib.crc32(text.encode()))))

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
            if data["format"] > _FORMAT:
                raise CheckpointError(
                    f"{path} was written by a newer zeropipe ({data['versions'].get('zeropipe')})",
                    expected=f"format {_FORMAT} or older",
                    found=data["format"],
                    fix="update zeropipe",
                )
            records = [{"name": name, **record} for name, record in data["files"].items()]
            manifest: Manifest = from_json(cls, data | {"files": records})
            # No file outside of the folder, and none that nothing checks.
            known = {record.name for record in manifest.files}
            for name in known:
                inside(path.parent, name, "a file of the manifest")
            used = {*manifest.rank_files, *(entry.file for entry in manifest.module)}
            used |= {file for flat in manifest.flats for file in flat.files}
            if used - known:
                raise ValueError(f"it has no size and checksum for {min(used - known)!r}")
            return manifest
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} is damaged: {error}",
                fix="use an earlier checkpoint, or copy this one again from where it is whole",
            ) from error


def _own(checksum: str) -> str:
    return f'"checksum": "{checksum}"\n}}'


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest, None where it has none. Raises CheckpointError when it is damaged."""
    path = folder / MANIFEST_NAME
    try:
        # As bytes: reading text would take other ends of lines for the same.
        return Manifest.from_text(path.read_bytes().decode("utf-8"), path)
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is damaged: {error}", fix="use an earlier checkpoint") from error
    except OSError as error:
        raise CheckpointError(missing_text(path, error)) from error


def united(parts: Sequence[Manifest]) -> Manifest:
    """The whole of what the ranks have written; ``parts`` in their order. Raises CheckpointError for a lost shard."""
    files = tuple(record for part in parts for record in part.files)
    assert len({record.name for record in files}) == len(files), "two ranks have written one file"
    flats: dict[tuple[int, str], FlatEntry] = {}
    for entry in (entry for part in parts for entry in part.flats):
        before = flats.setdefault((entry.mp_rank, entry.name), entry)
        # Each rank names the files of the shards that it has written.
        named = tuple(a or b for a, b in zip(before.files, entry.files, strict=True))
        flats[entry.mp_rank, entry.name] = replace(before, files=named)
    # A rank that saved less often than the others, or died, has left a hole.
    for entry in flats.values():
        if "" in entry.files:
            raise CheckpointError(
                f"no rank has written shard {entry.files.index('')} of {entry.name}",
                expected=f"{entry.layout.num_shards} shards",
                found=len([f for f in entry.files if f]),
                fix="every rank must call save_checkpoint",
            )
    return replace(
        parts[0],
        rank_files=tuple(file for part in parts for file in part.rank_files),
        tied={other: name for part in parts for other, name in part.tied.items()},
        excluded=tuple(dict.fromkeys(name for part in parts for name in part.excluded)),
        files=files,
        module=tuple(entry for part in parts for entry in part.module),
        flats=tuple(flats.values()),
    )
