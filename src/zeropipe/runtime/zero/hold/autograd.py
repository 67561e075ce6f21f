"""Where the house meets autograd: hooks as gradients arrive, the end of a backward, and what ``.grad`` shows.

    gradient arrives          expect(): the pass is opened, room is made in ``.grad``, and it gets the factor it lacks
    autograd adds it up
    it is in ``.grad``        take(): it is taken over
    the backward ends         at_end_of_backward(): the pass is over
    until the next begins     ``.grad`` shows:

    the window's gradient is whole here     a view of the buffer, so that an edit in place is one of the gradient
    only a shard of it is, or it is times   a stand-in: not None, without elements; a use of its values is an error
    the loss scale, which clipping by hand
    would take for the gradient

Nothing here decides what becomes of a gradient: that is the reducer's.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import _engine_run_backward, get_gradient_edge

from zeropipe.comm.collectives import all_gather_object
from zeropipe.comm.group import Group
from zeropipe.errors import UsageError
from zeropipe.tensor.host import HOST
from zeropipe.tensor.norms import NonFinite, all_finite, earliest

Store = TypeVar("Store", contravariant=True)  # who keeps the gradients of some parameters


class Taker(Protocol[Store]):
    """Who takes gradients over; ``index``: in the store's parameters."""

    def is_ready(self, store: Store, index: int) -> bool:
        """Whether a gradient may be added as it is: there is nothing to ``expect``."""

    def expect(self, store: Store, index: int) -> float:
        """A gradient is about to be added; returns what it must be multiplied by."""

    def take(self, store: Store, index: int, grad: torch.Tensor | None) -> None:
        """It is in ``.grad``; None: a custom function's backward said that there is none."""


class Arrivals(Generic[Store]):
    """The hooks on the parameters of all stores of one ``taker``.

    Neither hook is seen by the garbage collector: it must not be what keeps an optimizer alive.
    """

    def __init__(self, taker: Taker[Store]) -> None:
        self._taker = weakref.ref(taker)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        # By store: the parameters whose next gradient may be added as it is, and how many there are. Most gradients
        # lack nothing: while a pass says so, one look into a set lets the first of each parameter through.
        self._free: list[tuple[set[int], int]] = []

    def listen(self, store: Store, params: Sequence[torch.nn.Parameter]) -> None:
        free = set[int]()
        self._free.append((free, len(params)))
        for index, param in enumerate(params):
            before, after = self._hooks(store, index, param, free)
            self._handles.append(param.register_hook(before))
            self._handles.append(param.register_post_accumulate_grad_hook(after))

    def let_through(self) -> None:
        """The next gradient of each parameter lacks nothing, and finds the pass open."""
        for free, count in self._free:
            free.update(range(count))

    def stop(self) -> None:
        """The taker is asked about each gradient again."""
        for free, _ in self._free:
            free.clear()

    def remove(self) -> None:
        self._free.clear()
        while self._handles:
            self._handles.pop().remove()

    def _hooks(
        self, store: Store, index: int, param: torch.nn.Parameter, free: set[int]
    ) -> tuple[Callable[[torch.Tensor | None], torch.Tensor | None], Callable[[torch.Tensor], None]]:
        taker, store_of, param_of = self._taker, weakref.ref(store), weakref.ref(param)

        # Autograd is about to add ``grad`` to ``.grad``; None: a custom function said that there is none.
        def before(grad: torch.Tensor | None) -> torch.Tensor | None:
            if index in free:
                free.remove(index)
                return None
            taken_by, store, param = taker(), store_of(), param_of()
            if taken_by is None or store is None or param is None or taken_by.is_ready(store, index):
                return None
            if not _will_be_added(param):
                return None
            factor = taken_by.expect(store, index)
            # A new tensor: another parameter's gradient, or a user, may share autograd's memory.
            return None if grad is None or factor == 1.0 else grad * factor

        def after(param: torch.Tensor) -> None:
            taken_by, store = taker(), store_of()
            if taken_by is not None and store is not None:
                taken_by.take(store, index, param.grad)

        return before, after


def _will_be_added(param: torch.nn.Parameter) -> bool:
    """Whether the gradient that is at ``param`` goes on into ``.grad``."""
    # ``torch.autograd.grad`` takes it before: users of it must see the true gradient, and no pass begins.
    with torch._C.DisableTorchFunctionSubclass():
        node = get_gradient_edge(param).node
    try:
        will: bool = torch._C._will_engine_execute_node(node)  # type: ignore[attr-defined]
    except RuntimeError:  # how it says that this is torch.autograd.grad
        return False
    return will


# How a backward, and the node of a custom function that it runs, look on the stack.
_RUN = _engine_run_backward.__code__
_NODE = BackwardCFunction.apply.__code__


