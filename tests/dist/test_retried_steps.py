"""A step that raises and is called again has the bits of one that never raised, wherever it raised.

Every allocation and every collective of a step raises once, on every rank alike or on one alone: ``engine.step()`` is
called until it returns, and weights, optimizer state, gradient norm, clock and learning rate are compared bit for bit
with those of a run in which nothing raised.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import zeropipe
from tests.helpers.data import generator
from tests.helpers.models import build
from tests.helpers.referee import assert_bitwise
from tests.helpers.train import config
from tests.helpers.zero3 import whole
from zeropipe.comm.record import inject
from zeropipe.errors import UsageError

STEPS = 3
AT = 1  # the step in which something raises; 0 is the one that makes the state


class Injected(MemoryError):
    """What is raised on purpose."""


class RaiseAt(TorchDispatchMode):
    """Raises instead of the ``at``-th operation of torch, views among them."""

    def __init__(self, at: int, in_messages: bool = True) -> None:
        super().__init__()
        self.at = at
        self.count = 0
        self.in_messages = in_messages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += self.in_messages or not _inside("comm")
        if self.count == self.at:
            raise Injected(f"{func}")
        return func(*args, **(kwargs or {}))


def _inside(folder: str) -> bool:
    frame = inspect.currentframe()
    while frame is not None and f"/{folder}/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None


def raise_outside_of_messages(at: int) -> RaiseAt:
    """What has sent a part of its messages cannot be repeated on one rank alone."""
    return RaiseAt(at, in_messages=False)


@contextmanager
def collective_raises(at: int) -> Iterator[Any]:
    """Raises before the ``at``-th collective."""
    seen = RaiseAt(at)

    def fault(event: Any) -> None:
        seen.count += 1
        if seen.count == at:
            raise Injected(event.label)

    with inject(fault):
        yield seen


class Model(nn.Module):
    """Two layers, one that is used in the second step only, and a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.late, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 24)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor, late: bool) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        return (self.last(self.late(x) if late else x).float() * self.scale.float()).square().mean()


ADAMW = {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}}
UNFUSED = {"type": "AdamW", "params": {"lr": 0.01, "fused": False}}
SGD = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}}
FP16 = {"fp16": {"enabled": True, "loss_scale": 1024.0}}
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "plain 0": (0, ADAMW, {}),
    "clipped 1": (1, ADAMW, {"gradient_clipping": 0.01}),
    "unfused 0": (0, UNFUSED, {"gradient_clipping": 0.01}),
    "unfused 2": (2, UNFUSED, {}),
    "sgd fp16 0": (0, SGD, FP16),
    "sgd fp16 sums in fp32, 2": (2, SGD, FP16 | {"data_types": {"grad_accum_dtype": "fp32"}}),
    "rmsprop bf16 1": (
        1,
        {"type": "RMSprop", "params": {"lr": 0.01, "momentum": 0.5}},
        {"bf16": {"enabled": True}},
    ),
    "lamb 1": (1, {"type": "Lamb", "params": {"lr": 0.01}}, {}),
    "muon 2": (2, {"type": "Muon", "params": {"lr": 0.01}}, {}),
    "clipped 3": (3, ADAMW, {"gradient_clipping": 0.01} | FP16),
    "lion 3": (3, {"type": "Lion", "params": {"lr": 0.01}}, {}),
    "overlapped 2": (2, ADAMW, {"zero": {"allgather_bucket_size": 64}}),
    "files 3": (3, ADAMW, {"zero": {"offload_optimizer": {"device": "nvme"}, "sub_group_size": 128}}),
}


def engine_of(case: str, world: int, folder: str) -> Any:
    stage, optimizer, extra = CASES[case]
    extra = dict(extra)
    zero = {"stage": stage, "stage3_param_persistence_threshold": 20, **extra.pop("zero", {})}
    if "offload_optimizer" in zero:
        zero["offload_optimizer"] = zero["offload_optimizer"] | {"nvme_path": folder}
    schedule = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}}
    settings = config(stage, world, zero_optimization=zero, **schedule, **extra) | {"optimizer": optimizer}
    return zeropipe.initialize(model=build(Model), config=settings)[0]


