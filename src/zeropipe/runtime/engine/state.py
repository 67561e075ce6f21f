"""An engine's state as plain data: what checkpoints are made of, and its weights alone, taken out and put back."""

from __future__ import annotations

import logging
import os
import random
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from zeropipe.checkpoint.constants import UNIVERSAL_CHECKPOINT_INFO
from zeropipe.checkpoint.save.records import PARAM, FlatState, Grid, LocalState, TrainState
from zeropipe.checkpoint.universal_checkpoint import info_of, plain_info
from zeropipe.checkpoint.utils import clone_tensors_for_torch_save
from zeropipe.comm.collectives import broadcast_object
from zeropipe.comm.group import SELF, world
from zeropipe.errors import CheckpointError
from zeropipe.layout.flat import FlatShards, TensorSpec
from zeropipe.runtime.engine.flats import optimizer_flats
from zeropipe.runtime.engine.module_state import capture, destination
from zeropipe.runtime.engine.parts import Parts
from zeropipe.runtime.zero.gather.shards import shards_of
from zeropipe.runtime.zero.hold.optimizer import ZeroOptimizer
from zeropipe.runtime.zero.hold.survey import Communicates
from zeropipe.runtime.zero.param import ZeroParamStatus, is_sharded

_log = logging.getLogger("zeropipe")


def local_state(
    parts: Parts,
    client_state: Mapping[str, Any] | None = None,
    *,
    exclude_frozen: bool = False,
    saving: bool = True,
) -> LocalState:
    """What this rank holds, by reference: nothing is copied. ``saving=False``: only what a load fills in place."""
    optimizer = parts.optimizer
    stage = parts.config.zero_optimization.stage if optimizer is not None else 0
    flats = [held.flat for held in optimizer_flats(optimizer)] if optimizer is not None else []
    flats += frozen_flats(parts, exclude_frozen)
    groups: list[dict[str, Any]] = []
    if optimizer is not None:
        for index, group in enumerate(optimizer.param_groups):
            names = [n for p in optimizer.partitions if p.group_index == index for n in p.names]
            groups.append({k: v for k, v in group.items() if k != "params"} | {"param_names": names})
    return LocalState(
        grid=grid_of(parts),
        stage=3 if any(PARAM in f.tensors for f in flats) else stage,
        dtype={"fp16": "float16", "bf16": "bfloat16"}.get(parts.config.precision, "float32"),
        model=replace(
            capture(parts.module, exclude_frozen) if saving else destination(parts.module),
            universal_info=plain_info((client_state or {}).get(UNIVERSAL_CHECKPOINT_INFO))
            or info_of(parts.module),
        ),
        flats=tuple(flats),
        param_groups=tuple(groups),
        optimizer_name="" if optimizer is None else type(optimizer.optimizer).__name__,
        train=_train_state(parts, dict(client_state or {}), saving),
    )


def grid_of(parts: Parts) -> Grid:
    """This rank's place; model parallelism is what ``mpu`` says it is."""
    group, everyone, mpu = parts.group, world(), parts.mpu

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


def frozen_flats(parts: Parts, exclude_frozen: bool = False) -> list[FlatState]:
    """Sharded parameters that no optimizer holds: one flat each."""
    flats = []
    held = {id(p) for part in parts.optimizer.partitions for p in part.params} if parts.optimizer else set()
    replicas = SELF if parts.sharded is None else parts.sharded.parts.replicas
    for name, param in parts.module.named_parameters():
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


def _train_state(parts: Parts, client_state: dict[str, Any], with_rng: bool) -> TrainState:
    scaler = None if parts.optimizer is None else parts.optimizer.loss_scaler
    schedule = parts.lr_scheduler
    loader = parts.training_dataloader
    clock = parts.clock
    return TrainState(
        clock.global_steps,
        clock.global_samples,
        clock.skipped_steps,
        clock.micro_steps,
        lr_scheduler=schedule.state_dict() if hasattr(schedule, "state_dict") else None,
        loss_scaler=None if scaler is None else dict(scaler.state_dict()),
        per_rank={"rng": rng_state(parts.device)} | _own_state(parts) if with_rng else {},
        common={"data": loader.state_dict() if hasattr(loader, "state_dict") else None},
        client_state=client_state,
        ds_config=_plain_config(parts.config.raw),
    )


