"""torch's distributed checkpoints (DCP), as FSDP and others save them: read and written.

The keys are those of ``{"model": get_model_state_dict(...), "optim": get_optimizer_state_dict(...)}``:

    model.NAME   optim.state.NAME.exp_avg   optim.state.NAME.step   optim.param_groups.0.lr   ...

Read are also ``module``/``app`` and ``optimizer`` as first words, the weights without a first word, and the form
of ``flatten_optimizer_state_dict=True``. What DCP has no place for (counters, schedule, scale, random states,
client state) goes into one more value, ``zeropipe``, which readers that do not ask for it never see.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from zeropipe.checkpoint.save.files import new_file
from zeropipe.checkpoint.save.ownership import replacing
from zeropipe.checkpoint.save.plain import lowered
from zeropipe.checkpoint.save.records import (
    FP32,
    TrainState,
    rest_back,
    rest_words,
    training_back,
    training_words,
)
from zeropipe.checkpoint.sources import STEP, Checkpoint, Flat, Last, Value
from zeropipe.checkpoint.sources.parallel import joined, weights
from zeropipe.comm.dcp import Key, Lazy, Stored, flatten, read_chunk, read_index, read_tensor, write
from zeropipe.errors import CheckpointError
from zeropipe.layout.flat import FlatShards, TensorSpec
from zeropipe.runtime.optimizers.state_kinds import per_element_keys

OURS = "zeropipe"
_MODELS = ("model", "module", "app", "state_dict")
_OPTIMIZERS = ("optim", "optimizer", "optimizers")
_STATE, _GROUPS = "state", "param_groups"


def parse_dcp(folder: Path, tag: str, *, trust: bool = False) -> Checkpoint:
    """A folder with DCP's ``.metadata``. Raises CheckpointError when it cannot be read safely, or has no weights."""
    return _Folder(folder, trust).checkpoint(tag)


