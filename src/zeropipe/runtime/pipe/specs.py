"""Layers that are described before they are built, so that a rank builds only its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from zeropipe.errors import UsageError


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
