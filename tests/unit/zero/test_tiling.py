"""TiledLinear is a linear layer, whatever the tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.helpers.referee import assert_bitwise, assert_within_referee
from zeropipe.errors import UsageError
from zeropipe.runtime.zero.tiling import TiledLinear, TiledLinearReturnBias


def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    torch.manual_seed(inputs * 100 + outputs)
    return nn.Linear(inputs, outputs, bias=bias)


def run(layer: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    out = layer(x)
    out.square().sum().backward()
    return {"out": out.detach(), "x.grad": x.grad}


@pytest.mark.parametrize("bias", [True, False])
def test_one_tile_is_a_linear_bit_for_bit(bias):
    plain = linear(7, 5, bias)
    tiled = TiledLinear(7, 5, bias=bias, init_linear=plain)
    x = torch.randn(2, 3, 7)
    assert_bitwise(run(tiled, x), run(plain, x))
    assert_bitwise(tiled.linears[0][0].weight.grad, plain.weight.grad)


# Large enough that the errors of single sums average out: the referee compares norms.
SIZES = st.tuples(st.integers(30, 70), st.integers(1, 9))


@given(SIZES, SIZES, st.booleans())
def test_any_tiles_are_the_referee(inputs, outputs, bias):
    plain = linear(inputs[0], outputs[0], bias)
    tiled = TiledLinear(inputs[0], outputs[0], bias, inputs[1], outputs[1], init_linear=plain)
    x = torch.randn(4, inputs[0], generator=torch.Generator().manual_seed(1))
    ours, theirs = run(tiled, x), run(plain, x)
    exact = run(linear(inputs[0], outputs[0], bias).double(), x.double())
    assert_within_referee(ours, theirs, exact)
    assert sum(p.numel() for p in tiled.parameters()) == sum(p.numel() for p in plain.parameters())
    sizes = [tile.weight.numel() for row in tiled.linears for tile in row]
    assert max(sizes) <= -(-inputs[0] // inputs[1]) * -(-outputs[0] // outputs[1])


def test_each_row_of_tiles_has_one_bias():
    tiled = TiledLinear(6, 6, in_splits=3, out_splits=2)
    assert [[t.bias is not None for t in row] for row in tiled.linears] == [[False, False, True]] * 2


def test_split_inputs_and_outputs():
    plain = linear(7, 5)
    x = torch.randn(3, 7)
    tiled = TiledLinear(7, 5, True, 2, 2, True, False, init_linear=plain)
    parts = tiled(x.split([4, 3], -1))
    assert [part.shape[-1] for part in parts] == [3, 2]
    whole = TiledLinear(7, 5, True, 2, 2, init_linear=plain)
    assert_bitwise(torch.cat(parts, -1).detach(), whole(x).detach())


class _SkipsBias(nn.Linear):
    def forward(self, x: torch.Tensor) -> Any:
        return nn.functional.linear(x, self.weight), self.bias


@pytest.mark.parametrize("combine", [True, False])
def test_return_bias(combine):
    plain = linear(6, 4)
    tiled = TiledLinearReturnBias(
        6, 4, True, 2, 3, combine_out_splits=combine, linear_cls=_SkipsBias, init_linear=plain
    )
    x = torch.randn(5, 6)
    out, bias = tiled(x)
    if not combine:
        assert [o.shape[-1] for o in out] == [b.shape[-1] for b in bias] == [2, 1, 1]
        out, bias = torch.cat(out, -1), torch.cat(bias, -1)
    assert_bitwise(bias.detach(), plain.bias.detach())
    added = TiledLinear(6, 4, True, 2, 3, init_linear=plain)(x)
    assert torch.allclose(out + bias, added, atol=1e-6)  # the bias is added at the end instead of within


def test_return_bias_without_one():
    out, bias = TiledLinearReturnBias(4, 4, False, 2, 2, linear_cls=_SkipsBias)(torch.randn(1, 4))
    assert bias is None
    assert out.shape == (1, 4)


def test_return_bias_of_tiles_that_return_none_is_refused():
    tiled = TiledLinearReturnBias(4, 4, in_splits=2, out_splits=2)
    with pytest.raises(UsageError, match=r"Linear returned a Tensor.*TiledLinear"):
        tiled(torch.randn(2, 4))  # two rows, which would unpack as an output and a bias


def test_kwargs_reach_the_tiles():
    tiled = TiledLinear(4, 4, in_splits=2, dtype=torch.float64)
    assert {p.dtype for p in tiled.parameters()} == {torch.float64}


@pytest.mark.parametrize("splits", [{"in_splits": 5}, {"out_splits": 0}, {"out_splits": 9}])
def test_splits_without_features_are_refused(splits):
    with pytest.raises(UsageError, match=next(iter(splits))):
        TiledLinear(4, 8, **splits)


@pytest.mark.parametrize(
    "other", [nn.Linear(5, 4), nn.Linear(4, 4, bias=False)], ids=["other shape", "no bias"]
)
def test_copying_another_layer_is_refused(other):
    with pytest.raises(UsageError, match="copy_params_from"):
        TiledLinear(4, 4).copy_params_from(other)


def test_wrong_input_is_named():
    with pytest.raises(UsageError, match="expected 4, found 5"):
        TiledLinear(4, 4, in_splits=2)(torch.randn(1, 5))
    with pytest.raises(UsageError, match=r"expected \[2, 2\]"):
        TiledLinear(4, 4, in_splits=2, input_is_already_split=True)([torch.randn(1, 4)])
