"""Reads the files that DeepSpeed wrote, by describing the layouts that they have.

Stages 1 and 2: one flat per param group, each shard a multiple of two elements; the fp32 shard comes without
its padding, the moments with it. Stage 3: every parameter is cut by itself and the cuts of a sub-group lie
end to end. Stage 0: ``torch.optim``'s state, by position. Facts measured on files of DeepSpeed 0.19.8.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch

from zeropipe.checkpoint import constants as k
from zeropipe.checkpoint.save.contents import OURS
from zeropipe.checkpoint.save.files import THREADS, LossScalerValues
from zeropipe.checkpoint.save.peer_keys import KNOWN_KEYS
from zeropipe.checkpoint.save.records import FP32, MANIFEST_NAME, PARAM, ModuleRest, TrainState
from zeropipe.checkpoint.sources import (
    Checkpoint,
    Files,
    Flat,
    Value,
    counts_of,
    dtype_name,
    lost_file,
    plain_of,
    united,
)
from zeropipe.checkpoint.universal_checkpoint import rules_in
from zeropipe.errors import CheckpointError
from zeropipe.layout.flat import FlatShards, TensorSpec
from zeropipe.runtime.optimizers.state_kinds import per_element_keys, shapes_in, split_state

ALIGN = 2  # elements: what each shard of stages 1 and 2 is a multiple of
LAYER = re.compile(r"^layer_(\d+)-(?:model_(\d+)[-_])?model_states\.pt$")
_OPTIM = re.compile(r"^(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")
_MODEL = re.compile(r"^(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt$")
Shape = tuple[int, ...]


def parse_deepspeed(
    folder: Path,
    tag: str,
    *,
    trust: bool = False,
    order: Sequence[Sequence[str]] = (),
    unchecked: bool = False,
) -> Checkpoint:
    """Raises CheckpointError for a folder that DeepSpeed did not write, or that misses a rank's file.

    Also for files of ours without their manifest, since nothing says that they are whole; not if ``unchecked``.
    """
    there = _Folder(folder, trust, order)
    found = there.checkpoint(tag)
    if there.is_ours and not unchecked:
        raise CheckpointError(
            f"{folder} was written by zeropipe, but its {MANIFEST_NAME} is gone: nothing can be checked",
            fix="copy it too from where the checkpoint is whole; verify=False loads the files unchecked",
        )
    return found


def lacks_manifest(folder: Path) -> bool:
    """Whether these are files of ours whose manifest is gone; False for damaged ones."""
    try:
        there = _Folder(folder)
        there.checkpoint("")
    except CheckpointError:
        return False
    return there.is_ours


class _Folder:
    """A folder without a manifest, described from what is in its files."""

    def __init__(self, folder: Path, trust: bool = False, order: Sequence[Sequence[str]] = ()) -> None:
        self.folder = folder
        self.files = Files(folder, trust)
        self._order = order

        # By (dp rank, or -1 where the name has none; mp rank).
        names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        self._models = {_ranks(m): m[0] for m in map(_MODEL.match, names) if m}
        self._optims = {_ranks(m): m[0] for m in map(_OPTIM.match, names) if m}
        if not self._models:
            raise CheckpointError(
                f"{folder} is not a checkpoint",
                expected="a zeropipe manifest, or DeepSpeed's mp_rank_XX_model_states.pt",
                found=", ".join(names[:5]) or "nothing",
                fix="give the folder that holds `latest`, or a tag's folder",
            )
        self._lead: Any = self.files[self._models[min(self._models, key=lambda key: (key[1], key[0]))]]
        self._tied: Mapping[str, str] = dict(self._lead.get("shared_params") or {})
        dims = self._lead.get(k.CHECKPOINT_PARALLEL_DIMS) or {}
        self._tp = int(dims.get(k.CHECKPOINT_TP_DEGREE, self._lead.get("mp_world_size", 1)))
        self._pp = int(dims.get(k.CHECKPOINT_PP_DEGREE, 1))
        layers = (self._layer(match) for match in map(LAYER.match, names) if match)
        self._layers = {(e.name, e.mp_rank): e for layer in layers for e in layer}

        # What one optimizer file says for all.
        first = self.files[self._optims[min(self._optims)]] if self._optims else {}
        self._first: Any = first.get(k.OPTIMIZER_STATE_DICT) or {}
        self._stage = int(self._first.get(k.ZERO_STAGE, 1)) if first else 0
        self._groups: Sequence[Mapping[str, Any]] = ()  # hyperparameters, found with the flats
        # DeepSpeed hands a model file's further keys to its client, who may save them again; not these.
        self.is_ours = OURS in first or any(name.startswith("zeropipe_rank_") for name in names)

    def checkpoint(self, tag: str) -> Checkpoint:
        ranks, lead = sorted({mp for _, mp in self._models}), self._lead
        module = [value for mp_rank in ranks for value in self._module_of(mp_rank)]
        module += self._layers.values()
        flats = [flat for mp_rank in ranks for flat in self._flats_of(mp_rank)]
        dtype = next((e.dtype for e in module if e.kind == "param"), "float32")
        if any(name.startswith("bf16_") for name in self._optims.values()):
            dtype = "bfloat16"
        dp = int(lead.get("dp_world_size", 1))
        return Checkpoint(
            self.folder,
            tag,
            self._stage,
            dtype,
            str((lead.get("ds_config") or {}).get("optimizer", {}).get("type", "")),
            dp * int(lead.get("mp_world_size", 1)),
            {"dp": dp, "tp": self._tp, "pp": self._pp},
            tuple(module),
            tuple(flats),
            self._tied,
            lambda: self._groups,
            lambda: rules_in(lead),
            self._rest,
            self._train_state,
            threads=THREADS,
        )

    # What stands beside the tensors.

    def _rest(self, tp_rank: int) -> ModuleRest:
        trees = [(file, "") for (_, mp_rank), file in self._models.items() if mp_rank % self._tp == tp_rank]
        trees += [(e.file, e.name.split(".", 1)[0] + ".") for e in self._layers.values()]
        return united(self._rest_in(file, prefix) for file, prefix in dict(trees).items())

    def _rest_in(self, file: str, prefix: str) -> ModuleRest:
        tree = self._module_in(file)
        found = getattr(tree, "_metadata", None)
        versions = None if found is None else {(prefix + key).rstrip("."): v for key, v in found.items()}
        return ModuleRest(plain_of(tree, prefix), versions)

    def _train_state(self, rank: int) -> TrainState:
        lead, scaler = self._lead, None
        found = self._first.get(k.LOSS_SCALER)
        if isinstance(found, LossScalerValues) and found.values().get("dynamic"):
            scaler = found.values()
        client = {key: v for key, v in lead.items() if key not in KNOWN_KEYS}
        return TrainState(loss_scaler=scaler, client_state=client, **counts_of(lead))

    # Files.

    def _optimizer(self, name: str) -> Any:
        return self.files[name][k.OPTIMIZER_STATE_DICT]

    def _module_in(self, file: str) -> Any:
        """A layer's file is a state dict itself, or holds one as a model file does."""
        tree = self.files[file]
        return tree.get("module", tree) or {}

    def _model_of(self, mp_rank: int, dp_rank: int = 0) -> str:
        # Stage 3 has one for each data-parallel rank, the others one for all.
        name = self._models.get((dp_rank, mp_rank)) or self._models.get((-1, mp_rank))
        if name is None:
            raise CheckpointError(f"{self.folder} lacks the model file of rank dp {dp_rank}, mp {mp_rank}")
        return name

    # The module.

    def _module_of(self, mp_rank: int) -> list[Value]:
        name = self._models.get((-1, mp_rank)) or self._model_of(mp_rank)
        tree = self.files[name]
        buffers = set(tree.get(k.BUFFER_NAMES) or ())
        frozen = set(tree.get(k.FROZEN_PARAM_SHAPES) or ())
        entries = []
        for key, tensor in (tree.get("module") or {}).items():
            if not isinstance(tensor, torch.Tensor) or key in self._tied:
                continue
            if self._stage >= 3 and key not in buffers and tensor.numel() == 0:
                continue  # its value is in the shards
            kind = "buffer" if key in buffers else "frozen" if key in frozen else "param"
            entries.append(Value.of(key, tensor, kind, name, mp_rank))
        return entries

    def _layer(self, match: re.Match[str]) -> list[Value]:
        """Pipeline checkpoints keep each layer in a file of its own; its parameters are ``NUMBER.name``."""
        return [
            Value.of(f"{int(match[1])}.{key}", tensor, "param", match[0], int(match[2] or 0))
            for key, tensor in self._module_in(match[0]).items()
            if isinstance(tensor, torch.Tensor)
        ]

    # Optimizer state, stage by stage.

    def _flats_of(self, mp_rank: int) -> list[Flat]:
        names = {dp: name for (dp, mp), name in self._optims.items() if mp == mp_rank}
        if not names:
            return self._whole(mp_rank)
        listed = self._optimizer(names[min(names)]).get(k.PARTITION_COUNT, max(names) + 1)
        # By group, for stages 1 and 2; groups of experts are shared by fewer ranks.
        count = max(listed) if isinstance(listed, (list, tuple)) else int(listed)
        for dp in range(count):
            if dp not in names:
                what = f"the optimizer file of data-parallel rank {dp}"
                raise lost_file(self.folder, what, f"{count} files of mp_rank_{mp_rank:02d}", len(names))
        states = [self._optimizer(names[dp]) for dp in range(count)]
        base = [
            state[k.OPTIMIZER_STATE_DICT if self._stage >= 3 else k.BASE_OPTIMIZER_STATE] for state in states
        ]
        self._groups = _groups(base[0])
        if self._stage >= 3:
            frozen = self.files[self._model_of(mp_rank)].get(k.FROZEN_PARAM_SHAPES)
            files = [self.files[self._model_of(mp_rank, dp)] for dp in range(count if frozen else 0)]
            return self._stage3(mp_rank, states, base) + frozen_flats(files, mp_rank)
        return self._stage12(mp_rank, states, base)

    def _stage12(self, mp_rank: int, states: list[Any], base: list[Any]) -> list[Flat]:
        flats = []
        for group, shapes in enumerate(self.files[self._model_of(mp_rank)][k.PARAM_SHAPES]):
            # Not always the parameters' order: DeepSpeed may have dealt them out in turn, to even the ranks' load.
            names = _buffer_order(states, group) or list(shapes)
            # Tensors without elements have no slice anywhere.
            names += [n for n in shapes if n not in names]
            specs = tuple(TensorSpec(n, tuple(shapes[n]), "float32") for n in names)
            masters = [state[k.SINGLE_PARTITION_OF_FP32_GROUPS][group] for state in states]
            shards, numbers = _shards(masters, base, group)
            layout = FlatShards(specs, len(states), ALIGN)
            flats.append(Flat.of(f"group{group}", mp_rank, group, layout, shards, numbers))
        return flats

    def _stage3(self, mp_rank: int, states: list[Any], base: list[Any]) -> list[Flat]:
        flats: list[Flat] = []
        sub_group, offset = 0, 0
        for group, shapes in enumerate(self.files[self._model_of(mp_rank)][k.PARAM_SHAPES]):
            for name, shape in shapes.items():
                layout = FlatShards((TensorSpec(name, tuple(shape), "float32"),), len(states))
                size = layout.shard_numel
                # A parameter never straddles two sub-groups: what does not fit begins the next.
                while offset + size > states[0][k.FP32_FLAT_GROUPS][sub_group].numel():
                    sub_group, offset = sub_group + 1, 0
                masters = [state[k.FP32_FLAT_GROUPS][sub_group] for state in states]
                ends, numbers = _shards(masters, base, sub_group)
                shards = [{key: t[offset : offset + size] for key, t in end.items()} for end in ends]
                flats.append(Flat.of(name, mp_rank, group, layout, shards, numbers))
                offset += size
        return flats

    def _whole(self, mp_rank: int) -> list[Flat]:
        """Stage 0: the module's values are the masters; the moments are found by their position."""
        file = self._model_of(mp_rank)
        tree = self.files[file]
        state = tree.get("optimizer") or {}
        self._groups = _groups(state)
        names = [name for group in self._order for name in group]
        if self._layers and isinstance(state.get("state"), dict):
            names = self._stage_order(mp_rank)
        if not isinstance(state.get("state"), dict) or not names:
            return []
        count = sum(len(group["params"]) for group in state["param_groups"])
        if len(names) != count:
            raise CheckpointError(
                f"{self.folder / file}: the optimizer of this stage 0 checkpoint has other parameters",
                expected=f"{len(names)} parameters",
                found=count,
                fix="build the optimizer with the same param groups as when it was saved",
            )
        layers = {name: e.read() for (name, at), e in self._layers.items() if at == mp_rank % self._tp}
        held: dict[str, Any] = {**(tree.get("module") or {}), **layers}
        # A copy of a tied layer, which another stage has too, has no name.
        values: dict[int, Any] = {
            i: held.get(name) for i, name in enumerate(names) if name and i in state["state"]
        }
        known = {i: tuple(value.shape) for i, value in values.items() if value is not None}
        per_element = per_element_keys(None, ((s, shapes_in(state["state"][i])) for i, s in known.items()))
        flats = []
        for index, value in values.items():
            tensors, scalars = _moments(state, index, per_element)
            shape = next((tuple(t.shape) for t in tensors.values()), tuple(value.shape))
            layout = FlatShards((TensorSpec(names[index], shape, "float32"),), 1)
            flat = {key: t.reshape(-1) for key, t in tensors.items()}
            if value is not None and value.dtype == torch.float32:
                flat[FP32] = value.reshape(-1)
            flats.append(Flat.of(names[index], mp_rank, 0, layout, [flat], scalars))
        return flats

    def _stage_order(self, mp_rank: int) -> list[str]:
        """A pipeline stage's parameters in the order of its optimizer."""
        rank = mp_rank % self._tp
        members = [mp for _, mp in sorted(self._models, key=lambda key: key[1]) if mp % self._tp == rank]
        states = [self.files[self._model_of(mp)].get("optimizer") or {} for mp in members]
        found = [[_moments(s, i)[0] for g in s["param_groups"] for i in g["params"]] for s in states]
        # A parameter that was never stepped has no state to know it by.
        shapes = [
            [tuple(next(iter(tensors.values())).shape) for tensors in stage if tensors] for stage in found
        ]
        layers = [(n, e.shape) for (n, at), e in self._layers.items() if at == rank]
        orders = stage_orders(shapes, layers) if all(map(all, found)) else None
        if orders is None or any(len(s["param_groups"]) > 1 for s in states):
            raise CheckpointError(
                f"{self.folder}: the optimizer state of this stage 0 pipeline cannot be told apart",
                expected="one param group, every layer's parameters in order",
                found=", ".join(str(len(s)) for s in shapes) + " parameters on the stages",
                fix="save it with ZeRO stage 1, which names its parameters",
            )
        return orders[members.index(mp_rank)]