Fault = Callable[[int], Any]
FAULTS: dict[str, Fault] = {
    "operation": RaiseAt,
    "collective": collective_raises,
    "own operation": raise_outside_of_messages,
}


def fit(
    rank: int, world: int, case: str, folder: str, kind: str, at: int, step_at: int, only: int | None = None
) -> tuple[Any, int, bool]:
    """Train; in step ``step_at`` the ``at``-th thing of its kind raises (on rank ``only``, or all). Returns what the
    run ended with, how many such things the step has, and whether one raised."""
    engine = engine_of(case, world, folder)
    count, raised = 0, False
    for step in range(STEPS):
        x = torch.randn(4, 16, generator=generator(step, rank)).to(next(engine.module.parameters()).dtype)
        engine.backward(engine(x, step != 0))
        faulty = step == step_at and only in (None, rank)
        with FAULTS[kind](at) if faulty else nullcontext() as fault:
            try:
                engine.step()
            except Injected:
                raised = True
                engine.step()
        count = fault.count if faulty else count
    inner = engine.optimizer
    state = {
        f"{number}.{key}": partition.state.shard(key)
        for number, partition in enumerate(inner.partitions)
        for key in sorted(partition.state.keys())
    }
    counts = [
        partition.state.shared(i) for partition in inner.partitions for i in range(len(partition.params))
    ]
    shown = [repr({k: float(v) for k, v in (one or {}).items()}) for one in counts]
    masters = {str(n): partition.master.detach().clone() for n, partition in enumerate(inner.partitions)}
    facts = (
        engine.get_global_grad_norm(),
        engine.get_lr(),
        engine.global_steps,
        engine.global_samples,
        shown,
    )
    ended = (whole(engine.module), {k: v.clone() for k, v in state.items()}, masters, facts)
    engine.destroy()
    return ended, count, raised


def every(
    rank: int, world: int, case: str, folder: str, kind: str, step_at: int, stride: int
) -> list[tuple[int, str]]:
    """All places where the step may raise, ``stride`` apart; those at which the run ended otherwise."""
    right, count, _ = fit(rank, world, case, folder, kind, -1, step_at)
    assert count > 0 or kind == "collective"
    wrong = []
    for at in range(1, count + 1, stride):
        ours, _, raised = fit(rank, world, case, folder, kind, at, step_at)
        for what, a, b in zip(("weights", "state", "masters", "facts"), ours, right, strict=True):
            same = (
                a == b
                if what == "facts"
                else a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in b)
            )
            if not same or not raised:
                wrong.append((at, what if raised else "nothing raised"))
    return wrong


@pytest.mark.parametrize("step_at", [0, AT])
@pytest.mark.parametrize("case", CASES)
def test_a_raise_at_any_operation_and_a_retry(pool, tmp_path, case, step_at):
    """A step that raised while it made its moments left an unused parameter 0, and called again it applied the
    gradient's factor twice (fp16: an update 705 times too small)."""
    assert pool(1).run(every, case, str(tmp_path), "operation", step_at, 7) == [[]]


@pytest.mark.soak
@pytest.mark.parametrize("step_at", [0, AT])
@pytest.mark.parametrize("case", CASES)
def test_a_raise_at_each_operation_and_a_retry(pool, tmp_path, case, step_at):
    assert pool(1).run(every, case, str(tmp_path), "operation", step_at, 1) == [[]]


@pytest.mark.parametrize("case", CASES)
def test_a_raise_at_any_collective_and_a_retry(pool, tmp_path, case):
    for wrong in pool(2).run(every, case, str(tmp_path), "collective", AT, 1):
        assert wrong == []


