"""What clients do to the engine and its optimizer: the contract of trainers that were written for DeepSpeed."""

from __future__ import annotations

import argparse
import inspect
import json
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import zeropipe
from tests.helpers.data import mlp_batch, token_batch
from tests.helpers.models import MLP, NastyModel, build
from tests.helpers.referee import assert_bitwise, assert_within_referee, train_plain, weights_of
from tests.helpers.train import ADAMW, config, train
from zeropipe.errors import ConfigError, UsageError

STAGES = (0, 1, 2)
STEPS = 4
mlp = partial(build, MLP)
no_optimizer = {"optimizer": {"type": None, "params": {}}}


def adamw(params: Any, **kwargs: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, **{"lr": 0.01, "weight_decay": 0.1, "fused": True, **kwargs})


def run(engine: Any, rank: int, steps: int = STEPS, start: int = 0) -> dict[str, torch.Tensor]:
    for step in range(start, start + steps):
        for micro in range(engine.gradient_accumulation_steps()):
            engine.backward(engine(*mlp_batch(step, rank, micro)))
            engine.step()
    return weights_of(engine.module)


def every_way_to_an_optimizer(rank: int, world: int, stage: int) -> list[Any]:
    results = []

    def collect(**given: Any) -> None:
        engine, optimizer, _, _ = zeropipe.initialize(**given)
        assert engine.optimizer is optimizer
        results.append(run(engine, rank))
        engine.destroy()

    bare = config(stage, world, **no_optimizer)
    model = mlp()
    collect(model=model, config=config(stage, world))
    model = mlp()
    collect(model=model, optimizer=adamw(model.parameters()), config=bare)
    model = mlp()
    collect(model=model, optimizer=adamw, config_params=bare)
    model = mlp()
    collect(model=model, config=config(stage, world), model_parameters=(p for p in model.parameters()))
    model = mlp()
    groups = [{"params": [p], "lr": 0.01} for p in model.parameters()]
    args = argparse.Namespace(device_rank=None, local_rank=-1)
    collect(args=args, model=model, optimizer=adamw, model_parameters=groups, config=bare)
    return results


@pytest.mark.parametrize("stage", STAGES)
def test_optimizer_object_callable_config_and_generator_are_the_same(pool, stage):
    for results in pool(2).run(every_way_to_an_optimizer, stage):
        for weights in results[:4]:
            assert_bitwise(weights, results[0])
        # One partition per parameter: other remainders of 16, so other roundings in the last place.
        assert_within_referee(results[4], results[0], _referee())


def _referee() -> dict[str, torch.Tensor]:
    return train_plain(
        mlp, lambda step: [mlp_batch(step, r) for r in range(2)], partial(adamw, fused=None), STEPS
    ).weights


def client_groups(rank: int, world: int) -> None:
    for stage in STAGES:
        model = mlp()
        given = adamw(
            [
                {"params": list(model.layers[0].parameters())},
                {"params": list(model.layers[1:].parameters()), "lr": 0.5},
            ]
        )
        groups = given.param_groups
        dicts = list(groups)
        schedule = torch.optim.lr_scheduler.LambdaLR(given, lambda step: 1.0 / (1 + step))
        engine, optimizer, _, returned = zeropipe.initialize(
            model=model, optimizer=given, lr_scheduler=schedule, config=config(stage, world, **no_optimizer)
        )
        assert returned is schedule is engine.lr_scheduler
        assert optimizer.optimizer is given
        assert optimizer.param_groups is groups
        assert all(a is b for a, b in zip(optimizer.param_groups, dicts, strict=True))
        run(engine, rank, 3)
        assert [g["lr"] for g in dicts] == engine.get_lr() == [0.01 / 4, 0.5 / 4]
        engine.lr_scheduler = None  # as Lightning does: nobody steps it here any more
        run(engine, rank, 1, start=3)
        assert engine.get_lr() == [0.01 / 4, 0.5 / 4]
        dicts[0]["lr"] = 0.0
        dicts[0]["weight_decay"] = 0.0
        before = weights_of(model)
        run(engine, rank, 1, start=4)
        assert_bitwise(model.layers[0].weight, before["layers.0.weight"])
        assert not torch.equal(model.layers[1].weight, before["layers.1.weight"])
        engine.destroy()
        assert [p.shape for p in dicts[0]["params"]] == [p.shape for p in model.layers[0].parameters()]


