"""What happens around one unit: its forward by module hooks, its backward by hooks on what it takes and gives.

Tensor hooks are used for backward, so that neither the outputs nor the inputs become other tensors. A unit
without an input that comes from autograd's graph ends its backward when all its parameters have theirs, or with the
whole backward.
"""

from __future__ import annotations

import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch._C._dynamo import eval_frame
from torch._C._functorch import maybe_current_level
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.utils._pytree import tree_leaves, tree_map_only

from zeropipe.errors import UsageError
from zeropipe.runtime.zero.gather.coordinator import Coordinator, Unit, Use
from zeropipe.runtime.zero.gather.fetch_plan import Phase
from zeropipe.runtime.zero.gather.shards import Shards, shards_among
from zeropipe.runtime.zero.marks import externals_of


def untraced(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Keep torch.compile out of ``hook`` and all that it calls: what ``torch.compiler.disable`` does, without
    importing the compiler."""

    def outside(*args: Any) -> Any:
        before = eval_frame.set_eval_frame(None)
        try:
            return hook(*args)
        finally:
            eval_frame.set_eval_frame(before)

    outside._torchdynamo_disable = True  # type: ignore[attr-defined]
    return outside


class _Call:
    """One forward of a unit with gradients: waits for the two moments of its backward, or of several.

    ``looks_up``: its backward reads indices and no parameter (an embedding): nothing is gathered, and it is no visit.
    """

    __slots__ = ("coordinator", "ends", "inputs", "looks_up", "unit", "use", "waiting")

    def __init__(
        self, coordinator: Coordinator, unit: Unit, inputs: Iterable[torch.Tensor], looks_up: bool
    ) -> None:
        self.coordinator = coordinator
        self.unit = unit
        self.looks_up = looks_up
        self.use: Use | None = None
        # By reference: an input that is gone by the end of the forward may have left its id to an output.
        self.inputs = {id(tensor): weakref.ref(tensor) for tensor in inputs}
        # Inputs whose gradient comes after those of the parameters, which autograd, a queue by the order of creation,
        # gives to leaves at once. When the last one has come nobody reads the parameters any more.
        self.ends = 0
        self.waiting = 0
        for tensor in inputs:
            if tensor.grad_fn is not None:
                self.ends += 1
                _on_gradient(tensor, self._input_done)

    def watch(self, outputs: Iterable[torch.Tensor]) -> None:
        for tensor in outputs:
            if not tensor.requires_grad or tensor.grad_fn is None:
                continue
            # An input that the module handed through is none of its results: its gradient says nothing of this unit.
            known = self.inputs.get(id(tensor))
            if known is None or known() is not tensor:
                _on_gradient(tensor, self._output_arrives)

    def anchor(self, output: Any) -> Any:
        """``output`` with its tensors passed through a node of autograd that starts the backward."""
        nothing = torch.empty(0, requires_grad=True)

        def through(tensor: torch.Tensor) -> torch.Tensor:
            return _Anchor.apply(tensor, nothing, self) if tensor.is_floating_point() else tensor

        return tree_map_only(torch.Tensor, through, output)

    def start(self) -> None:
        # With several outputs the first gradient starts it; with retain_graph it starts anew.
        if self.use is None or not self.use.open:
            self.waiting = self.ends or self._watch_parameters()
            self.use = self.coordinator.start(self.unit, Phase.BACKWARD)

    @untraced
    def _output_arrives(self, _: torch.Tensor) -> None:
        if self.looks_up:
            self.coordinator.expect_gradient(next(iter(self.unit.shards)))
        else:
            self.start()

    def _watch_parameters(self) -> int:
        """Where no input tells the end, the last gradient of the parameters does; not so with a frozen one among
        them, which may be read even later."""
        params = [shards.param for shards in self.unit.shards]
        if not all(param.requires_grad for param in params):
            return 0
        for param in params:
            handle = param.register_post_accumulate_grad_hook(self._input_done)
            self.coordinator.until_settled.append(handle)
        return len(params)

    @untraced
    def _input_done(self, _: torch.Tensor) -> None:
        self.waiting -= 1
        if self.waiting == 0 and self.use is not None:
            self.coordinator.end(self.use)


def _on_gradient(tensor: torch.Tensor, hook: Callable[[torch.Tensor], None]) -> None:
    """As ``tensor.register_hook``, of which nobody takes the handle: that would be more work than the hook."""
    node, hooks = tensor.grad_fn, tensor._backward_hooks
    if type(tensor) is not torch.Tensor or node is None:
        tensor.register_hook(hook)
        return
    if hooks is None:
        hooks = tensor._backward_hooks = OrderedDict()
        node._register_hook_dict(tensor)
    hooks[id(hook)] = hook  # torch's own keys are small numbers


def _only_looks_up(module: torch.nn.Module, unit: Unit) -> bool:
    """Whether autograd keeps nothing of the unit's parameters: a plain embedding with nobody's hooks but ours, the code
    of which is torch's own."""
    if module._compiled_call_impl is not None:
        return False
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        _global_forward_hooks,
        _global_forward_pre_hooks,
    )
    return (
        len(unit.shards) == 1
        and sum(map(len, hooks)) == 2
        and not module._backward_hooks
        and not module._backward_pre_hooks
    )


