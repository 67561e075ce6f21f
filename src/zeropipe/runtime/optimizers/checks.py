"""Range checks that our optimizers share, so that a bad value is refused with the rule that it breaks."""

from __future__ import annotations

from collections.abc import Sequence


def check_not_negative(**values: float) -> None:
    for name, value in values.items():
        if not float(value) >= 0.0:
            raise ValueError(f"{name} must be at least 0, found {value}")


def check_betas(betas: Sequence[float]) -> None:
    if len(betas) != 2 or not all(0.0 <= float(beta) < 1.0 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), found {betas}")
