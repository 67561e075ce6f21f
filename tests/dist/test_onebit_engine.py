"""Compressed optimizers under the engine: stages 0 and 1, precisions, accumulation, overflow, checkpoints, traffic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zeropipe
from tests.helpers.pool import Pools
from zeropipe.comm.record import record
from zeropipe.errors import ConfigError, UnsupportedOptimizerError
from zeropipe.runtime.fp16.onebit import OnebitAdam

PARAMS: dict[str, dict[str, Any]] = {
    "OneBitAdam": {"lr": 0.01, "freeze_step": 3, "weight_decay": 0.01},
    "OneBitLamb": {"lr": 0.01, "freeze_step": 3, "weight_decay": 0.01},
    "ZeroOneAdam": {
        "lr": 0.01,
        "var_freeze_step": 3,
        "var_update_scaler": 2,
        "local_step_scaler": 3,
        "local_step_clipper": 4,
    },
}
NEVER_APART = {"local_step_clipper": 1}


class Net(nn.Module):
    """A scalar, an unused layer, a frozen parameter and a tied one among usual ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 21), nn.Linear(21, 6)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Linear(4, 4)
        self.frozen = nn.Parameter(torch.ones(6), requires_grad=False)
        self.tied = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(x))
        return (self.second(hidden) * self.scale + hidden @ self.tied * self.frozen).float().square().mean()


def make(name: str, stage: int, model: nn.Module | None = None, **config: Any) -> Any:
    if model is None:
        torch.manual_seed(5)
        model = Net()
    options = dict(PARAMS[name]) | config.pop("params", {})
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "optimizer": {"type": name, "params": options},
        "zero_optimization": {"stage": stage},
        **config,
    }
    return zeropipe.initialize(model=model, config=settings)[0]


def batch(rank: int, step: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 6, generator=torch.Generator().manual_seed(100 * step + rank)).to(dtype)


def train(engine: Any, rank: int, first: int, last: int) -> list[float]:
    losses = []
    dtype = next(engine.module.parameters()).dtype
    for step in range(first, last):
        loss = engine(batch(rank, step, dtype))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def weights(engine: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in engine.module.parameters()]


def stages(rank: int, size: int, name: str, config: dict[str, Any]) -> None:
    found = []
    for stage in (0, 1):
        extra = {"params": NEVER_APART} if name == "ZeroOneAdam" else {}
        engine = make(name, stage, **extra, **config)
        train(engine, rank, 0, 10)
        assert engine.optimizer.optimizer.wants_local_gradients()
        found.append(weights(engine))
        engine.destroy()
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
        assert torch.isfinite(a.float()).all()


@pytest.mark.native
@pytest.mark.parametrize("name", ["OneBitAdam", "OneBitLamb", "ZeroOneAdam"])
@pytest.mark.parametrize("size", [2, 3])
def test_stage_1_is_stage_0_to_the_bit(pool: Pools, name: str, size: int) -> None:
    pool(size).run(stages, name, {})


@pytest.mark.native
@pytest.mark.parametrize(
    "config",
    [
        {"bf16": {"enabled": True}},
        {"fp16": {"enabled": True, "initial_scale_power": 8}},
        {"gradient_accumulation_steps": 3},
        {"gradient_clipping": 0.1},
    ],
    ids=["bf16", "fp16", "accumulation", "clipping"],
)
def test_precisions_accumulation_and_clipping(pool: Pools, config: dict[str, Any]) -> None:
    pool(2).run(stages, "OneBitAdam", config)


def like_the_plain_one(rank: int, size: int) -> None:
    engine = make("OneBitAdam", 1)
    train(engine, rank, 0, 8)
    torch.manual_seed(5)
    plain = Net()
    optimizer = OnebitAdam(plain.parameters(), **PARAMS["OneBitAdam"])
    for step in range(8):
        plain.zero_grad()
        plain(batch(rank, step)).backward()
        optimizer.step()
    for (name, ours), theirs in zip(engine.module.named_parameters(), plain.parameters(), strict=True):
        if not name.startswith("unused"):  # the engine skips what no rank used, as torch.optim does
            assert torch.equal(ours, theirs), name


def test_the_engine_and_the_plain_optimizer_agree(pool: Pools) -> None:
    pool(2).run(like_the_plain_one)


