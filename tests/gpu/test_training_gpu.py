"""Training on a GPU, in a world of one on NCCL: stages, precisions, optimizers, checkpoints and compiled models.

Between stages the bits are equal, as on a CPU; against plain PyTorch the weights are as close as fp32 rounds.
"""

from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zeropipe
from tests.helpers.data import gpt_batch
from tests.helpers.models import TinyGPT, build
from tests.helpers.referee import assert_bitwise
from zeropipe.comm import collectives
from zeropipe.comm.native import Native
from zeropipe.utils import safe_get_full_fp32_param

pytestmark = pytest.mark.gpu
STEPS = 4
ADAMW = {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}}
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8}},
}
OPTIMIZERS = ["Adam", "SGD", "Adagrad", "Lion", "Lamb", "Muon", "OneBitAdam", "OneBitLamb", "ZeroOneAdam"]


def settings(stage: int, **extra: Any) -> dict[str, Any]:
    return {
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "optimizer": ADAMW,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        **extra,
    }


def start(config: dict[str, Any], **how: Any) -> Any:
    model = build(TinyGPT)
    muon = config["optimizer"]["type"] == "Muon"
    for name, p in model.named_parameters():
        if muon:
            p.use_muon = p.dim() == 2 and "blocks" in name
    return zeropipe.initialize(model=model, config=config, **how)[0]


def run(engine: Any, first: int = 0, steps: int = STEPS) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        for micro in range(2):
            loss = engine(*(t.to(engine.device) for t in gpt_batch(step, 0, micro)))
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach().float())
    return [loss.item() for loss in losses]


def weights(engine: Any) -> dict[str, torch.Tensor]:
    return {n: safe_get_full_fp32_param(p).cpu() for n, p in engine.module.named_parameters()}


def trained(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    engine = start(config)
    run(engine)
    found = weights(engine)
    engine.destroy()
    return found


def test_the_engine_computes_where_the_test_says(device):
    engine = start(settings(3))
    assert engine.device.type == device.type
    backends = dict(zeropipe.comm.group.world().backends)
    assert backends.get(device.type) == ("nccl" if device.type == "cuda" else "gloo")
    engine.destroy()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_all_stages_have_the_same_bits(precision):
    found = [trained(settings(stage, **PRECISIONS[precision])) for stage in range(4)]
    for one, other in pairwise(found):
        assert_bitwise(one, other)


@pytest.mark.parametrize("stage", range(4))
def test_the_backends_own_collectives_have_the_same_bits(stage, device):
    """A world of one needs no collective; made to, they must change nothing."""
    expected = trained(settings(stage))
    with collectives.carried_by(Native()):
        assert_bitwise(trained(settings(stage)), expected)


@pytest.mark.parametrize("stage", [0, 3])
def test_fp32_trains_as_plain_pytorch_does(stage, device):
    """With SGD: Adam makes a whole step of a gradient that is nothing but rounding."""
    model = build(TinyGPT).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    for step in range(STEPS):
        for micro in range(2):
            (model(*(t.to(device) for t in gpt_batch(step, 0, micro))) / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    sgd = {"type": "SGD", "params": {"lr": 0.25}}
    for name, value in trained(settings(stage, optimizer=sgd)).items():
        torch.testing.assert_close(value, model.get_parameter(name).detach().cpu(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns(name):
    """The kernels of each run on the device: one batch again and again, and the loss falls."""
    lr = {"SGD": 0.2, "Adagrad": 0.05, "Muon": 0.02}.get(name, 0.005)
    params = {"lr": lr, **({"freeze_step": 3} if name.startswith("OneBit") else {})}
    if name == "ZeroOneAdam":
        params |= {"var_freeze_step": 3}
    stage = 0 if "One" in name or name == "Lamb" else 2
    engine = start(
        settings(stage, optimizer={"type": name, "params": params}, gradient_clipping=0.0)
        | {"gradient_accumulation_steps": 1, "train_batch_size": 1}
    )
    batch = [t.to(engine.device) for t in gpt_batch(0)]
    losses = []
    for _ in range(12):
        loss = engine(*batch)
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    first, last = losses[0].item(), losses[-1].item()
    assert last < first - 0.05, (first, last)
    engine.destroy()


@pytest.mark.parametrize(("saved", "loaded"), list(product((0, 2, 3), (1, 3))))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_goes_on_at_another_stage(tmp_path: Path, saved, loaded, precision):
    engine = start(settings(saved, **PRECISIONS[precision]))
    run(engine, 0, 2)
    engine.save_checkpoint(str(tmp_path))
    run(engine, 2, 2)
    expected = weights(engine)
    engine.destroy()
    again = start(settings(loaded, **PRECISIONS[precision]))
    again.load_checkpoint(str(tmp_path))
    run(again, 2, 2)
    assert_bitwise(weights(again), expected)
    again.destroy()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_compiled_model_trains_as_the_plain_one(stage, device):
    """The compiler fuses, so bits may differ; the losses agree as fp32 does."""
    expected = start(settings(stage))
    losses = run(expected)
    expected.destroy()
    engine = start(settings(stage))
    engine.module.compile(backend="inductor" if device.type == "cuda" else "aot_eager")
    for found, wanted in zip(run(engine), losses, strict=True):
        assert found == pytest.approx(wanted, rel=1e-3)
    engine.destroy()
