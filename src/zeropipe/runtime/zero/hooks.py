"""Puts a coordinator's calls where they belong: around each unit's forward, and around its backward.

    forward pre-hook     start(FORWARD)              gradient of an output arrives   start(BACKWARD)
    forward hook         end                         gradients of the inputs left    end

Tensor hooks are used for backward, so that neither the outputs nor the inputs become other tensors. A unit
without an input that requires gradients ends its backward when all its parameters have theirs, or with the
whole backward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch._C._dynamo.eval_frame import set_eval_frame
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.hooks import RemovableHandle

from zeropipe.errors import UsageError
from zeropipe.runtime.zero.coordinator import Coordinator, Unit, Use
from zeropipe.runtime.zero.external import (
    external_shards,
    hide_external_parameters,
    show_external_parameters,
)
from zeropipe.runtime.zero.fetch_plan import Phase
from zeropipe.runtime.zero.param import shards_of
from zeropipe.runtime.zero.shards import Shards


class _Call:
    """One forward of a unit with gradients: waits for the two moments of its backward, or of several."""

    __slots__ = ("coordinator", "inputs", "unit", "use", "waiting")

    def __init__(self, coordinator: Coordinator, unit: Unit, inputs: Iterable[torch.Tensor]) -> None:
        self.coordinator = coordinator
        self.unit = unit
        self.use: Use | None = None
        self.inputs = [id(tensor) for tensor in inputs]
        self.waiting = 0
        for tensor in inputs:
            handle = tensor.register_hook(_untraced(self._input_done))
            if tensor.grad_fn is None:  # the tensor outlives the graph, and so would the hook
                coordinator.until_settled.append(handle)

    def watch(self, outputs: Iterable[torch.Tensor]) -> None:
        for tensor in outputs:
            if id(tensor) not in self.inputs:
                tensor.register_hook(_untraced(self._output_arrives))

    def anchor(self, output: Any) -> Any:
        """``output`` with its tensors passed through a node of autograd that starts the backward."""
        nothing = torch.empty(0, requires_grad=True)

        def through(tensor: torch.Tensor) -> torch.Tensor:
            return _Anchor.apply(tensor, nothing, self) if tensor.is_floating_point() else tensor

        return tree_map_only(torch.Tensor, through, output)

    def start(self) -> None:
        if self.use is None or not self.coordinator.is_open(self.use):
            self.waiting = len(self.inputs) or self._watch_parameters()
            self.use = self.coordinator.start(self.unit, Phase.BACKWARD)

    def _output_arrives(self, _: torch.Tensor) -> None:
        self.start()

    def _watch_parameters(self) -> int:
        """Where no input tells the end, the last gradient of the parameters does; not so with a frozen one among
        them, which may be read even later."""
        params = [shards.param for shards in self.unit.shards]
        if not all(param.requires_grad for param in params):
            return 0
        for param in params:
            handle = param.register_post_accumulate_grad_hook(_untraced(self._input_done))
            self.coordinator.until_settled.append(handle)
        return len(params)

    def _input_done(self, _: torch.Tensor) -> None:
        self.waiting -= 1
        if self.waiting == 0 and self.use is not None:
            self.coordinator.end(self.use)


class _Anchor(torch.autograd.Function):
    """The identity; its backward starts that of a call."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, nothing: torch.Tensor, call: _Call) -> torch.Tensor:
        ctx.call = call
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        ctx.call.start()
        return grad, None, None


class ModelHooks:
    """All hooks on one model. ``leaves``: modules whose whole subtree is one unit."""

    def __init__(
        self, module: torch.nn.Module, coordinator: Coordinator, leaves: Iterable[torch.nn.Module] = ()
    ) -> None:
        self.module = module
        self.coordinator = coordinator
        self.units: dict[torch.nn.Module, Unit] = {}
        self.handles: list[RemovableHandle] = []  # on modules; some clients take them off for a while
        self._hooked: list[tuple[torch.nn.Module, _UnitHooks]] = []
        self._whole = set(leaves)
        self._attach_root()
        self._add(module, "", force=True)

    def unit_of(self, module: torch.nn.Module) -> Unit:
        """The unit of ``module``, made now if it has no parameters of its own."""
        if module not in self.units:
            self._hook(module, type(module).__name__, [])
        return self.units[module]

    def attach(self) -> None:
        """Put the hooks back on the modules, where a client took them off."""
        self._take_off()
        self._attach_root()
        for module, hooks in self._hooked:
            self._attach(module, hooks)

    def remove(self) -> None:
        self._take_off()
        for module in self.units:
            hide_external_parameters(module)
        for unit in self.coordinator.units:
            for shards in unit.shards:
                shards.fetch_for_use = None

    def _add(self, module: torch.nn.Module, name: str, force: bool = False) -> None:
        whole = module in self._whole
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
        self._hooked.append((module, _UnitHooks(self.coordinator, unit, whole)))
        self._attach(*self._hooked[-1])

    def _attach_root(self) -> None:
        coordinator, root = self.coordinator, type(self.module).__name__
        begin = _untraced(lambda *_: coordinator.begin_pass(root))
        self.handles.append(self.module.register_forward_pre_hook(begin))

    def _attach(self, module: torch.nn.Module, hooks: _UnitHooks) -> None:
        self.handles.append(module.register_forward_pre_hook(_untraced(hooks.before), with_kwargs=True))
        self.handles.append(module.register_forward_hook(_untraced(hooks.after), always_call=True))

    def _take_off(self) -> None:
        while self.handles:
            self.handles.pop().remove()