class _Anchor(torch.autograd.Function):
    """The identity; its backward starts that of a call."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, nothing: torch.Tensor, call: _Call) -> torch.Tensor:
        ctx.call = call
        ctx.set_materialize_grads(False)  # an absent gradient stays absent, as without this node
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, None, None]:  # type: ignore[override]
        ctx.call.start()
        return grad, None, None


class UnitHooks:
    """The hooks of one unit; forwards in progress are several when the module nests itself.

    ``anchored``: its backward is visited on every rank, also where none of its parameters was used.
    ``covered``: a larger unit that runs now holds the parameters of this one, whose hooks then do nothing.
    """

    def __init__(self, coordinator: Coordinator, unit: Unit, anchored: bool) -> None:
        self.anchored = anchored
        self.covered = False
        self.begin: Callable[[], None] | None = None  # of the root: a pass begins
        self.coordinator = coordinator
        self.unit = unit
        self.calls: list[_Running] = []
        # The ids of the hooks ``before`` and ``after``, which stand around all others on their module.
        self.first: int | None = None
        self.last: int | None = None
        # Tensors in attributes of the module, when last looked at: by name and place in a list.
        self._attributes: dict[tuple[str, int], weakref.ref[torch.Tensor]] = {}

    def before(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if maybe_current_level() is not None:
            raise UsageError(
                f"{self.unit.name}: a functorch transform (torch.func.grad, vmap, ...) around a module of stage 3",
                fix="take the values with zero.GatheredParameters and pass them to torch.func.functional_call, or use "
                "stage 2",
            )
        if self.begin is not None:
            self.begin()
        if externals := externals_of(module):
            for shards in shards_among(externals):
                self.unit.add(shards)
        # Others' hooks must see whole parameters, and ours stand outermost.
        if len(module._forward_hooks) > 1 or len(module._forward_pre_hooks) > 1:
            self._stand_around(module)
        # To tell an exception of this forward from one that was being handled around it.
        handling = sys.exc_info()[1]
        use = self.coordinator.start(self.unit, Phase.FORWARD)
        arguments = (*args, *kwargs.values()) if kwargs else args
        plain = len(arguments) == 1 and isinstance(arguments[0], torch.Tensor)  # as most layers have it
        given = () if plain else [one for one in arguments if not isinstance(one, _IMMUTABLE)]
        call: _Call | None = None
        if torch.is_grad_enabled():
            # Most layers take tensors alone; to look into whatever else there is takes as long as all the rest.
            found = _tensors((args, kwargs)) if given else arguments
            inputs = [t for t in found if isinstance(t, torch.Tensor) and t.requires_grad]
            looks_up = (
                type(module) is torch.nn.Embedding and not self.anchored and _only_looks_up(module, self.unit)
            )
            call = _Call(self.coordinator, self.unit, () if looks_up else inputs, looks_up)
        self.calls.append(_Running(use, call, handling, given))

    def after(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        if not self.calls:
            return None  # ``before`` has not been reached
        use, call, handling, given = self.calls.pop()
        error = sys.exc_info()[1] if output is None else None
        if error is not None and error is not handling:
            self.coordinator.failed(use, error)
            return None
        if call is not None and self.anchored:
            output = call.anchor(output)
        # What leaves the forward: by its result, by what it was given, by attributes of the module.
        tensors = _tensors(output)
        if given:
            tensors += _tensors(given)
        if not type(module).__module__.startswith("torch.nn."):  # whose own code leaves nothing in attributes
            tensors += self._set_attributes(module)
        if call is not None:
            call.watch(tensors)
        self.coordinator.end(use, _returned(use, tensors))
        if self.begin is not None:
            self.coordinator.end_pass(self.unit.name)
        return output

    def _stand_around(self, module: torch.nn.Module) -> None:
        """Hooks that a client added later run while the parameters are whole."""
        after: Any = module._forward_hooks
        if self.last in after and next(reversed(after)) != self.last:
            after.move_to_end(self.last)
        before: Any = module._forward_pre_hooks
        if self.first in before and next(iter(before)) != self.first:  # from the next forward on
            before.move_to_end(self.first, last=False)

    def _set_attributes(self, module: torch.nn.Module) -> list[torch.Tensor]:
        """The tensors that the forward left in attributes of the module, by which they leave it as by its result."""
        here: dict[tuple[str, int], torch.Tensor] = {}
        for name, value in module.__dict__.items():
            if isinstance(value, torch.Tensor):
                here[name, 0] = value
            elif isinstance(value, list | tuple):
                here.update(
                    {(name, at): leaf for at, leaf in enumerate(value) if isinstance(leaf, torch.Tensor)}
                )
        before = self._attributes
        found = [
            value for place, value in here.items() if place not in before or before[place]() is not value
        ]
        self._attributes = {place: weakref.ref(value) for place, value in here.items()}
        return found


class _Running(NamedTuple):
    """One forward in progress."""

    use: Use
    call: _Call | None  # its backward, where it will have one
    handling: BaseException | None  # the exception that was being handled when it began
    given: Sequence[Any]  # arguments by which something may leave it


def _returned(use: Use, tensors: Iterable[torch.Tensor]) -> list[Shards]:
    """The parameters of ``use`` of which ``tensors`` holds views; their storage must outlive the use."""
    found = []
    for tensor in tensors:
        if tensor.layout is torch.strided:
            memory = tensor.untyped_storage()._cdata
            found += [shards for shards in use.held if shards.memory == memory and not shards.persist]
    return found


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
# By what cannot be changed nothing leaves a forward.
_IMMUTABLE = (torch.Tensor, *_PLAIN)
_MOST_OBJECTS = 200  # looked into per call: an argument may be anything, also the door to half the process


def _attributes(thing: Any) -> list[Any]:
    slots = [
        getattr(thing, name, None) for cls in type(thing).__mro__ for name in getattr(cls, "__slots__", ())
    ]
    return [*getattr(thing, "__dict__", {}).values(), *slots]


def unless_covered(unit: UnitHooks, hook: Callable[..., Any]) -> Callable[..., Any]:
    """``hook`` of ``unit``, out of torch.compile's sight; nothing, not even for torch.compile, while it is covered."""
    hook = untraced(hook)

    def checked(module: torch.nn.Module, args: Any, more: Any) -> Any:
        return None if unit.covered else hook(module, args, more)

    return checked


def skip_frames() -> None:
    """Have torch.compile leave alone the frames of hooks that run between graphs; it would compile each and warn."""
    skip = getattr(torch._dynamo.eval_frame, "skip_code", None)
    if skip is not None:
        hook = untraced(print)
        skip(hook.__code__)
        skip(unless_covered(UnitHooks.__new__(UnitHooks), hook).__code__)