class _Folder:
    """Weights, optimizer state and hyperparameters, told apart by their keys."""

    def __init__(self, folder: Path, trust: bool) -> None:
        self._folder = folder
        self._trust = trust
        index = read_index(folder)
        ours = next((s for s in index.values() if s.key == (OURS,)), None)
        self._ours: dict[str, Any] = {} if ours is None else self._read(ours)

        # What the keys say. The names of weights come first: keys of optimizer state have them in the middle.
        self._values: dict[str, Stored] = {}  # parameter or buffer -> its value
        self._state: dict[str, dict[str, Stored]] = {}  # parameter -> "exp_avg", "step", ...
        optimizer = list(self._take_values(index))
        if not self._values:
            raise CheckpointError(
                f"{folder} is a DCP checkpoint without weights that can be told apart",
                expected="keys such as model.NAME, or NAME alone",
                found=", ".join(list(index)[:5]) or "no key",
                fix='save {"model": get_model_state_dict(...), "optim": get_optimizer_state_dict(...)}',
            )
        self._groups = self._take_optimizer(optimizer)

        # A key that is per element for one parameter is so for all; those of one element do not tell.
        shapes = (
            (self._values[name].shape, {key: s.shape if s.dtype else None for key, s in state.items()})
            for name, state in self._state.items()
            if name in self._values
        )
        self._per_element = per_element_keys(None, shapes)

    def checkpoint(self, tag: str) -> Checkpoint:
        ours, last = self._ours, Last()
        tied: Mapping[str, str] = dict(ours.get("tied") or {})
        module = tuple(self._value(n, s) for n, s in self._values.items() if n not in tied)
        # A parameter that no group names (weights alone were saved) counts to the first.
        group_of = {n: i for i, g in enumerate(self._groups) for n in g.get("params", ())}
        first = next((value.dtype for value in module if value.kind == "param"), "float32")
        return Checkpoint(
            self._folder,
            tag,
            int(ours.get("stage", 0)),
            str(ours.get("dtype", first)),
            str(ours.get("optimizer", "")),
            len(ours.get("per_rank") or [None]),
            dict(ours.get("degrees") or {"dp": 1, "tp": 1, "pp": 1}),
            module,
            tuple(self._flat(n, group_of.get(n, 0), last) for n in self._values if n in self._state),
            tied,
            lambda: [g | {"param_names": list(g.get("params", ()))} for g in self._groups],
            lambda: None,  # its tensors are whole
            lambda tp_rank: rest_back(ours.get("module") or {}, {}),
            self._train_state,
        )

    def _value(self, name: str, stored: Stored) -> Value:
        # Ours says it. Else what has optimizer state is a parameter, and where nothing has, what could have some.
        floating = stored.dtype in ("float32", "bfloat16", "float16")
        kind = "param" if name in self._state or not self._state or floating else "buffer"
        kind = (self._ours.get("kinds") or {}).get(name, kind)
        return Value(
            name, stored.shape, stored.dtype, kind, "", 0, partial(read_tensor, self._folder, stored)
        )

    def _flat(self, name: str, group: int, last: Last) -> Flat:
        value, state = self._values[name], self._state[name]
        stored = {k: s for k, s in state.items() if s.dtype and k in self._per_element}
        numbers = {k: s for k, s in state.items() if k not in stored}
        if value.dtype == "float32":
            stored[FP32] = value

        def read(shard: int, key: str) -> torch.Tensor:
            # A chunk is read whole, whatever run of it is wanted.
            return last.get((name, key), lambda: read_tensor(self._folder, stored[key]).reshape(-1))

        def read_numbers() -> dict[str, Any]:
            found = {key: self._read(s) for key, s in numbers.items()}
            if STEP in found:  # some write it with one dim
                found[STEP] = torch.as_tensor(found[STEP]).view(())
            return found

        layout = FlatShards((TensorSpec(name, value.shape, value.dtype),), 1)
        return Flat(name, 0, group, layout, {k: s.dtype for k, s in stored.items()}, read, read_numbers)

    def _train_state(self, rank: int) -> TrainState:
        per_rank = self._ours.get("per_rank") or []
        train = dict(self._ours.get("train") or {}) | training_back(self._ours.get("words") or {}, {})
        return TrainState(**train, per_rank=per_rank[rank] if rank < len(per_rank) else {})

    def _read(self, stored: Stored) -> Any:
        if stored.dtype:
            return read_tensor(self._folder, stored)
        return read_chunk(self._folder, stored.chunks[0], trust=self._trust)

    def _take_values(self, index: Mapping[str, Stored]) -> Iterator[tuple[Key, Stored]]:
        """Keep the weights; what is the optimizer's is given back, by its key or by that key's words joined by dots."""
        for name, stored in index.items():
            key = stored.key if len(stored.key) > 1 else tuple(name.split("."))
            head, rest = str(key[0]), key[1:]
            if head in _OPTIMIZERS and rest:
                # Whole names stand in a path of its own; a flat dict's keys are joined by dots, which names have too.
                whole = key is stored.key and rest[0] in (_STATE, _GROUPS)
                yield (rest if whole else (".".join(map(str, rest)),)), stored
            elif stored.dtype and head != OURS:
                words = rest if head in _MODELS and rest else key
                self._values[".".join(map(str, words))] = stored

    def _take_optimizer(self, optimizer: Sequence[tuple[Key, Stored]]) -> list[dict[str, Any]]:
        """Keep the state of parameters; hyperparameters of each param group."""
        options: dict[str, dict[str, Any]] = {}  # a group by its number, or a parameter by its name
        for key, stored in optimizer:
            kind, owner, *words = self._words(str(key[0])) if len(key) == 1 else key
            if kind == _STATE and words:
                self._state.setdefault(str(owner), {})[".".join(map(str, words))] = stored
            elif kind == _GROUPS and words:
                into = options.setdefault(str(owner), {})
                for word in words[:-1]:
                    into = into.setdefault(str(word), {})
                into[str(words[-1])] = self._read(stored)
        numbered = {int(owner): found for owner, found in options.items() if owner.isdigit()}
        groups = [numbered.get(number, {}) for number in range(1 + max(numbered, default=-1))]
        return groups or _same_hyperparameters(options)

    def _words(self, joined: str) -> Key:
        """(head, parameter, key) of words joined by dots: the longest known name counts, else all but the last word."""
        words = joined.split(".")
        # "state.a.b.exp_avg": whether the parameter is "a" or "a.b" only the module's names tell.
        for stop in range(len(words) - 1, 1, -1):
            name = ".".join(words[1:stop])
            if name in self._values:
                return words[0], name, ".".join(words[stop:])
        return words[0], ".".join(words[1:-1]), words[-1]