def test_the_clients_param_groups_and_schedule_stay_the_same_objects(pool):
    pool(2).run(client_groups)


def schedules(rank: int, world: int) -> None:
    class Callable:
        def __call__(self, optimizer: Any) -> Any:
            assert type(optimizer) is torch.optim.AdamW
            return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    halving = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    section = {
        "type": "WarmupLR",
        "params": {"warmup_max_lr": 0.08, "warmup_num_steps": 4, "warmup_type": "linear"},
    }
    for stage in STAGES:
        for given, extra, expected in (
            (Callable(), {}, 0.01 / 4),
            (halving, {}, 0.01 / 4),
            (torch.optim.lr_scheduler.ConstantLR, {}, 0.01 / 3),
            (None, {"scheduler": section}, 0.02),
            (None, {}, 0.01),
        ):
            engine, _, _, schedule = zeropipe.initialize(
                model=mlp(), lr_scheduler=given, config=config(stage, world, **extra)
            )
            run(engine, rank, 2)
            assert engine.get_lr() == pytest.approx([expected])
            assert (schedule is None) == (given is None and not extra)
            engine.destroy()


def test_a_schedule_is_an_object_a_callable_or_in_the_config(pool):
    pool(2).run(schedules)


def stepped_before(rank: int, world: int) -> list[Any]:
    results = []
    for stage in STAGES:
        model = build(NastyModel)
        optimizer = adamw([p for p in model.parameters() if p.requires_grad])
        for step in range(2):
            for r in range(world):
                (model(*token_batch(step, r), wake_dead=True) / world).backward()
            optimizer.step()
            optimizer.zero_grad()
        engine, *_ = zeropipe.initialize(
            model=model, optimizer=optimizer, config=config(stage, world, **no_optimizer)
        )
        for step in range(2, 4):
            engine.backward(engine(*token_batch(step, rank), wake_dead=True))
            engine.step()
        results.append(weights_of(model))
        engine.destroy()
    return results