def at_end_of_backward(then: Callable[[], None], gone: Callable[[], None]) -> weakref.ref[partial[None]]:
    """Inside a backward: call ``then`` when the outermost one ends, and ``gone`` after that or when it raised.

    Returns a reference that is dead from then on. If a re-entrant checkpoint runs backwards inside of others:

        loss.backward()                     autograd calls back at the end of the backward in which one asks:
          CheckpointFunction.backward       a hook in here would be called at the end of
            torch.autograd.backward         this one, once per checkpoint
              hook of a parameter

    So the end is asked for in the backward around it.
    """
    # Autograd alone holds it, so that it is gone uncalled where the backward raises.
    ending = partial(then)
    _queue(ending)
    return weakref.ref(ending, lambda _: gone())


def _queue(ending: partial[None]) -> None:
    outer = _enclosing_node()
    following = [] if outer is None else [node for node, _ in outer.next_functions if node is not None]
    if not following:
        torch.autograd.Variable._execution_engine.queue_callback(ending)
        return

    # What autograd runs after the node in which this backward was started, it runs in the backward around it.
    def outside(_: Any) -> None:
        handle.remove()
        _queue(ending)

    handle = following[0].register_prehook(outside)


def _enclosing_node() -> Any:
    """The node of a custom function in whose backward the present backward was started; None at the outermost."""
    frame, inside = sys._getframe(), False
    while frame is not None:
        if frame.f_code is _RUN:
            inside = True
        elif inside and frame.f_code is _NODE:
            return frame.f_locals["self"]
        frame = frame.f_back  # type: ignore[assignment]
    return None


class Change(Enum):
    """What a user did to a gradient between backwards."""

    DROPPED = "set to None"
    ZEROED = "zeroed in place, where it is a stand-in"
    REPLACED = "another tensor stands in its place"


