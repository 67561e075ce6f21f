"""Every reparametrization of torch, in a constructor under zero.Init and without it: plain weights, plain training.

``orthogonal`` got other weights in silence, a parametrized ``weight_norm`` and ``load_state_dict`` inside the context
raised, an old ``spectral_norm`` around the root of a stage 3 model read what was away.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.utils as old
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.helpers.models import build
from tests.helpers.referee import assert_bitwise
from tests.helpers.zero3 import engine_of, settings, x_batch
from zeropipe import zero
from zeropipe.errors import UnavailableParameterError


class Symmetric(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.triu() + x.triu(1).t()

    def right_inverse(self, x: torch.Tensor) -> torch.Tensor:
        return x.triu()


class Product(nn.Module):
    """Two tensors in the place of one."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a @ b

    def right_inverse(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * 0.5, 2 * torch.eye(x.shape[1])


class Scaled(nn.Module):
    """With a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


class Padded(nn.Module):
    """What is stored has another shape than what is used."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :-1]

    def right_inverse(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, torch.ones(x.shape[0], 1)], 1)


def registered(*kinds: type[nn.Module], unsafe: bool = False) -> Callable[[nn.Module], nn.Module]:
    def change(module: nn.Module) -> nn.Module:
        for kind in kinds:
            parametrize.register_parametrization(module, "weight", kind(), unsafe=unsafe)
        return module

    return change


KINDS: dict[str, Callable[[Any], Any]] = {
    "weight_norm": old.weight_norm,
    "spectral_norm": old.spectral_norm,
    "weight_norm removed": lambda m: old.remove_weight_norm(old.weight_norm(m)),
    "spectral_norm removed": lambda m: old.remove_spectral_norm(old.spectral_norm(m)),
    "parametrized weight_norm": parametrizations.weight_norm,
    "parametrized weight_norm removed": lambda m: parametrize.remove_parametrizations(
        parametrizations.weight_norm(m), "weight"
    ),
    "parametrized spectral_norm": parametrizations.spectral_norm,
    "orthogonal householder": partial(parametrizations.orthogonal, orthogonal_map="householder"),
    "orthogonal cayley": partial(parametrizations.orthogonal, orthogonal_map="cayley"),
    "orthogonal matrix_exp": partial(parametrizations.orthogonal, orthogonal_map="matrix_exp"),
    "orthogonal without base": partial(parametrizations.orthogonal, use_trivialization=False),
    "orthogonal removed": lambda m: parametrize.remove_parametrizations(
        parametrizations.orthogonal(m), "weight"
    ),
    "symmetric": registered(Symmetric),
    "symmetric left": lambda m: parametrize.remove_parametrizations(
        registered(Symmetric)(m), "weight", leave_parametrized=False
    ),
    "product": registered(Product),
    "symmetric and scaled": registered(Symmetric, Scaled, unsafe=True),
    "padded": registered(Padded, unsafe=True),
    "pruned l1": partial(prune.l1_unstructured, name="weight", amount=0.3),
    "pruned at random": partial(prune.random_unstructured, name="weight", amount=0.3),
    "pruned ln": partial(prune.ln_structured, name="weight", amount=0.5, n=2, dim=0),
    "pruned at random by rows": partial(prune.random_structured, name="weight", amount=0.5, dim=1),
    "pruned by mask": lambda m: prune.custom_from_mask(m, "weight", torch.eye(*m.weight.shape)),
    "pruned twice": lambda m: prune.l1_unstructured(prune.l1_unstructured(m, "weight", 0.2), "weight", 0.2),
    "pruned for ever": lambda m: prune.remove(prune.l1_unstructured(m, "weight", 0.3), "weight"),
    "a parameter of a parameter": lambda m: _set(m, nn.Parameter(m.weight)),
    "assigned to": lambda m: _set(parametrizations.weight_norm(m), torch.full((16, 16), 0.25)),
    "given memory": lambda m: _give(m, torch.full_like(m.weight, 0.25)),
}
LOADS = [kind for kind in KINDS if kind != "spectral_norm removed"]  # torch itself cannot load that one


def _set(module: nn.Module, weight: torch.Tensor) -> nn.Module:
    with torch.no_grad():
        module.weight = weight
    return module


def _give(module: nn.Module, value: torch.Tensor) -> nn.Module:
    module.weight.data = value
    return module


