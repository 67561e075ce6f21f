"""What runs beside the computation: gathers ahead of use, gradients on their way out, states that come and go.

Each test trains twice, once with every launch waited for, and the bits are equal. Under torch's CUDA sanitizer
(`TORCH_CUDA_SANITIZER=1`, as `make gpu` runs this file) a pair of accesses that no event orders is an error too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zeropipe
from tests.helpers.referee import assert_bitwise
from zeropipe.streams import STREAMS, Side
from zeropipe.utils import safe_get_full_fp32_param

pytestmark = pytest.mark.gpu
WIDTH, LAYERS, STEPS = 256, 6, 3


class Waits(nn.Module):
    """A layer after which the host waits for the device: nothing is in flight at its border."""

    def __init__(self, layer: nn.Module, wait: bool) -> None:
        super().__init__()
        self.layer, self.wait = layer, wait

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        if self.wait and x.is_cuda:
            torch.cuda.synchronize()
        return y


def trained(config: dict[str, Any], device: torch.device, wait: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    layers = [
        Waits(nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)), wait)
        for _ in range(LAYERS)
    ]
    engine = zeropipe.initialize(model=nn.Sequential(*layers), config=config)[0]
    dtype = torch.bfloat16 if "bf16" in config else torch.float32
    for step in range(STEPS):
        for micro in range(2):
            x = torch.randn(
                8, WIDTH, generator=torch.Generator().manual_seed(10 * step + micro), dtype=torch.float32
            ).to(device, dtype)
            engine.backward(engine(x).float().square().mean())
            engine.step()
    found = {n: safe_get_full_fp32_param(p).cpu() for n, p in engine.module.named_parameters()}
    engine.destroy()
    return found


PLACES = [("none", "none"), ("cpu", "none"), ("cpu", "cpu"), ("nvme", "nvme")]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("places", PLACES, ids="-".join)
def test_what_overlaps_is_ordered(tmp_path: Path, device, stage, places, precision):
    state, param = places
    if stage < 3 and param != "none":
        pytest.skip("parameters are offloaded at stage 3")
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": True,
        "reduce_bucket_size": 4 * WIDTH * WIDTH,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 8 * WIDTH * WIDTH,
        "sub_group_size": 8 * WIDTH * WIDTH,
    }
    for key, where in (("offload_optimizer", state), ("offload_param", param)):
        if where != "none":
            zero[key] = {"device": where, "pin_memory": True, "nvme_path": str(tmp_path)}
    config: dict[str, Any] = {
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "zero_optimization": zero,
    }
    if precision == "bf16":
        config["bf16"] = {"enabled": True}
    assert_bitwise(trained(config, device, wait=False), trained(config, device, wait=True))


@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_what_is_staged_arrives(device, wanted):
    """Sums in host memory, rounding on the way back, and a ring that is used many times over."""
    streams = STREAMS.of(device)
    total, target = (
        streams.zeros(2**19, torch.float32),
        torch.empty(2**19, dtype=torch.bfloat16, device=device),
    )
    for at in range(20):
        piece = torch.full((2**19,), at, dtype=wanted, device=device)
        with streams.beside(Side.OUT):
            streams.add(total, piece)
            moment = streams.mark()
        streams.wait(moment)
        streams.bring(target, total)
    streams.host_turn()
    assert (total == 190).all()
    assert (target == 190).all()


def test_pinned_memory_is_exact(device):
    if device.type == "cpu":
        pytest.skip("a CPU's memory is the host's")
    tensor = STREAMS.of(device).zeros(5_000_001, torch.uint8)
    assert tensor.is_pinned()
    assert tensor.untyped_storage().nbytes() == 5_000_001
    assert torch.equal(tensor.to(device, non_blocking=True).cpu(), tensor)


@pytest.mark.parametrize("side", [Side.IN, Side.OUT])
def test_copies_are_done_while_the_device_computes(device, side):
    if device.type == "cpu":
        pytest.skip("a CPU does one thing at a time")
    streams = STREAMS.of(device)
    host, here = streams.zeros(2**22, torch.float32), torch.ones(2**22, device=device)
    x = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()
    before = streams.mark()
    for _ in range(200):
        x = (x @ x).clamp_(-1, 1)
    busy = streams.mark()
    with streams.beside(side, after=before):
        streams.copy(*((here, host) if side is Side.IN else (host, here)))
    streams.host_turn()
    assert not streams.passed(busy)
    assert (here == (0 if side is Side.IN else 1)).all() and (host == (0 if side is Side.IN else 1)).all()
