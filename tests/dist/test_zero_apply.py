"""``module.apply(fn)`` of a model in shards, outside zero.Init: as on a plain model, bit for bit, on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import zeropipe
from tests.helpers.models import build
from tests.helpers.referee import assert_bitwise
from tests.helpers.zero3 import Stack, engine_of, gathered, settings, whole, x_batch
from zeropipe.errors import DesyncError, UnavailableParameterError

# Some parameters of the model stay whole between uses, others do not.
MIXED = {"stage3_param_persistence_threshold": 40}


def init_weights(module: nn.Module) -> None:
    """As model libraries write it: by type, through ``.data`` and ``nn.init``, and once by name from far above."""
    if isinstance(module, nn.Linear):
        module.weight.data.normal_(mean=0.0, std=0.02)
        if module.bias is not None:
            nn.init.uniform_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        module.weight.data.fill_(1.5)
        module.bias.data.zero_()
    for name, param in module.named_parameters():
        if name.endswith("down.weight"):
            with torch.no_grad():
                param.normal_(std=0.02 / len(param) ** 0.5)


def fresh(seed: int, model: nn.Module) -> nn.Module:
    torch.manual_seed(seed)
    return model.apply(init_weights)


def plain() -> nn.Module:
    return fresh(7, build(Stack))


def applied(rank: int, world: int, when: str, zero: dict[str, Any]) -> dict[str, torch.Tensor]:
    chosen = settings(3, world, zero_optimization=zero)
    if when == "after Init":
        with zeropipe.zero.Init(config_dict_or_path=chosen):
            model = build(Stack)
        fresh(7 + rank, model)  # rank 0's values count
        engine = engine_of(model, 3, world, zero_optimization=zero)
    else:
        engine = engine_of(build(Stack), 3, world, zero_optimization=zero)
        if when == "after a step":
            engine.backward(engine(x_batch(0, rank)).square().mean())
            engine.step()
        assert fresh(7 + rank, engine.module) is engine.module
    assert gathered(engine.module) == []
    values = {f"before {name}": value for name, value in whole(engine.module).items()}
    engine.zero_grad()
    assert torch.equal(
        engine(x_batch(5, rank)), plain()(x_batch(5, rank))
    )  # what is used is what was written
    engine._sharded.coordinator.settle()
    if when != "after a step":  # whose moments plain training from here would not have
        for step in range(2):
            engine.backward(engine(x_batch(step, rank)).square().mean())
            engine.step()
        values.update(whole(engine.module))
    engine.destroy()
    return values


def trained(rank: int, world: int) -> dict[str, torch.Tensor]:
    engine = engine_of(plain(), 0, world)
    values = {f"before {name}": value for name, value in whole(engine.module).items()}
    for step in range(2):
        engine.backward(engine(x_batch(step, rank)).square().mean())
        engine.step()
    return {**values, **whole(engine.module)}


@pytest.mark.parametrize("zero", [{}, MIXED], ids=["away", "mixed"])
@pytest.mark.parametrize("when", ["after Init", "after initialize", "after a step"])
def test_a_pass_over_all_modules_writes_what_it_writes_on_a_plain_model(pool, when, zero):
    expected = pool(2).run(trained)[0]
    for ours in pool(2).run(applied, when, zero):
        assert_bitwise(ours, {name: value for name, value in expected.items() if name in ours})


def three_ranks_in_bf16(rank: int, world: int) -> None:
    engine = engine_of(build(Stack), 3, world, zero_optimization=MIXED, bf16={"enabled": True})
    fresh(7 + rank, engine.module)
    # In 16 bits the random numbers are others: a plain model in 16 bits is the referee.
    expected = dict(fresh(7, build(Stack).bfloat16()).named_parameters())
    assert_bitwise(whole(engine.module), {name: param.detach() for name, param in expected.items()})
    masters = {n: zeropipe.utils.safe_get_full_fp32_param(p) for n, p in engine.module.named_parameters()}
    assert_bitwise(masters, {name: param.detach().float() for name, param in expected.items()})


def test_sixteen_bits_on_three_ranks(pool):
    pool(3).run(three_ranks_in_bf16)


def looked_at(rank: int, world: int) -> None:
    """What uses no value gathers none; what reads finds the whole; a part of the model may be asked."""
    engine = engine_of(build(Stack), 3, world)
    expected = {name: param.detach() for name, param in build(Stack).named_parameters()}
    with zeropipe.comm.record() as events:
        engine.module.apply(lambda module: module.train())
    assert [event for event in events if event.bytes] == []
    seen = {}
    block = engine.module.blocks[1]
    block.apply(lambda module: seen.update({p: p.sum() for p in module.parameters(recurse=False)}))
    names = {param: name for name, param in engine.module.named_parameters()}
    assert {names[param] for param in seen} == {name for name in expected if name.startswith("blocks.1.")}
    for param, total in seen.items():
        assert torch.equal(total, expected[names[param]].sum())
    assert gathered(engine.module) == []


def test_a_look_costs_what_it_reads(pool):
    pool(2).run(looked_at)


def switched_off(rank: int, world: int) -> str:
    zero = {"override_module_apply": False}
    with zeropipe.zero.Init(config_dict_or_path=settings(3, world, zero_optimization=zero)):
        model = build(Stack)
    with pytest.raises(UnavailableParameterError):
        model.apply(init_weights)
    engine = engine_of(build(Stack), 3, world, zero_optimization=zero)
    with pytest.raises(UnavailableParameterError) as caught:
        engine.module.apply(init_weights)
    return str(caught.value)


def test_the_key_switches_it_off(pool):
    for said in pool(2).run(switched_off):
        assert "blocks.0.norm.weight" in said
        assert "GatheredParameters" in said


def raising(rank: int, world: int) -> None:
    """An exception on every rank leaves the shards as they were, and the ranks together."""
    engine = engine_of(build(Stack), 3, world)
    before = whole(engine.module)

    def fails(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.zero_()
            raise ArithmeticError("no")

    with pytest.raises(ArithmeticError):
        engine.module.apply(fails)
    assert gathered(engine.module) == []
    assert_bitwise(whole(engine.module), before)


def test_an_exception_on_all_ranks_writes_nothing(pool):
    pool(2).run(raising)


def made_plain(rank: int, world: int) -> None:
    model = build(Stack)
    engine = engine_of(model, 3, world)
    engine.destroy()
    fresh(7, model)  # still shards
    zeropipe.zero.unshard_module(model)
    assert_bitwise(dict(model.named_parameters()), dict(plain().named_parameters()))
    assert not any("apply" in vars(module) for module in model.modules())


def test_it_goes_with_the_shards(pool):
    pool(2).run(made_plain)


def alone(rank: int, world: int) -> str:
    engine = engine_of(build(Stack), 3, world)

    def odd(module: nn.Module) -> None:
        if isinstance(module, nn.LayerNorm) and rank == 1:
            module.weight.data.zero_()
        if isinstance(module, nn.Linear):
            module.weight.data.zero_()

    with pytest.raises(DesyncError) as caught:
        engine.module.apply(odd)
    return str(caught.value)


def test_an_edit_of_one_rank_alone_is_an_error_on_every_rank(pool):
    for outcome in pool(2).run_faulty(alone, timeout=60):
        assert outcome.kind == "result", (outcome.kind, outcome.error)
        assert "blocks.0" in outcome.value
