"""The pipeline engine against plain training: same losses, same weights, at every ZeRO stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import zeropipe
from tests.dist.pipe_models import BASE_SEED, batches, loss_of, plain, specs
from zeropipe.comm.record import record
from zeropipe.runtime.pipe.module import PipelineModule
from zeropipe.runtime.pipe.topology import PipeDataParallelTopology

STEPS, MICRO, LINE = 6, 4, 16


def config(stage: int = 0, **kwargs: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": MICRO,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.01}},
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
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


def reference(
    layers: list[Any], steps: int = STEPS, dp: int = 1
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Plain PyTorch on all micro-batches: replica by replica, averaged as the ranks average."""
    modules, forward = plain(layers)
    params = list(dict.fromkeys(modules.parameters()))
    # One flat parameter of whole cache lines: torch's fused step rounds the last numel % 16 elements differently.
    flat = torch.nn.Parameter(torch.cat([p.detach().reshape(-1) for p in params] + [torch.zeros(LINE)]))
    flat.data = flat.data[: flat.numel() // LINE * LINE].clone()
    optimizer = torch.optim.AdamW([flat], lr=1e-2, weight_decay=0.01, fused=True)
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
    rank: int, world: int, pp: int, stage: int, schedule: str | None, micro: int = MICRO
) -> None:
    layers = specs(blocks=2 * pp - 1)
    weights, losses = reference(layers, dp=world // pp)
    engine = engine_of(pp, world // pp, layers, config(stage), schedule=schedule)
    assert train(engine) == losses
    compare(engine, weights)
    engine.destroy()


@pytest.mark.parametrize(("world", "pp"), [(1, 1), (2, 2), (3, 3), (4, 4)])
def test_pipelines_train_like_one_process_bitwise(pool, world, pp):
    pool(world).run(same_as_plain, pp, 0, None, timeout=90)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_pipeline_and_zero_train_like_one_process_bitwise(pool, stage):
    pool(4).run(same_as_plain, 2, stage, None, timeout=90)


@pytest.mark.parametrize("schedule", ["gpipe", "interleaved", "zb-h1", "interleaved-zb", "zbv", "dualpipev"])
def test_every_schedule_trains_at_stage_2_bitwise(pool, schedule):
    pool(4).run(same_as_plain, 2, 2, schedule, timeout=90)
