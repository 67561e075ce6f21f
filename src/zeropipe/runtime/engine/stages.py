"""What the instructions of a pipeline schedule that concern a whole stage do to the ZeRO optimizer's parameters."""

from __future__ import annotations

from functools import partial

import torch

from zeropipe.runtime.pipe.executor import Effect
from zeropipe.runtime.pipe.instructions import Instruction, Op
from zeropipe.runtime.pipe.module import PipelineModule
from zeropipe.runtime.pipe.tied import sum_gradients
from zeropipe.runtime.zero.gather.shards import Hold, Shards, shards_of
from zeropipe.runtime.zero.hold.access import trained_of
from zeropipe.runtime.zero.hold.optimizer import ZeroOptimizer


def stage_table(module: PipelineModule, optimizer: ZeroOptimizer) -> dict[Op, Effect]:
    """The effects that an executor of ``module`` cannot know by itself."""
    held: dict[int, list[Hold]] = {}  # by stage
    return {
        Op.UNSHARD: partial(_unshard, module, held),
        Op.RESHARD: partial(_reshard, held),
        Op.REDUCE_TIED: lambda step: sum_gradients(module.ties, _has_gradient, _gradient),
        Op.REDUCE_GRAD: lambda step: optimizer.reducer.finish_window(),
    }


def _unshard(module: PipelineModule, held: dict[int, list[Hold]], step: Instruction) -> None:
    # All parameters of the stage at once: their gathers travel together.
    found = _shards(module, step.stage)
    held.setdefault(step.stage, []).extend(shards.hold() for shards in found)
    for shards in found:
        shards.start_gather()
    for shards in found:
        shards.finish_gather()


def _reshard(held: dict[int, list[Hold]], step: Instruction) -> None:
    for hold in held.pop(step.stage, ()):
        hold.release()


def _shards(module: PipelineModule, stage: int) -> list[Shards]:
    modules = [module.layer_module(layer) for layer in module.layers_of(stage)]
    params = dict.fromkeys(p for m in modules if m is not None for p in m.parameters())
    return [shards for shards in map(shards_of, params) if shards is not None]


def _has_gradient(param: torch.nn.Parameter) -> bool:
    """Whether a backward of this batch has reached ``param`` on this rank."""
    one = trained_of(param)
    if one is None or not param.requires_grad:
        return False
    return param.grad is not None or one.index in one.store.seen


def _gradient(param: torch.nn.Parameter) -> torch.Tensor:
    """The tensor that holds it, to be changed in place; zeros where there was none."""
    one = trained_of(param)
    assert one is not None
    store = one.store
    taken = store.local(one.index)
    if taken is not None:
        return taken
    if param.grad is None:
        param.grad = torch.zeros_like(param)
    # A store that does not keep it whole leaves it in the parameter until it is reduced, unless it widens it.
    if not store.keeps_whole and store.dtype == store.partition.dtype:
        return param.grad
    store.accept(one.index, keep_grad=store.keeps_whole)
    taken = store.local(one.index)
    assert taken is not None
    return taken
