"""Which parameter is which in the stages of a pipeline whose optimizers only number them."""

from __future__ import annotations

import pytest

from zeropipe.checkpoint.sources.deepspeed import stage_orders

A, B, C = (11, 6), (6, 6), (6,)
LAYERS = [("0.weight", A), ("1.w", B), ("1.b", C), ("2.w", B), ("2.b", C)]


def test_stages_are_laid_along_the_layers() -> None:
    assert stage_orders([[A, B, C], [B, C]], LAYERS) == [["0.weight", "1.w", "1.b"], ["2.w", "2.b"]]
    assert stage_orders([[A, B, C, B, C]], LAYERS) == [[name for name, _ in LAYERS]]


def test_copies_of_tied_layers_come_first() -> None:
    assert stage_orders([[A, B, C], [A, B, C]], LAYERS) == [["0.weight", "1.w", "1.b"], ["", "2.w", "2.b"]]


@pytest.mark.parametrize(
    "stages", [[[A, B], [B, C]], [[A, B, C]], [[A, B, C], [B, C, C]], [[B, A, C], [B, C]], []]
)
def test_what_does_not_fit_is_not_guessed(stages: list[list[tuple[int, ...]]]) -> None:
    assert stage_orders(stages, LAYERS) is None
