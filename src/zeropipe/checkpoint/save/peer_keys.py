"""The keys that DeepSpeed's own loader and tools look for, filled from our state.

Measured on files that DeepSpeed 0.19.8 wrote. Values that DeepSpeed keeps per parameter group are given per
flat, in the order of the groups.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from zeropipe.checkpoint import constants as k
from zeropipe.checkpoint.save.files import FragmentAddress, LossScalerValues
from zeropipe.checkpoint.save.plain import lowered
from zeropipe.checkpoint.save.records import FP32, PARAM, FlatState, LocalState, TrainState
from zeropipe.given import Anything
from zeropipe.runtime.optimizers.state_kinds import numbers_by_tensor

# The format that these keys follow; DeepSpeed's tools want to see one of its versions.
PEER_VERSION = "0.19.8"
# What a model file holds besides the client's own keys.
KNOWN_KEYS = {
    "module", "optimizer", "lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names",
    "skipped_steps", "global_steps", "global_samples", "dp_world_size", "mp_world_size", "ds_config",
    "shared_params", "num_experts", k.BUFFER_NAMES, k.PARAM_SHAPES, k.FROZEN_PARAM_SHAPES,
    k.FROZEN_PARAM_FRAGMENTS, k.CHECKPOINT_PARALLEL_DIMS, k.DS_VERSION,
}  # fmt: skip


def model_keys(local: LocalState, module: Anything) -> dict[str, Any]:
    """Top level of a model file. ``module``: the state dict that it holds."""
    grid, train, model = local.grid, local.train, local.model
    trained = [f for f in local.flats if FP32 in f.tensors]
    groups = 1 + max((f.group_index for f in trained), default=-1)
    shapes: list[OrderedDict[str, torch.Size]] = [OrderedDict() for _ in range(groups)]
    for flat in trained:
        for spec in flat.layout.tensors:
            shapes[flat.group_index][spec.name] = torch.Size(spec.shape)
    return model_file(
        train,
        module,
        buffers=model.of_kind("buffer"),
        shapes=shapes if local.stage else None,
        frozen=_frozen(local),
        tied=model.tied,
        degrees={"dp": grid.dp_degree, "tp": grid.tp_degree, "pp": grid.pp_degree},
        info=model.universal_info,
    )


def model_file(
    train: TrainState,
    module: Anything,
    *,
    buffers: Iterable[str],
    shapes: Sequence[Mapping[str, torch.Size]] | None,
    frozen: tuple[Any, Any],
    tied: Mapping[str, str],
    degrees: Mapping[str, int],
    info: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The keys of every model file. ``frozen``: shapes and values of what is not trained, where they stand apart."""
    tp, pp = degrees.get("tp", 1), degrees.get("pp", 1)
    version = {k.UNIVERSAL_CHECKPOINT_VERSION_KEY: k.UNIVERSAL_CHECKPOINT_VERSION_VALUE}
    return {
        "module": module,
        k.BUFFER_NAMES: list(buffers),
        "optimizer": None,
        k.PARAM_SHAPES: shapes,
        k.FROZEN_PARAM_SHAPES: frozen[0],
        k.FROZEN_PARAM_FRAGMENTS: frozen[1],
        "shared_params": dict(tied),
        "lr_scheduler": lowered(train.lr_scheduler),
        "data_sampler": None,
        "random_ltd": None,
        "sparse_tensor_module_names": [],
        "skipped_steps": train.skipped_steps,
        "global_steps": train.global_steps,
        "global_samples": train.global_samples,
        "dp_world_size": degrees["dp"],
        "mp_world_size": tp * pp,
        k.CHECKPOINT_PARALLEL_DIMS: {k.CHECKPOINT_PP_DEGREE: pp, k.CHECKPOINT_TP_DEGREE: tp},
        "ds_config": train.ds_config,
        k.DS_VERSION: PEER_VERSION,
        **({} if info is None else {k.UNIVERSAL_CHECKPOINT_INFO: version | dict(info)}),
    }


def _frozen(local: LocalState) -> tuple[Any, Any]:
    """Shapes and this rank's values of frozen parameters."""
    # Below stage 2 DeepSpeed does not write them apart: they are in the module.
    if local.stage < 2:
        return None, None
    shapes: OrderedDict[str, torch.Size] = OrderedDict()
    parts: OrderedDict[str, torch.Tensor] = OrderedDict()
    for name in local.model.of_kind("frozen"):
        tensor = local.model.tensors.get(name)
        if tensor is not None:
            shapes[name], parts[name] = torch.Size(tensor.shape), tensor.detach()
    for flat in local.flats:
        if PARAM not in flat.tensors or FP32 in flat.tensors:
            continue
        assert len(flat.layout.tensors) == 1, "frozen parameters are sharded one by one"
        (spec,) = flat.layout.tensors
        shapes[spec.name] = torch.Size(spec.shape)
        # With its padding: DeepSpeed joins the parts of all ranks and cuts the end off.
        parts[spec.name] = flat.tensors[PARAM]
    return shapes, parts


