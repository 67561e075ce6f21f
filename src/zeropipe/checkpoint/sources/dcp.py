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
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from zeropipe.checkpoint.save.files import new_file
from zeropipe.checkpoint.save.ownership import replacing
from zeropipe.checkpoint.save.plain import lowered
from zeropipe.checkpoint.save.records import FP32, TrainState
from zeropipe.checkpoint.save.words import rest_back, rest_words, training_back, training_words
from zeropipe.checkpoint.sources.data import STEP, Checkpoint, Flat, Last, Value
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
        self._values: dict[str, Stored] = {}  # parameter or buffer -> its value
        self._state: dict[str, dict[str, Stored]] = {}  # parameter -> "exp_avg", "step", ...
        self._groups: list[dict[str, Any]] = []
        index = read_index(folder)
        ours = next((s for s in index.values() if s.key == (OURS,)), None)
        self._ours: dict[str, Any] = {} if ours is None else self._value(ours)
        self._sort(index)
        if not self._values:
            raise CheckpointError(
                f"{folder} is a DCP checkpoint without weights that can be told apart",
                expected="keys such as model.NAME, or NAME alone",
                found=", ".join(list(index)[:5]) or "no key",
                fix='save {"model": get_model_state_dict(...), "optim": get_optimizer_state_dict(...)}',
            )

    def checkpoint(self, tag: str) -> Checkpoint:
        ours = self._ours
        tied: Mapping[str, str] = dict(ours.get("tied") or {})
        kinds: Mapping[str, str] = ours.get("kinds") or {}
        module = tuple(
            Value(
                n,
                s.shape,
                s.dtype,
                kinds.get(n, self._kind(n, s)),
                "",
                0,
                partial(read_tensor, self._folder, s),
            )
            for n, s in self._values.items()
            if n not in tied
        )
        # A parameter that no group names (weights alone were saved) counts to the first.
        group_of = {n: i for i, g in enumerate(self._groups) for n in g.get("params", ())}
        first = next((value.dtype for value in module if value.kind == "param"), "float32")
        last = Last()
        return Checkpoint(
            self._folder,
            tag,
            int(ours.get("stage", 0)),
            str(ours.get("dtype", first)),
            str(ours.get("optimizer", "")),
            len(ours.get("per_rank") or [None]),
            dict(ours.get("degrees") or {"dp": 1, "tp": 1, "pp": 1}),
            module,
            tuple(
                self._flat(name, group_of.get(name, 0), last) for name in self._values if name in self._state
            ),
            tied,
            lambda: [g | {"param_names": list(g.get("params", ()))} for g in self._groups],
            lambda: None,  # its tensors are whole
            lambda tp_rank: rest_back(ours.get("module") or {}, {}),
            self._train_state,
        )

    def _flat(self, name: str, group: int, last: Last) -> Flat:
        value, state = self._values[name], self._state[name]
        stored = {k: s for k, s in state.items() if s.dtype and k in self._per_element}
        numbers = {k: s for k, s in state.items() if k not in stored}
        if value.dtype == "float32":
            stored[FP32] = value

        def read(shard: int, key: str) -> torch.Tensor:
            return last.get((name, key), lambda: read_tensor(self._folder, stored[key]).reshape(-1))

        def read_numbers() -> dict[str, Any]:
            found = {
                key: read_tensor(self._folder, s) if s.dtype else self._value(s) for key, s in numbers.items()
            }
            if STEP in found:  # some write it with one dim
                found[STEP] = torch.as_tensor(found[STEP]).view(())
            return found

        layout = FlatShards((TensorSpec(name, value.shape, value.dtype),), 1)
        return Flat(name, 0, group, layout, {k: s.dtype for k, s in stored.items()}, read, read_numbers)

    @cached_property
    def _per_element(self) -> set[str]:
        """The keys of optimizer state with one value per element."""
        return per_element_keys(
            None,
            (
                (self._values[name].shape, {key: s.shape if s.dtype else None for key, s in state.items()})
                for name, state in self._state.items()
                if name in self._values
            ),
        )

    def _kind(self, name: str, stored: Stored) -> str:
        if name in self._state or not self._state:
            return "param"
        return "param" if stored.dtype in ("float32", "bfloat16", "float16") else "buffer"

    def _train_state(self, rank: int) -> TrainState:
        per_rank = self._ours.get("per_rank") or []
        train = dict(self._ours.get("train") or {}) | training_back(self._ours.get("words") or {}, {})
        return TrainState(**train, per_rank=per_rank[rank] if rank < len(per_rank) else {})

    def _value(self, stored: Stored) -> Any:
        return read_chunk(self._folder, stored.chunks[0], trust=self._trust)

    def _sort(self, index: Mapping[str, Stored]) -> None:
        """Tell weights, optimizer state and hyperparameters apart by their keys."""
        flat_groups: dict[str, dict[str, Any]] = {}
        optimizer: list[tuple[Key, Stored]] = []
        for name, stored in index.items():
            key = stored.key if len(stored.key) > 1 else tuple(name.split("."))
            head, rest = str(key[0]), key[1:]
            if head in _OPTIMIZERS and rest:
                # Whole names stand in a path of its own; a flat dict's keys are joined by dots, which names have too.
                whole = key is stored.key and rest[0] in (_STATE, _GROUPS)
                optimizer.append((rest if whole else (".".join(map(str, rest)),), stored))
            elif stored.dtype and head != OURS:
                words = rest if head in _MODELS and rest else key
                self._values[".".join(map(str, words))] = stored
        for key, stored in optimizer:
            kind, owner, *parts = self._words(str(key[0])) if len(key) == 1 else key
            if kind == _STATE and parts:
                self._state.setdefault(str(owner), {})[".".join(map(str, parts))] = stored
            elif kind == _GROUPS and parts:
                value = read_tensor(self._folder, stored) if stored.dtype else self._value(stored)
                self._take_option(owner, parts, value, flat_groups)
        if not self._groups and flat_groups:
            self._groups = _same_hyperparameters(flat_groups)

    def _words(self, joined: str) -> Key:
        """(head, parameter, key) of words joined by dots: the longest known name counts, else all but the last word."""
        words = joined.split(".")
        for stop in range(len(words) - 1, 1, -1):
            name = ".".join(words[1:stop])
            if name in self._values:
                return words[0], name, ".".join(words[stop:])
        return words[0], ".".join(words[1:-1]), words[-1]

    def _take_option(
        self, group: str | int, words: Sequence[str | int], value: Any, flat_groups: dict[str, dict[str, Any]]
    ) -> None:
        """One hyperparameter, of a param group by number or of one parameter by name."""
        if str(group).isdigit():
            while len(self._groups) <= int(group):
                self._groups.append({})
            into = self._groups[int(group)]
        else:
            into = flat_groups.setdefault(str(group), {})
        for word in words[:-1]:
            into = into.setdefault(str(word), {})
        into[str(words[-1])] = value


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
    source = joined(source)
    others = source.aliases
    kinds: dict[str, str] = {}
    for weight in weights(source):
        kinds[weight.name] = weight.kind
        for name in (weight.name, *others.get(weight.name, ())):
            yield ("model", name), Lazy(weight.shape, weight.dtype, weight.read)
        progress(1)
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
        "module": rest_words(source.rest()),
        "per_rank": [source.train_state(rank).per_rank for rank in range(source.world)],
    }
