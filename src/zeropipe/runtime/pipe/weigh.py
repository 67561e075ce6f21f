"""Weighs layers for the partition methods: parameters, bytes, or measured time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from zeropipe.comm.collectives import broadcast_object
from zeropipe.comm.group import world
from zeropipe.errors import ConfigError
from zeropipe.runtime.pipe.layers import layer_name, on_meta
from zeropipe.runtime.pipe.partition import LayerFacts
from zeropipe.runtime.pipe.specs import LayerSpec, TiedLayerSpec

STATE_BYTES = 16  # of an fp32 parameter under Adam: value, gradient and two moments
_ROUNDS = 3  # of a measured forward, of which the quickest counts


class LayerScales:
    """Weighs ``layers``; ``sample``: what the first layer takes, for the methods that have to run them."""

    def __init__(self, layers: Sequence[Any], sample: Any = None) -> None:
        self._layers, self._sample = layers, sample

    def facts(self, method: str | Sequence[int]) -> list[LayerFacts]:
        """What ``method`` needs to know of each layer; collective for the methods that measure."""
        if isinstance(method, str) and method.strip().lower() in ("memory", "profile"):
            if self._sample is None:
                raise ConfigError(
                    f"partition_method {method!r} runs the layers once",
                    expected="sample_input",
                    found="None",
                    fix="pass PipelineModule(..., sample_input=what the first layer takes)",
                )
            # Times differ between ranks, the cut must not: what rank 0 measures counts for all.
            everyone = world()
            return list(broadcast_object(self._measure(everyone.rank), 0, everyone, label="layer profile"))
        return [LayerFacts(layer_name(layer), _count(layer)) for layer in self._layers]

    def _measure(self, rank: int) -> list[LayerFacts]:
        """Build, run and drop one layer after the other, so that the whole model never exists at once.

        Ranks other than 0 go along only where parameters become shards as they are built, which takes all ranks;
        elsewhere they end with the first parameters that are whole.
        """
        found = []
        value = self._sample
        built: dict[str, nn.Module] = {}
        with torch.random.fork_rng(devices=[]):
            for layer in self._layers:
                call: Any = layer
                if isinstance(layer, TiedLayerSpec):
                    module = built.setdefault(layer.key, layer.build())
                    function = layer.forward_fn
                    call = module if function is None else lambda x, f=function, m=module: f(m, x)
                elif isinstance(layer, LayerSpec):
                    call = module = layer.build()
                else:
                    module = layer
                if rank and isinstance(module, nn.Module) and _whole(module):
                    return []
                parameters = _numel(module) if isinstance(module, nn.Module) else 0
                saved, value, seconds = _run(call, value)
                found.append(
                    LayerFacts(
                        layer_name(layer), parameters, parameters * STATE_BYTES + saved, int(seconds * 1e9)
                    )
                )
        return found


def _count(layer: Any) -> int:
    """Parameters of a layer, without building it where that can be avoided."""
    if isinstance(layer, LayerSpec):
        module = on_meta(layer)
        if module is None:
            with torch.random.fork_rng(devices=[]):
                module = layer.build()
        return _numel(module)
    return _numel(layer) if isinstance(layer, nn.Module) else 0


def _numel(module: nn.Module) -> int:
    """Elements of all parameters; a shard of a parameter counts as the whole."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())


def _whole(module: nn.Module) -> bool:
    return any(not hasattr(param, "ds_numel") for param in module.parameters())


def _run(call: Any, value: Any) -> tuple[int, Any, float]:
    """Bytes saved for backward, the output (detached), and the quickest forward in seconds."""
    storages: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = call(value)
    best = float("inf")
    with torch.no_grad():
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            call(value)
            best = min(best, time.perf_counter() - start)
    detached = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, output)
    return sum(storages.values()), detached, best
