"""What ``param.grad`` shows between backwards, and how it is seen that a user cleared, replaced or zeroed it.

    the window's gradient is whole here     a view of the buffer, so that an edit in place is one of the gradient
    only a shard of it is, or it is times   a stand-in: not None, without elements; a use of its values is an error
    the loss scale, which clipping by hand
    would take for the gradient

``model.zero_grad()``, ``param.grad = None`` and the like are plain assignments, which nobody is told of. So what is
found in ``.grad`` is compared with what was put there, when a backward begins and when a step takes the gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from typing import Any

import torch

from zeropipe.errors import UsageError


class Change(Enum):
    """What a user did to a gradient between backwards."""

    DROPPED = "set to None"
    ZEROED = "zeroed in place, where it is a stand-in"
    REPLACED = "another tensor stands in its place"


class AbsentGradient(torch.Tensor):
    """Stands in ``.grad`` for a gradient that this rank does not hold whole there. It has no memory."""

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
            f"times fp16's loss scale ({func}). "
            "Fix: clip with the config key gradient_clipping, read the norm with engine.get_global_grad_norm() after "
            "the step, and read or change a gradient on every rank with zeropipe.utils.safe_get_full_grad(param) and "
            "safe_set_full_grad(param, value)"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"AbsentGradient('{self.parameter}')"


_OWN = -1  # in place of an address: autograd's own memory
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
        self._put: dict[
            int, tuple[torch.Tensor, int]
        ] = {}  # by parameter: what stands in its .grad, and its address
        self._faces: dict[int, torch.Tensor] = {}  # made once: what stands for views
        self._absent: dict[int, AbsentGradient] = {}  # the same for stand-ins

    def __contains__(self, index: int) -> bool:
        return index in self._put

    @property
    def whole(self) -> bool:
        """Whether some ``.grad`` is a view of the buffer."""
        return any(not isinstance(tensor, AbsentGradient) for tensor, _ in self._put.values())

    def view(self, index: int, view: torch.Tensor) -> None:
        """Let ``.grad`` be ``view``'s memory, as an object of its own, since users set ``.grad.data`` too."""
        face, where = self._faces.get(index), view.data_ptr()
        if face is None or face.data_ptr() != where:
            face = self._faces[index] = view.detach()
        self._put[index] = face, where
        self._params[index].grad = face

    def absent(self, indices: Iterable[int], reduced: bool = True) -> None:
        """Let the ``.grad`` of these be stand-ins; not ``reduced``: unless autograd's own is there."""
        for index in indices:
            param = self._params[index]
            found = None if reduced else param.grad
            if found is not None and not isinstance(found, AbsentGradient):
                self._put[index] = found, _OWN
                continue
            stand_in = self._absent.get(index)
            try:
                param.grad = stand_in
            except RuntimeError:  # the parameter was gathered then and is away now, or the other way round
                stand_in = None
            if stand_in is None:
                stand_in = param.grad = self._absent[index] = AbsentGradient(param, self._names[index])
            stand_in.zeroed = False
            self._put[index] = stand_in, 0

    def hide(self, index: int) -> None:
        """Nothing is shown: the gradient waits for its reduction."""
        self._put.pop(index, None)
        self._params[index].grad = None

    def changes(self, lift: bool) -> Iterator[tuple[int, Change, torch.Tensor | None]]:
        """What users did, each change once, and what they put there. ``lift``: a backward begins, and autograd needs
        the place of the stand-ins."""
        for index, (put, where) in list(self._put.items()):
            param = self._params[index]
            found = param.grad
            if isinstance(put, AbsentGradient):
                if found is put:
                    if put.zeroed:
                        put.zeroed = False
                        yield index, Change.ZEROED, None
                    if lift:
                        param.grad = None
                        del self._put[index]
                    continue
                if found is not None:
                    raise UsageError(
                        f"the .grad of '{self._names[index]}' was replaced between backward and step, but the ranks "
                        "hold the gradient elsewhere, as shards, in another dtype or times fp16's loss scale. "
                        "Fix: call zeropipe.utils.safe_set_full_grad(param, value) on every rank"
                    )
            elif found is put and where in (_OWN, put.data_ptr()):
                continue
            del self._put[index]
            if found is not None and where == _OWN:
                continue
            yield index, Change.DROPPED if found is None else Change.REPLACED, found

    def clear(self) -> None:
        for param in self._params:
            param.grad = None
        self._put.clear()