def overflow(rank: int, size: int, stage: int) -> None:
    """One rank overflows in the middle of compression: no rank steps, sends bits or touches its errors."""
    engine = make("OneBitAdam", stage, fp16={"enabled": True, "initial_scale_power": 8, "hysteresis": 1})
    train(engine, rank, 0, 6)
    base = engine.optimizer.optimizer
    kept = [lane["worker_error"].clone() for lane in base.rank_state()["lanes"]]
    served = [lane["server_error"].clone() for lane in base.rank_state()["lanes"]]
    before, step = weights(engine), base.phases.step
    data = batch(rank, 6, torch.float16)
    if rank == 1:
        data[0, 0] = float("inf")
    with record() as events:
        engine.backward(engine(data))
        engine.step()
    assert not engine.was_step_applied() and engine.loss_scale == 2.0**7
    assert "all_to_all" not in [event.op for event in events]
    assert base.phases.step == step
    for kind, old in (("worker_error", kept), ("server_error", served)):
        for lane, was in zip(base.rank_state()["lanes"], old, strict=True):
            assert torch.equal(lane[kind], was)
    assert all(torch.equal(a, b) for a, b in zip(weights(engine), before, strict=True))
    train(engine, rank, 7, 9)
    assert base.phases.step == step + 2


@pytest.mark.parametrize("stage", [0, 1])
def test_an_overflow_leaves_the_error_feedback_alone(pool: Pools, stage: int) -> None:
    pool(2).run(overflow, stage)


