"""Lets the instructions of a pipeline schedule (unshard, reshard, reduce) reach the ZeRO optimizer."""

from __future__ import annotations

import torch

from zeropipe.runtime.pipe.module import PipelineModule
from zeropipe.runtime.zero.gather.shards import Shards, shards_of
from zeropipe.runtime.zero.hold.access import trained_of
from zeropipe.runtime.zero.hold.optimizer import ZeroOptimizer


class StageSharding:
    """The stages of one rank; each call is for all their parameters, or for those of one stage."""

    def __init__(self, optimizer: ZeroOptimizer, module: PipelineModule) -> None:
        self._optimizer, self._module = optimizer, module

    def has_gradient(self, param: torch.nn.Parameter) -> bool:
        """Whether a backward of this batch has reached ``param`` on this rank."""
        one = trained_of(param)
        if one is None or not param.requires_grad:
            return False
        return param.grad is not None or one.index in one.store.seen

    def gradient(self, param: torch.nn.Parameter) -> torch.Tensor:
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

    def reduce(self) -> None:
        self._optimizer.reducer.finish_window()

    def unshard(self, stage: int) -> None:
        """All parameters of the stage at once: their gathers travel together."""
        found = self._shards(stage)
        for shards in found:
            shards.holds += 1
            shards.start_gather()
        for shards in found:
            shards.finish_gather()

    def reshard(self, stage: int) -> None:
        for shards in self._shards(stage):
            shards.holds -= 1
            shards.release_if_idle()

    def _shards(self, stage: int) -> list[Shards]:
        modules = [self._module.layer_module(layer) for layer in self._module.layers_of(stage)]
        params = dict.fromkeys(p for m in modules if m is not None for p in m.parameters())
        return [shards for shards in map(shards_of, params) if shards is not None]
