"""Lion, and the optimizer classes that DeepSpeed users build by hand, as torch's fused steps and ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from zeropipe.errors import ConfigError
from zeropipe.runtime.optimizers.lamb import Lamb
from zeropipe.runtime.optimizers.shard_view import Stepped, check_betas, check_not_negative


class Lion(Stepped):
    """EvoLved Sign Momentum (arXiv 2302.06675, Algorithm 2).

    ``u = sign(b1 m + (1 - b1) g)``, ``m = b2 m + (1 - b2) g``, ``x = x - lr (u + weight_decay x)``. Any shape and
    floating dtype; state ``exp_avg`` has the parameter's. Raises ValueError for values out of range.
    """

    per_element_state = ("exp_avg",)  # see state_kinds.py

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        check_not_negative(lr=lr, weight_decay=weight_decay)
        check_betas(betas)
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    def _update(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            grads, moments = [p.grad for p in params], [self.state[p]["exp_avg"] for p in params]
            first, second = group["betas"]
            lr = float(group["lr"])
            # One call for all tensors of the group; with one buffer of their size, which is gone afterwards.
            update = torch._foreach_lerp(moments, grads, 1.0 - first)
            torch._foreach_sign_(update)
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1.0 - lr * group["weight_decay"])
            torch._foreach_add_(params, update, alpha=-lr)
            # Last: the step above takes the moment as it was, by another beta.
            torch._foreach_lerp_(moments, grads, 1.0 - second)


FUSED_DEVICES = frozenset({"cpu", "cuda"})  # where torch >= 2.8 has a fused Adam, AdamW, SGD and Adagrad


def held(params: ParamsT) -> list[Any]:
    """``params`` as lists, so that they can be read more than once; dicts stay the very same objects."""
    listed: list[Any] = list(params)
    for entry in listed:
        if isinstance(entry, dict) and isinstance(entry.get("params"), Iterator):
            entry["params"] = list(entry["params"])
    return listed


def tensors_of(params: list[Any]) -> list[torch.Tensor]:
    """All tensors in a list of tensors, of (name, tensor) pairs or of group dicts."""
    found: list[torch.Tensor] = []
    for entry in params:
        members = entry["params"] if isinstance(entry, dict) else [entry]
        for member in [members] if isinstance(members, torch.Tensor) else members:
            found.append(member[1] if isinstance(member, tuple) else member)
    return found


# A fused step is one kernel, which has happened or not: an update of ours that raised can be gone on with for free.
def can_fuse(params: list[Any], devices: frozenset[str] = FUSED_DEVICES) -> bool:
    return all(p.device.type in devices and torch.is_floating_point(p) for p in tensors_of(params))


def refuse(cls: str, key: str, value: object, fix: str) -> ConfigError:
    return ConfigError(f"{cls} does not support {key}={value!r}, which would change results", fix=fix)


class FusedAdam(torch.optim.Adam):
    """torch's fused Adam, decoupled weight decay by default (arXiv 1412.6980, 1711.05101). Elementwise.

    ``set_grad_none`` is accepted and has no effect. Raises ConfigError for ``bias_correction=False``.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
    ) -> None:
        if not bias_correction:
            raise refuse(
                type(self).__name__, "bias_correction", False, "leave it out, or use Lamb, which has it"
            )
        params = held(params)
        ours: dict[str, Any] = {"fused": can_fuse(params) or None, "decoupled_weight_decay": adam_w_mode}
        super().__init__(
            params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, **ours
        )
        # Groups taken over from another optimizer keep its keys; how the step is done is ours to say.
        for group in self.param_groups:
            group.update(ours, foreach=None)


class DeepSpeedCPUAdam(FusedAdam):
    """The same Adam under the name and arguments that offloading users know. Elementwise.

    ``fp32_optimizer_states`` is accepted and has no effect: state has the dtype of what is stepped, fp32 masters.
    """

    def __init__(
        self,
        model_params: ParamsT,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,
    ) -> None:
        super().__init__(model_params, lr, bias_correction, betas, eps, adamw_mode, weight_decay, amsgrad)


class DeepSpeedCPUAdagrad(torch.optim.Adagrad):
    """torch's fused Adagrad under the name and arguments that offloading users know. Elementwise."""

    def __init__(
        self,
        model_params: ParamsT,
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        fp32_optimizer_states: bool = True,
    ) -> None:
        # Accepted by DeepSpeed and without effect there: who sets it expects other numbers.
        if amsgrad:
            raise refuse(type(self).__name__, "amsgrad", True, "leave it out")
        params = held(model_params)
        fused = can_fuse(params, frozenset({"cpu"}))
        super().__init__(params, lr=lr, eps=eps, weight_decay=weight_decay, fused=fused or None)
        for group in self.param_groups:
            group.update(fused=fused or None, foreach=None)


class FusedLion(Lion):
    """Lion with DeepSpeed's default learning rate. ``set_grad_none`` is accepted and has no effect."""

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        set_grad_none: bool = True,
    ) -> None:
        super().__init__(params, lr, betas, weight_decay)


class DeepSpeedCPULion(Lion):
    """Lion under the name and defaults that offloading users know (second beta 0.999)."""

    def __init__(
        self,
        model_params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        fp32_optimizer_states: bool = True,
    ) -> None:
        super().__init__(model_params, lr, betas, weight_decay)


class FusedLamb(Lamb):
    """Lamb with the arguments that DeepSpeed users know.

    Raises ConfigError for ``amsgrad``, ``eps_inside_sqrt`` and ``max_grad_norm``, which would change results;
    clip with the config key ``gradient_clipping``.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        amsgrad: bool = False,
    ) -> None:
        # Better no optimizer than one that takes an option and computes without it.
        for key, value, fix in (
            ("eps_inside_sqrt", eps_inside_sqrt, "leave it out"),
            ("max_grad_norm", max_grad_norm, "set gradient_clipping in the config instead"),
            ("amsgrad", amsgrad, "leave it out"),
        ):
            if value:
                raise refuse(type(self).__name__, key, value, fix)
        super().__init__(params, lr, betas, eps, weight_decay, bias_correction, max_coeff, min_coeff)