class Model(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        change = KINDS[kind]
        self.first, self.middle, self.last = change(nn.Linear(16, 16)), nn.Linear(16, 16), nn.Linear(16, 16)
        change(self.last)
        torch.nn.init.normal_(self.middle.weight)  # the random numbers that follow are drawn in their turn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.middle(torch.tanh(self.first(x)))))


def kept(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def made(kind: str, init: bool, world: int) -> nn.Module:
    with zero.Init(config_dict_or_path=settings(3, world), enabled=init):
        return build(Model, kind)


def trained(rank: int, world: int, kinds: list[str], stage: int, init: bool) -> dict[str, torch.Tensor]:
    """The values of each kind, as built and after three steps."""
    found = {}
    for kind in kinds:
        module = made(kind, init, world)
        found.update({f"{kind}: built {name}": value for name, value in kept(module).items()})
        engine = engine_of(module, stage, world)
        for step in range(3):
            engine.backward(engine(x_batch(step, rank)).square().mean())
            engine.step()
        found.update({f"{kind}: trained {name}": value for name, value in kept(engine.module).items()})
        engine.destroy()
    return found


@pytest.mark.parametrize(("stage", "init"), [(1, False), (2, False), (3, False), (3, True)])
def test_every_reparametrization_is_as_at_stage_0(pool, stage, init):
    expected = pool(2).run(trained, list(KINDS), 0, False)[0]
    for ours in pool(2).run(trained, list(KINDS), stage, init):
        assert_bitwise(ours, expected)


def test_stage_0_starts_with_plain_weights(pool):
    ours = pool(1).run(trained, list(KINDS), 0, False)[0]
    for kind in KINDS:
        for name, value in build(Model, kind).state_dict().items():
            assert torch.equal(ours[f"{kind}: built {name}"], value)


def changed(kind: str) -> dict[str, torch.Tensor]:
    return {name: value * 0.9 for name, value in build(Model, kind).state_dict().items()}


def loaded_inside(rank: int, world: int, how: str) -> dict[str, torch.Tensor]:
    found = {}
    for kind in LOADS:
        state = changed(kind)
        with zero.Init(config_dict_or_path=settings(3, world)):
            module = build(Model, kind)
            if how == "in parts":
                for name, value in state.items():
                    module.load_state_dict({name: value}, strict=False)
            else:
                module.load_state_dict(state, assign=how == "assign")
        found.update({f"{kind}: {name}": value for name, value in kept(module).items()})
    return found


@pytest.mark.parametrize("how", ["whole", "in parts", "assign"])
def test_load_state_dict_inside_the_context(pool, how):
    expected = {}
    for kind in LOADS:
        module = build(Model, kind)
        module.load_state_dict(changed(kind))
        expected.update({f"{kind}: {name}": value for name, value in module.state_dict().items()})
    for ours in pool(2).run(loaded_inside, how):
        assert_bitwise(ours, expected)


def root_alone(rank: int, world: int, kind: str, stage: int) -> dict[str, torch.Tensor]:
    engine = engine_of(build(lambda: KINDS[kind](nn.Linear(16, 16))), stage, world)
    for step in range(3):
        engine.backward(engine(x_batch(step, rank)).square().mean())
        engine.step()
    values = kept(engine.module)
    engine.destroy()
    return values


@pytest.mark.parametrize("kind", ["spectral_norm", "weight_norm", "pruned l1", "parametrized spectral_norm"])
def test_around_the_root(pool, kind):
    expected = pool(2).run(root_alone, kind, 0)[0]
    for ours in pool(2).run(root_alone, kind, 3):
        assert_bitwise(ours, expected)


def assigned(rank: int, world: int) -> None:
    """A parametrized weight of an engine is assigned to, inside and outside of the context."""
    engine = engine_of(build(Model, "parametrized weight_norm"), 3, world)
    first, value = engine.module.first, torch.full((16, 16), 0.25)
    with pytest.raises(UnavailableParameterError, match=r"first\.parametrizations\.weight\.original0"):
        _set(first, value)
    with zero.GatheredParameters(list(first.parameters()), modifier_rank=0):
        _set(first, value * (rank + 1))
    with zero.GatheredParameters(list(first.parameters())):
        assert torch.equal(first.parametrizations.weight.original1, value)
        assert torch.equal(first.parametrizations.weight.original0, torch.ones(16, 1))
    engine.destroy()


def test_a_parametrized_weight_is_assigned_to(pool):
    """torch's ``set_`` asks no subclass: an assignment to a weight that is away was lost without a word, and inside
    zero.Init the model began with other weights."""
    pool(2).run(assigned)