def _same_hyperparameters(flat: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Param groups of the parameters whose hyperparameters are equal, in order of their first member."""
    groups: list[dict[str, Any]] = []
    for name, values in flat.items():
        for group in groups:
            if {k: v for k, v in group.items() if k != "params"} == values:
                group["params"].append(name)
                break
        else:
            groups.append(values | {"params": [name]})
    return groups


def write_dcp(
    source: Checkpoint,
    output: str | os.PathLike[str],
    *,
    progress: Callable[[int], None] = lambda done: None,
) -> Path:
    """Write the folder ``output`` as torch's DCP would: fp32 weights, optimizer state, hyperparameters, the rest.

    ``dcp.load(..., checkpoint_id=output)`` reads it at any number of ranks, whole or sharded. A tied tensor is
    written under each of its names, as in a module's state dict. One tensor is in memory at a time; ``progress``
    gets 1 per weight. What an earlier call wrote there is replaced once the new one is whole; anything else that is
    there is a CheckpointError, before a byte is written.
    """
    with replacing(Path(output), "dcp", source.folder) as work:
        write(work, _items(source, progress), new_file)
    return Path(output)


def _items(source: Checkpoint, progress: Callable[[int], None]) -> Iterator[tuple[Key, Any]]:
    # [1] The module: DCP has no ties, so a tied tensor is written under each of its names.
    source = joined(source)
    kinds: dict[str, str] = {}
    for weight in weights(source):
        kinds[weight.name] = weight.kind
        for name in source.names_of(weight.name):
            yield ("model", name), Lazy(weight.shape, weight.dtype, weight.read)
        progress(1)
    # [2] The optimizer's state, parameter by parameter.
    names: dict[int, list[str]] = {}
    # torch's loader wants state of every parameter: what was never stepped gets zeros, and a number that says so.
    shared = (flat.numbers_of(name) for name, flat in source.trained.items())
    like = next((own for own in shared if own is not None), {})
    blank = like | {key: 0 for key in like if key == STEP}
    for name, flat in source.trained.items():
        names.setdefault(flat.group_index, []).append(name)
        never, shape = flat.numbers_of(name) is None, flat.shape_of(name)
        for key, dtype in flat.moments.items():
            kind = getattr(torch, dtype)
            read = partial(torch.zeros, shape, dtype=kind) if never else partial(flat.whole, name, key)
            yield ("optim", _STATE, name, key), Lazy(shape, kind, read)
        for key, value in ((blank if never else {}) | flat.all_numbers_of(name)).items():
            counts = key == STEP and isinstance(value, (int, float))
            yield ("optim", _STATE, name, key), torch.tensor(float(value)) if counts else value
    # [3] Hyperparameters, and in one more value what DCP has no place for.
    groups = [lowered(g) | {"params": names.get(i, [])} for i, g in enumerate(source.hyperparameters)]
    yield from flatten({"optim": {_GROUPS: groups}})
    yield (OURS,), _rest(source, kinds)


def _rest(source: Checkpoint, kinds: dict[str, str]) -> dict[str, Any]:
    train = source.train_state(0)
    words = training_words(train, {})
    counts = [f.name for f in fields(TrainState) if f.name not in (*words, "per_rank")]
    return {
        "stage": source.stage,
        "dtype": source.dtype,
        "degrees": dict(source.degrees),
        "optimizer": source.optimizer,
        "tied": dict(source.tied),
        "kinds": kinds,
        "train": {name: getattr(train, name) for name in counts},
        "words": words,
        "module": rest_words(source.rest(), {}),
        "per_rank": [source.train_state(rank).per_rank for rank in range(source.world)],
    }