class _UnitHooks:
    """The hooks of one unit; forwards in progress are several when the module nests itself.

    ``anchored``: its backward is visited on every rank, also where none of its parameters was used.
    """

    def __init__(self, coordinator: Coordinator, unit: Unit, anchored: bool) -> None:
        self.anchored = anchored
        self.coordinator = coordinator
        self.unit = unit
        # use, its backward where it will have one, and the exception that was being handled when it began
        self.calls: list[tuple[Use, _Call | None, BaseException | None]] = []

    def before(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        for shards in external_shards(module):
            self.unit.add(shards)
        if torch._C._functorch.maybe_current_level() is not None:
            raise UsageError(
                f"{self.unit.name}: a functorch transform (torch.func.grad, vmap, ...) around a module of stage 3. "
                "Fix: take the values with zero.GatheredParameters and pass them to torch.func.functional_call, "
                "or use stage 2"
            )
        handling = sys.exc_info()[1]
        use = self.coordinator.start(self.unit, Phase.FORWARD)
        call = None
        if torch.is_grad_enabled():
            call = _Call(
                self.coordinator, self.unit, [t for t in _tensors((args, kwargs)) if t.requires_grad]
            )
        self.calls.append((use, call, handling))

    def after(self, _: torch.nn.Module, args: Any, output: Any) -> Any:
        if not self.calls:
            return None  # ``before`` has not been reached
        use, call, handling = self.calls.pop()
        error = sys.exc_info()[1]
        if output is None and error is not None and error is not handling:
            self.coordinator.failed(use, error)
            return None
        if call is not None and self.anchored:
            output = call.anchor(output)
        tensors = _tensors(output)
        if call is not None:
            call.watch(t for t in tensors if t.requires_grad and t.grad_fn is not None)
        self.coordinator.end(use, _returned(use, tensors))
        return output


def _returned(use: Use, tensors: Iterable[torch.Tensor]) -> list[Shards]:
    """The parameters of ``use`` of which ``tensors`` holds views; their storage must outlive the use."""
    away = {s.full.untyped_storage()._cdata: s for s in use.held if not s.persist}
    found = (away.get(t.untyped_storage()._cdata) for t in tensors if away and t.layout is torch.strided)
    return [shards for shards in found if shards is not None]


def _direct(params: Iterable[torch.nn.Parameter | None]) -> list[Shards]:
    found = (None if param is None else shards_of(param) for param in params)
    return [shards for shards in found if shards is not None]


def _tensors(value: Any) -> list[torch.Tensor]:
    """All tensors in ``value``: in containers that pytree knows, in dataclasses, in the attributes of objects."""
    if isinstance(value, torch.Tensor):
        return [value]
    found: list[torch.Tensor] = []
    seen: set[int] = set()
    rest = [value]
    while rest and len(seen) < _MOST_OBJECTS:
        for leaf in tree_leaves(rest.pop()):
            if isinstance(leaf, torch.Tensor):
                found.append(leaf)
            elif not isinstance(leaf, _PLAIN) and not callable(leaf) and id(leaf) not in seen:
                seen.add(id(leaf))
                if isinstance(leaf, Mapping):
                    rest.append(list(leaf.values()))
                elif isinstance(leaf, list | tuple | set | frozenset):
                    rest.append(list(leaf))
                else:
                    rest.append(_attributes(leaf))
    return found


# Hold no tensors, or (modules) none that a forward takes or gives back by them.
_PLAIN = (
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    type,
    torch.nn.Module,
)
_MOST_OBJECTS = 200  # looked into per call: an argument may be anything, also the door to half the process


def _attributes(thing: Any) -> list[Any]:
    slots = [
        getattr(thing, name, None) for cls in type(thing).__mro__ for name in getattr(cls, "__slots__", ())
    ]
    return [*getattr(thing, "__dict__", {}).values(), *slots]


def _untraced(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Keep torch.compile out of ``hook`` and all that it calls: what ``torch.compiler.disable`` does, without
    importing the compiler."""

    def untraced(*args: Any) -> Any:
        before = set_eval_frame(None)
        try:
            return hook(*args)
        finally:
            set_eval_frame(before)

    untraced._torchdynamo_disable = True  # type: ignore[attr-defined]
    return untraced
