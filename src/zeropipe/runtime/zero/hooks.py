"""Puts a coordinator's calls where they belong: around each unit's forward, and around its backward.

    forward pre-hook     start(FORWARD)              gradient of an output arrives   start(BACKWARD)
    forward hook         end                         gradients of the inputs left    end

Tensor hooks are used for backward, so that neither the outputs nor the inputs become other tensors. A unit
without an input that requires gradients ends its backward when all its parameters have theirs, or with the
whole backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from zeropipe.runtime.zero.coordinator import Coordinator, Unit, Use
from zeropipe.runtime.zero.fetch_plan import Phase
from zeropipe.runtime.zero.param import shards_of
from zeropipe.runtime.zero.shards import Shards


class _Call:
    """One forward of a unit with gradients: waits for the two moments of its backward."""

    __slots__ = ("coordinator", "over", "unit", "use", "waiting")

    def __init__(self, coordinator: Coordinator, unit: Unit, inputs: Iterable[torch.Tensor]) -> None:
        self.coordinator = coordinator
        self.unit = unit
        self.use: Use | None = None
        self.over = False
        self.waiting = 0
        for tensor in inputs:
            self.waiting += 1
            _once(tensor, self._input_done)

    def watch(self, outputs: Iterable[torch.Tensor]) -> None:
        for tensor in outputs:
            _once(tensor, self._output_arrives)

    def _output_arrives(self) -> None:
        if self.use is None and not self.over:
            self.use = self.coordinator.start(self.unit, Phase.BACKWARD)

    def _input_done(self) -> None:
        self.waiting -= 1
        if self.waiting == 0:
            self.over = True
            if self.use is not None:
                self.coordinator.end_if_open(self.use)


class ModelHooks:
    """All hooks on one model. ``leaves``: modules whose whole subtree is one unit."""

    def __init__(
        self, module: torch.nn.Module, coordinator: Coordinator, leaves: Iterable[torch.nn.Module] = ()
    ) -> None:
        self.module = module
        self.coordinator = coordinator
        self.units: dict[torch.nn.Module, Unit] = {}
        self._handles: list[RemovableHandle] = []
        self._whole = set(leaves)
        self._handles.append(module.register_forward_pre_hook(_untraced(lambda *_: coordinator.begin_pass())))
        self._add(module, "", force=True)

    def unit_of(self, module: torch.nn.Module) -> Unit:
        """The unit of ``module``, made now if it has no parameters of its own."""
        if module not in self.units:
            self._hook(module, type(module).__name__, [])
        return self.units[module]

    def remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        for unit in self.coordinator.units:
            for shards in unit.shards:
                shards.fetch_for_use = None

    def _add(self, module: torch.nn.Module, name: str, force: bool = False) -> None:
        whole = module in self._whole
        shards = _direct(module.parameters() if whole else module._parameters.values())
        if shards or force or whole:
            self._hook(module, name or type(module).__name__, shards)
        if whole:
            return
        for child_name, child in module.named_children():
            if child not in self.units:
                self._add(child, f"{name}.{child_name}" if name else child_name)

    def _hook(self, module: torch.nn.Module, name: str, shards: list[Shards]) -> None:
        coordinator = self.coordinator
        unit = coordinator.add_unit(name, shards)
        self.units[module] = unit
        calls: list[
            tuple[Use, _Call | None]
        ] = []  # forwards in progress; several when the module nests itself

        def before(_: torch.nn.Module, args: Any, kwargs: Any) -> None:
            use = coordinator.start(unit, Phase.FORWARD)
            call = None
            if torch.is_grad_enabled():
                inputs = [t for t in _tensors((args, kwargs)) if t.requires_grad]
                call = _Call(coordinator, unit, inputs)
            calls.append((use, call))

        def after(_: torch.nn.Module, args: Any, output: Any) -> None:
            use, call = calls.pop()
            if call is not None:
                call.watch(t for t in _tensors(output) if t.requires_grad and t.grad_fn is not None)
            coordinator.end_if_open(use)

        self._handles.append(module.register_forward_pre_hook(_untraced(before), with_kwargs=True))
        self._handles.append(module.register_forward_hook(_untraced(after), always_call=True))


def _direct(params: Iterable[torch.nn.Parameter | None]) -> list[Shards]:
    found = (None if param is None else shards_of(param) for param in params)
    return [shards for shards in found if shards is not None]


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _once(tensor: torch.Tensor, react: Callable[[], None]) -> None:
    """Call ``react`` when the gradient of ``tensor`` is known, the first time only."""
    handles: list[RemovableHandle] = []

    def hook(_: torch.Tensor) -> None:
        if handles:
            handles.pop().remove()
            react()

    handles.append(tensor.register_hook(_untraced(hook)))


def _untraced(hook: Callable[..., None]) -> Callable[..., None]:
    """Keep torch.compile out of ``hook``: what ``torch.compiler.disable`` sets, without importing the compiler."""
    hook._torchdynamo_disable = True  # type: ignore[attr-defined]
    return hook