def optimizer_keys(local: LocalState) -> dict[str, Any]:
    """Top level of an optimizer file of stages 1 to 3."""
    flats = sorted((f for f in local.flats if FP32 in f.tensors), key=lambda f: f.group_index)
    if local.stage >= 3:
        flats = _joined(flats)
    masters = [f.tensors[FP32] for f in flats]
    base = {
        "state": {i: dict(lowered(f.scalars)) | _moments(f) for i, f in enumerate(flats)},
        "param_groups": [
            _plain(group) | {"params": [i for i, f in enumerate(flats) if f.group_index == number]}
            for number, group in enumerate(local.param_groups)
        ],
    }
    # DeepSpeed's stage 3 insists on a scaler, whatever the precision.
    scaler = LossScalerValues()
    scaler.__setstate__(lowered(local.train.loss_scaler) or {"cur_scale": 1.0, "dynamic": False})
    state: dict[str, Any] = {
        "overflow": False,
        k.ZERO_STAGE: local.stage,
        k.DS_VERSION: PEER_VERSION,
        "dynamic_loss_scale": bool((local.train.loss_scaler or {}).get("dynamic")),
        k.LOSS_SCALER: scaler,
    }
    if local.stage >= 3:
        state |= {
            k.PARTITION_COUNT: local.grid.dp_degree,
            k.FP32_FLAT_GROUPS: masters,
            k.OPTIMIZER_STATE_DICT: base,
        }
    else:
        # What a shard lacks at its end is padding to DeepSpeed, and which elements of it are whose is a mapping.
        addresses = [
            OrderedDict(
                (f.layout.tensors[piece.tensor].name, FragmentAddress(piece.numel, piece.offset))
                for piece in f.layout.pieces(f.shard)
            )
            for f in flats
        ]
        state |= {
            k.CLIP_GRAD: 0.0,
            k.BASE_OPTIMIZER_STATE: base,
            k.SINGLE_PARTITION_OF_FP32_GROUPS: masters,
            k.GROUP_PADDINGS: [f.layout.shard_numel - f.layout.held(f.shard) for f in flats],
            k.PARTITION_COUNT: [f.layout.num_shards for f in flats],
            k.PARAM_SLICE_MAPPINGS: addresses,
        }
    return {k.OPTIMIZER_STATE_DICT: state, "ds_config": local.train.ds_config, k.DS_VERSION: PEER_VERSION}


def whole_optimizer(local: LocalState) -> dict[str, Any]:
    """Stage 0: ``torch.optim``'s own state dict, one entry per parameter, as views of the flats."""
    states: dict[str, dict[str, Any]] = {}
    for flat in local.flats:
        names = [spec.name for spec in flat.layout.tensors]
        for index, shared in enumerate(numbers_by_tensor(flat.scalars, names)[0]):
            if shared is None:  # never stepped: torch has no entry of it
                continue
            start, stop = flat.layout.tensor_range(index)
            shape = flat.layout.tensors[index].shape
            # Optimizers count in place: parameters that shared one step tensor would each advance it.
            states[names[index]] = {
                key: v.clone() if isinstance(v, torch.Tensor) else v for key, v in lowered(shared).items()
            } | {key: t[start:stop].view(shape) for key, t in _moments(flat).items()}
    state: dict[int, Any] = {}
    groups: list[dict[str, Any]] = []
    first = 0
    for number, group in enumerate(local.param_groups):
        held = [t.name for f in local.flats if f.group_index == number for t in f.layout.tensors]
        # torch numbers the parameters through all groups.
        numbers = dict(enumerate(group.get("param_names") or held, first))
        first += len(numbers)
        state |= {n: states[name] for n, name in numbers.items() if states.get(name)}
        groups.append(_plain(group) | {"params": list(numbers)})
    return {"state": state, "param_groups": groups}


# Moments that one parameter lacks (it was never stepped) are zeros to DeepSpeed, which has one tensor for all.
def _joined(flats: list[FlatState]) -> list[FlatState]:
    """One flat per param group: the shards of its parameters end to end, as DeepSpeed has them at stage 3."""
    groups: dict[int, list[FlatState]] = {}
    for flat in flats:
        groups.setdefault(flat.group_index, []).append(flat)
    return [
        replace(
            members[0],
            tensors={
                key: _end_to_end([m.tensors.get(key, torch.zeros_like(m.tensors[FP32])) for m in members])
                for key in dict.fromkeys(key for m in members for key in m.tensors)
            },
            scalars=max((m.scalars for m in members), key=lambda scalars: float(scalars.get("step", 0))),
        )
        for members in groups.values()
    ]


def _end_to_end(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The tensors as one; a view where they are neighbours in memory already, so that it costs nothing."""
    first = tensors[0]
    at = first.storage_offset()
    for tensor in tensors:
        if tensor.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() or (
            tensor.numel() and tensor.storage_offset() != at
        ):
            return torch.cat(tensors)
        at += tensor.numel()
    return first.as_strided((at - first.storage_offset(),), (1,))


def _plain(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in lowered(group).items() if key != "param_names"}


def _moments(flat: FlatState) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in flat.tensors.items() if key not in (FP32, PARAM)}
