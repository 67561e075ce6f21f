"""One rank of one checkout: makes as many steps as each line of standard input says, and prints the time of one."""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import zeropipe
from benchmarks.common.model import GPT, Size, batch

# A step of about 10 ms: the engine's own work shows, and messages are of several sizes.
SIZE = Size(layers=4, width=128, heads=4, vocabulary=512, context=64, micro_batch=2)


def main() -> None:
    case = json.loads(sys.argv[1])
    torch.manual_seed(0)
    zeropipe.init_distributed("gloo", dist_init_required=True)
    step = make(case)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            step()
        sys.stdout.write(f"{(time.perf_counter() - start) / int(line)}\n")
        sys.stdout.flush()


def make(case: dict[str, Any]) -> Callable[[], None]:
    """One step of the case."""
    kind = case.get("model", "gpt")
    params = {"freeze_step": 5} if case.get("optimizer") == "OneBitAdam" else {}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": case.get("optimizer", "AdamW"), "params": {"lr": 1e-4, **params}},
        "zero_optimization": {"stage": case["stage"]},
        "bf16": {"enabled": case.get("bf16", False)},
    }
    if kind == "pipeline":
        return pipeline(config)
    if kind == "gpt":
        x, y = batch(SIZE, 0, torch.device("cpu"))
        return plain(GPT(SIZE), config, lambda engine: engine(x, y))
    width, layers = (16, 500) if kind == "many" else (64, 200)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    x = torch.randn(4, width)
    return plain(model, config, lambda engine: engine(x).square().mean())


def plain(
    model: nn.Module, config: dict[str, Any], loss_of: Callable[[Any], torch.Tensor]
) -> Callable[[], None]:
    engine, *_ = zeropipe.initialize(model=model, config=config)

    def step() -> None:
        engine.backward(loss_of(engine))
        engine.step()

    return step


def pipeline(config: dict[str, Any]) -> Callable[[], None]:
    layers = [nn.Sequential(nn.Linear(256, 256), nn.GELU()) for _ in range(8)]
    loss = nn.MSELoss()
    module = zeropipe.pipe.PipelineModule(layers, num_stages=2, loss_fn=loss)
    engine, *_ = zeropipe.initialize(model=module, config=config | {"gradient_accumulation_steps": 4})
    data = (torch.randn(4, 256), torch.randn(4, 256))

    def step() -> None:
        engine.train_batch(iter([data] * 4))

    return step


if __name__ == "__main__":
    main()
