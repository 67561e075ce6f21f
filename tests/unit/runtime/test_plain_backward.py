"""The gate scales gradients where they enter the model and takes the scale off where they leave it."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from zeropipe.runtime.plain_backward import Gate


class Pair(NamedTuple):
    first: Any
    second: Any


def called(gate: Gate, layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return gate.leave(layer(gate.enter(x)))


@pytest.mark.parametrize("factor", [1.0, 8.0, 0.25])
def test_parameters_see_the_factor_and_inputs_do_not(factor: float) -> None:
    gate, layer = Gate(lambda: factor), nn.Linear(3, 3)
    x = torch.randn(2, 3, requires_grad=True)
    layer(x).sum().backward()
    weight, inputs = layer.weight.grad.clone(), x.grad.clone()
    layer.zero_grad()
    x.grad = None
    called(gate, layer, x).sum().backward()
    assert torch.equal(layer.weight.grad, weight * factor)
    assert torch.equal(x.grad, inputs)


def test_a_model_called_on_its_own_output_scales_once() -> None:
    gate, layer = Gate(lambda: 4.0), nn.Linear(3, 3)
    x = torch.randn(2, 3)
    layer(torch.tanh(layer(x))).sum().backward()
    expected = layer.weight.grad * 4
    layer.zero_grad()
    called(gate, layer, torch.tanh(called(gate, layer, x))).sum().backward()
    assert torch.equal(layer.weight.grad, expected)
    layer.zero_grad()
    gate.closed = True
    (called(gate, layer, torch.tanh(called(gate, layer, x))).sum() * 4).backward()
    assert torch.equal(layer.weight.grad, expected)


def test_a_closed_gate_still_takes_its_scale_off_what_comes_from_elsewhere() -> None:
    gate, other, layer, before = Gate(lambda: 4.0), Gate(lambda: 16.0), nn.Linear(3, 3), nn.Linear(3, 3)
    x = torch.randn(2, 3)
    layer(before(x)).sum().backward()
    expected, scaled = before.weight.grad * 16, layer.weight.grad * 4
    layer.zero_grad()
    before.zero_grad()
    gate.closed = True
    (called(gate, layer, called(other, before, x)).sum() * 4).backward()
    assert torch.equal(layer.weight.grad, scaled)
    assert torch.equal(before.weight.grad, expected)


def test_containers_are_passed_through_with_what_is_not_a_tensor() -> None:
    gate, weight = Gate(lambda: 2.0), torch.ones(3, requires_grad=True)
    marker = object()
    output = {"a": [weight * 1, 5], "b": Pair(weight * 2, marker), "c": None, "d": torch.ones(2)}
    passed = gate.leave(output)
    assert passed["a"][1] == 5 and passed["b"].second is marker and passed["c"] is None
    assert isinstance(passed["b"], Pair)
    assert passed["d"] is output["d"]  # no gradient: the same object
    (passed["a"][0].sum() + passed["b"].first.sum()).backward()
    assert torch.equal(weight.grad, torch.full((3,), 6.0))


def test_nothing_is_touched_where_there_is_nothing_to_do() -> None:
    output = [torch.ones(2, requires_grad=True)]
    assert Gate(lambda: 1.0).leave(output) is output
    with torch.no_grad():
        assert Gate(lambda: 2.0).leave(output) is output


def test_the_factor_is_the_one_at_the_time_of_backward() -> None:
    scale = [2.0]
    gate, weight = Gate(lambda: scale[0]), torch.ones(1, requires_grad=True)
    loss = gate.leave(weight * 3)
    scale[0] = 8.0
    loss.backward()
    assert weight.grad.item() == 24.0


@pytest.mark.parametrize("closed", [True, False])
def test_outputs_may_be_changed_in_place_as_those_of_any_module(closed: bool) -> None:
    """transformers' Trainer writes ``loss *= scale``."""
    gate, layer, before = Gate(lambda: 4.0), nn.Linear(3, 3), nn.Linear(3, 3)
    x = torch.randn(2, 3)
    (layer(before(x) * 3).sum() * 2).backward()
    expected, outer = layer.weight.grad * 4, before.weight.grad.clone()
    layer.zero_grad()
    before.zero_grad()
    gate.closed = closed
    loss = gate.leave(layer(gate.enter(before(x)) * 3).sum())
    loss *= 8 if closed else 2
    loss.backward()
    assert torch.equal(layer.weight.grad, expected)
    assert torch.equal(before.weight.grad, outer)


def test_an_input_that_is_changed_in_place_is_refused_and_not_wrong_where_its_owner_uses_it_again() -> None:
    hidden = torch.ones(3, requires_grad=True) * 1.0
    passed = Gate(lambda: 2.0).enter(hidden)
    with pytest.raises(RuntimeError, match="modified inplace"):
        passed.mul_(3.0)


def test_an_output_that_backward_needs_is_still_guarded_against_change() -> None:
    weight = torch.ones(3, requires_grad=True)
    output = Gate(lambda: 2.0).leave(weight.exp())
    output *= 2
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