@pytest.mark.parametrize("case", ["clipped 1", "unfused 2", "overlapped 2"])
def test_a_raise_on_one_rank_alone_while_the_other_waits(pool, tmp_path, case):
    """The retry must come to the very collective that the peer waits in, and say nothing twice."""
    folder = str(tmp_path)
    right = [result[0] for result in pool(2).run(fit, case, folder, "own operation", -1, AT)]
    count = pool(2).run(fit, case, folder, "own operation", -1, AT, 1)[1][1]
    for at in range(2, count + 1, 17):
        runs = pool(2).run(fit, case, folder, "own operation", at, AT, 1)
        assert runs[1][2]
        for (ours, _, _), expected in zip(runs, right, strict=True):
            for a, b in zip(ours[:3], expected[:3], strict=True):
                assert_bitwise(a, b)


class Failing(torch.optim.lr_scheduler.LambdaLR):
    """Raises once, after it has counted."""

    faults: list[str]

    def get_lr(self) -> list[Any]:
        if getattr(self, "faults", None):
            raise Injected(self.faults.pop())
        return super().get_lr()


def scheduled(rank: int, world: int, fails: bool) -> tuple[Any, Any, int]:
    model = build(Model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = Failing(optimizer, lambda step: 0.5**step)
    settings = config(1, world, optimizer={"type": None, "params": {}})
    engine = zeropipe.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=settings)[0]
    for step in range(STEPS):
        engine.backward(engine(torch.ones(4, 16), True))
        schedule.faults = ["schedule"] if fails and step == AT else []
        try:
            engine.step()
        except Injected:
            engine.step()
    ended = whole(engine.module), (schedule.last_epoch, engine.get_lr()), engine.global_steps
    engine.destroy()
    return ended


def test_a_schedule_that_raises_is_stepped_once_and_the_optimizer_too(pool):
    weights, schedule, steps = pool(1).run(scheduled, False)[0]
    ours, schedule_then, steps_then = pool(1).run(scheduled, True)[0]
    assert_bitwise(ours, weights)
    assert (schedule_then, steps_then) == (schedule, steps)


def reported(rank: int, world: int, at: int) -> tuple[Any, int, int, bool]:
    """Operation ``at`` of a step that is told of raises; ends with weights, steps, operations in a step, raised."""
    settings = config(1, world, steps_per_print=1)
    engine = zeropipe.initialize(model=build(Model), config=settings)[0]
    count, raised = 0, False
    for step in range(STEPS):
        engine.backward(engine(torch.ones(4, 16), True))
        with RaiseAt(at if step == AT else -1) as fault:
            try:
                engine.step()
            except Injected:
                raised = True
                engine.step()
        count = fault.count if step == AT else count
    ended = whole(engine.module), engine.global_steps, count, raised
    engine.destroy()
    return ended


def test_a_report_that_raises_after_the_step_does_not_step_twice(pool):
    """A raise in what tells of the step (its loss, its norm, a full disk of the monitor) and a retry stepped again,
    with no gradients: moments and weight decay moved the weights, and the clock counted a step too many."""
    weights, steps, count, _ = pool(1).run(reported, -1)[0]
    for at in range(count - 2, count + 1):
        ours, steps_then, _, raised = pool(1).run(reported, at)[0]
        assert raised
        assert steps_then == steps
        assert_bitwise(ours, weights)


def _raise(*args: Any) -> Any:
    raise Injected("init_group")


def given_up(rank: int, world: int) -> None:
    """After a raise before anything was stepped, zero_grad gives the step up; after that only a retry goes on."""
    engine = engine_of("plain 0", world, "")
    before = whole(engine.module)
    engine.backward(engine(torch.ones(4, 16), True))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Injected):
        patch.setattr(torch.optim.AdamW, "_init_group", _raise)
        engine.step()
    with pytest.raises(UsageError, match=r"backward: the last step raised"):
        engine.backward(engine(torch.ones(4, 16), True))
    engine.zero_grad()
    assert_bitwise(whole(engine.module), before)
    engine.backward(engine(torch.ones(4, 16), True))
    engine.step()
    assert engine.global_steps == 1
    engine.destroy()


def test_a_step_that_raised_may_be_given_up(pool):
    pool(1).run(given_up)
