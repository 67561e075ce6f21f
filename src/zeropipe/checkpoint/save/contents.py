"""Decides which files a rank writes and what is in each: DeepSpeed's names and keys, ours beside them.

    file                                              written by                          holds
    [zero_pp_rank_D_]mp_rank_M_model_states.pt        the first data rank; stage 3: all   the module, counts, words
    layer_N-model_T-model_states.pt                   the first data rank of a pipeline   one layer's tensors
    [bf16_]zero_pp_rank_D_mp_rank_M_optim_states.pt   stages 1 to 3: who has a shard      flats, the rank's own
    zeropipe_rank_R_states.pt                         who writes no optimizer file        the rank's own
    zeropipe_client_states.pt                         the first data rank, if need be     what only code restores

D, M, T are ranks of data, model and tensor parallelism, R is the rank of all. The rank's own: its random states, the
position of its data, what its compressed communication owes.
Tensors that stand under two names (ours and DeepSpeed's) share their storage, so they are written once.
``zeropipe`` is our key in each file; what the manifest points at is there.
"""

from __future__ import annotations

import importlib.metadata
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from zeropipe.checkpoint.constants import LAYER_FILE_PREFIX
from zeropipe.checkpoint.save.files import pickled, unpickled, write_torch
from zeropipe.checkpoint.save.peer_keys import model_keys, optimizer_keys, whole_optimizer
from zeropipe.checkpoint.save.plain import below, encode, is_plain, lowered, name_of
from zeropipe.checkpoint.save.records import (
    CLIENT,
    FlatEntry,
    FlatState,
    LocalState,
    Manifest,
    TensorEntry,
    rest_words,
    training_words,
)
from zeropipe.checkpoint.utils import (
    HostBuffers,
    footprint,
    get_model_ckpt_name_for_rank,
    get_zero3_model_ckpt_name_for_rank,
    get_zero_ckpt_name_for_rank,
    snapshot,
)
from zeropipe.errors import describe

OURS = "zeropipe"
CODE_FILE = "zeropipe_client_states.pt"  # what only unpickling with code can read back


@dataclass(frozen=True, slots=True)
class Outgoing:
    """The files of one rank, ready to be written, and what it adds to the manifest."""

    trees: dict[str, Any]  # file name -> what torch.save gets
    part: Manifest  # without file records


def collect(local: LocalState, tag: str, *, copy: bool, buffers: HostBuffers | None = None) -> Outgoing:
    """Lay out this rank's files. With ``copy`` nothing in them shares memory with the training state."""
    laid = lay_out(local, tag, copy=copy)
    # One by one: what two files hold of a storage differs, and each must hold no more than its own.
    host = {name: snapshot(tree, copy=copy, buffers=buffers) for name, tree in laid.trees.items()}
    return Outgoing(host, laid.part)


def estimated(local: LocalState) -> int:
    """Bytes that this rank's files will take; a little less rather than more."""
    return sum(map(footprint, lay_out(local, "").trees.values()))


