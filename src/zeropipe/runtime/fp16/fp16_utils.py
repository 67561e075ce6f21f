"""Building blocks for a hand-written 16-bit loop: convert a network, keep fp32 masters, move values between.

    model_params, masters = prep_param_lists(model)        # 16-bit values, fp32 masters
    scaler.backward(loss)
    model_grads_to_master_grads(model_params, masters)     # unscale, clip, optimizer.step() on the masters
    master_params_to_model_params(model_params, masters)

The engine does all of this by itself; these are for code that does not use it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from zeropipe.errors import UsageError
from zeropipe.given import Anything, Tree
from zeropipe.tensor.model import KeepsDtype
from zeropipe.tensor.norms import clip_coefficient, total_norm

BATCH_NORMS: tuple[type[nn.Module], ...] = (_BatchNorm,)
NORM_LAYERS: tuple[type[nn.Module], ...] = (
    _BatchNorm,
    _InstanceNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


def cast_floating(value: Tree, dtype: torch.dtype) -> Any:
    """``value`` with every floating tensor in it (tuples, lists, dicts) in ``dtype``; token ids stay."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        # A copy keeps the class and whatever else the object carries (a BatchEncoding, an OrderedDict).
        cast = copy.copy(value)
        for key, item in value.items():
            cast[key] = cast_floating(item, dtype)
        return cast
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(cast_floating(v, dtype) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(cast_floating(v, dtype) for v in value)
    return value


@dataclass(frozen=True, slots=True)
class _Cast(KeepsDtype):
    """Forward pre-hook, and forward hook; an object, so that a converted network pickles and copies.

    The engine knows it as a mark.
    """

    dtype: torch.dtype

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *output: Any) -> Any:
        return cast_floating(output[0] if output else args, self.dtype)


