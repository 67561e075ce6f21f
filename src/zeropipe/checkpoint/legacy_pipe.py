"""Whose state is whose in a DeepSpeed pipeline at ZeRO stage 0, where optimizers number their parameters only.

Each stage's optimizer counts from zero; the layer files name and order all parameters but not the stages. So the
stages' lists of shapes are laid along the layers' tensors. Copies of tied layers come first in a stage's list.
"""

from __future__ import annotations

from collections.abc import Sequence

Shape = tuple[int, ...]


def stage_orders(
    stages: Sequence[Sequence[Shape]], layers: Sequence[tuple[str, Shape]]
) -> list[list[str]] | None:
    """The names of each stage's parameters, "" for a copy of a tied layer; None where shapes do not fit.

    ``stages``: shapes of each stage's parameters in the order of its optimizer. ``layers``: all parameters of all
    layers in order, tied ones at their first layer (their later layers have no file).
    """
    found: list[list[str]] = []
    at = 0
    for shapes in stages:
        seen = {shape for _, shape in layers[:at]}
        for copies in range(len(shapes) + 1):
            own = layers[at : at + len(shapes) - copies]
            if [shape for _, shape in own] == list(shapes[copies:]):
                break
            if copies < len(shapes) and shapes[copies] not in seen:
                return None
        else:
            return None
        found.append([""] * copies + [name for name, _ in own])
        at += len(own)
    return found if at == len(layers) else None