def resume(rank: int, size: int, name: str, stage: int, at: int, folder: str, config: dict[str, Any]) -> None:
    extra = {"params": NEVER_APART} if name == "ZeroOneAdam" and stage else {}
    straight = make(name, stage, **extra, **config)
    train(straight, rank, 0, at)
    straight.save_checkpoint(folder)
    train(straight, rank, at, at + 5)
    torch.manual_seed(77)  # other weights, all of which the checkpoint replaces
    loaded = make(name, stage, Net(), **extra, **config)
    train(loaded, rank, 50, 52)
    loaded.load_checkpoint(folder)
    assert loaded.optimizer.optimizer.phases.step == at
    train(loaded, rank, at, at + 5)
    for a, b in zip(weights(straight), weights(loaded), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(
        straight.optimizer.optimizer.rank_state()["lanes"],
        loaded.optimizer.optimizer.rank_state()["lanes"],
        strict=True,
    ):
        assert torch.equal(a["worker_error"], b["worker_error"])
        assert torch.equal(a["server_error"], b["server_error"])


@pytest.mark.native
@pytest.mark.parametrize(
    ("name", "stage", "at", "config"),
    [
        ("OneBitAdam", 0, 2, {}),
        ("OneBitAdam", 0, 6, {}),
        ("OneBitAdam", 1, 6, {}),
        ("OneBitAdam", 1, 6, {"bf16": {"enabled": True}}),
        ("OneBitLamb", 1, 6, {}),
        ("ZeroOneAdam", 0, 7, {}),  # the middle of a local interval
        ("ZeroOneAdam", 0, 10, {"fp16": {"enabled": True, "initial_scale_power": 8}}),
        ("ZeroOneAdam", 1, 6, {}),
    ],
)
def test_save_load_go_on_is_never_stopped(
    pool: Pools, tmp_path: Path, name: str, stage: int, at: int, config: dict[str, Any]
) -> None:
    pool(2).run(resume, name, stage, at, str(tmp_path), config)


def save_at(rank: int, size: int, name: str, stage: int, folder: str) -> tuple[Any, float]:
    engine = make(name, stage)
    losses = train(engine, rank, 0, 10)
    engine.save_checkpoint(folder)
    return engine.optimizer.optimizer.rank_state(), losses[-1]


def load_at(rank: int, size: int, name: str, stage: int, folder: str) -> tuple[Any, list[float]]:
    import copy

    engine = make(name, stage)
    engine.load_checkpoint(folder)
    taken = copy.deepcopy(engine.optimizer.optimizer.rank_state())
    return taken, train(engine, rank, 10, 30)


@pytest.mark.parametrize(
    ("name", "old", "new", "stage", "then"),
    [
        ("OneBitAdam", 2, 3, 0, 1),
        ("OneBitAdam", 4, 2, 1, 0),
        ("OneBitLamb", 3, 2, 1, 1),
        ("ZeroOneAdam", 2, 1, 0, 0),
    ],
)
def test_another_number_of_ranks_and_another_stage(
    pool: Pools, tmp_path: Path, name: str, old: int, new: int, stage: int, then: int
) -> None:
    saved = pool(old).run(save_at, name, stage, str(tmp_path))
    found = pool(new).run(load_at, name, then, str(tmp_path))
    numel = sum(p.numel() for p in Net().parameters()) - 6  # without the frozen one
    worker = torch.stack([s["lanes"][0]["worker_error"].double()[:numel] for s, _ in saved]).mean(0)
    taken = torch.stack([t["lanes"][0]["worker_error"].double()[:numel] for t, _ in found]).mean(0)
    assert worker.any()
    assert torch.allclose(taken, worker, rtol=0, atol=1e-6 * float(worker.abs().max()))  # fp32 means
    assert all(loss < 2 * saved[0][1] for loss in found[0][1])  # it does not diverge


def traffic(rank: int, size: int, stage: int) -> list[tuple[str, int, str]]:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    engine = make("OneBitAdam", stage, model, bf16={"enabled": True})
    for _ in range(6):
        with record() as events:
            engine.backward(engine(torch.ones(2, 64, dtype=torch.bfloat16)).float().sum())
            engine.step()
    return [(event.op, event.bytes, event.label) for event in events if event.bytes > 64]


def test_bytes_of_a_compressed_step(pool: Pools) -> None:
    """Two rounds of one bit per element and a scale per tensor and shard; stage 1 gathers parameters too."""
    numel, size = 2 * 64 * 64, 2
    bits = numel // 8 + 4 * size  # each of the two shards holds one tensor
    exchange = [
        ("all_to_all", bits, "momentum: signs to servers"),
        ("all_gather", bits, "momentum: signs to all"),
    ]
    assert bits <= (numel * 2) / 16 + 4 * size
    assert pool(2).run(traffic, 0)[0] == exchange
    assert pool(2).run(traffic, 1)[0] == [*exchange, ("all_gather", 2 * numel, "parameters")]


def two_nodes(rank: int, size: int, folder: str) -> None:
    """Two nodes of two ranks: full precision inside, bits between; saved and loaded in the middle of it."""
    found = []
    for stage in (0, 1):
        engine = make("OneBitAdam", stage, params={"node_size": 2})
        train(engine, rank, 0, 6)
        engine.save_checkpoint(f"{folder}/{stage}")
        with record() as events:
            losses = train(engine, rank, 6, 7)
        crowd = [(e.op, e.group_size, e.label) for e in events if "momentum" in e.label]
        assert crowd == [
            ("reduce_scatter", 2, "momentum: average in node"),
            ("all_to_all", 2, "momentum: signs to servers"),
            ("all_gather", 2, "momentum: signs to all"),
            ("all_gather", 2, "momentum: signs in node"),
        ]
        loaded = make("OneBitAdam", stage, params={"node_size": 2})
        loaded.load_checkpoint(f"{folder}/{stage}")
        assert train(loaded, rank, 6, 7) == losses
        assert all(torch.equal(a, b) for a, b in zip(weights(engine), weights(loaded), strict=True))
        found.append(weights(engine))
        engine.destroy()
        loaded.destroy()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_full_precision_inside_a_node_and_bits_between(pool: Pools, tmp_path: Path) -> None:
    pool(4).run(two_nodes, str(tmp_path))


def pipeline(rank: int, size: int) -> None:
    """Two stages by two replicas: each stage's replicas exchange bits among themselves; tied weights are refused."""
    from tests.dist.pipe_models import specs
    from tests.dist.test_pipe_engine import config, engine_of, train

    found, losses = [], []
    for stage in (0, 1):
        settings = config(stage, optimizer={"type": "OneBitAdam", "params": {"lr": 1e-2, "freeze_step": 3}})
        engine = engine_of(2, 2, specs(), settings)
        with record() as events:
            losses.append(train(engine, steps=8))
        assert engine.optimizer.optimizer.size == 2
        exchanges = [event for event in events if event.op == "all_to_all"]
        assert len(exchanges) == 8 - 3 and all(event.group_size == 2 for event in exchanges)
        found.append(weights(engine))
        engine.destroy()
    settings = config(0, optimizer={"type": "OneBitAdam", "params": {"lr": 1e-2}})
    with pytest.raises(UnsupportedOptimizerError, match=r"pipeline stages share.*found embed"):
        engine_of(2, 2, specs(tied=True), settings)
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.native
def test_pipeline(pool: Pools) -> None:
    pool(4).run(pipeline)


def refused(rank: int, size: int) -> None:
    for stage in (2, 3):
        with pytest.raises((UnsupportedOptimizerError, ConfigError), match=f"OnebitAdam.*stage {stage}"):
            make("OneBitAdam", stage)
    with pytest.raises(UnsupportedOptimizerError, match="local_step_clipper"):
        make("ZeroOneAdam", 1)
    with pytest.raises(ConfigError, match="gradient_clipping"):
        make("OneBitAdam", 0, params={"max_grad_norm": 1.0})
    schedule = {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 2, "total_num_steps": 3}}
    with pytest.raises(ConfigError, match="compression would never start"):
        make("OneBitAdam", 0, scheduler=schedule)
    schedule = {"type": "WarmupLR", "params": {"warmup_num_steps": 9}}
    with pytest.raises(ConfigError, match="still warms up"):
        make("OneBitAdam", 0, scheduler=schedule)


def test_wrong_use_is_named(pool: Pools) -> None:
    pool(2).run(refused)
