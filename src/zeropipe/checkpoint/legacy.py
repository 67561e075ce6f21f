"""Reads the files that DeepSpeed wrote, by describing the layouts that they have.

Stages 1 and 2: one flat per param group, each shard a multiple of two elements; the fp32 shard comes without
its padding, the moments with it. Stage 3: every parameter is cut by itself and the cuts of a sub-group lie
end to end. Stage 0: ``torch.optim``'s state, by position. Facts measured on files of DeepSpeed 0.19.8.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from zeropipe.checkpoint import constants as k
from zeropipe.checkpoint.files import THREADS
from zeropipe.checkpoint.legacy_optimizer import buffer_order, hyperparameters, moments
from zeropipe.checkpoint.legacy_pipe import stage_orders
from zeropipe.checkpoint.manifest import MANIFEST_NAME, FlatEntry, TensorEntry
from zeropipe.checkpoint.source import Files, Source
from zeropipe.checkpoint.stand_ins import LossScalerValues
from zeropipe.checkpoint.state import FP32, PARAM, ModuleRest, TrainState
from zeropipe.checkpoint.universal.patterns import rules_in
from zeropipe.checkpoint.writer import OURS
from zeropipe.errors import CheckpointError
from zeropipe.layout.flat import FlatShards, TensorSpec
from zeropipe.runtime.optimizers.state_kinds import per_element_keys, shapes_in

_ALIGN = 2  # elements: what each shard of stages 1 and 2 is a multiple of
_OPTIM = re.compile(r"^(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")
_MODEL = re.compile(r"^(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt$")
_LAYER = re.compile(r"^layer_(\d+)-(?:model_(\d+)[-_])?model_states\.pt$")
# What a model file holds besides the client's own keys.
KNOWN_KEYS = {
    "module", "optimizer", "lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names",
    "skipped_steps", "global_steps", "global_samples", "dp_world_size", "mp_world_size", "ds_config",
    "shared_params", "num_experts", k.BUFFER_NAMES, k.PARAM_SHAPES, k.FROZEN_PARAM_SHAPES,
    k.FROZEN_PARAM_FRAGMENTS, k.CHECKPOINT_PARALLEL_DIMS, k.DS_VERSION,
}  # fmt: skip


def open_peer(
    path: Path,
    tag: str,
    *,
    trust: bool = False,
    order: Sequence[Sequence[str]] = (),
    unchecked: bool = False,
) -> Source:
    """Open a folder that DeepSpeed wrote. Raises CheckpointError when it is none, or misses a rank's file.

    Also for files of ours without their manifest, since nothing says that they are whole; not if ``unchecked``.
    """
    source = PeerSource(path, tag, trust=trust, order=order)
    if source.is_ours and not unchecked:
        raise CheckpointError(
            f"{path} was written by zeropipe, but its {MANIFEST_NAME} is gone: nothing can be checked",
            fix="copy it too from where the checkpoint is whole; verify=False loads the files unchecked",
        )
    return source


class PeerSource:
    """A folder without a manifest, described from what is in its files."""

    threads = THREADS
    param_groups: tuple[dict[str, Any], ...] = ()

    def __init__(
        self, folder: Path, tag: str, *, trust: bool = False, order: Sequence[Sequence[str]] = ()
    ) -> None:
        self.folder = folder
        self.tag = tag
        self.files = Files(folder, trust)
        self._order = order
        self._tensors: dict[tuple[str, str, int, str], torch.Tensor] = {}  # (flat, key) by mp rank and shard
        self._scalars: dict[str, dict[str, Any]] = {}
        names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        self._models = {_numbers(m): m[0] for m in map(_MODEL.match, names) if m}
        self._optims = {_numbers(m): m[0] for m in map(_OPTIM.match, names) if m}
        if not self._models:
            raise CheckpointError(
                f"{folder} is not a checkpoint",
                expected="a zeropipe manifest, or DeepSpeed's mp_rank_XX_model_states.pt",
                found=", ".join(names[:5]) or "nothing",
                fix="give the folder that holds `latest`, or a tag's folder",
            )
        # DeepSpeed hands a model file's further keys to its client, who may save them again; not these.
        first = self._optims[min(self._optims)] if self._optims else None
        self.is_ours = any(n.startswith("zeropipe_rank_") for n in names) or (
            first is not None and OURS in self.files[first]
        )
        lead = self._lead()
        self.world = int(lead.get("dp_world_size", 1)) * int(lead.get("mp_world_size", 1))
        dims = lead.get(k.CHECKPOINT_PARALLEL_DIMS) or {}
        self.degrees = {
            "dp": int(lead.get("dp_world_size", 1)),
            "tp": int(dims.get(k.CHECKPOINT_TP_DEGREE, lead.get("mp_world_size", 1))),
            "pp": int(dims.get(k.CHECKPOINT_PP_DEGREE, 1)),
        }
        self.stage = self._stage()
        self.tied: Mapping[str, str] = dict(lead.get("shared_params") or {})
        self.optimizer = str((lead.get("ds_config") or {}).get("optimizer", {}).get("type", ""))
        flats: list[FlatEntry] = []
        module: list[TensorEntry] = []
        layers = self._layers(names)
        self._layer_entries = {(e.name, e.mp_rank): e for e in layers}
        for mp_rank in sorted({mp for _, mp in self._models}):
            module += self._module_of(mp_rank)
            flats += self._flats_of(mp_rank)
        module += layers
        self.module = tuple(module)
        self.flats = tuple(flats)
        self.dtype = next((e.dtype for e in module if e.kind == "param" and e.file), "float32")
        if any(name.startswith("bf16_") for name in self._optims.values()):
            self.dtype = "bfloat16"

    @property
    def universal_info(self) -> Mapping[str, Any] | None:
        return rules_in(self._lead())

    def rest(self, tp_rank: int = 0) -> ModuleRest:
        extra: dict[str, Any] = {}
        versions: dict[str, Any] | None = None
        trees = [
            (file, "")
            for (_, mp_rank), file in self._models.items()
            if mp_rank % self.degrees["tp"] == tp_rank
        ]
        trees += [(e.file, e.name.split(".", 1)[0] + ".") for e in self._layer_entries.values()]
        for file, prefix in dict(trees).items():
            tree = self.files[file]
            tree = tree.get("module", tree) or {}
            extra |= {prefix + key: v for key, v in tree.items() if not isinstance(v, torch.Tensor)}
            found = getattr(tree, "_metadata", None)
            if found is not None:
                versions = (versions or {}) | {(prefix + key).rstrip("."): v for key, v in found.items()}
        return ModuleRest(extra, versions)

    def flat_tensor(self, entry: FlatEntry, shard: int, key: str) -> torch.Tensor:
        return self._tensors[(entry.name, key, shard, str(entry.mp_rank))]

    def flat_scalars(self, entry: FlatEntry) -> dict[str, Any]:
        return dict(self._scalars.get(f"{entry.mp_rank}/{entry.name}", {}))

    def module_tensor(self, entry: TensorEntry) -> torch.Tensor:
        tree = self.files[entry.file]
        tree = tree.get("module", tree)
        layer = _LAYER.match(entry.file)
        return tree[entry.name.split(".", 1)[1] if layer else entry.name]

    def train_state(self, rank: int) -> TrainState:
        lead = self._lead()
        scaler = None
        for name in self._optims.values():
            found = self.files[name][k.OPTIMIZER_STATE_DICT].get(k.LOSS_SCALER)
            if isinstance(found, LossScalerValues) and found.values().get("dynamic"):
                scaler = found.values()
            break
        return TrainState(
            global_steps=int(lead.get("global_steps", 0)),
            global_samples=int(lead.get("global_samples", 0)),
            skipped_steps=int(lead.get("skipped_steps", 0)),
            lr_scheduler=lead.get("lr_scheduler"),
            loss_scaler=scaler,
            client_state={key: v for key, v in lead.items() if key not in KNOWN_KEYS},
            ds_config=lead.get("ds_config") or {},
        )

    def _lead(self) -> Any:
        return self.files[self._models[min(self._models, key=lambda key: (key[1], key[0]))]]

    def _stage(self) -> int:
        if not self._optims:
            return 0
        state = self.files[next(iter(self._optims.values()))][k.OPTIMIZER_STATE_DICT]
        return int(state.get(k.ZERO_STAGE, 1))

    def _model_of(self, mp_rank: int, dp_rank: int = 0) -> str:
        name = self._models.get((dp_rank, mp_rank)) or self._models.get((-1, mp_rank))
        if name is None:
            raise CheckpointError(f"{self.folder} lacks the model file of rank dp {dp_rank}, mp {mp_rank}")
        return name

    def _module_of(self, mp_rank: int) -> list[TensorEntry]:
        name = self._models.get((-1, mp_rank)) or self._model_of(mp_rank)
        tree = self.files[name]
        buffers = set(tree.get(k.BUFFER_NAMES) or ())
        frozen = set(tree.get(k.FROZEN_PARAM_SHAPES) or ())
        entries = []
        for key, tensor in (tree.get("module") or {}).items():
            if not isinstance(tensor, torch.Tensor) or key in self.tied:
                continue
            if self.stage >= 3 and key not in buffers and tensor.numel() == 0:
                continue  # its value is in the shards
            kind = "buffer" if key in buffers else "frozen" if key in frozen else "param"
            dtype = str(tensor.dtype).removeprefix("torch.")
            entries.append(TensorEntry(key, tuple(tensor.shape), dtype, kind, name, mp_rank))
        return entries

    def _layers(self, names: list[str]) -> list[TensorEntry]:
        """Pipeline checkpoints keep each layer in a file of its own; its parameters are ``NUMBER.name``."""
        entries = []
        for match in filter(None, map(_LAYER.match, names)):
            tree = self.files[match[0]]
            for key, tensor in tree.get("module", tree).items():
                if isinstance(tensor, torch.Tensor):
                    dtype = str(tensor.dtype).removeprefix("torch.")
                    name = f"{int(match[1])}.{key}"
                    entries.append(
                        TensorEntry(name, tuple(tensor.shape), dtype, "param", match[0], int(match[2] or 0))
                    )
        return entries

    def _flats_of(self, mp_rank: int) -> list[FlatEntry]:
        states = {dp: name for (dp, mp), name in self._optims.items() if mp == mp_rank}
        if not states:
            return self._whole(mp_rank)
        count = max(states) + 1
        state = self.files[states[min(states)]][k.OPTIMIZER_STATE_DICT]
        listed = state.get(k.PARTITION_COUNT, count)
        count = max(listed) if isinstance(listed, (list, tuple)) else int(listed)
        lost = [dp for dp in range(count) if dp not in states]
        if lost:
            raise CheckpointError(
                f"{self.folder} lacks the optimizer file of data-parallel rank {lost[0]}",
                expected=f"{count} files of mp_rank_{mp_rank:02d}",
                found=len(states),
                fix="copy all ranks' files into one folder",
            )
        ordered = [self.files[states[dp]][k.OPTIMIZER_STATE_DICT] for dp in range(count)]
        files = tuple(states[dp] for dp in range(count))
        if self.stage >= 3:
            return self._stage3(mp_rank, ordered, files) + self._frozen3(mp_rank, count)
        return self._stage12(mp_rank, ordered, files)

    def _stage12(self, mp_rank: int, states: list[Any], files: tuple[str, ...]) -> list[FlatEntry]:
        shapes = self.files[self._model_of(mp_rank)][k.PARAM_SHAPES]
        self.param_groups = hyperparameters(states[0][k.BASE_OPTIMIZER_STATE])
        flats = []
        for group, group_shapes in enumerate(shapes):
            names = buffer_order(states, group) or list(group_shapes)
            # Tensors without elements have no slice anywhere.
            names += [n for n in group_shapes if n not in names]
            specs = tuple(TensorSpec(n, tuple(group_shapes[n]), "float32") for n in names)
            layout = FlatShards(specs, len(states), _ALIGN)
            name = f"group{group}"
            keys: dict[str, str] = {}
            for shard, state in enumerate(states):
                tensors, scalars = moments(state[k.BASE_OPTIMIZER_STATE], group)
                tensors[FP32] = state[k.SINGLE_PARTITION_OF_FP32_GROUPS][group]
                keys = self._keep(name, mp_rank, shard, tensors)
                self._scalars.setdefault(f"{mp_rank}/{name}", scalars)
            flats.append(self._entry(name, mp_rank, group, layout, keys, files))
        return flats

    def _stage3(self, mp_rank: int, states: list[Any], files: tuple[str, ...]) -> list[FlatEntry]:
        shapes = self.files[self._model_of(mp_rank)][k.PARAM_SHAPES]
        self.param_groups = hyperparameters(states[0][k.OPTIMIZER_STATE_DICT])
        flats: list[FlatEntry] = []
        sub_group, offset = 0, 0
        for group, group_shapes in enumerate(shapes):
            for name, shape in group_shapes.items():
                layout = FlatShards((TensorSpec(name, tuple(shape), "float32"),), len(states))
                size = layout.shard_numel
                while offset + size > states[0][k.FP32_FLAT_GROUPS][sub_group].numel():
                    sub_group, offset = sub_group + 1, 0
                keys: dict[str, str] = {}
                for shard, state in enumerate(states):
                    tensors, scalars = moments(state[k.OPTIMIZER_STATE_DICT], sub_group)
                    tensors[FP32] = state[k.FP32_FLAT_GROUPS][sub_group]
                    cut = {key: t[offset : offset + size] for key, t in tensors.items()}
                    keys = self._keep(name, mp_rank, shard, cut)
                    self._scalars.setdefault(f"{mp_rank}/{name}", scalars)
                flats.append(self._entry(name, mp_rank, group, layout, keys, files))
                offset += size
        return flats

    def _frozen3(self, mp_rank: int, count: int) -> list[FlatEntry]:
        shapes = self.files[self._model_of(mp_rank)].get(k.FROZEN_PARAM_SHAPES) or {}
        flats = []
        files = tuple(self._model_of(mp_rank, dp) for dp in range(count))
        for name, shape in shapes.items():
            keys: dict[str, str] = {}
            for shard, file in enumerate(files):
                part = self.files[file][k.FROZEN_PARAM_FRAGMENTS][name]
                keys = self._keep(name, mp_rank, shard, {PARAM: part.reshape(-1)})
            layout = FlatShards((TensorSpec(name, tuple(shape), keys[PARAM]),), count)
            flats.append(self._entry(name, mp_rank, 0, layout, keys, files))
        return flats

    def _whole(self, mp_rank: int) -> list[FlatEntry]:
        """Stage 0: the module's values are the masters; the moments are found by their position."""
        file = self._model_of(mp_rank)
        tree = self.files[file]
        state = tree.get("optimizer") or {}
        self.param_groups = hyperparameters(state)
        names = [name for group in self._order for name in group]
        if self._layer_entries and isinstance(state.get("state"), dict):
            names = self._stage_order(mp_rank)
        if not isinstance(state.get("state"), dict) or not names:
            return []
        if len(names) != sum(len(group["params"]) for group in state["param_groups"]):
            raise CheckpointError(
                f"{self.folder / file}: the optimizer of this stage 0 checkpoint has other parameters",
                expected=f"{len(names)} parameters",
                found=sum(len(group["params"]) for group in state["param_groups"]),
                fix="build the optimizer with the same param groups as when it was saved",
            )
        values_of: dict[int, torch.Tensor] = {}
        for index, name in enumerate(names):
            # A copy of a tied layer, which another stage has too, has no name.
            if index in state["state"] and name != "":
                layer = self._layer_entries.get((name, mp_rank % self.degrees["tp"]))
                values_of[index] = tree["module"].get(name) if layer is None else self.module_tensor(layer)
        per_element = per_element_keys(
            None,
            (
                (tuple(values.shape), shapes_in(state["state"][index]))
                for index, values in values_of.items()
                if values is not None
            ),
        )
        flats = []
        for index, values in values_of.items():
            name = names[index]
            tensors, scalars = moments(state, index, per_element)
            shape = next((tuple(t.shape) for t in tensors.values()), tuple(values.shape))
            layout = FlatShards((TensorSpec(name, shape, "float32"),), 1)
            flat = {key: t.reshape(-1) for key, t in tensors.items()}
            if values is not None and values.dtype == torch.float32:
                flat[FP32] = values.reshape(-1)
            keys = self._keep(name, mp_rank, 0, flat)
            self._scalars[f"{mp_rank}/{name}"] = scalars
            flats.append(self._entry(name, mp_rank, 0, layout, keys, (file,)))
        return flats

    def _stage_order(self, mp_rank: int) -> list[str]:
        """A pipeline stage's parameters in the order of its optimizer."""
        tp = self.degrees["tp"]
        rank = mp_rank % tp
        members = [mp for _, mp in sorted(self._models, key=lambda key: key[1]) if mp % tp == rank]
        states = [self.files[self._model_of(mp)].get("optimizer") or {} for mp in members]
        found = [[moments(s, i)[0] for g in s["param_groups"] for i in g["params"]] for s in states]
        # A parameter that was never stepped has no state to know it by.
        shapes = [
            [tuple(next(iter(tensors.values())).shape) for tensors in stage if tensors] for stage in found
        ]
        layers = [(n, e.shape) for (n, at), e in self._layer_entries.items() if at == rank]
        orders = stage_orders(shapes, layers) if all(map(all, found)) else None
        if orders is None or any(len(s["param_groups"]) > 1 for s in states):
            raise CheckpointError(
                f"{self.folder}: the optimizer state of this stage 0 pipeline cannot be told apart",
                expected="one param group, every layer's parameters in order",
                found=", ".join(str(len(s)) for s in shapes) + " parameters on the stages",
                fix="save it with ZeRO stage 1, which names its parameters",
            )
        return orders[members.index(mp_rank)]

    def _keep(self, name: str, mp_rank: int, shard: int, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
        for key, tensor in tensors.items():
            self._tensors[(name, key, shard, str(mp_rank))] = tensor
        return {key: str(t.dtype).removeprefix("torch.") for key, t in tensors.items()}

    def _entry(
        self,
        name: str,
        mp_rank: int,
        group: int,
        layout: FlatShards,
        keys: dict[str, str],
        files: tuple[str, ...],
    ) -> FlatEntry:
        scalars = self._scalars.get(f"{mp_rank}/{name}", {})
        figures = {
            key: v.item() if isinstance(v, torch.Tensor) and v.numel() == 1 else v
            for key, v in scalars.items()
        }
        return FlatEntry(name, mp_rank, group, layout, keys, figures, files)


def _numbers(match: re.Match[str]) -> tuple[int, int]:
    """(dp rank, or -1 where the file has none; mp rank)."""
    return (-1 if match[1] is None else int(match[1]), int(match[2]))
