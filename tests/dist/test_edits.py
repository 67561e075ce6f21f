"""What is written to a parameter in place reaches its master, at every stage, as it does in plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import zeropipe
from tests.helpers.models import build
from tests.helpers.referee import assert_bitwise, weights_of
from tests.helpers.train import config
from tests.helpers.zero3 import Stack, engine_of, whole, x_batch
from zeropipe import utils
from zeropipe.errors import UnavailableParameterError, UsageError

BF16 = {"bf16": {"enabled": True}}
PERSIST = {"stage3_param_persistence_threshold": 100_000}
EDITED = ("head.weight", "blocks.0.norm.weight", "blocks.2.down.bias")
STEPS = 4


def mask_of(param: torch.Tensor, step: int) -> torch.Tensor:
    return torch.arange(param.numel()).view(param.shape) % (step + 3) == 0


def edit(model: torch.nn.Module, step: int) -> None:
    """As a pruner does, on every rank alike."""
    with torch.no_grad():
        for name in EDITED:
            param = model.get_parameter(name)
            param.masked_fill_(mask_of(param, step), 0.25)


def spell_out(model: torch.nn.Module, step: int) -> None:
    """The same edit by way of the masters; one that rounds to the written value already is left alone."""
    for name in EDITED:
        param = model.get_parameter(name)
        master = utils.safe_get_full_fp32_param(param)
        mask = mask_of(master, step) & (master.to(param.dtype) != 0.25)
        utils.safe_set_full_fp32_param(param, master.masked_fill(mask, 0.25))


def prune(rank: int, world: int, stage: int, extra: dict[str, Any], how: str, when: str) -> Any:
    engine = engine_of(build(Stack), stage, world, **extra, zero_optimization=PERSIST if stage == 3 else {})
    model = engine.module
    change = edit if how == "in place" else spell_out
    for step in range(STEPS):
        if when == "before the forward":
            change(model, step)
        x = x_batch(step, rank)
        engine.backward(engine(x.bfloat16() if extra else x).float().square().mean())
        if when == "before the step":
            change(model, step)
        engine.step()
    change(model, STEPS)
    masters = {name: utils.safe_get_full_fp32_param(param) for name, param in model.named_parameters()}
    values = whole(model)
    engine.destroy()
    return values, masters


@pytest.mark.parametrize("when", ["before the forward", "before the step"])
@pytest.mark.parametrize("extra", [{}, BF16], ids=["fp32", "bf16"])
def test_an_edit_in_place_is_one_of_the_master_at_every_stage(pool, extra, when):
    expected = pool(2).run(prune, 0, extra, "by the masters", when)[0]
    unedited = pool(2).run(prune, 0, extra, "by the masters", "never")[0]
    assert not torch.equal(expected[0]["blocks.1.up.weight"], unedited[0]["blocks.1.up.weight"])
    for stage in (0, 1, 2, 3):
        for found in pool(2).run(prune, stage, extra, "in place", when):
            assert_bitwise(found, expected, f"stage {stage}")


def test_it_equals_plain_pytorch(pool):
    found = pool(1).run(prune, 3, {}, "in place", "before the step")[0][0]
    model = build(Stack)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, fused=True)
    for step in range(STEPS):
        model(x_batch(step, 0)).square().mean().backward()
        edit(model, step)
        optimizer.step()
        optimizer.zero_grad()
    edit(model, STEPS)
    assert_bitwise(found, weights_of(model))


def saved(rank: int, world: int, folder: str, stage: int, extra: dict[str, Any]) -> None:
    zero = PERSIST if stage == 3 else {}
    engine = engine_of(build(Stack), stage, world, **extra, zero_optimization=zero)
    edit(engine.module, 0)
    engine.module.get_parameter("blocks.0.norm.bias").data.fill_(0.5)
    engine.save_checkpoint(folder)
    values = whole(engine.module)
    engine.destroy()
    again = engine_of(build(Stack), 1, world, **extra)
    again.load_checkpoint(folder)
    found = {name: utils.safe_get_full_fp32_param(param) for name, param in again.module.named_parameters()}
    seen = stage == 3 or not extra  # where the master is a tensor of its own, .data tells nobody
    for name in (*EDITED, "blocks.0.norm.bias") if seen else EDITED:
        assert_bitwise(found[name].to(values[name].dtype), values[name], name)
    again.destroy()


@pytest.mark.parametrize("extra", [{}, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_it_is_in_the_next_checkpoint(pool, tmp_path, stage, extra):
    pool(2).run(saved, str(tmp_path), stage, extra)


def untouched(rank: int, world: int, stage: int) -> None:
    """Elements that nobody wrote to keep the bits of their masters, which are finer than bf16."""
    zero = PERSIST if stage == 3 else {}
    engine = engine_of(build(Stack), stage, world, **BF16, zero_optimization=zero)
    engine.backward(engine(x_batch(0, rank).bfloat16()).float().square().mean())
    engine.step()
    param = engine.module.get_parameter("head.weight")
    before = utils.safe_get_full_fp32_param(param)
    assert not torch.equal(before, before.bfloat16().float())
    with torch.no_grad():
        param[3, 5] = 7.0
    after = utils.safe_get_full_fp32_param(param)
    before[3, 5] = 7.0
    assert_bitwise(after, before)
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_other_elements_keep_their_bits(pool, stage):
    pool(2).run(untouched, stage)


def own_piece(rank: int, world: int) -> None:
    """A write to the master itself, by the view that safe_get_local_fp32_param gives, is not undone."""
    engine = zeropipe.initialize(model=build(Stack), config=config(3, world))[0]
    for step in range(2):
        engine.backward(engine(x_batch(step, rank)).square().mean())
        param = engine.module.get_parameter("head.weight")
        utils.safe_get_local_fp32_param(param).fill_(3.0)
        for group in engine.optimizer.param_groups:
            group["lr"] = 0.0
        engine.step()
        assert bool((whole(engine.module)["head.weight"] == 3.0).all())
    engine.destroy()


def test_a_master_written_by_itself_stays(pool):
    pool(2).run(own_piece)


def away(rank: int, world: int) -> None:
    engine = engine_of(build(Stack), 3, world)
    with pytest.raises(UnavailableParameterError, match="GatheredParameters"):
        edit(engine.module, 0)
    engine.destroy()


def test_a_parameter_that_is_away_says_so(pool):
    pool(2).run(away)


def assign(rank: int, world: int, stage: int, extra: dict[str, Any], how: str) -> Any:
    """Weights replaced as an average or a pruner does it, between backward and step and before a forward."""
    zero = PERSIST if stage == 3 else {}
    engine = engine_of(build(Stack), stage, world, **extra, zero_optimization=zero)
    model = engine.module
    for step in range(STEPS):
        for moment in range(2):
            for name in EDITED:
                param = model.get_parameter(name)
                new = torch.where(mask_of(param, step + moment), 0.5, param.detach())
                if how == "assigned":
                    param.data = new
                else:
                    with torch.no_grad():
                        param.copy_(new)
            if moment == 0:
                x = x_batch(step, rank)
                engine.backward(engine(x.bfloat16() if extra else x).float().square().mean())
        engine.step()
    masters = {name: utils.safe_get_full_fp32_param(param) for name, param in model.named_parameters()}
    values = whole(model)
    engine.destroy()
    return masters, values


@pytest.mark.parametrize("extra", [{}, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_data_that_is_assigned_is_an_edit_too(pool, stage: int, extra: dict[str, Any]):
    """After ``param.data = value`` the engine stepped on values that the model no longer showed."""
    expected = pool(2).run(assign, stage, extra, "copied")[0]
    for ours in pool(2).run(assign, stage, extra, "assigned"):
        assert_bitwise(ours, expected)


def converted(rank: int, world: int, stage: int) -> None:
    engine = engine_of(build(Stack), stage, world)
    x = x_batch(0, rank)
    for convert in ("half", "bfloat16", "double"):
        with pytest.raises(UsageError, match=r"is trained in torch.float32 on cpu and cannot become .* Fix:"):
            getattr(engine.module, convert)()  # at stage 3 this is refused, else the next forward
            engine(x)
        engine.module.float()
        before = whole(engine.module)  # rounded by now; the next step trains them
        engine.backward(engine(x).square().mean())
        engine.step()
        assert all(not torch.equal(value, before[name]) for name, value in whole(engine.module).items())
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_module_that_is_converted_after_initialize_is_told_by_name(pool, stage: int):
    """``engine.module.half()`` trained on in silence, and the weights never changed again."""
    pool(2).run(converted, stage)