def lay_out(local: LocalState, tag: str, *, copy: bool = False, peers: bool = True) -> Outgoing:
    """This rank's files, of the state's own tensors; ``peers``: with the keys that other readers than ours want."""
    grid, model = local.grid, local.model
    lead = grid.dp_rank == 0
    trees: dict[str, Any] = {}
    code: dict[str, Any] = {}
    # Replicas take turns, shard by shard, so that they write disjoint parts. At stage 0 all ranks are replicas.
    mine = [f for f in local.flats if (f.replica == f.shard % f.num_replicas if local.stage else lead)]
    # What of these needs code is not kept: the optimizer starts it anew.
    flat_trees = {f.name: {"tensors": dict(f.tensors), "scalars": _scalars(f, {})} for f in mine}

    # [1] The module. A layer's tensors are in the layer's file; a tied one is in several, and the first counts.
    model_file = get_model_ckpt_name_for_rank("", f"{grid.mp_rank:02d}")
    if local.stage >= 3:
        model_file = get_zero3_model_ckpt_name_for_rank("", grid.dp_rank, grid.mp_rank)
    files = dict.fromkeys(model.tensors if lead else (), model_file)
    if lead or (peers and local.stage >= 3):
        module = _module(local, lead, peers)
        trees[model_file] = tree = model_keys(local, module) if peers else _counts(local, module)
        for key, value in lowered(local.train.client_state).items() if peers else ():
            tree.setdefault(key, value)
        tree[OURS] = _words(local, code if lead else {}, lead)
        for layer, key, name in model.layers if lead else ():
            # As DeepSpeed's pipeline names it; what its tools call a layer's file has an underscore before ``model``.
            file = f"{LAYER_FILE_PREFIX}{layer:02d}-model_{grid.tp_rank:02d}-model_states.pt"
            files[name] = file if files[name] == model_file else files[name]
            trees.setdefault(file, {})[key] = model.tensors[name]
        for name in [n for n in module if files.get(model.tied.get(n, n), model_file) != model_file]:
            del module[name]
        # DeepSpeed's pipeline looks into the layer files only where there is nothing here.
        tree["module"] = module or None

    # [2] Flats, and what belongs to a rank: in its optimizer file, or in one of its own where it writes none.
    rank_file = f"zeropipe_rank_{grid.rank:05d}_states.pt"
    flat_file = model_file
    per_rank = {"per_rank": local.train.per_rank}
    if local.stage and mine:
        rank_file = flat_file = get_zero_ckpt_name_for_rank("", grid.dp_rank, grid.mp_rank)
        if local.dtype == "bfloat16":
            rank_file = flat_file = f"bf16_{flat_file}"
        trees[rank_file] = (optimizer_keys(local) if peers else {}) | {OURS: per_rank | {"flats": flat_trees}}
    else:
        trees[rank_file] = {OURS: per_rank}
        if mine:
            if peers:
                tree["optimizer"] = whole_optimizer(local)
            tree[OURS]["flats"] = flat_trees

    # [3] What only code restores.
    code = _objects(code, copy=copy)
    if code:
        trees[code_file(grid.mp_rank)] = {OURS: code}

    part = Manifest(
        tag,
        local.stage,
        local.dtype,
        local.optimizer_name,
        grid.world,
        {"dp": grid.dp_degree, "tp": grid.tp_degree, "pp": grid.pp_degree},
        local.train.global_steps,
        {"zeropipe": _version(), "torch": torch.__version__},
        (rank_file,),
        model.tied,
        model.excluded,
        (),
        tuple(
            TensorEntry(n, tuple(t.shape), _dtype(t), model.kinds.get(n, "param"), files[n], grid.mp_rank)
            for n, t in (model.tensors.items() if lead else ())
        ),
        tuple(_entry(f, grid.mp_rank, flat_file) for f in mine),
    )
    return Outgoing(trees, part)


@cache  # it reads a file, and copies in memory are made at every step
def _version() -> str:
    return importlib.metadata.version("zeropipe")


def write(folder: Path, outgoing: Outgoing) -> Manifest:
    """Write and sync the files. Raises OSError as it comes."""
    records = tuple(write_torch(folder / name, tree) for name, tree in outgoing.trees.items())
    return replace(outgoing.part, files=records)


def code_file(mp_rank: int) -> str:
    """Where a model-parallel rank keeps what only code restores: the first one's holds the training's state too."""
    return CODE_FILE if mp_rank == 0 else CODE_FILE.replace("states", f"mp_rank_{mp_rank:02d}_states")


def _module(local: LocalState, lead: bool, peers: bool) -> OrderedDict[str, Any]:
    """The state dict in the model file; only the first data-parallel rank's (``lead``) holds values."""
    model, tensors = local.model, local.model.tensors
    module: OrderedDict[str, Any] = OrderedDict()
    if lead:
        module.update(tensors)
        module.update({other: tensors[name] for other, name in model.tied.items() if name in tensors})
        module.update({k: v for k, v in model.rest.extra.items() if is_plain(v)})
    if local.stage >= 3 and peers:
        module.update({name: tensors[name] for name in model.of_kind("buffer")})
        # A strict load in DeepSpeed wants every name; it too keeps sharded parameters as empty tensors here.
        held = [s.name for f in local.flats for s in f.layout.tensors if s.name not in model.rest.hidden]
        for name in (*held, *model.tied):
            module.setdefault(name, torch.empty(0, dtype=getattr(torch, local.dtype)))
    return module


