"""The universal format: one folder per parameter with its whole fp32 value and moments; DeepSpeed's or ours.

    zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt    zero/optimizer_state.pt    mp_rank_00_model_states.pt
    zeropipe_state.pt                              what DeepSpeed's form has no place for

Every parameter is a flat of one shard. Read and written with one parameter in memory at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from zeropipe.checkpoint import constants as k
from zeropipe.checkpoint.save.contents import OURS
from zeropipe.checkpoint.save.files import load_torch, replace_text, write_torch
from zeropipe.checkpoint.save.ownership import replacing
from zeropipe.checkpoint.save.peer_keys import PEER_VERSION, model_file
from zeropipe.checkpoint.save.plain import decode, encode, is_plain, lowered
from zeropipe.checkpoint.save.records import (
    CLIENT,
    FP32,
    TrainState,
    rest_back,
    rest_words,
    training_back,
    training_words,
)
from zeropipe.checkpoint.save.tags import LATEST_UNIVERSAL
from zeropipe.checkpoint.sources import STEP, Checkpoint, Files, Flat, Weight, dtype_name, united
from zeropipe.checkpoint.sources.deepspeed import frozen_flats, parse_deepspeed
from zeropipe.checkpoint.sources.parallel import joined, weights
from zeropipe.checkpoint.universal_checkpoint import Joining, as_info, joining_of, rules_in
from zeropipe.errors import CheckpointError
from zeropipe.layout.flat import FlatShards, TensorSpec
from zeropipe.paths import inside

_OUR_FILE = "zeropipe_state.pt"
_NOT_THE_CLIENTS = (k.UNIVERSAL_CHECKPOINT_INFO, OURS)  # further keys of a universal model file


def parse_universal(folder: Path, tag: str, *, trust: bool = False) -> Checkpoint:
    """A folder with ``zero/NAME/*.pt``. Raises CheckpointError when it has no model file beside them."""
    # Shorter names first: rank 10 comes after rank 9.
    names = sorted((p.name for p in folder.glob("*mp_rank_*_model_states.pt")), key=lambda n: (len(n), n))
    if not names:
        raise CheckpointError(
            f"{folder} has a folder `zero` but no model file", expected="mp_rank_00_model_states.pt"
        )
    # Its model files are those of an ordinary checkpoint: what they hold beside parameters is read as there.
    plain = parse_deepspeed(folder, tag, trust=trust, unchecked=True)
    files = Files(folder, trust)
    models = [files[name] for name in names]
    params = _Params(folder, trust, models)
    shards = [m for n, m in zip(names, models, strict=True) if n.startswith(k.ZERO_FILE_PREFIX)]
    # Stage 3 leaves frozen parameters in shards, and the converter leaves them where they are.
    frozen = {flat.name: flat for flat in frozen_flats(shards if len(shards) == len(models) else [])}
    own = [value for value in plain.module if value.file == names[0]]
    # Asked for by name, not listed: a name with a slash is a folder in a folder.
    known = sorted({*params.group, *frozen, *(value.name for value in own)})
    places = {name: inside(folder / "zero", name, "a tensor's name") for name in known}
    folders = {name: path for name, path in places.items() if path.is_dir()}
    flats = [params.flat(name, path) for name, path in folders.items() if name in params.group]
    values = tuple(
        value if value.kind == "buffer" or value.name in params.group else replace(value, kind="frozen")
        for value in own
        if value.name not in frozen
        and (value.kind == "buffer" or value.name not in folders or torch.Size(value.shape).numel())
    )
    words = models[0].get(OURS) or {}

    def train_state(rank: int) -> TrainState:
        train, per_rank = plain.train_state(rank), params.ours.get("per_rank") or []
        ours = {
            # A model file has the client's keys and its own at one level.
            CLIENT: {n: v for n, v in train.client_state.items() if n not in _NOT_THE_CLIENTS},
            "micro_steps": int(params.ours.get("micro_steps") or 0),
            "per_rank": per_rank[rank] if rank < len(per_rank) else {},
        }
        return replace(train, **(ours | training_back(words, {})))

    return replace(
        plain,
        dtype=next((value.dtype for value in values if value.kind == "param"), "float32"),
        world=len(params.ours.get("per_rank") or [None]),
        degrees={"dp": plain.degrees["dp"], "tp": 1, "pp": 1},
        module=values,
        flats=(*flats, *(flat for name, flat in frozen.items() if name not in folders)),
        read_groups=lambda: params.common.get(k.PARAM_GROUPS) or (),
        # DeepSpeed writes rules with each parameter alone.
        read_rules=lambda: rules_in(models[0]) or params.rules(flats),
        rest_of=lambda tp_rank: united((plain.rest_of(0), rest_back(words, {}))),
        train_state=train_state,
        threads=1,
    )


class _Params:
    """The folders of single parameters, and the numbers beside them."""

    def __init__(self, folder: Path, trust: bool, models: Sequence[Mapping[str, Any]]) -> None:
        self._folder = folder
        self._trust = trust
        self.ours = self._load_if_there(folder / _OUR_FILE)  # {} where DeepSpeed wrote the folder
        self.group: dict[str, int] = {}  # name -> param group
        self._shapes: dict[str, tuple[int, ...]] = {}
        for model in models:  # each pipeline stage's file names its own parameters
            for index, shapes in enumerate(model.get(k.PARAM_SHAPES) or []):
                self.group |= dict.fromkeys(shapes, index)
                self._shapes |= {name: tuple(shape) for name, shape in shapes.items()}

    @cached_property
    def common(self) -> dict[str, Any]:
        return self._load_if_there(self._folder / "zero" / "optimizer_state.pt")

    @cached_property
    def _further(self) -> Mapping[str, dict[str, Any]]:
        return decode(self.ours.get("numbers") or {}, "numbers", {})

    def rules(self, flats: list[Flat]) -> Mapping[str, Any] | None:
        said = ((f.name, self._folder / "zero" / f.name / f"{FP32}.pt") for f in flats)
        return as_info((n, Joining.said(load_torch(p, trust=self._trust))) for n, p in said) or None

    def flat(self, name: str, folder: Path) -> Flat:
        # Opened for shapes and dtypes alone; the values stay in the files, which are opened anew for each.
        tensors = {p.stem: self._read(folder, p.stem) for p in sorted(folder.glob("*.pt")) if p.stem != STEP}
        if FP32 not in tensors:
            raise CheckpointError(f"{folder} has no fp32.pt", fix="convert the checkpoint again")
        shape = tuple(tensors[FP32].shape)
        given = self._shapes.get(name, shape)
        if torch.Size(given).numel() == tensors[FP32].numel():
            shape = given  # DeepSpeed writes the parameters of stage 3 as 1D
        layout = FlatShards((TensorSpec(name, shape, "float32"),), 1)
        dtypes = {key: dtype_name(t) for key, t in tensors.items()}

        def read(shard: int, key: str) -> torch.Tensor:
            return self._read(folder, key).reshape(-1)

        return Flat(name, 0, self.group[name], layout, dtypes, read, partial(self._numbers_of, name, folder))

    def _numbers_of(self, name: str, folder: Path) -> dict[str, Any]:
        further = self._further.get(name) or {}
        path = folder / f"{STEP}.pt"
        if path.exists():
            return {STEP: load_torch(path, trust=self._trust)} | further
        # At stage 3 DeepSpeed keeps one step count for all, beside the hyperparameters.
        tree = self.common
        states: dict[Any, Any] = (tree.get(k.OPTIMIZER_STATE_DICT) or tree).get("state") or {}
        found: dict[str, Any] = next((state for state in states.values() if STEP in state), {})
        return {key: value for key, value in found.items() if key == STEP} | further

    def _load_if_there(self, path: Path) -> dict[str, Any]:
        return load_torch(path, trust=self._trust) if path.exists() else {}

    def _read(self, folder: Path, key: str) -> torch.Tensor:
        held = load_torch(folder / f"{key}.pt", trust=self._trust)
        return held[k.PARAM] if isinstance(held, dict) else held


def write_universal(
    source: Checkpoint,
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
    rules = source.universal_info or {}
    final = Path(output)
    everything = list(weights(source))
    masters = {name: flat for name, flat in source.trained.items() if FP32 in flat.keys}
    folders = {w.name: inside(Path("zero"), w.name, "a tensor's name") for w in everything}

    def one(weight: Weight, folder: Path) -> None:
        how = joining_of(weight.name, rules, weight.shape)
        _parameter(weight, masters.get(weight.name), folder, how.words())
        progress(1)

    # The parameters first, several at once: each is read, written and let go.
    with replacing(final, "universal", source.folder) as work:
        (work / "zero").mkdir()
        with ThreadPoolExecutor(workers) as threads:
            list(threads.map(lambda weight: one(weight, work / folders[weight.name]), everything))
        groups = [lowered(group) | {"params": [i]} for i, group in enumerate(source.hyperparameters)]
        common = {k.PARAM_GROUPS: groups, k.ZERO_STAGE: source.stage, k.DS_VERSION: PEER_VERSION}
        write_torch(work / "zero" / "optimizer_state.pt", common)
        write_torch(work / _OUR_FILE, _ours(source, masters))
        write_torch(work / "mp_rank_00_model_states.pt", _model(source, everything, masters))
    replace_text(final.parent / LATEST_UNIVERSAL, final.name)
    return final


def _parameter(weight: Weight, flat: Flat | None, folder: Path, slicing: dict[str, Any]) -> None:
    folder.mkdir(parents=True)  # a name may have a slash in it
    write_torch(folder / "fp32.pt", {k.PARAM: weight.contiguous()} | slicing)
    shared = None if flat is None else flat.numbers_of(weight.name)
    # A file of zeros would make the optimizer believe that it was stepped.
    if flat is None or shared is None:
        return
    for key in flat.moments:
        file = inside(folder, f"{key}.pt", "a key of the optimizer's state")
        write_torch(file, {k.PARAM: flat.whole(weight.name, key)} | slicing)
    step = shared.get(STEP)
    if step is not None:
        write_torch(folder / f"{STEP}.pt", torch.as_tensor(step, dtype=torch.float32))


def _ours(source: Checkpoint, masters: Mapping[str, Flat]) -> dict[str, Any]:
    """What DeepSpeed's form has no place for: numbers of a parameter other than ``step`` (any other file in its folder
    is a tensor to DeepSpeed), and what each rank keeps for itself."""
    numbers = {name: flat.all_numbers_of(name) for name, flat in masters.items()}
    further = {n: {key: v for key, v in found.items() if key != STEP} for n, found in numbers.items()}
    return {
        "numbers": encode(further, "numbers", {}),
        "micro_steps": source.train_state(0).micro_steps,
        "per_rank": [source.train_state(rank).per_rank for rank in range(source.world)],
    }


def _model(source: Checkpoint, everything: list[Weight], masters: Mapping[str, Flat]) -> dict[str, Any]:
    """A model file: buffers and counters; parameters are in their folders."""
    train, rest = source.train_state(0), source.rest()
    shapes: dict[int, dict[str, torch.Size]] = {}
    for name, flat in masters.items():
        shapes.setdefault(flat.group_index, {})[name] = torch.Size(flat.shape_of(name))
    dtype = getattr(torch, source.dtype)
    module = {w.name: w.read(dtype if w.kind != "buffer" else None) for w in everything}
    module |= {other: module[name] for other, name in source.tied.items() if name in module}
    module |= {key: value for key, value in rest.extra.items() if is_plain(value)}
    return model_file(
        train,
        module,
        buffers=[w.name for w in everything if w.kind == "buffer"],
        shapes=[shapes[group] for group in sorted(shapes)],
        frozen=({w.name: torch.Size(w.shape) for w in everything if w.kind == "frozen"}, None),
        tied=source.tied,
        degrees={"dp": source.degrees.get("dp", 1)},
        info=source.universal_info or {},
    ) | {
        OURS: training_words(train, {}) | rest_words(rest, {}),
        **{key: v for key, v in lowered(train.client_state).items() if key != k.UNIVERSAL_CHECKPOINT_INFO},
    }
