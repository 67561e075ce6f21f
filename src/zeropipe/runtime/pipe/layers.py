"""The layers of a model: described before they are built, built, weighed, and cut into stages."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from zeropipe.comm.collectives import broadcast_object
from zeropipe.comm.group import world
from zeropipe.errors import ConfigError, UsageError
from zeropipe.given import Tree
from zeropipe.layout.balance import cut_evenly, cut_for_owners

STATE_BYTES = 16  # of an fp32 parameter under Adam: value, gradient and two moments
_ROUNDS = 3  # of a measured forward, of which the quickest counts
METHODS = "'uniform', 'parameters', 'type:REGEX', 'memory', 'profile' or a list of bounds"


class LayerSpec:
    """A module class and its arguments; `build` makes the module.

    >>> LayerSpec(nn.Linear, 4, 4, bias=False)
    LayerSpec(Linear, 4, 4, bias=False)
    """

    def __init__(self, typename: type[nn.Module], *module_args: Any, **module_kwargs: Any) -> None:
        if not (isinstance(typename, type) and issubclass(typename, nn.Module)):
            raise UsageError(
                "LayerSpec needs a class",
                expected="a subclass of torch.nn.Module",
                found=repr(typename),
                fix="pass the class and its arguments, not a built module; modules go in the list as they are",
            )
        self.typename = typename
        self.module_args = module_args
        self.module_kwargs = module_kwargs

    def build(self, log: bool = False) -> nn.Module:
        """Make the module. ``log`` is accepted for callers that pass it."""
        return self.typename(*self.module_args, **self.module_kwargs)

    @property
    def name(self) -> str:
        return self.typename.__name__

    def __repr__(self) -> str:
        words = [self.name, *map(repr, self.module_args)]
        words += [f"{key}={value!r}" for key, value in self.module_kwargs.items()]
        return f"{type(self).__name__}({', '.join(words)})"


class TiedLayerSpec(LayerSpec):
    """A layer whose module is that of every other layer of the same ``key``.

    ``forward_fn(module, inputs)`` replaces the module's own forward, such as the matrix product of an output head
    with the weight of an embedding. The module is built once on each rank that has layers of this key; all its
    parameters stay equal on those ranks, as the one module that they are where no cut falls between them.
    ``tied_weight_attr`` names those that all the layers use, and is checked.
    """

    def __init__(
        self,
        key: str,
        typename: type[nn.Module],
        *module_args: Any,
        forward_fn: Callable[..., Any] | None = None,
        tied_weight_attr: Sequence[str] | str = ("weight",),
        **module_kwargs: Any,
    ) -> None:
        super().__init__(typename, *module_args, **module_kwargs)
        self.key = key
        self.forward_fn = forward_fn
        self.tied_weight_attr = (
            [tied_weight_attr] if isinstance(tied_weight_attr, str) else list(tied_weight_attr)
        )


# An entry of a model's list. These three are all that the rest asks of it.
LayerLike = LayerSpec | nn.Module | Callable[..., Any]


def key_of(layer: LayerLike) -> str | None:
    """The key under which a layer shares its module with others."""
    return layer.key if isinstance(layer, TiedLayerSpec) else None


def build(layer: LayerLike) -> nn.Module | None:
    """The module of ``layer``; None for a plain function."""
    if isinstance(layer, LayerSpec):
        return layer.build()
    return layer if isinstance(layer, nn.Module) else None


def bind(layer: LayerLike, module: nn.Module | None) -> Any:
    """What runs ``layer``, whose module is ``module``."""
    if module is None:
        return layer
    function = layer.forward_fn if isinstance(layer, TiedLayerSpec) else None
    return module if function is None else Function(function, module)


class Function(nn.Module):
    """A plain function, or the ``forward_fn`` of a tied layer, as a module: it can be pickled, shown and nested."""

    def __init__(self, function: Callable[..., Any], module: nn.Module | None = None) -> None:
        super().__init__()
        self.function, self.module = function, module

    def forward(self, value: Tree) -> Any:
        return self.function(value) if self.module is None else self.function(self.module, value)


# Weighing.


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """What a partition method may weigh of one layer."""

    name: str  # class or function name, for ``type:REGEX``
    # Each under the name of the method that weighs it.
    parameters: int = 0  # elements
    memory: int = 0  # bytes of parameters, gradients, optimizer state and saved activations
    profile: int = 0  # nanoseconds of a forward, measured


def weigh(layers: Sequence[Any], method: str | Sequence[int], sample: Tree = None) -> list[LayerFacts]:
    """What ``method`` needs to know of each layer; collective for the methods that measure.

    ``sample``: what the first layer takes, for the methods that have to run them.
    """
    if isinstance(method, str) and method.strip().lower() in ("memory", "profile"):
        if sample is None:
            raise ConfigError(
                f"partition_method {method!r} runs the layers once",
                expected="sample_input",
                found="None",
                fix="pass PipelineModule(..., sample_input=what the first layer takes)",
            )
        # Times differ between ranks, the cut must not: what rank 0 measures counts for all.
        everyone = world()
        measured = _measure(layers, sample, everyone.rank)
        return list(broadcast_object(measured, 0, everyone, label="layer profile"))
    return [LayerFacts(_name(layer), _count(layer)) for layer in layers]


def _measure(layers: Sequence[Any], value: Any, rank: int) -> list[LayerFacts]:
    found = []
    tied: dict[str, nn.Module | None] = {}
    # Layers of one kind take one time, the least that any of them took: else a moment in which the machine is busy
    # would move the cut.
    kinds: list[object] = []
    quickest: dict[object, float] = {}
    with torch.random.fork_rng(devices=[]):
        # Built, run and dropped one after the other, so that the whole model never exists at once.
        for layer in layers:
            key = key_of(layer)
            module = tied[key] if key in tied else build(layer)
            if key is not None:
                tied[key] = module
            # Ranks other than 0 go along only where parameters become shards as they are built, which takes all
            # ranks; elsewhere they end with the first parameters that are whole.
            if rank and module is not None and any(not hasattr(p, "ds_numel") for p in module.parameters()):
                return []
            kinds.append(_kind(layer, module, value))
            with _buffers_kept(module):
                saved, value, seconds = _run(bind(layer, module), value)
            quickest[kinds[-1]] = min(seconds, quickest.get(kinds[-1], seconds))
            memory = _numel(module) * STATE_BYTES + saved
            found.append(LayerFacts(_name(layer), _numel(module), memory))
    return [replace(one, profile=int(quickest[kind] * 1e9)) for one, kind in zip(found, kinds, strict=True)]


def _kind(layer: Any, module: nn.Module | None, value: Any) -> object:
    """Equal for layers that do the same: of one class (or one function), with parameters and inputs of equal shapes."""
    given = [(leaf.shape, leaf.dtype) for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    if module is None:
        return layer, tuple(given)
    shapes = [getattr(p, "ds_shape", p.shape) for p in module.parameters()]
    inside = [type(one) for one in module.modules()]
    return _name(layer), tuple(inside), tuple(shapes), tuple(given)


@contextmanager
def _buffers_kept(module: nn.Module | None) -> Iterator[None]:
    """A layer that the user has built is trained afterwards: running statistics begin where they were."""
    owners = module.modules() if module is not None else ()
    kept = [
        (owner, name, buffer, buffer.clone())
        for owner in owners
        for name, buffer in owner.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for owner, name, buffer, before in kept:
            setattr(owner, name, buffer.copy_(before))


def _name(layer: Any) -> str:
    if isinstance(layer, LayerSpec):
        return layer.name
    kind = type(layer).__name__
    return kind if isinstance(layer, nn.Module) else getattr(layer, "__name__", kind)


def _count(layer: Any) -> int:
    # Without memory where the constructor allows that, and without touching the random numbers of the real build.
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                module = build(layer)
        except Exception:  # whatever a user's constructor raises on tensors without values
            module = build(layer)
    return _numel(module)


def _numel(module: nn.Module | None) -> int:
    """Elements of all parameters; a shard of a parameter counts as the whole."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in (module.parameters() if module is not None else ()))


