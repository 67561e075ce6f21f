"""Puts a coordinator's calls where they belong: around each unit's forward, and around its backward.

forward pre-hook     start(FORWARD)              gradient of an output arrives   start(BACKWARD)
forward hook         end                         gradients of the inputs left    end
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from zeropipe.runtime.zero.gather.compiled import CompiledModules, Handle
from zeropipe.runtime.zero.gather.coordinator import Coordinator
from zeropipe.runtime.zero.gather.external import (
    external_shards,
    hide_external_parameters,
    show_external_parameters,
)
from zeropipe.runtime.zero.gather.shards import Shards, shards_of
from zeropipe.runtime.zero.gather.unit import Unit
from zeropipe.runtime.zero.gather.unit_hooks import UnitHooks, unless_covered


class ModelHooks:
    """All hooks on one model. ``leaves``: modules whose whole subtree is one unit."""

    def __init__(
        self, module: torch.nn.Module, coordinator: Coordinator, leaves: Iterable[torch.nn.Module] = ()
    ) -> None:
        self.module = module
        self.coordinator = coordinator
        self.units: dict[torch.nn.Module, Unit] = {}
        self.handles: list[Handle] = []  # on modules; some clients take them off for a while
        self.hooked: list[tuple[torch.nn.Module, UnitHooks]] = []
        self.leaves = set(leaves)
        self._add(module, "", force=True)
        self.compiled = CompiledModules(self)
        self.hooked[0][1].begin = self.begin_pass

    def unit_of(self, module: torch.nn.Module) -> Unit:
        """The unit of ``module``, made now if it has no parameters of its own."""
        if module not in self.units:
            self._hook(module, type(module).__name__, [])
        return self.units[module]

    def attach(self) -> None:
        """Put the hooks back on the modules, where a client took them off."""
        self._take_off()
        for module, hooks in self.hooked:
            self._attach(module, hooks)
        self.compiled.renew()

    def remove(self) -> None:
        self._take_off()
        for module in self.units:
            hide_external_parameters(module)
        for unit in self.coordinator.units:
            for shards in unit.shards:
                shards.fetch_for_use = shards.keep_for_graph = None

    def begin_pass(self) -> None:
        """The root module is about to run forward."""
        self.compiled.look()
        self.coordinator.begin_pass(type(self.module).__name__)

    def _add(self, module: torch.nn.Module, name: str, force: bool = False) -> None:
        whole = module in self.leaves
        shards = _direct(module.parameters() if whole else module._parameters.values())
        shards += external_shards(module)
        for one in shards if whole else ():
            one.in_leaf = True
        if shards or force or whole:
            self._hook(module, name or type(module).__name__, shards, whole)
        if whole:
            return
        for child_name, child in module.named_children():
            if child not in self.units:
                self._add(child, f"{name}.{child_name}" if name else child_name)

    def _hook(self, module: torch.nn.Module, name: str, shards: list[Shards], whole: bool = False) -> None:
        unit = self.coordinator.add_unit(name, shards)
        self.units[module] = unit
        show_external_parameters(module)
        self.hooked.append((module, UnitHooks(self.coordinator, unit, whole)))
        self._attach(*self.hooked[-1])

    def _attach(self, module: torch.nn.Module, hooks: UnitHooks) -> None:
        before, after = unless_covered(hooks, hooks.before), unless_covered(hooks, hooks.after)
        first = module.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
        hooks.first = first.id
        self.handles.append(first)
        last = module.register_forward_hook(after, always_call=True)
        hooks.last = last.id
        self.handles.append(last)

    def _take_off(self) -> None:
        while self.handles:
            self.handles.pop().remove()


def _direct(params: Iterable[torch.nn.Parameter | None]) -> list[Shards]:
    found = (None if param is None else shards_of(param) for param in params)
    return [shards for shards in found if shards is not None]
