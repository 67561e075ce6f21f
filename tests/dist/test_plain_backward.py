"""A plain ``loss.backward()`` gives what ``engine.backward(loss)`` gives, whatever the loss came through."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import zeropipe
from tests.helpers.data import generator
from tests.helpers.models import build
from tests.helpers.train import config
from zeropipe.comm.record import record
from zeropipe.errors import UsageError

SGD = {"type": "SGD", "params": {"lr": 0.1}}


class Named(NamedTuple):
    out: torch.Tensor
    aux: torch.Tensor


@dataclasses.dataclass
class Data:
    out: torch.Tensor
    aux: torch.Tensor


class Thing:
    def __init__(self, out: torch.Tensor, aux: torch.Tensor) -> None:
        self.out, self.aux = out, aux


class Output(dict[str, Any]):
    """As transformers' ModelOutput: a dict with attributes, which pytree does not know."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 17), nn.LayerNorm(17), nn.Linear(17, 3)
        self.aux: Any = None
        self.kept: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor, kind: str) -> Any:
        hidden = self.norm(torch.tanh(self.first(x)))
        out, aux = self.last(hidden), hidden.square().mean()
        if kind == "attribute":
            self.aux = aux
            return out
        if kind == "list":
            self.kept.append(aux)
            return out
        if kind == "nothing":
            self.kept.append(out.square().mean() + aux)
            return None
        made: dict[str, Callable[[], Any]] = {
            "tuple": lambda: (out, aux),
            "dict": lambda: {"out": out, "aux": aux},
            "namedtuple": lambda: Named(out, aux),
            "dataclass": lambda: Data(out, aux),
            "object": lambda: Thing(out, aux),
            "output": lambda: Output(out=out, aux=aux),
        }
        return made[kind]() if kind in made else out.square().mean() + aux


KINDS = [
    "tensor",
    "tuple",
    "dict",
    "namedtuple",
    "dataclass",
    "object",
    "output",
    "attribute",
    "list",
    "nothing",
    "second",
]


def loss_of(call: Callable[..., Any], net: Net, x: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "second":
        x = x.clone().requires_grad_()
        loss: torch.Tensor = call(x, "tensor")
        (found,) = torch.autograd.grad(loss, x, create_graph=True)
        return loss + found.float().square().sum()
    result = call(x, kind)
    if kind in ("tensor",):
        return result
    if kind == "nothing":
        return net.kept.pop()
    if kind == "attribute":
        return result.square().mean() + net.aux
    if kind == "list":
        return result.square().mean() + net.kept.pop()
    if kind == "tuple":
        result = Named(*result)
    if kind == "dict":
        result = Named(**result)
    return result.out.square().mean() + result.aux


def grads_of(engine: Any) -> dict[str, torch.Tensor]:
    return {n: zeropipe.utils.safe_get_full_grad(p) for n, p in engine.module.named_parameters()}


def window(engine: Any, rank: int, gas: int, kind: str, how: str, dtype: torch.dtype) -> dict[str, Any]:
    """The gradients of one window, which is then forgotten and its step made without any."""
    for micro in range(gas):
        x = torch.randn(4, 6, generator=generator(rank, micro)).to(dtype)
        loss = loss_of(engine, engine.module, x, kind)
        if how == "engine":
            engine.backward(loss)
        elif how == "scale":
            engine.scale(loss).backward()
        else:
            loss.backward()
        if micro < gas - 1:
            engine.step()
    found = grads_of(engine)
    engine.zero_grad()
    engine.step()
    return found


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def start(stage: int, world: int, gas: int, precision: str) -> Any:
    extra: dict[str, Any] = {}
    if precision != "fp32":
        extra[precision] = {"enabled": True, **({"loss_scale": 64.0} if precision == "fp16" else {})}
    zero = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}
    settings = config(stage, world, gas=gas, optimizer=SGD, zero_optimization=zero, **extra)
    return zeropipe.initialize(model=build(Net), config=settings)[0]