def test_state_that_the_optimizer_already_has_is_adopted(pool):
    def plain(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        batches = lambda step: [(*token_batch(step, r), torch.tensor(True)) for r in range(2)]  # noqa: E731
        return train_plain(partial(build, NastyModel), batches, adamw, 4, dtype=dtype).weights

    runs = pool(2).run(stepped_before)
    for results in runs:
        for weights in results:
            assert_bitwise(weights, runs[0][0])
    assert_within_referee(runs[0][0], plain(torch.float32), plain(torch.float64))


class Talkative(MLP):
    """A module with members that a client reaches through the engine."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = 0.7

    def generate(self, count: int) -> str:
        return "token " * count

    @property
    def first(self) -> nn.Module:
        return self.layers[0]


def attributes(rank: int, world: int) -> None:
    settings = config(2, world)
    model = build(Talkative)
    engine, optimizer, loader, schedule = zeropipe.initialize(model=model, config=settings)
    assert loader is None and schedule is None
    assert isinstance(engine, nn.Module) and isinstance(engine, zeropipe.DeepSpeedEngine)
    assert engine.module is model
    assert engine.temperature == 0.7
    assert engine.generate(2) == "token token "
    assert engine.first is model.layers[0]
    assert [n for n, _ in engine.named_parameters()] == [f"module.{n}" for n, _ in model.named_parameters()]
    for absent in ("_hf_hook", "param_groups", "defaults", "state"):
        assert not hasattr(engine, absent)
    with pytest.raises(AttributeError, match="neither the engine nor its module has an attribute 'no_such'"):
        _ = engine.no_such
    engine._is_accelerate_prepared = True
    assert engine._is_accelerate_prepared
    assert engine.config is settings
    assert engine.config["zero_optimization"]["stage"] == 2
    assert engine.device == torch.device("cpu")
    assert not engine.eval().module.training
    assert engine.train().module.training
    assert isinstance(optimizer, zeropipe.DeepSpeedOptimizer)
    assert set(optimizer.defaults) >= {"lr", "betas"}
    assert "exclude_frozen_parameters" in inspect.signature(engine.save_checkpoint).parameters
    assert engine.train_batch_size() == world and engine.train_micro_batch_size_per_gpu() == 1
    assert (engine.global_steps, engine.global_samples, engine.skipped_steps) == (0, 0, 0)
    assert engine.get_global_grad_norm() is None
    run(engine, rank, 2)
    assert (engine.global_steps, engine.global_samples, engine.skipped_steps) == (2, 2 * world, 0)
    assert engine.was_step_applied() and isinstance(engine.get_global_grad_norm(), float)
    assert optimizer.overflow is False
    assert engine.optimizer.state_dict()["zero_stage"] == 2
    engine.destroy()
    engine.destroy()


def test_the_engine_is_a_module_that_delegates(pool):
    pool(2).run(attributes)


def fabric(rank: int, world: int, stage: int) -> list[Any]:
    """Fabric's optimizer wrapper: a class made of a wrapper and the optimizer's class, without its __init__."""

    class Wrapper:
        def __init__(self, optimizer: Any) -> None:
            self.__dict__ = {k: v for k, v in optimizer.__dict__.items() if k not in ("state_dict", "step")}
            self.__class__ = type("Fabric" + optimizer.__class__.__name__, (Wrapper, optimizer.__class__), {})
            self._optimizer = optimizer

        def step(self, closure: Any = None) -> Any:
            return self._optimizer.step() if closure is None else self._optimizer.step(closure)

        def state_dict(self) -> Any:
            return self._optimizer.state_dict()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.__dict__["_optimizer"], name)

    class Bare(Wrapper):
        """The other form: nothing but __getattr__ leads to the optimizer."""

        def __init__(self, optimizer: Any) -> None:
            self.__class__ = type("Fabric" + optimizer.__class__.__name__, (Bare, optimizer.__class__), {})
            self.__dict__["_optimizer"] = optimizer

    results = []
    for wrapper in (Wrapper, Bare):
        engine, optimizer, *_ = zeropipe.initialize(model=mlp(), config=config(stage, world))
        wrapped: Any = wrapper(optimizer)
        assert isinstance(wrapped, zeropipe.DeepSpeedOptimizer)
        assert wrapped.param_groups is optimizer.param_groups
        assert wrapped.loss_scale == 1.0 and wrapped.overflow is False
        for step in range(STEPS):
            loss = engine(*mlp_batch(step, rank))
            engine.backward(loss)
            assert wrapped.step() is None
            wrapped.zero_grad()
        assert wrapped.step(lambda: 5) == 5
        results.append(weights_of(engine.module))
        engine.destroy()
    return results


@pytest.mark.parametrize("stage", STAGES)
def test_optimizer_step_alone_is_a_whole_update_also_through_fabrics_wrapper(pool, stage):
    engine_steps = pool(2).run(train, mlp, mlp_batch, config(stage, 2), STEPS)
    for results in pool(2).run(fabric, stage):
        for weights in results:
            assert_bitwise(weights, engine_steps[0]["weights"])


def misuse(rank: int, world: int) -> None:
    engine, optimizer, *_ = zeropipe.initialize(model=mlp(), config=config(1, world))
    loss = engine(*mlp_batch(0, rank))
    for wrong in (None, 3.0, torch.ones(2), {"loss": loss}):
        with pytest.raises(UsageError, match=r"backward: loss; expected a tensor with one element, found"):
            engine.backward(wrong)
    with pytest.raises(TypeError):
        engine.backward(loss, retain_grah=True)
    with pytest.raises(
        ConfigError, match=rf"set_train_batch_size.*multiple of {world}.*found 5.*Fix: use [46]"
    ):
        engine.set_train_batch_size(5)
    with pytest.raises(UsageError, match=r"the optimizer's param group 1 holds a parameter.*Fix"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    with pytest.raises(UsageError, match=r"data_sampler is not taken.*Fix"):
        engine.deepspeed_io([1, 2], data_sampler=object())
    with pytest.raises(
        UsageError, match=r"'layers.0.weight', which another engine trains.*Fix: call destroy"
    ):
        zeropipe.initialize(model=engine.module, config=config(1, world))
    with pytest.raises(
        UsageError, match=r"another engine trains this module in torch.float32.*bfloat16.*Fix"
    ):
        zeropipe.initialize(model=engine.module, config={"bf16": {"enabled": True}})
    engine.destroy()
    for call in (lambda: engine.backward(loss), engine.step, lambda: engine.no_sync().__enter__()):
        with pytest.raises(UsageError, match=r"this engine has no optimizer. Fix: pass optimizer="):
            call()

    other = mlp()
    for wrong, kind in (
        (object(), "found object"),
        (lambda params: None, "found NoneType"),
        ("AdamW", "found str"),
    ):
        with pytest.raises(
            ConfigError, match=rf"initialize: optimizer.*expected a torch.optim.Optimizer.*{kind}.*Fix"
        ):
            zeropipe.initialize(model=mlp(), optimizer=wrong, config={"train_batch_size": world})
    with pytest.raises(
        UsageError, match=r"param group 0 of the optimizer holds a parameter of shape \(17, 10\)"
    ):
        zeropipe.initialize(
            model=mlp(), optimizer=adamw(other.parameters()), config={"train_batch_size": world}
        )
    for wrong in (None, "model", MLP):
        with pytest.raises(ConfigError, match=r"initialize: model; expected a torch.nn.Module, found"):
            zeropipe.initialize(model=wrong, config={})
    with pytest.raises(UsageError, match=r"'0.weight', '0.bias' of lazy modules have no shape yet. Fix"):
        zeropipe.initialize(model=torch.nn.Sequential(torch.nn.LazyLinear(4)), config=config(2, world))
    with pytest.raises(ConfigError, match=r"initialize: no configuration. Fix"):
        zeropipe.initialize(model=mlp())
    with pytest.raises(ConfigError, match=r"given twice, as config and config_params. Fix"):
        zeropipe.initialize(model=mlp(), config={}, config_params={"train_batch_size": 2})
    with pytest.raises(
        ConfigError, match=r"train_batch_size 5.*world size 2.*Fix: set train_batch_size to 4 or 6"
    ):
        zeropipe.initialize(model=mlp(), config={"train_batch_size": 5})
    complex_model = nn.Linear(4, 4, dtype=torch.complex64)
    with pytest.raises(
        UsageError, match=r"'weight' of torch.complex64; expected a floating-point dtype.*Fix"
    ):
        zeropipe.initialize(model=complex_model, config=config(1, world))


def test_misuse_is_told_with_a_way_out(pool):
    pool(2).run(misuse)


def boundaries(rank: int, world: int) -> list[Any]:
    results = []
    for stage in STAGES:
        engine, *_ = zeropipe.initialize(model=mlp(), config=config(stage, world, gas=4))
        steps = []
        for micro in range(6):  # accelerate says for each backward whether it ends a step
            engine.set_gradient_accumulation_boundary(is_boundary=micro in (1, 4))
            engine.backward(engine(*mlp_batch(0, rank, micro)), scale_wrt_gas=False)
            steps.append(engine.is_gradient_accumulation_boundary())
            engine.step()
        assert steps == [False, True, False, False, True, False]
        assert engine.global_steps == 2
        engine.zero_grad()
        before = weights_of(engine.module)
        engine.set_gradient_accumulation_boundary(True)
        engine.optimizer.param_groups[0]["weight_decay"] = 0.0
        engine.step()  # no gradient since zero_grad: no parameter moves
        assert_bitwise(weights_of(engine.module), before)
        results.append(before)
        engine.destroy()
    return results


def test_the_client_sets_the_boundary(pool):
    runs = pool(2).run(boundaries)
    for results in runs:
        assert_bitwise(results[1], runs[0][0])
        for name in results[2]:  # stage 2 averages each micro-batch: another order of additions
            torch.testing.assert_close(results[2][name], runs[0][0][name], rtol=1e-5, atol=1e-6)


def changed_batch(rank: int, world: int) -> None:
    for stage in STAGES:
        engine, *_ = zeropipe.initialize(model=mlp(), config=config(stage, world, gas=2))
        run(engine, rank, 1)
        engine.set_train_batch_size(3 * world)
        assert engine.gradient_accumulation_steps() == 3 and engine.train_batch_size() == 3 * world
        run(engine, rank, 2)
        assert engine.global_steps == 3 and engine.global_samples == 8 * world
        engine.destroy()


def test_set_train_batch_size_changes_the_accumulation(pool):
    pool(2).run(changed_batch)


def test_the_namespace_has_the_names_of_scripts():
    import zeropipe as deepspeed

    for path in (
        "initialize", "init_distributed", "add_config_arguments", "DeepSpeedEngine", "comm.get_rank", "comm.barrier",
        "comm.is_initialized", "comm.init_distributed", "runtime.lr_schedules.VALID_LR_SCHEDULES", "utils.logger",
        "runtime.base_optimizer.DeepSpeedOptimizer", "runtime.engine.DeepSpeedEngine", "checkpointing.checkpoint",
        "checkpointing.configure", "utils.RepeatingLoader", "utils.safe_get_full_fp32_param",
        "utils.safe_set_full_fp32_param", "utils.safe_get_full_grad", "utils.safe_set_full_grad",
        "utils.safe_get_full_optimizer_state", "utils.safe_set_full_optimizer_state", "utils.safe_get_local_grad",
        "utils.safe_set_local_optimizer_state", "zero", "pipe", "checkpoint",
    ):  # fmt: skip
        found: Any = deepspeed
        for part in path.split("."):
            found = getattr(found, part)
    for owner in (deepspeed, deepspeed.runtime, deepspeed.comm, deepspeed.utils):
        with pytest.raises(AttributeError, match="no_such"):
            _ = owner.no_such
    parser = deepspeed.add_config_arguments(argparse.ArgumentParser())
    args = parser.parse_args(["--deepspeed", "--deepspeed_config", "my.json"])
    assert args.deepspeed and args.deepspeed_config == "my.json"
    assert {"initialize", "zero", "utils"} <= set(dir(deepspeed))


def test_the_config_may_come_from_the_arguments(tmp_path, pool):
    file = tmp_path / "my.json"
    file.write_text(json.dumps({"train_batch_size": 2, "optimizer": ADAMW, "gradient_clipping": 0}))
    ours = pool(2).run(from_args, str(file))
    assert_bitwise(ours[0], pool(2).run(train, mlp, mlp_batch, config(0, 2), 1)[0]["weights"])


def from_args(rank: int, world: int, file: str) -> Any:
    engine, *_ = zeropipe.initialize(argparse.Namespace(deepspeed_config=file), mlp())
    assert engine.config["train_batch_size"] == 2
    weights = run(engine, rank, 1)
    engine.destroy()
    return weights
