"""Translates between an engine and the plain data that checkpoints are made of; it reads and writes no files."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from zeropipe.checkpoint.constants import UNIVERSAL_CHECKPOINT_INFO
from zeropipe.checkpoint.sources.slices import info_of, plain_info
from zeropipe.checkpoint.state import (
    PARAM,
    FlatState,
    Grid,
    LoadedState,
    LocalState,
    TrainState,
)
from zeropipe.checkpoint.utils import clone_tensors_for_torch_save
from zeropipe.comm.group import SELF, world
from zeropipe.layout.flat import FlatShards, TensorSpec
from zeropipe.runtime.engine.flats import optimizer_flats
from zeropipe.runtime.engine.module_state import capture, destination
from zeropipe.runtime.zero.gather.shards import shards_of
from zeropipe.runtime.zero.hold.survey import Communicates
from zeropipe.runtime.zero.param import is_sharded
from zeropipe.runtime.zero.status import ZeroParamStatus

if TYPE_CHECKING:
    from zeropipe.runtime.engine.engine import DeepSpeedEngine
    from zeropipe.runtime.zero.hold.optimizer import ZeroOptimizer


def local_state(
    engine: DeepSpeedEngine,
    client_state: Mapping[str, Any] | None = None,
    *,
    exclude_frozen: bool = False,
    saving: bool = True,
) -> LocalState:
    """What this rank holds, by reference: nothing is copied. ``saving=False``: only what a load fills in place."""
    optimizer = engine.optimizer
    stage = engine.zero_optimization_stage() if optimizer is not None else 0
    flats = [held.flat for held in optimizer_flats(optimizer)] if optimizer is not None else []
    flats += frozen_flats(engine, exclude_frozen)
    groups: list[dict[str, Any]] = []
    if optimizer is not None:
        for index, group in enumerate(optimizer.param_groups):
            names = [n for p in optimizer.partitions if p.group_index == index for n in p.names]
            groups.append({k: v for k, v in group.items() if k != "params"} | {"param_names": names})
    return LocalState(
        grid=grid_of(engine),
        stage=3 if any(PARAM in f.tensors for f in flats) else stage,
        dtype={"fp16": "float16", "bf16": "bfloat16"}.get(engine._config.precision, "float32"),
        model=replace(
            capture(engine.module, exclude_frozen) if saving else destination(engine.module),
            universal_info=plain_info((client_state or {}).get(UNIVERSAL_CHECKPOINT_INFO))
            or info_of(engine.module),
        ),
        flats=tuple(flats),
        param_groups=tuple(groups),
        optimizer_name=engine.get_type() or "",
        train=_train_state(engine, dict(client_state or {}), saving),
    )


def grid_of(engine: DeepSpeedEngine) -> Grid:
    """This rank's place; model parallelism is what ``mpu`` says it is."""
    group, everyone, mpu = engine._group, world(), engine.mpu

    def ask(*names: str, default: int) -> int:
        found = next((getattr(mpu, name) for name in names if hasattr(mpu, name)), None)
        return default if found is None else int(found())

    pp = ask("get_pipe_parallel_world_size", "get_pipeline_model_parallel_world_size", default=1)
    pp_rank = ask("get_pipe_parallel_rank", "get_pipeline_model_parallel_rank", default=0)
    tp_names = ("get_tensor_model_parallel_world_size", "get_slice_parallel_world_size")
    tp_ranks = ("get_tensor_model_parallel_rank", "get_slice_parallel_rank")
    tp = ask(*tp_names, default=ask("get_model_parallel_world_size", default=1) // pp)
    tp_rank = ask(*tp_ranks, default=ask("get_model_parallel_rank", default=0) % max(tp, 1))
    if mpu is None:
        return Grid(group.rank, group.size, group.rank, group.size)
    return Grid(everyone.rank, everyone.size, group.rank, group.size, tp_rank, tp, pp_rank, pp)


def frozen_flats(engine: DeepSpeedEngine, exclude_frozen: bool = False) -> list[FlatState]:
    """Sharded parameters that no optimizer holds: one flat each."""
    flats = []
    held = {id(p) for part in engine.optimizer.partitions for p in part.params} if engine.optimizer else set()
    replicas = SELF if engine._sharded is None else engine._sharded.parts.replicas
    for name, param in engine.module.named_parameters():
        shards = shards_of(param)
        if shards is None or id(param) in held or (exclude_frozen and not param.requires_grad):
            continue
        spec = TensorSpec(name, tuple(shards.shape), str(shards.dtype).removeprefix("torch."))
        layout = FlatShards((spec,), shards.layout.num_shards, shards.layout.align)
        flats.append(
            FlatState(
                name,
                layout,
                shards.group.rank,
                {PARAM: shards.source.detach()},
                replica=replicas.rank,
                num_replicas=replicas.size,
            )
        )
    return flats


def _train_state(engine: DeepSpeedEngine, client_state: dict[str, Any], with_rng: bool) -> TrainState:
    scaler = None if engine.optimizer is None else engine.optimizer.loss_scaler
    schedule = engine.lr_scheduler
    loader = engine.training_dataloader
    clock = engine.clock
    return TrainState(
        clock.global_steps,
        clock.global_samples,
        clock.skipped_steps,
        clock.micro_steps,
        lr_scheduler=schedule.state_dict() if hasattr(schedule, "state_dict") else None,
        loss_scaler=None if scaler is None else dict(scaler.state_dict()),
        per_rank={"rng": rng_state(engine.device)} | _own_state(engine) if with_rng else {},
        common={"data": loader.state_dict() if hasattr(loader, "state_dict") else None},
        client_state=client_state,
        ds_config=_plain_config(engine.config),
    )


def _own_state(engine: DeepSpeedEngine) -> dict[str, Any]:
    """What an optimizer that communicates by itself keeps on this rank alone, and of which tensor-parallel slices."""
    base = None if engine.optimizer is None else engine.optimizer.optimizer
    return (
        {"optimizer": base.rank_state(), "slice": _slice_of(engine)} if isinstance(base, Communicates) else {}
    )


def _slice_of(engine: DeepSpeedEngine) -> list[int]:
    grid = grid_of(engine)
    return [grid.tp_rank, grid.tp_degree]


def adopt_own_state(
    engine: DeepSpeedEngine, own: Mapping[str, Any], everyone: Callable[[], list[Mapping[str, Any]]]
) -> str:
    """Give such an optimizer what each rank kept: ``own`` is this rank's part of the file. What to log, or "".

    Ranks that held other tensor-parallel slices, or slices of another degree, are of no use to it.
    """
    optimizer, here = engine.optimizer, _slice_of(engine)
    if optimizer is None or not isinstance(optimizer.optimizer, Communicates):
        return ""

    def of_our_slices(parts: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [
            part["optimizer"] for part in parts if "optimizer" in part and part.get("slice", here) == here
        ]

    notice = optimizer.optimizer.take_rank_states(
        next(iter(of_our_slices([own])), None), lambda: of_our_slices(everyone())
    )
    for partition in optimizer.partitions:  # masters may have moved to where this rank stood by itself
        partition.values.publish()
    return notice


def _plain_config(config: Any) -> Any:
    """The configuration without what JSON has no word for."""
    if isinstance(config, Mapping):
        return {str(key): _plain_config(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [_plain_config(value) for value in config]
    return config if config is None or isinstance(config, (bool, int, float, str)) else str(config)


def rng_state(device: torch.device) -> dict[str, Any]:
    """Python's, NumPy's and torch's generators as plain values and tensors."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = (str(kind), [int(key) for key in keys], *map(float, rest))
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"].clone())
    if "numpy" in state:
        import numpy

        kind, keys, position, has_gauss, gauss = state["numpy"]
        numpy.random.set_state((kind, numpy.array(keys, "uint32"), int(position), int(has_gauss), gauss))
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].clone(), device)


def adopt_groups(optimizer: ZeroOptimizer, saved: tuple[dict[str, Any], ...]) -> str:
    """Set the hyperparameters of each param group in place; why not, or ""."""
    if not saved:
        return ""
    if len(saved) != len(optimizer.param_groups):
        return (
            f"the checkpoint has {len(saved)} param groups and the optimizer {len(optimizer.param_groups)}; "
            "learning rates and the like stay as configured"
        )
    for group, values in zip(optimizer.param_groups, saved, strict=True):
        for key, value in values.items():
            if key not in ("params", "param_names") and key in group:
                group[key] = clone_tensors_for_torch_save(value)
    return ""


def adopt_clock(engine: DeepSpeedEngine, loaded: LoadedState) -> None:
    clock, train = engine.clock, loaded.train
    accumulation = clock.batch.gradient_accumulation_steps
    clock.global_steps = train.global_steps
    clock.global_samples = train.global_samples
    clock.skipped_steps = train.skipped_steps
    # Gradients of an unfinished window are not saved, so the window starts over.
    micro_steps = train.micro_steps or train.global_steps * accumulation
    clock.micro_steps = micro_steps - micro_steps % accumulation


def show_loaded_shards(engine: DeepSpeedEngine) -> None:
    """Parameters that are shards, and gathered now, show what was read into the shards. Collective at stage 3."""
    held: set[int] = set()
    for partition in engine.optimizer.partitions if engine.optimizer is not None else ():
        held |= {id(param) for param in partition.params}
        if is_sharded(partition.params[0]):
            partition.values.publish()
    for param in engine.module.parameters():
        shards = shards_of(param)
        if shards is None or id(param) in held:
            continue
        if shards.status is ZeroParamStatus.AVAILABLE:
            shards.show(shards.settled().view(-1))


def masters_from_values(optimizer: ZeroOptimizer) -> None:
    """The values were written from outside: take the masters anew from them."""
    for partition in optimizer.partitions:
        partition.values.refresh_master()
