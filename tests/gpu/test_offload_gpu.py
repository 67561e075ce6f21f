"""Offload from a GPU: the same numbers as a CPU step gives, and memory on the device that is really freed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.data import gpt_batch
from tests.helpers.models import TinyGPT, build
from tests.helpers.referee import assert_bitwise

pytestmark = pytest.mark.gpu
STEPS = 3


def settings(stage: int, state: str, param: str, folder: Path, **extra: Any) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage, "stage3_param_persistence_threshold": 0, "sub_group_size": 4096}
    for key, device in (("offload_optimizer", state), ("offload_param", param)):
        zero[key] = {"device": device, "nvme_path": str(folder)}
    return {
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "zero_optimization": zero,
        **extra,
    }


def train(config: dict[str, Any], between: Any = None) -> dict[str, torch.Tensor]:
    import zeropipe
    from zeropipe.utils import safe_get_full_fp32_param

    engine = zeropipe.initialize(model=build(TinyGPT), config=config)[0]
    for step in range(STEPS):
        for micro in range(2):
            if between is not None:
                between(engine)
            batch = [tensor.to(engine.device) for tensor in gpt_batch(step, 0, micro)]
            engine.backward(engine(*batch))
            engine.step()
    weights = {n: safe_get_full_fp32_param(p).cpu() for n, p in engine.module.named_parameters()}
    engine.destroy()
    return weights


PRECISIONS: list[dict[str, Any]] = [{}, {"bf16": {"enabled": True}}]


@pytest.mark.parametrize("precision", PRECISIONS, ids=["fp32", "bf16"])
def test_where_shards_live_does_not_change_a_bit(tmp_path, precision):
    expected = train(settings(3, "none", "none", tmp_path, **precision))
    for param in ("cpu", "nvme"):
        assert_bitwise(train(settings(3, "none", param, tmp_path, **precision)), expected)


@pytest.mark.parametrize("precision", PRECISIONS, ids=["fp32", "bf16"])
def test_every_place_of_the_state_steps_on_the_cpu_to_the_same_bits(tmp_path, precision):
    expected = train(settings(3, "cpu", "none", tmp_path, **precision))
    for state, param in (("cpu", "cpu"), ("nvme", "none"), ("nvme", "nvme")):
        assert_bitwise(train(settings(3, state, param, tmp_path, **precision)), expected)


@pytest.mark.parametrize("stage", [1, 2])
def test_stages_1_and_2_step_on_the_cpu(tmp_path, stage):
    weights = train(settings(stage, "cpu", "none", tmp_path))
    assert all(torch.isfinite(w).all() for w in weights.values())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_states_go_and_come_back(tmp_path, stage):
    config = settings(stage, "none", "none", tmp_path, bf16={"enabled": True})
    assert_bitwise(train(config, between=lambda engine: engine.offload_states()), train(config))


def test_the_device_holds_neither_state_nor_shards(tmp_path, device):
    """Live bytes after a step, against 16 bytes per parameter without offload."""
    import zeropipe

    if device.type == "cpu":
        pytest.skip("a CPU's memory is the host's")
    width, layers = 2048, 8
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers)))
    numel = sum(p.numel() for p in model.parameters())
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    config = settings(3, "cpu", "cpu", tmp_path, bf16={"enabled": True})
    engine = zeropipe.initialize(model=model, config=config)[0]
    for _ in range(2):
        x = torch.randn(2, width, device=engine.device, dtype=torch.bfloat16)
        engine.backward(engine(x).float().square().mean())
        engine.step()
    assert torch.cuda.memory_allocated() - before < numel // 4
    partition = engine.optimizer.partitions[0]
    assert partition.master.is_pinned()
    assert partition.values.copy.is_pinned()
    engine.destroy()
