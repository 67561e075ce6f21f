"""Lets torch's layers of one dtype take inputs of another, in models that keep some tensors wide on purpose.

A table that stays fp32 makes what is added to it fp32, and layers kept in fp32 get 16-bit inputs; torch refuses both.

    layer in 16 bits    wide inputs are rounded to its dtype, as autocast does; it gives 16 bits
    layer kept wide     16-bit inputs are widened, and its output is rounded to what came in
    weighted loss       inputs are widened to its weights; the loss stays wide

Only where torch would raise: modules with a forward of their own, functions and norms that take the mix are left alone.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.loss import _WeightedLoss
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.hooks import RemovableHandle

from zeropipe.tensor.model import HALVES, keeps_dtype

_LAYERS = (
    nn.Linear, nn.Bilinear, _ConvNd, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.PReLU, nn.EmbeddingBag
)  # fmt: skip
# Of a batch or instance norm torch widens 16-bit inputs itself; of these only on the CPU.
_NORMS = (nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True, slots=True)
class _Cast:
    """Forward pre-hook: floating-point inputs in ``dtype``."""

    dtype: torch.dtype

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if (
            len(args) == 1
            and not kwargs
            and isinstance(args[0], torch.Tensor)
            and args[0].dtype == self.dtype
        ):
            return None
        return tree_map_only(
            torch.Tensor, lambda t: t.to(self.dtype) if t.dtype.is_floating_point else t, (args, kwargs)
        )


@dataclass(frozen=True, slots=True)
class _Widen:
    """Forward pre-hook of a layer kept wide. ``came``: for each call under way the 16-bit dtype that was widened."""

    cast: _Cast
    came: list[torch.dtype | None] = field(default_factory=list)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = (t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
        self.came.append(next((t.dtype for t in tensors if t.dtype in HALVES), None))
        return self.cast(module, args, kwargs)


@dataclass(frozen=True, slots=True)
class _Narrow:
    """The forward hook that goes with it; torch calls it after an exception too, which keeps ``came`` right."""

    before: _Widen

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        came, wide = self.before.came.pop(), self.before.cast.dtype
        if came is None or output is None:
            return output
        return tree_map_only(torch.Tensor, lambda t: t.to(came) if t.dtype == wide else t, output)


class MixedInputs(AbstractContextManager[Any]):
    """The hooks of one model. As a context around a forward it tells where an error about dtypes may come from."""

    def __init__(self, module: nn.Module) -> None:
        self._kept = sorted(
            f"'{name}' ({str(tensor.dtype).removeprefix('torch.')})"
            for name, tensor in (*module.named_buffers(), *module.named_parameters())
            if tensor.dtype.is_floating_point and tensor.dtype.itemsize > HALVES[0].itemsize
        )
        self._handles: list[RemovableHandle] = []
        for layer in module.modules():
            self._install(layer)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, RuntimeError) and ("dtype" in str(error) or "scalar type" in str(error)):
            shown = ", ".join(self._kept[:_SHOWN]) + (", ..." if len(self._kept) > _SHOWN else "")
            error.add_note(
                f"zeropipe: the model keeps these in the dtype that it gives them: {shown}. Fix: cast where they meet "
                "16-bit values (.to(x.dtype)), or set data_types.buffer_dtype or data_types.param_dtype"
            )

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _install(self, layer: nn.Module) -> None:
        if isinstance(layer, _WeightedLoss):
            weights = [t.dtype for t in layer._buffers.values() if t is not None and t.dtype not in HALVES]
            if weights:
                self._before(layer, _Cast(weights[0]))
            return
        torchs_own = type(layer).forward.__module__.startswith("torch.nn.") and "forward" not in vars(layer)
        if not torchs_own or keeps_dtype(layer) or not isinstance(layer, (*_LAYERS, *_NORMS, _NormBase)):
            return
        values = (p for p in layer.parameters() if p.dtype.is_floating_point and p.dtype.itemsize > 1)
        first = next(values, None)
        if first is None:
            return
        if first.dtype in HALVES:
            self._before(layer, _Cast(first.dtype))
        elif isinstance(layer, _LAYERS) or (isinstance(layer, _NORMS) and first.device.type != "cpu"):
            before = _Widen(_Cast(first.dtype))
            self._before(layer, before)
            self._handles.append(layer.register_forward_hook(_Narrow(before), always_call=True))

    def _before(self, layer: nn.Module, hook: _Cast | _Widen) -> None:
        self._handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))


_SHOWN = 8
