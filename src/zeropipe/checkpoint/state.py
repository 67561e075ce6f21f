"""What an engine hands over to be saved and what it gets back: plain data, so that this package knows no engine.

Each rank describes only what it holds. Replicas hold the same bytes; the writer decides which of them writes.

    engine --LocalState--> save()          load(into=LocalState) --LoadedState--> engine
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from zeropipe.checkpoint import stand_ins
from zeropipe.checkpoint.plain import below, decode, encode, name_of
from zeropipe.errors import describe
from zeropipe.layout.flat import FlatShards

FP32 = "fp32"  # key of the fp32 master shard in FlatState.tensors
COMPUTED = "computed"  # kind of a value that a hook of the module put into its state dict
CLIENT = "client_state"
_OF_TRAINING = ("lr_scheduler", "loss_scaler", "common", CLIENT)
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


# In words: what a save says beside its tensors, and what of it only code can restore, named by its path.


@dataclass(frozen=True, slots=True)
class Objects:
    """What of a state needs code. ``told``: path -> a line for the log; ``refused``: why it cannot be saved, or ""."""

    told: dict[str, str]
    refused: str = ""


def training_words(train: TrainState, code: dict[str, Any]) -> dict[str, Any]:
    """Everything of ``train`` that is not a count; what needs code goes to ``code``."""
    return {name: encode(getattr(train, name), name, code) for name in _OF_TRAINING}


def training_back(words: Mapping[str, Any], code: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a TrainState that ``training_words`` gave words for."""
    return {name: decode(words[name], name, code) for name in _OF_TRAINING if name in words}


def module_words(model: ModelState, code: dict[str, Any]) -> dict[str, Any]:
    """As ``rest_words``, of a module that is saved; what needs code goes to ``code``."""
    return {
        "extra": {key: encode(value, key, code) for key, value in model.extra.items()},
        "hidden": list(model.hidden),
        "versions": encode(model.versions, "versions", {}),
    }


def rest_words(rest: ModuleRest) -> dict[str, Any]:
    """What a state dict held beside its tensors, without what needs code."""
    words: dict[str, Any] = {"extra": {key: encode(value, key, {}) for key, value in rest.extra.items()}}
    words["hidden"] = sorted(rest.hidden)
    return words if rest.versions is None else words | {"versions": encode(rest.versions, "versions", {})}


def rest_back(
    words: Mapping[str, Any], plain: Mapping[str, Any], code: Mapping[str, Any] | None = None
) -> ModuleRest:
    """Back from ``rest_words``; ``plain``: extra state that stands in the state dict itself."""
    extra = {key: decode(value, key, code) for key, value in (words.get("extra") or {}).items()}
    versions = decode(words["versions"]) if "versions" in words else None
    return ModuleRest(dict(plain) | extra, versions, frozenset(words.get("hidden") or ()))


def groups_words(local: LocalState, code: dict[str, Any]) -> list[Any]:
    return list(encode(list(local.param_groups), "param_groups", code))


def scalars_words(flat: FlatState, code: dict[str, Any]) -> Any:
    """Optimizer state with one value for a whole flat."""
    return encode(flat.scalars, below("optimizer", flat.name), code)


def look_through(local: LocalState) -> Objects:
    """Find what needs code before anything is written. What cannot be pickled either is left out, and said so; in
    the client's own state, which would be lost, it is refused."""
    code: dict[str, Any] = {}
    training_words(local.train, code)
    module_words(local.model, code)
    groups_words(local, code)
    told: dict[str, str] = {}
    refused = ""
    unsaved: dict[str, Any] = {}
    for flat in local.flats:
        scalars_words(flat, unsaved)
    for path, value in unsaved.items():
        told[path] = describe(
            f"{path} is a {_kind(value)} in the optimizer's state: it is not saved and stays at its start on resume",
            fix="let the optimizer keep numbers, strings, tensors and containers of them",
        )
    for path, value in code.items():
        kind = _kind(value)
        try:
            pickled(value)
        except Exception as reason:
            text = describe(
                f"{path} cannot be saved: it holds a {kind}, and pickle says {reason}",
                fix="give numbers, strings, tensors and containers of them, and make the object from those",
            )
            if path == CLIENT or path.startswith((f"{CLIENT}.", f"{CLIENT}[")):
                refused = refused or text
            else:
                told[path] = f"{text}; it will stay at its start on resume"
        else:
            told[path] = describe(
                f"{path} is a {kind}, which only running code can restore: it comes back with "
                "load_checkpoint(..., trust=True) alone",
                fix="give numbers, strings, tensors and containers of them, and make the object from those",
            )
    return Objects(told, refused)


def _kind(value: Any) -> str:
    return ".".join(name_of(type(value)))


def pickled(value: Any) -> bytes:
    """As it will stand in the file. Raises what pickle raises."""
    file = io.BytesIO()
    torch.save(value, file, pickle_module=stand_ins)
    return file.getvalue()


def objects(code: Mapping[str, Any], *, copy: bool) -> dict[str, Any]:
    """Those of ``code`` that pickle can write; with ``copy`` as they are now."""
    kept: dict[str, Any] = {}
    for path, value in code.items():
        try:
            data = pickled(value)
        except Exception:  # ``look_through`` has said so
            continue
        kept[path] = value
        if copy:
            kept[path] = torch.load(
                io.BytesIO(data), map_location="cpu", weights_only=False, pickle_module=stand_ins
            )
    return kept