def _entry(flat: FlatState, mp_rank: int, file: str) -> FlatEntry:
    files = tuple(file if s == flat.shard else "" for s in range(flat.layout.num_shards))
    keys = {key: _dtype(tensor) for key, tensor in flat.tensors.items()}
    figures = {key: _figure(value) for key, value in flat.scalars.items() if _figure(value) is not None}
    return FlatEntry(flat.name, mp_rank, flat.group_index, flat.layout, keys, figures, files)


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


# In the manifest, for those who read it alone; a load takes the values from the files, with their types.
def _figure(value: Any) -> int | float | None:
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else None
    return value if isinstance(value, (int, float)) else None


def _counts(local: LocalState, module: OrderedDict[str, Any]) -> dict[str, Any]:
    """Of a model file's top level what we read ourselves."""
    train = local.train
    counts = {
        key: getattr(train, key) for key in ("global_steps", "global_samples", "skipped_steps", "ds_config")
    }
    return {"module": module} | counts


# What is no tensor, in words; ``code`` gets what only code can restore.


def _words(local: LocalState, code: dict[str, Any], lead: bool = True) -> dict[str, Any]:
    return {
        "micro_steps": local.train.micro_steps,
        "optimizer": local.optimizer_name,
        "param_groups": encode(list(local.param_groups), "param_groups", code),
        **(rest_words(local.model.rest, code) if lead else {}),
        **training_words(local.train, code),
    }


def _scalars(flat: FlatState, code: dict[str, Any]) -> Any:
    """Optimizer state with one value for a whole flat."""
    return encode(flat.scalars, below("optimizer", flat.name), code)


@dataclass(frozen=True, slots=True)
class Objects:
    """What of a state needs code. ``told``: path -> a line for the log; ``refused``: why it cannot be saved, or ""."""

    told: dict[str, str]
    refused: str = ""


def look_through(local: LocalState) -> Objects:
    """Find what needs code before anything is written. What cannot be pickled either is left out, and said so; in
    the client's own state, which would be lost, it is refused."""
    code: dict[str, Any] = {}
    unsaved: dict[str, Any] = {}
    _words(local, code)
    for flat in local.flats:
        _scalars(flat, unsaved)
    told = {
        path: describe(
            f"{path} is a {_kind(value)} in the optimizer's state: it is not saved and stays at its start on resume",
            fix="let the optimizer keep numbers, strings, tensors and containers of them",
        )
        for path, value in unsaved.items()
    }
    refused = ""
    fix = "give numbers, strings, tensors and containers of them, and make the object from those"
    for path, value in code.items():
        try:
            pickled(value)
        except Exception as reason:
            what = f"{path} cannot be saved: it holds a {_kind(value)}, and pickle says {reason}"
            text = describe(what, fix=fix)
            if path == CLIENT or path.startswith((f"{CLIENT}.", f"{CLIENT}[")):
                refused = refused or text
            else:
                told[path] = f"{text}; it will stay at its start on resume"
        else:
            told[path] = describe(
                f"{path} is a {_kind(value)}, which only running code can restore: it comes back with "
                "load_checkpoint(..., trust=True) alone",
                fix=fix,
            )
    return Objects(told, refused)


def _objects(code: Mapping[str, Any], *, copy: bool) -> dict[str, Any]:
    """Those of ``code`` that pickle can write; with ``copy`` as they are now."""
    kept: dict[str, Any] = {}
    for path, value in code.items():
        try:
            data = pickled(value)
        except Exception:  # ``look_through`` has said so
            continue
        kept[path] = unpickled(data) if copy else value
    return kept


def _kind(value: Any) -> str:
    return ".".join(name_of(type(value)))
