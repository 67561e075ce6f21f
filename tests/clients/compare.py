"""How two runs are compared."""

from __future__ import annotations

from typing import Any

import torch

# Two orders of adding the same few fp32 numbers of size 1, a handful of steps at a rate of 0.01: a few ulps.
REORDERED = 5e-7
# Norms are added up over the flat buffer here and per tensor in torch: fp32 sums of some 20,000 squares.
NORM = 1e-6


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Raises AssertionError that names the parameters that differ, and by how much."""
    assert found.keys() == expected.keys()
    off = {
        name: (found[name].float() - expected[name].float()).abs().max().item()
        for name in expected
        if found[name].dtype != expected[name].dtype or not torch.equal(found[name], expected[name])
    }
    assert not off, f"differ by at most {off}"


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float) -> None:
    """As ``assert_same_bits`` up to an absolute difference of ``bound``."""
    assert found.keys() == expected.keys()
    off = {name: (found[name] - expected[name]).abs().max().item() for name in expected}
    assert max(off.values()) <= bound, off


def relative(found: list[float], expected: list[float]) -> float:
    """The largest relative difference."""
    assert len(found) == len(expected)
    return max(abs(f / e - 1) for f, e in zip(found, expected, strict=True))


def assert_same_story(found: dict[str, Any], expected: dict[str, Any], *names: str) -> None:
    """The same bits in the weights and the same numbers under ``names``."""
    for name in names:
        assert found[name] == expected[name], name
    assert_same_bits(found["weights"], expected["weights"])