def _own_state(parts: Parts) -> dict[str, Any]:
    """What an optimizer that communicates by itself keeps on this rank alone, and of which tensor-parallel slices."""
    base = None if parts.optimizer is None else parts.optimizer.optimizer
    return (
        {"optimizer": base.rank_state(), "slice": _slice_of(parts)} if isinstance(base, Communicates) else {}
    )


def _slice_of(parts: Parts) -> list[int]:
    grid = grid_of(parts)
    return [grid.tp_rank, grid.tp_degree]


def adopt_own_state(
    parts: Parts, own: Mapping[str, Any], everyone: Callable[[], Iterable[Mapping[str, Any]]]
) -> str:
    """Give such an optimizer what each rank kept: ``own`` is this rank's part of the file. What to log, or "".

    Ranks that held other tensor-parallel slices, or slices of another degree, are of no use to it.
    """
    optimizer, here = parts.optimizer, _slice_of(parts)
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


def show_loaded_shards(parts: Parts) -> None:
    """Parameters that are shards, and gathered now, show what was read into the shards. Collective at stage 3."""
    held: set[int] = set()
    for partition in parts.optimizer.partitions if parts.optimizer is not None else ():
        held |= {id(param) for param in partition.params}
        if is_sharded(partition.params[0]):
            partition.values.publish()
    for param in parts.module.parameters():
        shards = shards_of(param)
        if shards is None or id(param) in held:
            continue
        if shards.status is ZeroParamStatus.AVAILABLE:
            shards.show(shards.settled().view(-1))


def masters_from_values(optimizer: ZeroOptimizer) -> None:
    """The values were written from outside: take the masters anew from them."""
    for partition in optimizer.partitions:
        partition.values.refresh_master()


# ---- the weights alone ----


def load_weights(parts: Parts, state: Mapping[str, Any], strict: bool) -> Any:
    """See ``engine.load_module_state_dict``."""
    outcome = parts.module.load_state_dict(state, strict=strict)
    if parts.optimizer is not None:
        masters_from_values(parts.optimizer)
    return outcome


def module_state(module: torch.nn.Module, exclude_frozen: bool) -> dict[str, Any]:
    """References; without the parameters that do not require gradients where they are not wanted (buffers stay)."""
    state = module.state_dict()
    if not exclude_frozen:
        return state
    frozen = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: value for name, value in state.items() if name not in frozen}


def whole_weights(parts: Parts, exclude_frozen: bool) -> dict[str, Any]:
    """In host memory on the first rank, each tensor with a storage of its own size; empty on the others; collective."""
    state = module_state(parts.module, exclude_frozen)
    copies: dict[tuple[Any, ...], torch.Tensor] = {}

    def copy(value: Any) -> Any:
        if not torch.is_tensor(value):
            return value
        # Tied tensors stay tied: a file holds them once. Empty ones have no address to be told apart by.
        where = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if value.numel() == 0 or where not in copies:
            copies[where] = value.detach().cpu().clone()
        return copies[where]

    return {name: copy(value) for name, value in state.items()} if parts.first else {}


def save_weights(parts: Parts, target: Path, exclude_frozen: bool) -> bool:
    """See ``engine.save_16bit_model``."""
    zero = parts.config.zero_optimization
    if zero.stage == 3 and not zero.stage3_gather_16bit_weights_on_model_save:
        parts.say(
            "save_16bit_model wrote nothing: at stage 3 it needs the config key "
            "zero_optimization.stage3_gather_16bit_weights_on_model_save: true"
        )
        return False
    state = whole_weights(parts, exclude_frozen)
    problem = None
    if parts.first:
        # Under a temporary name first, so that a kill leaves no half file.
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except OSError as error:
            problem = str(error)
        finally:
            with suppress(OSError):  # the error to tell is the first
                temporary.unlink()
    problem = broadcast_object(problem, 0, parts.group, label="save_16bit_model")
    if problem is not None:
        raise CheckpointError(
            f"the weights cannot be written: {problem}", fix="free space there, or save elsewhere"
        )
    return True