def _run(call: Any, value: Any) -> tuple[int, Any, float]:
    """Bytes saved for backward, the output (detached), and the quickest forward in seconds."""
    # By storage: two views that are saved take up their memory once.
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


# Cutting.

# stages + 1 ascending layer numbers: stage s has the layers [bounds[s], bounds[s + 1])
Bounds = tuple[int, ...]


def partition(
    method: str | Sequence[int],
    num_layers: int,
    owners: Sequence[int],
    facts: Callable[[], Sequence[LayerFacts]],
) -> Bounds:
    """Bounds of the stages, of which number i is on the pipeline rank ``owners[i]``; what a rank has in all counts.
    ``facts`` is called only by methods that weigh layers.

    Raises `ConfigError` where there are too few layers, an unknown method, or bounds that do not fit.
    """
    stages = len(owners)
    if num_layers < stages:
        raise ConfigError(
            "a pipeline stage would be empty",
            expected=f"at least one layer for each of {stages} stages",
            found=f"{num_layers} layers",
            fix=f"use at most {num_layers} stages (pipeline ranks x chunks), or split layers",
        )
    if not isinstance(method, str):
        bounds = tuple(method)
        ascending = all(a < b for a, b in pairwise(bounds))
        if not ascending or len(bounds) != stages + 1 or (bounds[0], bounds[-1]) != (0, num_layers):
            raise ConfigError(
                "partition bounds do not fit the model",
                expected=f"{stages + 1} ascending numbers from 0 to {num_layers}",
                found=list(bounds),
            )
        return bounds
    name, _, pattern = method.partition(":")
    name = name.strip().lower()
    if name == "uniform":
        return cut_evenly(num_layers, stages)
    if name == "type":
        return cut_for_owners(_matches(pattern, facts(), stages), owners)
    if name in ("parameters", "memory", "profile"):
        return cut_for_owners([getattr(one, name) for one in facts()], owners)
    raise ConfigError("unknown partition_method", expected=METHODS, found=repr(method))


def _matches(pattern: str, facts: Sequence[LayerFacts], stages: int) -> list[int]:
    try:
        compiled = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise ConfigError(
            "partition_method 'type:' needs a regular expression", found=f"{pattern!r} ({error})"
        ) from error
    weights = [int(compiled.search(f.name) is not None) for f in facts]
    if sum(weights) < stages:
        raise ConfigError(
            f"partition_method 'type:{pattern}' matches too few layers",
            expected=f"at least {stages}, one for each stage",
            found=f"{sum(weights)} of {sorted({f.name for f in facts})}",
            fix="correct the expression, or use 'parameters'",
        )
    return weights