def frozen_flats(files: Sequence[Mapping[str, Any]], mp_rank: int = 0) -> list[Flat]:
    """Frozen parameters of stage 3: the model file of each data-parallel rank has its shard of every one."""
    shapes = files[0].get(k.FROZEN_PARAM_SHAPES) or {} if files else {}
    flats = []
    for name, shape in shapes.items():
        parts = [{PARAM: file[k.FROZEN_PARAM_FRAGMENTS][name].reshape(-1)} for file in files]
        layout = FlatShards((TensorSpec(name, tuple(shape), dtype_name(parts[-1][PARAM])),), len(parts))
        flats.append(Flat.of(name, mp_rank, 0, layout, parts, {}))
    return flats


def stage_orders(
    stages: Sequence[Sequence[Shape]], layers: Sequence[tuple[str, Shape]]
) -> list[list[str]] | None:
    """The names of each stage's parameters, "" for a copy of a tied layer; None where shapes do not fit.

    ``stages``: shapes of each stage's parameters in the order of its optimizer. ``layers``: all parameters of all
    layers in order, tied ones at their first layer (their later layers have no file).
    """
    # Each stage's optimizer counts from zero; the layer files name and order all parameters but not the stages. So the
    # stages' lists of shapes are laid along the layers' tensors. Copies of tied layers come first in a stage's list.
    found: list[list[str]] = []
    at = 0
    for shapes in stages:
        seen = {shape for _, shape in layers[:at]}
        for copies in range(len(shapes) + 1):
            own = layers[at : at + len(shapes) - copies]
            if [shape for _, shape in own] == list(shapes[copies:]):
                break
            if copies < len(shapes) and shapes[copies] not in seen:
                return None
        else:
            return None
        found.append([""] * copies + [name for name, _ in own])
        at += len(own)
    return found if at == len(layers) else None


