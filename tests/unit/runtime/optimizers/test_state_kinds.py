"""Which state has one value per element: what each optimizer really makes, for parameters of every shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from zeropipe.runtime.optimizers.fused import Lion
from zeropipe.runtime.optimizers.lamb import Lamb
from zeropipe.runtime.optimizers.muon import Muon
from zeropipe.runtime.optimizers.registry import ELEMENTWISE
from zeropipe.runtime.optimizers.state_kinds import (
    born_state,
    kinds_of,
    per_element_keys,
    shapes_in,
    split_state,
    state_keys,
)

SHAPES: tuple[tuple[int, ...], ...] = ((8, 8), (8,), (1,), (), (1, 1), (0,))
OPTIONS: dict[type, dict[str, Any]] = {
    torch.optim.SGD: {"momentum": 0.9},
    torch.optim.RMSprop: {"momentum": 0.9, "centered": True},
    torch.optim.Adam: {"amsgrad": True},
    torch.optim.AdamW: {"amsgrad": True},
}


class Unknown(torch.optim.Optimizer):
    """Keeps a moment, a trace under a name of its own, a count of steps and a row statistic."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for param in self.param_groups[0]["params"]:
            state = self.state[param]
            state["slow"] = torch.zeros_like(param)
            state["step"] = torch.tensor(1.0)
            state["decay"] = torch.tensor(0.5)
            state["row"] = torch.zeros(param.shape[:1])
            state["name"] = "unknown"


class OwnStep(torch.optim.Adam):
    """An Adam with a step of its own, and one more average."""

    def step(self, closure: Any = None) -> Any:
        done = super().step(closure)
        for param in self.param_groups[0]["params"]:
            self.state[param]["ema"] = param.detach().clone()
        return done


def stepped(cls: Any, shapes: tuple[tuple[int, ...], ...]) -> torch.optim.Optimizer:
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer: torch.optim.Optimizer = cls(params, **OPTIONS.get(cls, {}))
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("shapes", [SHAPES, *((shape,) for shape in SHAPES)], ids=str)
@pytest.mark.parametrize("cls", [*ELEMENTWISE, Lion, Lamb, OwnStep], ids=lambda cls: cls.__name__)
def test_step_counts_are_shared_and_the_rest_is_per_element_whatever_the_shapes(cls, shapes):
    optimizer = stepped(cls, shapes)
    keys = state_keys(optimizer)
    for param, state in optimizer.state.items():
        tensors, rest = split_state(state, keys)
        assert all(value.shape == param.shape for value in tensors.values())
        assert set(rest) <= {"step", "mu_product", "eta", "mu"}
        assert ("step" in rest) == ("step" in state)
        assert len(tensors) >= 1


def test_everything_that_an_optimizer_makes_is_declared():
    """A key that a new torch adds would go by its shape; the table should say it."""
    for cls in (*ELEMENTWISE, Lamb, Lion, Muon):
        optimizer = stepped(cls, ((8, 8), (8,)) if cls is not Muon else ((8, 8),))
        kinds = kinds_of(optimizer)
        assert {
            key for state in optimizer.state.values() for key in state
        } <= kinds.per_element | kinds.shared


@pytest.mark.parametrize("shapes", [SHAPES, SHAPES[::-1]])
def test_an_unknown_optimizers_state_goes_by_shape_and_by_what_larger_parameters_show(shapes):
    assert state_keys(stepped(Unknown, shapes)) == {"slow"}


@pytest.mark.parametrize("shape", [(), (1,)])
def test_an_unknown_optimizer_of_one_element_has_no_step_per_element(shape):
    keys = state_keys(stepped(Unknown, (shape,)))
    assert "slow" in keys
    assert "step" not in keys


def test_the_average_that_a_subclass_adds_is_found_also_for_a_scalar():
    assert state_keys(stepped(OwnStep, ((8, 8), ()))) == {"exp_avg", "exp_avg_sq", "ema"}


def test_files_whose_optimizer_is_not_known_go_by_all_their_parameters():
    states = [((), {"step": (), "mine": ()}), ((4, 4), {"step": (), "mine": (4, 4)})]
    assert per_element_keys(None, states) == {"mine"}
    assert per_element_keys(None, states[::-1]) == {"mine"}
    assert shapes_in({"a": torch.zeros(2), "b": 3}) == {"a": (2,), "b": None}


def test_adagrads_state_exists_from_birth():
    param = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.Adagrad([param], initial_accumulator_value=0.25)
    born = born_state(optimizer, optimizer.param_groups[0], param)
    assert born.keys() == optimizer.state[param].keys()
    assert all(torch.equal(born[key], value) for key, value in optimizer.state[param].items())
    assert born_state(torch.optim.SGD([param], 0.1), {}, param) == {}
