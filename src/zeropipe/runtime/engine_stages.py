"""Lets the instructions of a pipeline schedule (unshard, reshard, reduce) reach the ZeRO optimizer."""

from __future__ import annotations

import torch

from zeropipe.runtime.pipe.module import PipelineModule
from zeropipe.runtime.zero.grads import GradStore
from zeropipe.runtime.zero.optimizer import ZeroOptimizer
from zeropipe.runtime.zero.param import shards_of, zero_param
from zeropipe.runtime.zero.shards import Shards


class StageSharding:
    """The stages of one rank; each call is for all their parameters, or for those of one stage."""

    def __init__(self, optimizer: ZeroOptimizer, module: PipelineModule) -> None:
        self._optimizer, self._module = optimizer, module

    def gradient(self, param: torch.nn.Parameter) -> torch.Tensor:
        trained = zero_param(param)
        assert trained is not None
        assert trained.partition is not None
        store = next(s for s in self._optimizer.reducer.stores if s.partition is trained.partition)
        # A store that does not keep it whole leaves it in the parameter until it is reduced.
        if not isinstance(store, GradStore) or not store.keeps_whole:
            if param.grad is None:
                param.grad = torch.zeros_like(param)
            return param.grad
        view = store.view(trained.index)
        if trained.index not in store.seen:
            view.zero_()
            store.seen.add(trained.index)
        return view

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
