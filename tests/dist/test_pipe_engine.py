"""The pipeline engine against plain training: same losses, same weights, at every ZeRO stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

import zeropipe
from tests.dist.pipe_models import BASE_SEED, batches, loss_of, plain, specs
from zeropipe.comm.record import record
from zeropipe.runtime.pipe.layers import LayerSpec
from zeropipe.runtime.pipe.module import PipelineModule
from zeropipe.runtime.pipe.topology import PipeDataParallelTopology

STEPS, LONG, MICRO, LINE = 6, 20, 4, 16
# A tied weight's gradient is (all uses here) + (all uses there) instead of one sum by micro-batch: last bits differ.
# SGD keeps them last bits; Adam would blow up those of gradients that are zero but for rounding.
TIED_LOSS, TIED_WEIGHT = 1e-5, 1e-6
NORM = 1e-3  # after three clipped AdamW steps with other last bits


def config(stage: int = 0, **kwargs: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": MICRO,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.01}},
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        **kwargs,
    }


def engine_of(pp: int, dp: int, layers: list[Any], settings: dict[str, Any], **kwargs: Any) -> Any:
    module = PipelineModule(
        layers,
        topology=PipeDataParallelTopology(pp, dp),
        loss_fn=kwargs.pop("loss_fn", loss_of),
        seed_layers=True,
        base_seed=BASE_SEED,
        **kwargs,
    )
    return zeropipe.initialize(model=module, config=settings)[0]


def data_of(step: int, replica: int = 0, dp: int = 1) -> list[Any]:
    return batches(MICRO * dp, seed=100 + step)[replica::dp]


def train(engine: Any, steps: int = STEPS) -> list[float]:
    dp, replica = engine.grid.data_parallel_size, engine.grid.data_parallel_id
    return [engine.train_batch(iter(data_of(s, replica, dp))).item() for s in range(steps)]


def adamw(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.01, fused=True)


def sgd(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def reference(
    layers: list[Any], steps: int = STEPS, dp: int = 1, make: Callable[..., torch.optim.Optimizer] = adamw
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Plain PyTorch on all micro-batches: replica by replica, averaged as the ranks average."""
    modules, forward = plain(layers)
    params = list(dict.fromkeys(modules.parameters()))
    # One flat parameter of whole cache lines: torch's fused step rounds the last numel % 16 elements differently.
    flat = torch.nn.Parameter(torch.cat([p.detach().reshape(-1) for p in params] + [torch.zeros(LINE)]))
    flat.data = flat.data[: flat.numel() // LINE * LINE].clone()
    optimizer = make([flat])
    losses = []
    for step in range(steps):
        sums, total = [], []
        for replica in range(dp):
            for p in params:
                p.grad = None
            seen = []
            for tokens, labels in data_of(step, replica, dp):
                loss = loss_of(forward(tokens), labels)
                seen.append(loss.detach())
                (loss / MICRO).backward()
            sums.append([p.grad for p in params])
            total.append(torch.stack(seen).mean())
        whole = [sum(grads[1:], start=grads[0]).reshape(-1) / dp for grads in zip(*sums, strict=True)]
        flat.grad = torch.zeros_like(flat)
        flat.grad[: sum(g.numel() for g in whole)] = torch.cat(whole)
        optimizer.step()
        for p, new in zip(
            params,
            flat.detach().split([p.numel() for p in params] + [flat.numel() - len(torch.cat(whole))]),
            strict=False,
        ):
            p.data.copy_(new.view(p.shape))
        losses.append((sum(total[1:], start=total[0]) / dp).item())
    return {n: p.detach() for n, p in modules.named_parameters()}, losses


def compare(engine: Any, weights: dict[str, torch.Tensor]) -> None:
    for name, param in engine.module.named_parameters():
        full = zeropipe.utils.safe_get_full_fp32_param(param)
        assert torch.equal(full, weights[name]), f"{name}: {(full - weights[name]).abs().max()}"


def same_as_plain(
    rank: int, world: int, pp: int, stage: int, schedule: str | None, steps: int = STEPS
) -> None:
    layers = specs(blocks=2 * pp - 1)
    weights, losses = reference(layers, steps, dp=world // pp)
    engine = engine_of(pp, world // pp, layers, config(stage), schedule=schedule)
    assert train(engine, steps) == losses
    compare(engine, weights)
    engine.destroy()


@pytest.mark.parametrize(("world", "pp"), [(1, 1), (2, 2), (3, 3), (4, 4)])
def test_pipelines_train_like_one_process_bitwise(pool, world, pp):
    pool(world).run(same_as_plain, pp, 0, None, LONG, timeout=90)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_pipeline_and_zero_train_like_one_process_bitwise(pool, stage):
    pool(4).run(same_as_plain, 2, stage, None, LONG, timeout=90)


@pytest.mark.parametrize("schedule", ["gpipe", "interleaved", "zb-h1", "interleaved-zb", "zbv", "dualpipev"])
def test_every_schedule_trains_bitwise_at_stage_3(pool, schedule):
    pool(4).run(same_as_plain, 2, 3, schedule, timeout=90)


def traffic(rank: int, world: int, stage: int, micro: int) -> dict[str, int]:
    engine = engine_of(
        2, 2, specs(blocks=3), config(stage, gradient_accumulation_steps=micro), schedule="1f1b"
    )
    data = batches(micro * 2)
    engine.train_batch(iter(data))
    with record() as events:
        engine.train_batch(iter(data))
    labels = Counter(f"{e.op} {e.label.split()[0] if e.op in ('send', 'recv') else e.label}" for e in events)
    gathers = [e for e in events if e.op == "all_gather"]
    parameters = len(list(engine.module.parameters()))
    return {
        "sends": sum(n for key, n in labels.items() if key.startswith("send ")),
        "reductions": labels["reduce_to_owners gradients"] + labels["all_reduce gradients"],
        "gathers": len(gathers) / parameters if stage == 3 else len(gathers),
    }


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_reductions_and_gathers_do_not_grow_with_micro_batches(pool, stage):
    few, many = (pool(4).run(traffic, stage, micro) for micro in (2, 6))
    for a, b in zip(few, many, strict=True):
        assert (a["sends"], b["sends"]) == (2, 6)
        assert a["reductions"] == b["reductions"] == 1
        assert a["gathers"] == b["gathers"] == {0: 0, 2: 1, 3: 1}[stage]


def tied_training(rank: int, world: int, stage: int, schedule: str) -> dict[str, torch.Tensor]:
    layers = specs(blocks=3, tied=True)
    weights, losses = reference(layers, dp=2, make=sgd)
    settings = config(stage, optimizer={"type": "SGD", "params": {"lr": 0.1}})
    engine = engine_of(2, 2, layers, settings, schedule=schedule)
    found = train(engine)
    assert found == pytest.approx(losses, rel=TIED_LOSS)
    worst = 0.0
    full = {
        n: zeropipe.utils.safe_get_full_fp32_param(p).clone() for n, p in engine.module.named_parameters()
    }
    for name, value in full.items():
        worst = max(worst, (value - weights[name]).abs().max().item())
    assert worst < TIED_WEIGHT
    return {"embedding": full["0.weight"]} if "0.weight" in full else {}


@pytest.mark.parametrize(("stage", "schedule"), [(0, "1f1b"), (1, "zb-h1"), (2, "interleaved"), (3, "zb-h1")])
def test_tied_weights_stay_bit_equal_and_follow_plain_training(pool, stage, schedule):
    copies = [
        found["embedding"] for found in pool(4).run(tied_training, stage, schedule, timeout=90) if found
    ]
    assert len(copies) == 4  # two pipeline ranks, two replicas
    assert all(torch.equal(copies[0], copy) for copy in copies[1:])


def tied_on_one_rank(rank: int, world: int) -> None:
    """ZBV puts the first and the last stage on one rank: a tied pair needs no communication there."""
    layers = specs(blocks=3, tied=True)
    weights, losses = reference(layers)
    engine = engine_of(2, 1, layers, config(2), schedule="zbv")
    assert engine.module.ties == []
    assert train(engine, 2) == pytest.approx(losses[:2], rel=TIED_LOSS)


def test_zbv_keeps_a_tied_pair_on_one_rank(pool):
    pool(2).run(tied_on_one_rank)


def clipped(rank: int, world: int, pp: int, tied: bool, stage: int) -> list[float]:
    engine = engine_of(pp, 1, specs(blocks=3, tied=tied), config(stage, gradient_clipping=0.05))
    train(engine, 3)
    return [engine.get_global_grad_norm()]


@pytest.mark.parametrize(("tied", "stage"), [(False, 0), (True, 1), (True, 3)])
def test_the_norm_is_that_of_the_whole_model_with_ties_counted_once(pool, tied, stage):
    alone = pool(1).run(clipped, 1, tied, stage)[0][0]
    for ranks in (2, 3):
        norms = [found[0] for found in pool(ranks).run(clipped, ranks, tied, stage)]
        assert len(set(norms)) == 1
        assert norms[0] == pytest.approx(alone, rel=NORM)


class Overflow(torch.nn.Module):
    """Makes an infinite gradient on its own stage, once, in micro-batch 2 of step 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8))
        self.calls = 0

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == MICRO + 3:
            return h * self.weight + (self.weight * 60000.0 * 2.0).sum() * 0.0
        return h * self.weight


def overflowing(rank: int, world: int, stage: int) -> list[Any]:
    layers = specs(blocks=3)
    layers.insert(2, LayerSpec(Overflow))
    settings = config(stage, fp16={"enabled": True, "initial_scale_power": 8, "hysteresis": 1})
    engine = engine_of(2, 2, layers, settings, partition_method=[0, 3, 6])
    scales = [engine.loss_scale]
    before = None
    for step in range(3):
        if step == 1:
            before = [p.detach().clone() for p in engine.module.parameters()]
        engine.train_batch(iter(data_of(step, engine.grid.data_parallel_id, 2)))
        if step == 1 and stage < 3:
            assert all(torch.equal(a, b) for a, b in zip(before, engine.module.parameters(), strict=True))
        scales.append(engine.loss_scale)
    return [engine.skipped_steps, scales]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_an_overflow_on_one_stage_skips_the_step_on_all(pool, stage):
    found = pool(4).run(overflowing, stage)
    assert all(one == found[0] for one in found)
    skipped, scales = found[0]
    assert skipped == 1
    assert scales == [256, 256, 128, 128]