def compared(rank: int, world: int, stage: int, precision: str) -> list[str]:
    """What differs between the ways to call backward, by kind of output."""
    wrong = []
    # A factor 1/3 rounds at another place; a factor that is missing or there twice is off by 3 or 64.
    tolerance = {"fp32": 1e-5, "bf16": 3e-2, "fp16": 4e-3}[precision]
    for gas in (1, 3):
        engine = start(stage, world, gas, precision)
        for kind in KINDS:
            right = window(engine, rank, gas, kind, "engine", DTYPES[precision])
            scaled = window(engine, rank, gas, kind, "scale", DTYPES[precision])
            wrong += [f"{gas} {kind} {n} scale" for n in right if not torch.equal(right[n], scaled[n])]
            if precision == "fp16":
                loss = loss_of(engine, engine.module, torch.randn(4, 6).half(), kind)
                with pytest.raises(UsageError, match=r"engine\.scale"):
                    loss.backward()
                continue  # and the next kind goes on with the engine
            plain = window(engine, rank, gas, kind, "plain", DTYPES[precision])
            for name, value in right.items():
                if gas == 1 and not torch.equal(value, plain[name]):
                    wrong.append(f"{gas} {kind} {name} plain")
                torch.testing.assert_close(plain[name], value, rtol=tolerance, atol=tolerance * 0.1)
            if precision == "fp32":
                net = build(Net)
                for peer in range(world):
                    for micro in range(gas):
                        x = torch.randn(4, 6, generator=generator(peer, micro))
                        (loss_of(net, net, x, kind) / gas / world).backward()
                for name, param in net.named_parameters():
                    torch.testing.assert_close(plain[name], param.grad, rtol=tolerance, atol=tolerance * 0.1)
        engine.destroy()
    return wrong


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_whatever_the_loss_came_through(pool, stage, precision):
    """The factor entered only at tensors that pytree found in what forward returned: a loss in a dataclass or an
    attribute was 3 times too large with 3 accumulation steps, and 64 times too small with a loss scale of 64."""
    assert pool(2).run(compared, stage, precision) == [[], []]


def true_gradients(rank: int, world: int) -> None:
    x = torch.randn(3, 6, generator=generator(rank))
    net = build(Net)
    right = torch.autograd.grad(net(x, "tensor"), list(net.parameters()))
    of_input = torch.func.grad(lambda y: net(y, "tensor"))(x)
    for stage in (0, 1, 2):
        for precision in ("fp32", "fp16"):
            engine = start(stage, world, 3, precision)
            if precision == "fp32":
                loss = engine(x, "tensor")
                found = torch.autograd.grad(loss, list(engine.module.parameters()), retain_graph=True)
                for one, value in zip(found, right, strict=True):
                    assert torch.equal(one, value)
                assert all(p.grad is None for p in engine.module.parameters())
                torch.testing.assert_close(
                    torch.func.grad(lambda y, engine=engine: engine(y, "tensor"))(x), of_input
                )
                torch.testing.assert_close(
                    torch.func.vmap(torch.func.grad(lambda y, engine=engine: engine(y, "tensor")))(x),
                    torch.func.vmap(torch.func.grad(lambda y: net(y, "tensor")))(x),
                )
            else:  # no error either, although nothing scaled this loss
                torch.autograd.grad(engine(x.half(), "tensor"), list(engine.module.parameters()))
            engine.destroy()


def refused_transform(rank: int, world: int) -> None:
    engine = start(3, world, 1, "fp32")
    x = torch.randn(3, 6, generator=generator(rank))
    with pytest.raises(UsageError, match=r"functorch.*Fix"):
        torch.func.grad(lambda y, engine=engine: engine(y, "tensor"))(x)
    engine.backward(engine(x, "tensor"))
    engine.step()
    engine.destroy()


def test_torch_func_around_stage_3_is_a_named_error_and_training_goes_on(pool):
    """As the first thing an engine did it ended the process: autograd was asked for nodes inside of the transform."""
    pool(2).run(refused_transform)


def test_autograd_grad_and_torch_func_see_true_gradients(pool):
    """They saw the factor of the accumulation, and torch.func met an autograd function that it cannot transform."""
    pool(2).run(true_gradients)


def one_through_another(rank: int, world: int, stage: int) -> None:
    """G's loss runs through D's parameters, with other accumulation steps and loss scales."""
    fp16 = {"fp16": {"enabled": True, "loss_scale": 8.0}}
    kinds: list[tuple[dict[str, Any], dict[str, Any], torch.dtype]] = [
        ({"gas": 3}, {}, torch.float32),
        ({}, {"gas": 3}, torch.float32),
        (fp16, {"fp16": {"enabled": True, "loss_scale": 2.0}, "gas": 2}, torch.float16),
    ]
    for for_d, for_g, dtype in kinds:
        start_d, start_g = build(nn.Linear, 4, 16), build(nn.Linear, 16, 4, seed=1)
        z = torch.randn(8, 16, generator=generator(rank)).to(dtype)
        d = zeropipe.initialize(model=build(nn.Linear, 4, 16), config=config(stage, world, **for_d))[0]
        g = zeropipe.initialize(model=build(nn.Linear, 16, 4, seed=1), config=config(stage, world, **for_g))[
            0
        ]
        for backward in (g.backward, lambda loss, g=g: g.scale(loss).backward()):
            backward(d(g(z)).float().square().mean())
            found = (
                zeropipe.utils.safe_get_full_grad(d.module.weight),
                zeropipe.utils.safe_get_full_grad(g.module.weight),
            )
            d.zero_grad()
            g.zero_grad()
            for peer in range(world):
                there = torch.randn(8, 16, generator=generator(peer)).to(dtype)
                start_d.to(dtype), start_g.to(dtype)
                (start_d(start_g(there)).float().square().mean() / world).backward()
            want = (
                start_d.weight.grad.float() / for_d.get("gas", 1),
                start_g.weight.grad.float() / for_g.get("gas", 1),
            )
            start_d.zero_grad()
            start_g.zero_grad()
            for one, value in zip(found, want, strict=True):
                torch.testing.assert_close(
                    one, value, rtol=1e-2, atol=1e-4
                )  # a wrong factor is off by 2 at least
        d.destroy()
        g.destroy()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_backward_of_another_engine_is_not_a_plain_one(pool, stage):
    pool(2).run(one_through_another, stage)


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))

    def forward(self, x: torch.Tensor, reentrant: bool) -> torch.Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=reentrant)
        return functional.tanh(x).square().mean()


