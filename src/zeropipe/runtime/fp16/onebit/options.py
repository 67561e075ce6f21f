"""The options that the three compressed optimizers share, and the one place where they are checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zeropipe.errors import UsageError, describe


@dataclass(frozen=True, slots=True)
class Common:
    """What a user gave, named as in the optimizers' signatures."""

    deepspeed: Any
    lr: float
    bias_correction: bool
    betas: tuple[float, float]
    eps: float
    eps_inside_sqrt: bool
    weight_decay: float
    max_grad_norm: float
    amsgrad: bool
    cuda_aware: bool
    comm_backend_name: str
    node_size: int

    def check(self, optimizer: str) -> None:
        """Raises ValueError for a value out of its range, UsageError for ``amsgrad``, which none of them has."""
        if self.amsgrad:
            raise UsageError(f"{optimizer} has no AMSGrad variant. Fix: leave out amsgrad=True")
        beta1, beta2 = self.betas
        rules = {
            "betas": (0 <= beta1 < 1 and 0 <= beta2 < 1, "two numbers in [0, 1)", self.betas),
            "node_size": (self.node_size >= 1, "at least 1", self.node_size),
        }
        for key in ("lr", "eps", "weight_decay", "max_grad_norm"):
            value = getattr(self, key)
            rules[key] = (value >= 0, "at least 0", value)
        check_ranges(optimizer, rules)

    def of_a_group(self) -> dict[str, Any]:
        """The options that may differ by param group."""
        return {
            "lr": self.lr,
            "bias_correction": self.bias_correction,
            "betas": tuple(self.betas),
            "eps": self.eps,
            "weight_decay": self.weight_decay,
            "max_grad_norm": self.max_grad_norm,
        }


def check_ranges(optimizer: str, rules: Mapping[str, tuple[bool, str, Any]]) -> None:
    """Raises ValueError for the first option that breaks its rule: key -> (whether it is kept, rule, value)."""
    for key, (kept, rule, value) in rules.items():
        if not kept:
            raise ValueError(describe(f"{optimizer}: {key} is out of range", expected=rule, found=value))