def convert_module(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Put the floating parameters, gradients and buffers of ``module`` itself (not its children) in ``dtype``.

    The Parameter objects stay the same, so ties and optimizers that hold them stay right.
    """
    for param in module.parameters(recurse=False):
        if param.is_floating_point():
            # The gradient is off while the values change: torch refuses one of another dtype.
            grad = param.grad
            param.grad = None
            param.data = param.data.to(dtype)
            param.grad = None if grad is None else grad.to(dtype)
    for name, buffer in module.named_buffers(recurse=False):
        if buffer.is_floating_point():
            module._buffers[name] = buffer.to(dtype)
    if isinstance(module, nn.RNNBase):
        module.flatten_parameters()
    return module


def _keep_in_fp32(module: nn.Module, outside: torch.dtype) -> None:
    """fp32 inside, ``outside`` at both edges: most norm layers refuse an input of another dtype."""
    convert_module(module, torch.float32)
    # Converted before, to another dtype perhaps: its casts go first.
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [k for k, hook in hooks.items() if isinstance(hook, _Cast)]:
            del hooks[key]
    if outside != torch.float32:
        module.register_forward_pre_hook(_Cast(torch.float32))
        module.register_forward_hook(_Cast(outside))


def convert_network(
    network: nn.Module, dtype: torch.dtype, keep_fp32: tuple[type[nn.Module], ...] = NORM_LAYERS
) -> nn.Module:
    """Convert ``network`` in place to ``dtype``, but for modules of the types in ``keep_fp32``.

    Those keep fp32 parameters and statistics, compute in fp32 and hand on ``dtype``. ``keep_fp32=()``
    converts everything. Returns ``network``. Converting again, to any dtype, is fine.
    """
    for module in network.modules():
        if isinstance(module, keep_fp32):
            _keep_in_fp32(module, dtype)
        else:
            convert_module(module, dtype)
    return network


def BN_convert_float(module: nn.Module) -> nn.Module:
    """Bring the batch-norm layers of a network that is already 16-bit back to fp32, in place."""
    for layer in module.modules():
        if isinstance(layer, BATCH_NORMS):
            tensors = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
            dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
            if dtype != torch.float32:
                _keep_in_fp32(layer, dtype)
    return module


class tofp16(nn.Module):
    """Casts floating inputs to fp16."""

    def forward(self, *inputs: Any) -> Any:
        cast = cast_floating(inputs, torch.float16)
        return cast[0] if len(cast) == 1 else cast


def network_to_half(network: nn.Module) -> nn.Sequential:
    """``network`` in fp16 with batch norm in fp32, behind a cast of its (one) input."""
    return nn.Sequential(tofp16(), convert_network(network, torch.float16, keep_fp32=BATCH_NORMS))


class FP16Model(nn.Module):
    """``network`` in fp16 with normalisation layers in fp32; all floating inputs are cast."""

    def __init__(self, network: nn.Module, keep_fp32: tuple[type[nn.Module], ...] = NORM_LAYERS) -> None:
        super().__init__()
        self.network = convert_network(network, torch.float16, keep_fp32=keep_fp32)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.network(*cast_floating(args, torch.float16), **cast_floating(kwargs, torch.float16))


def _pairs(
    model_params: Sequence[torch.Tensor], masters: Sequence[torch.Tensor], flat: bool, of: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each parameter, and what its master has of it; ``of`` a flat one, "data" or "grad", the view of its part."""
    expected = min(1, len(model_params)) if flat else len(model_params)
    if len(masters) != expected:
        raise UsageError(
            "the lists of parameters and masters do not match",
            expected=f"{expected} master(s) for {len(model_params)} parameter(s), flat_master={flat}",
            found=len(masters),
            fix="pass both lists, and flat_master, as in the call of prep_param_lists",
        )
    if not flat or not model_params:
        return zip(model_params, masters, strict=True)
    whole: torch.Tensor = getattr(masters[0], of)
    sizes = [param.numel() for param in model_params]
    if whole.numel() != sum(sizes):
        raise UsageError(
            "the flat master does not belong to these parameters",
            expected=f"{sum(sizes)} elements",
            found=whole.numel(),
            fix="pass both lists as prep_param_lists(model, flat_master=True) returned them",
        )
    views = (part.view(param.shape) for part, param in zip(whole.split(sizes), model_params, strict=True))
    return zip(model_params, views, strict=True)


def prep_param_lists(
    model: nn.Module, flat_master: bool = False
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters of ``model`` and their fp32 masters: one each, or one flat (1-D) for all.

    A parameter that two modules share is listed once. Both lists are empty if nothing is trainable.
    Raises UsageError if ``flat_master`` meets more than one dtype or device.
    """
    model_params = [p for p in model.parameters() if p.requires_grad]
    if not flat_master:
        return model_params, [nn.Parameter(p.detach().clone().float()) for p in model_params]
    for what, seen in (
        ("dtype", sorted({str(p.dtype) for p in model_params})),
        ("device", sorted({str(p.device) for p in model_params})),
    ):
        if len(seen) > 1:
            raise UsageError(
                f"one flat master cannot hold parameters of more than one {what}",
                expected=f"a single {what}",
                found=", ".join(seen),
                fix="use flat_master=False, or convert the whole network (convert_network(..., keep_fp32=()))",
            )
    if not model_params:
        return [], []
    flat = torch.cat([p.detach().reshape(-1).float() for p in model_params])
    return model_params, [nn.Parameter(flat)]


@torch.no_grad()
def model_grads_to_master_grads(
    model_params: Sequence[nn.Parameter], master_params: Sequence[nn.Parameter], flat_master: bool = False
) -> None:
    """Copy each parameter's gradient to its master, in the master's dtype; existing buffers are reused.

    A parameter without a gradient leaves its master without one; in a flat master its part is zero, and
    only if none has a gradient is the flat gradient None. Raises UsageError if the lists do not match.
    """
    if flat_master and len(master_params) == 1 and model_params:
        master = master_params[0]
        if all(p.grad is None for p in model_params):
            master.grad = None
            return
        if master.grad is None:
            master.grad = torch.empty_like(master)
    for param, target in _pairs(model_params, master_params, flat_master, "grad"):
        grad = param.grad
        if flat_master:
            target.copy_(grad) if grad is not None else target.zero_()
        elif grad is None or target.grad is None:
            target.grad = None if grad is None else grad.detach().to(target.dtype, copy=True)
        else:
            target.grad.copy_(grad)


@torch.no_grad()
def master_params_to_model_params(
    model_params: Sequence[nn.Parameter], master_params: Sequence[nn.Parameter], flat_master: bool = False
) -> None:
    """Round each master's value into its parameter, in place. Raises UsageError if the lists do not match."""
    for param, value in _pairs(model_params, master_params, flat_master, "data"):
        param.copy_(value)


def to_python_float(value: Anything) -> float:
    """The Python number in a one-element tensor or sequence, or in a number."""
    if hasattr(value, "item"):
        return float(value.item())
    return float(value[0]) if isinstance(value, (list, tuple)) else float(value)


@torch.no_grad()
def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> torch.Tensor:
    """Scale the gradients in place so that their common norm is at most ``max_norm``; returns the norm before.

    As ``torch.nn.utils.clip_grad_norm_``, but accumulated in fp64: fp16 gradients do not overflow in it.
    The norm is 0-d fp32. ``max_norm`` of 0 or less only measures. A norm that is inf or NaN leaves the
    gradients as they are (scaling cannot help them) or, with ``error_if_nonfinite``, raises UsageError.
    """
    tensors = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    grads = [p.grad for p in tensors if p.grad is not None]
    norm = total_norm(grads, norm_type)
    if max_norm <= 0 and not error_if_nonfinite:
        return norm.float()
    if not bool(torch.isfinite(norm)):
        if error_if_nonfinite:
            raise UsageError(
                "the gradients cannot be clipped",
                expected="a finite norm",
                found=float(norm),
                fix="skip this step (error_if_nonfinite=False leaves the gradients as they are)",
            )
        return norm.float()
    # A factor of 1 would change no bit and cost a pass.
    factor = float(clip_coefficient(norm, max_norm))
    if factor < 1.0:
        for grad in grads:
            grad.mul_(factor)
    return norm.float()


clip_grad_norm: Callable[..., torch.Tensor] = clip_grad_norm_