def _ranks(match: re.Match[str]) -> tuple[int, int]:
    return (-1 if match[1] is None else int(match[1]), int(match[2]))


def _groups(state: Any) -> Sequence[Mapping[str, Any]]:
    return state.get(k.PARAM_GROUPS, ()) if isinstance(state, dict) else ()


def _shards(
    masters: Sequence[torch.Tensor], base: Sequence[Any], index: int
) -> tuple[list[dict[str, torch.Tensor]], dict[str, Any]]:
    """Each rank's master and moments of one flat buffer, and the numbers that all have."""
    found = [_moments(own, index) for own in base]
    shards = [tensors | {FP32: master} for master, (tensors, _) in zip(masters, found, strict=True)]
    return shards, found[0][1]


def _moments(
    base: Any, index: int, per_element: Set[str] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, one-value entries) that an optimizer state dict holds for parameter ``index``.

    ``per_element``: the keys of the former; None for flat buffers, whose state is 1D.
    """
    if not isinstance(base, dict):
        raise CheckpointError(
            "this DeepSpeed checkpoint was saved with elastic_checkpoint, whose format is not read",
            fix="save it again without `elastic_checkpoint`, or convert it to the universal format first",
        )
    state = base.get("state", {}).get(index, {})
    if per_element is None:
        per_element = {key for key, v in state.items() if isinstance(v, torch.Tensor) and v.dim() > 0}
    return split_state(state, per_element)


def _buffer_order(states: list[Any], group: int) -> list[str]:
    """Names in the order in which they lie in the buffer, which need not be that of the parameters."""
    names: dict[str, None] = {}
    for state in states:
        mappings = state.get(k.PARAM_SLICE_MAPPINGS)
        if not mappings:
            return []
        for name, address in sorted(mappings[group].items(), key=lambda item: item[1].start):
            if address.numel:
                names[name] = None
    return list(names)