class AbsentGradient(torch.Tensor):
    """Stands in ``.grad`` for a gradient that this rank does not hold whole there. It has no memory."""

    # Not by functions of torch but by operators, so that what is written in C++ (foreach, fused steps) meets it too.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    parameter: str
    zeroed: bool

    @staticmethod
    def __new__(cls, param: torch.Tensor, name: str) -> AbsentGradient:
        here = param.data  # of a parameter that is away: shape [0], as ``.grad`` has to be
        made: AbsentGradient = torch.Tensor._make_wrapper_subclass(
            cls, here.shape, dtype=here.dtype, device=here.device
        )
        made.parameter, made.zeroed = name, False
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # It may be looked at and be zeroed, as ``zero_grad(set_to_none=False)`` does; anything else would compute with
        # what is not there.
        if func in _ALIASES:
            return args[0]
        if func in _ZEROES:
            for one in args[0] if isinstance(args[0], list | tuple) else (args[0],):
                if isinstance(one, cls):
                    one.zeroed = True
                else:
                    one.zero_()
            return None if isinstance(args[0], list | tuple) else args[0]
        name = next((one.parameter for one in _tensors(args) if isinstance(one, cls)), "")
        raise UsageError(
            f"the gradient of '{name}' is not in .grad: the ranks hold it as shards, in another dtype, or "
            f"times fp16's loss scale ({func})",
            fix="clip with the config key gradient_clipping, read the norm with engine.get_global_grad_norm() after "
            "the step, and read or change a gradient on every rank with zeropipe.utils.safe_get_full_grad(param) and "
            "safe_set_full_grad(param, value)",
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"AbsentGradient('{self.parameter}')"


_OWN, _STAND_IN = -1, -2  # in place of an address: autograd's own memory, none
_aten = torch.ops.aten
_ALIASES = (_aten.detach.default, _aten.detach_.default, _aten.alias.default)
_ZEROES = (_aten.zero_.default, _aten._foreach_zero_.default)


def _tensors(args: Iterable[Any]) -> Iterator[Any]:
    for arg in args:
        if isinstance(arg, list | tuple):
            yield from _tensors(arg)
        else:
            yield arg


class Shown:
    """The ``.grad`` of one store's parameters between backwards."""

    def __init__(self, params: Sequence[torch.nn.Parameter], names: Sequence[str]) -> None:
        self._params = params
        self._names = names

        # By parameter: what was put into its ``.grad``, and its address. Clearing and replacing are plain assignments,
        # of which nobody is told, so what is found there is compared with this.
        self._put: dict[int, tuple[torch.Tensor, int]] = {}

        # Made once, as a small model would notice: what was put for views, and these; and stand-ins.
        self._faces: dict[int, tuple[tuple[torch.Tensor, int], torch.Tensor]] = {}
        self._absent: dict[int, AbsentGradient] = {}

    def __contains__(self, index: int) -> bool:
        return index in self._put

    @property
    def whole(self) -> bool:
        """Whether some ``.grad`` is a view of the buffer."""
        return any(not isinstance(tensor, AbsentGradient) for tensor, _ in self._put.values())

    def views(
        self, views: Mapping[int, torch.Tensor] | Sequence[torch.Tensor], indices: Iterable[int]
    ) -> None:
        """Let the ``.grad`` of these be the memory of their ``views``."""
        for index in indices:
            # An object of its own: users set ``.grad.data`` too, which must not move the view of the buffer.
            known, view = self._faces.get(index), views[index]
            if known is None or known[1] is not view or known[0][0].data_ptr() != known[0][1]:
                known = self._faces[index] = (view.detach(), view.data_ptr()), view
            put = self._put[index] = known[0]
            self._params[index].grad = put[0]

    def absent(self, indices: Iterable[int], reduced: bool = True) -> None:
        """Let the ``.grad`` of these be stand-ins; not ``reduced``: unless autograd's own is there."""
        with torch._C.DisableTorchFunctionSubclass():  # a parameter that is away would be asked about each
            for index in indices:
                param = self._params[index]
                found = None if reduced else param.grad
                if found is not None and not isinstance(found, AbsentGradient):
                    self._put[index] = found, _OWN
                    continue
                stand_in = self._absent.get(index)
                try:
                    param.grad = stand_in
                except (
                    RuntimeError
                ):  # the parameter was gathered then and is away now, or the other way round
                    stand_in = None
                if stand_in is None:
                    stand_in = param.grad = self._absent[index] = AbsentGradient(param, self._names[index])
                stand_in.zeroed = False
                self._put[index] = stand_in, _STAND_IN

    def hide(self, index: int) -> None:
        """Nothing is shown: the gradient waits for its reduction."""
        self._put.pop(index, None)
        self._params[index].grad = None

    def changes(self, lift: bool) -> list[tuple[int, Change, torch.Tensor | None]]:
        """What users did, each change once, and what they put there. ``lift``: a backward begins, and autograd needs
        the place of the stand-ins."""
        seen: list[tuple[int, Change, torch.Tensor | None]] = []
        here: list[int] = []  # stand-ins
        gone: list[int] = []
        params = self._params
        with torch._C.DisableTorchFunctionSubclass():
            for index, (put, where) in self._put.items():
                found = params[index].grad
                if found is put:
                    if where == _STAND_IN:
                        here.append(index)
                        continue
                    if where == _OWN or where == put.data_ptr():
                        continue
                elif (
                    where == _STAND_IN and found is not None
                ):  # only the loss of what is elsewhere can be taken over
                    raise UsageError(
                        f"the .grad of '{self._names[index]}' was replaced between backward and step, but the ranks "
                        "hold the gradient elsewhere, as shards, in another dtype or times fp16's loss scale",
                        fix="call zeropipe.utils.safe_set_full_grad(param, value) on every rank",
                    )
                gone.append(index)
                # What replaced autograd's own is what the next pass adds to, as for a plain tensor.
                if found is None or where != _OWN:
                    seen.append((index, Change.DROPPED if found is None else Change.REPLACED, found))
            # Nothing was done until here: where it raises no change is lost.
            for index in here:
                if self._absent[index].zeroed:
                    self._absent[index].zeroed = False
                    seen.append((index, Change.ZEROED, None))
                if lift:
                    params[index].grad = None
        for index in [*gone, *here] if lift else gone:
            del self._put[index]
        return seen

    def clear(self) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            for param in self._params:
                param.grad = None
        self._put.clear()


class Watch:
    """Looks at each local gradient of a window before it is reduced, so that the rank is still known."""

    def __init__(self, group: Group, micro_step: Callable[[], int]) -> None:
        self._group = group
        self._micro_step = micro_step
        self._rank = group.ranks[group.rank]
        self._bad: list[NonFinite] = []
        # On a device, where looking would wait: of each gradient the largest magnitude, one small kernel.
        self._unread: list[tuple[NonFinite, torch.Tensor]] = []

    def look(self, name: str, grad: torch.Tensor) -> None:
        here = HOST.sees(grad)
        if grad.is_sparse:  # of an embedding: repeated rows are added first, which on a device would wait
            grad = grad.coalesce().values() if here else grad._values()
        if not grad.numel() or (here and bool(all_finite(grad))):
            return
        inf, nan = (int(torch.isinf(grad).sum()), int(torch.isnan(grad).sum())) if here else (None, None)
        found = NonFinite(name, inf, nan, grad.numel(), self._rank, self._micro_step())
        if here:
            self._bad.append(found)
        else:
            self._unread.append((found, torch.linalg.vector_norm(grad.detach(), math.inf)))

    def clear(self) -> None:
        self._bad.clear()
        self._unread.clear()

    def find(self) -> NonFinite | None:
        """The earliest bad gradient of all ranks in this window; collective, the same on every rank."""
        if self._unread:
            largest = torch.stack([value.float() for _, value in self._unread]).tolist()
            pairs = zip(self._unread, largest, strict=True)
            self._bad += [found for (found, _), value in pairs if not math.isfinite(value)]
            self._unread.clear()
        mine = next(iter(self._bad), None)
        return earliest(all_gather_object(mine, self._group, label="overflow"))


def no_engine(loss: torch.Tensor, retain_graph: bool) -> None:
    """What runs the backward that an optimizer is asked for before it has an engine, and after."""
    raise UsageError("optimizer.backward: this optimizer has no engine", fix="call backward on the loss")