def reductions(rank: int, world: int, stage: int) -> list[list[Any]]:
    found = []
    for plain in (False, True):
        for reentrant in (False, True):
            settings = config(stage, world, zero_optimization={"stage": stage, "reduce_bucket_size": 512})
            engine = zeropipe.initialize(model=build(Deep), config=settings)[0]
            for step in range(2):
                x = torch.randn(4, 16, generator=generator(rank, step)).requires_grad_()
                loss = engine(x, reentrant)
                with record() as events:
                    loss.backward() if plain else engine.backward(loss)
                    engine.step()
            found.append([e.bytes for e in events if e.label == "gradients"])
            found.append(
                [
                    p.item()
                    for p in [
                        zeropipe.utils.safe_get_full_fp32_param(q).sum() for q in engine.module.parameters()
                    ]
                ]
            )
            engine.destroy()
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_reentrant_checkpoints_reduce_the_model_once(pool, stage):
    """A plain backward ended its pass with each checkpoint, and so reduced the whole model once per segment."""
    for found in pool(2).run(reductions, stage):
        assert found[0] and found == found[:2] * 4


class Tied(nn.Module):
    """One layer in two re-entrant segments: two gradients in one backward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, x: torch.Tensor, reentrant: bool) -> torch.Tensor:
        for _ in range(2):
            x = torch.tanh(checkpoint(self.layer, x, use_reentrant=reentrant))
        return self.head(x).square().mean()


def twice(rank: int, world: int, stage: int) -> None:
    right = None
    for plain in (False, True):
        for reentrant in (False, True):
            for gas in (1, 2):
                engine = zeropipe.initialize(model=build(Tied), config=config(stage, world, gas=gas))[0]
                for micro in range(gas):
                    x = torch.randn(4, 16, generator=generator(rank)).requires_grad_()
                    loss = engine(x, reentrant)
                    loss.backward() if plain else engine.backward(loss)
                    if micro < gas - 1:
                        engine.step()
                found = grads_of(engine)
                right = right or found
                for name, value in right.items():
                    torch.testing.assert_close(found[name], value)
                engine.destroy()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_layer_in_two_reentrant_segments_gets_both_gradients(pool, stage):
    """At stage 0 the second gradient was overwritten by the view of the first one's average."""
    pool(2).run(twice, stage)


def interrupted(rank: int, world: int, stage: int, plain: bool) -> None:
    """A backward raises in the middle; the window is forgotten and made again."""
    runs = []
    for fails in (False, True):
        for gas in (1, 2):
            engine = zeropipe.initialize(model=build(Net), config=config(stage, world, gas=gas))[0]
            raising = [False]

            def maybe(grad: torch.Tensor, raising: list[bool] = raising) -> None:
                if raising[0]:
                    raise MemoryError("no memory")

            def micro(step: int, number: int, engine: Any = engine) -> None:
                loss = engine(torch.randn(4, 6, generator=generator(rank, step, number)), "tensor")
                loss.backward() if plain else engine.backward(loss)

            engine.module.first.bias.register_hook(maybe)
            for step in range(2):
                if fails and step == 1:
                    raising[0] = True
                    with pytest.raises(MemoryError):
                        micro(step, 0)
                    raising[0] = False
                    with pytest.raises(UsageError, match=r"incomplete.*engine\.zero_grad"):
                        engine.step()
                    engine.zero_grad()
                for number in range(gas):
                    micro(step, number)
                    engine.step()
            weights = {
                n: zeropipe.utils.safe_get_full_fp32_param(p) for n, p in engine.module.named_parameters()
            }
            runs.append(weights)
            engine.destroy()
    for once, again in zip(runs[:2], runs[2:], strict=True):
        for name, value in once.items():
            assert torch.equal(again[name], value), name


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_window_whose_backward_raised_is_refused_and_made_again(pool, stage, plain):
    """What a raised backward had taken was stepped with, or added to the next one."""
    pool(2).run(interrupted, stage, plain)


def returned(rank: int, world: int) -> None:
    engine = zeropipe.initialize(model=build(Net), config=config(0, world, gas=4))[0]
    loss = engine(torch.randn(4, 6), "tensor")
    assert torch.equal(engine.backward(loss), loss / 4)
    loss = engine(torch.randn(4, 6), "tensor")
    assert engine.backward(loss, scale_wrt_gas=False) is loss
    engine.destroy()


def test_engine_backward_returns_the_loss_as_the_step_uses_it(pool):
    pool(2).run(returned)
