"""One optimizer on the example's GPT and text, on all ranks that torchrun started; the loss curve as one JSON line."""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

import zeropipe

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MARK = "CURVE "
# The pairs that must end alike: each compressed optimizer beside its dense form, with the same hyperparameters.
DENSE_OF = {
    "1-bit Adam": "Adam",
    "1-bit Adam, stage 1": "Adam",
    "0/1 Adam": "Adam",
    "1-bit LAMB": "LAMB",
}
NAMES = ("Adam", "1-bit Adam", "1-bit Adam, stage 1", "0/1 Adam", "LAMB", "1-bit LAMB")


def configuration(name: str, steps: int, warm: float) -> dict[str, Any]:
    """``warm``: the share of the run after which the variance is frozen."""
    freeze = max(2, round(steps * warm))
    adam = {"lr": 2e-3, "betas": [0.9, 0.999], "eps": 1e-6, "weight_decay": 0.01}
    # LAMB's default bounds (0.01 to 10) do not suit this model. Its zero-initialised projections would stay at 0.01
    # for the first hundred steps, and what lies before them, without gradient, at 10: a variance of nothing is frozen.
    bounds = {"min_coeff": 0.1, "max_coeff": 1.0}
    lamb = {"lr": 2e-2, "betas": [0.9, 0.999], "eps": 1e-6, "weight_decay": 0.01, **bounds}
    optimizers: dict[str, dict[str, Any]] = {
        # 1-bit Adam that never leaves its warm-up is the dense recursion
        "Adam": {"type": "OneBitAdam", "params": {**adam, "freeze_step": 10 * steps}},
        "1-bit Adam": {"type": "OneBitAdam", "params": {**adam, "freeze_step": freeze}},
        "0/1 Adam": {
            "type": "ZeroOneAdam",
            "params": {
                **adam,
                "var_freeze_step": freeze,
                # In a run this short the variance cannot wait: it is updated at every step until it is frozen.
                # The papers' 16 is for warm-ups of ten thousand steps.
                "var_update_scaler": freeze,
                "local_step_scaler": max(1, steps // 5),
                "local_step_clipper": 4,
            },
        },
        "LAMB": {"type": "OneBitLamb", "params": {**lamb, "freeze_step": 10 * steps}},
        "1-bit LAMB": {"type": "OneBitLamb", "params": {**lamb, "freeze_step": freeze}},
    }
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "optimizer": optimizers[name.removesuffix(", stage 1")],
        "zero_optimization": {"stage": 1 if name.endswith("stage 1") else 0},
    }


def main() -> None:
    args = arguments()
    sys.path.insert(0, str(EXAMPLES))
    from gpt import GPT, GPTConfig, parameter_groups
    from support.text import read_text

    zeropipe.init_distributed()
    rank, ranks = zeropipe.comm.get_rank(), zeropipe.comm.get_world_size()
    context = GPTConfig.context
    text = read_text(args.text, context)
    torch.manual_seed(args.seed)
    model = GPT()
    config = configuration(args.name, args.steps, args.warm)
    engine, optimizer, *_ = zeropipe.initialize(
        model=model, model_parameters=parameter_groups(model), config=config
    )
    assert optimizer is not None
    rates = [group["lr"] for group in optimizer.param_groups]
    curve: list[tuple[int, float]] = []
    for step in range(args.steps):
        # Linear warm-up over the first part of the dense steps, then a cosine to a tenth.
        up = min(1.0, (step + 1) / max(1, round(args.steps * args.warm / 2)))
        share = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * up * share
        x, y = text.batch(step, 0, rank, 4, context)
        engine.backward(engine(x, y))
        engine.step()
        if (step + 1) % args.measure_every == 0 or step + 1 == args.steps:
            curve.append((step + 1, held_out(engine, text, rank, ranks, context)))
            if rank == 0:
                print(f"{args.name} {step + 1}/{args.steps}: {curve[-1][1]:.4f}", file=sys.stderr, flush=True)
    if rank == 0:
        print(MARK + json.dumps(curve), flush=True)
    zeropipe.comm.barrier()


@torch.no_grad()
def held_out(engine: Any, text: Any, rank: int, ranks: int, context: int, windows: int = 16) -> float:
    """Mean cross-entropy in nats on the same held-out windows for any number of ranks.

    Between exchanges 0/1 Adam's ranks differ; each then scores its share of the windows with its own weights.
    """
    engine.eval()
    total = torch.zeros(())
    for number in range(rank, windows, ranks):
        x, y = text.held_out_batch(number, windows, 4, context)
        total += engine(x, y)
    engine.train()
    zeropipe.comm.all_reduce(total)
    return float(total / windows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--warm", type=float, default=0.2)
    parser.add_argument("--measure-every", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, default=None)
    return parser.parse_args()


if __name__ == "__main__":
    main()
