"""All hooks on one model: around each unit's forward and backward, and around what torch.compile compiled.

    forward pre-hook     start(FORWARD)              gradient of an output arrives   start(BACKWARD)
    forward hook         end                         gradients of the inputs left    end

A hook would break a compiled graph, so modules under torch.compile are fetched whole, by a call around the compiled
code:

    block.compile(); torch.compile(block)     the block is one unit: gathered before its compiled code, freed after
    model.compile(), larger than the budget   so are the largest modules inside that are within it

The hooks of the units inside are *covered*: torch.compile sees that they do nothing. Their parameters have their whole
shape whenever compiled code looks, so its guards hold from step to step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from zeropipe.runtime.zero.gather.coordinator import Coordinator, Unit, in_backward
from zeropipe.runtime.zero.gather.fetch_plan import Budget
from zeropipe.runtime.zero.gather.shards import Shards, shards_among, shards_in
from zeropipe.runtime.zero.gather.unit_hooks import UnitHooks, skip_frames, unless_covered, untraced
from zeropipe.runtime.zero.marks import externals_of, hide_external_parameters, show_external_parameters

_Hook = Callable[[torch.nn.Module, Any, Any], Any]
_COMPILED = "_compiled_call_impl"  # in a module's __dict__: what ``module.compile()`` made


class ModelHooks:
    """All hooks on one model. ``leaves``: modules whose whole subtree is one unit."""

    def __init__(
        self, module: torch.nn.Module, coordinator: Coordinator, leaves: Iterable[torch.nn.Module] = ()
    ) -> None:
        self.module = module
        self.coordinator = coordinator
        self.units: dict[torch.nn.Module, Unit] = {}
        self.handles: list[
            RemovableHandle | _Around
        ] = []  # on modules; some clients take them off for a while
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
                shards.conduct(None)

    def begin_pass(self) -> None:
        """The root module is about to run forward."""
        self.compiled.look()
        self.coordinator.begin_pass(type(self.module).__name__)

    def _add(self, module: torch.nn.Module, name: str, force: bool = False) -> None:
        whole = module in self.leaves
        shards = shards_among(module.parameters() if whole else module._parameters.values())
        shards += shards_among(externals_of(module))
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


class CompiledModules:
    """Finds what is compiled in one model, at the beginning of every pass, and makes units of it."""

    def __init__(self, hooks: ModelHooks) -> None:
        self.budget_of: Callable[[int], Budget] = lambda _: hooks.coordinator.budget
        self.whole: list[tuple[torch.nn.Module, WholeUnit]] = []
        self._hooks = hooks
        # Looked into in every pass: each module's own attributes, and the children of those that have some.
        self._own = [(module, module.__dict__) for module in hooks.module.modules()]
        self._children = [own["_modules"] for _, own in self._own if own["_modules"]]
        self._seen: list[torch.nn.Module] = []
        self._units: dict[torch.nn.Module, Unit] = {}
        self._handles: list[RemovableHandle | _Around] = []
        self._watched: list[torch.nn.Module] = []  # whose compiled call something stands around

    def look(self) -> None:
        """Bring the units up to date with what is compiled now; every rank compiles the same modules."""
        coordinator = self._hooks.coordinator
        if "torch._dynamo" not in sys.modules or coordinator.running or in_backward():
            return
        # Calls that ended by an exception which compiled code did not tell are forgotten here.
        for _, whole in self.whole:
            whole.reset()
        found = self._compiled()
        if found == self._seen and not any(_is_bare(module) for module in self._watched):
            return
        # Units are made anew from what is compiled now; one that was made before for the same module is used again, so
        # that its number in plans stays.
        self._seen = found
        self._take_off()
        self.whole.clear()
        root = self._hooks.module
        self._find(root, type(root).__name__, self._numel(root), inside=False)
        coordinator.budget = self.budget_of(max((unit.numel for unit in coordinator.units), default=0))
        self.renew()

    def renew(self) -> None:
        """Put the calls around compiled code, again where a client took them off."""
        self._take_off()
        if not self._seen:
            return
        skip_frames()
        # Compiled code skips the hooks of modules that an exception left: the root ends their uses.
        root = self._hooks.module
        around: dict[torch.nn.Module, tuple[_Hook | None, _Hook]] = {root: (None, self._after_root)}
        around.update({module: (whole.before, whole.after) for module, whole in self.whole})
        self._watched = [module for module in around if module.__dict__.get(_COMPILED) is not None]
        self._handles.extend(_Around(module, *around[module]) for module in self._watched)
        # Others run in a wrapper that ``torch.compile(module)`` made, which calls the hooks of its module.
        for module, whole in self.whole:
            if module not in self._watched:
                before, after = untraced(whole.before), untraced(whole.after)
                self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
                self._handles.append(module.register_forward_hook(after, always_call=True))
        self._hooks.handles.extend(self._handles)

    def _after_root(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        error = sys.exc_info()[1]
        if output is None and error is not None and not in_backward():
            self._hooks.coordinator.unwind(0, error, type(module).__name__)
        return output

    def _compiled(self) -> list[torch.nn.Module]:
        """The modules that are compiled, and the wrappers that ``torch.compile(module)`` put around others."""
        wrapper = torch._dynamo.OptimizedModule
        found = [module for module, own in self._own if own.get(_COMPILED) is not None]
        found += [child for some in self._children for child in some.values() if isinstance(child, wrapper)]
        return [self._hooks.module, *found] if isinstance(self._hooks.module, wrapper) else found

    def _take_off(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _find(self, module: torch.nn.Module, name: str, total: int, inside: bool) -> None:
        """Note the largest modules below ``module`` that run compiled and may be fetched whole."""
        inside = inside or module in self._seen
        leaf = module in self._hooks.leaves
        if inside and _is_called(module) and (leaf or self._fits(self._numel(module), total)):
            self._add(module, name)
        elif not leaf:
            for child_name, child in module.named_children():
                self._find(child, f"{name}.{child_name}", total, inside)

    def _fits(self, numel: int, total: int) -> bool:
        """Whether a module of ``numel`` elements may be fetched whole, in a model that shards ``total``."""
        budget = self._hooks.coordinator.budget
        # Half of the model at once is what a user accepts who compiles it as one.
        small = numel <= budget.prefetch_bucket_size or 2 * numel <= total
        return small and numel <= budget.max_live_parameters

    def _add(self, module: torch.nn.Module, name: str) -> None:
        order = list(module.modules())
        below = set(order)
        inside = [hooks for hooked, hooks in self._hooks.hooked if hooked in below]
        alone = len(inside) == 1 and module not in self._seen  # a unit by itself, whose hooks do the same
        if not inside or alone or any(module is known for known, _ in self.whole):
            return
        if module not in self._units:
            shards = shards_in(module)
            self._units[module] = self._hooks.coordinator.add_unit(f"compiled {name}", shards)
        whole = WholeUnit(
            self._hooks.coordinator,
            self._units[module],
            not below.isdisjoint(self._hooks.leaves),
            inside,
            order,
        )
        if module is self._hooks.module:
            whole.begin = self._hooks.begin_pass
        self.whole.append((module, whole))

    def _numel(self, module: torch.nn.Module) -> int:
        return sum(shards.numel for shards in shards_in(module) if not shards.persist)


class WholeUnit(UnitHooks):
    """The unit of a compiled module: while it runs it covers the units inside."""

    def __init__(
        self,
        coordinator: Coordinator,
        unit: Unit,
        anchored: bool,
        inside: list[UnitHooks],
        modules: list[torch.nn.Module],
    ) -> None:
        super().__init__(coordinator, unit, anchored)
        self._inside = inside
        self._modules = modules

    def before(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        for inner in self._modules:
            for shards in shards_among(externals_of(inner)):
                self.unit.add(shards)
        super().before(module, args, kwargs)
        self._cover(True)

    def after(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        if len(self.calls) == 1:
            self._cover(False)
        return super().after(module, args, output)

    def reset(self) -> None:
        """Forget calls that ended by an exception which compiled code did not tell."""
        if self.calls:
            self.calls.clear()
            self._cover(False)

    def _cover(self, covered: bool) -> None:
        for hooks in self._inside:
            hooks.covered = covered


class _Around:
    """Stands for what ``module.compile()`` made, until removed: calls it between the hooks of its unit."""

    def __init__(self, module: torch.nn.Module, before: _Hook | None, after: _Hook) -> None:
        self._module = module
        self._compiled: Callable[..., Any] = module.__dict__[_COMPILED]
        self._before = None if before is None else untraced(before)
        self._after = untraced(after)
        setattr(module, _COMPILED, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._before is not None:
            self._before(self._module, args, kwargs)
        try:
            output = self._compiled(*args, **kwargs)
        except BaseException:
            self._after(self._module, args, None)
            raise
        return self._after(self._module, args, output)

    def remove(self) -> None:
        if self._module.__dict__.get(_COMPILED) is self:
            setattr(self._module, _COMPILED, self._compiled)


def _is_bare(module: torch.nn.Module) -> bool:
    """Whether ``module.compile()`` has made compiled code that nothing stands around."""
    return not isinstance(module.__dict__.get(_COMPILED), _Around | None)


def _is_called(module: torch.nn.Module) -> bool:
    """Whether the module can run as such: a ModuleList cannot."""
    return type(module).forward is not torch.nn.Module.forward


class ParameterCoordinator:
    """The two calls about the recorded order of modules. There is nothing stale to drop: a step that runs other
    modules than the last is followed as it is, and the next plan is made from it."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    def is_invalid_trace(self) -> bool:
        """Whether no training step has been recorded yet."""
        return not self._coordinator.fetch_plan

    def _invalidate_trace(self) -> None:
        """Does nothing: see the class."""


class ParameterOffload:
    """``optimizer.parameter_offload``: ``forward_hooks`` are handles with ``remove()``; ``backward_hooks`` is
    empty, because backward is followed by hooks on tensors, which live for one pass."""

    def __init__(self, hooks: ModelHooks) -> None:
        self.module = hooks.module
        self.forward_hooks = hooks.handles
        self.backward_hooks: list[RemovableHandle] = []
        self.param_coordinator = ParameterCoordinator(hooks.coordinator)
        self._hooks = hooks

    def _register_deepspeed_module(self, module: torch.nn.Module, count: list[int] | None = None) -> None:
        """Put the hooks back on the whole model; ``module`` is its root, ``count`` has no meaning here."""
        self._hooks.attach()
        self.forward_hooks = self._hooks.handles
