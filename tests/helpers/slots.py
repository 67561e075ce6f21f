"""Runs whose results must not follow the number of ranks, and what is compared of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import zeropipe
from zeropipe.comm.collectives import all_gather_object
from zeropipe.comm.group import world as comm_world
from zeropipe.pipe import LayerSpec, PipelineModule
from zeropipe.runtime.zero.partition_parameters import GatheredParameters

WORDS, LENGTH, MICRO = 17, 9, 2


class Odd(nn.Module):
    """Dropout, an embedding, a scalar, a frozen layer, one that half of the slots use, one that none does, a buffer."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, width)
        self.up, self.down = nn.Linear(width, 40), nn.Linear(40, width)
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(0.2)
        self.scale = nn.Parameter(torch.ones(()))
        self.sometimes, self.never = nn.Linear(width, width), nn.Linear(width, 3)
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.register_buffer("table", torch.arange(WORDS))

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.embed(words)
        x = x + self.down(self.drop(functional.relu(self.up(x)))) * self.scale
        if int(words.sum()) % 2:
            x = x + self.sometimes(x)
        x = self.drop(self.norm(self.frozen(x)))
        scores = x @ self.embed.weight.t()  # tied
        return functional.cross_entropy(scores.flatten(0, 1), words.roll(1, 1).flatten())


def words(step: int, slot: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + slot)
    return torch.randint(0, WORDS, (MICRO, LENGTH), generator=generator)


def settings(stage: int, slots: int = 12, precision: str = "fp32", **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": MICRO,
        "reproducible": {"slots": slots},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "gradient_clipping": 0.3,
        "zero_optimization": {"stage": stage},
        **({} if precision == "fp32" else {precision: {"enabled": True}}),
        **more,
    }


def digest(module: nn.Module) -> str:
    """SHA-256 of all parameters; collective where they are shards."""
    found, params = hashlib.sha256(), list(module.parameters())
    whole = any(hasattr(param, "ds_shape") for param in params)
    with GatheredParameters(params) if whole else nullcontext():
        for param in params:
            found.update(param.detach().float().cpu().numpy().tobytes())
    return found.hexdigest()


def make(config: Mapping[str, Any], model: Callable[[], nn.Module] = Odd, **more: Any) -> Any:
    torch.manual_seed(0)
    return zeropipe.initialize(model=model(), config=dict(config), **more)[0]


def step(engine: Any, number: int, backwards: int = 1) -> list[float]:
    """One step on the words of its slots; the losses of those."""
    losses = []
    for _ in range(engine.gradient_accumulation_steps()):
        slot = engine.optimizer.turn.slot
        for _ in range(backwards):
            loss = engine(words(number, 99 if slot is None else slot))
            engine.backward(loss)
        if slot is not None:
            losses.append(float(loss))
        engine.step()
    return losses


def train(
    rank: int, world: int, configs: list[Mapping[str, Any]], steps: int, backwards: int = 1, **more: Any
) -> list[tuple[Any, ...]]:
    """Of each configuration: the digest after ``steps``, and the last norm."""
    found = []
    for config in configs:
        engine = make(config, **more)
        for number in range(steps):
            step(engine, number, backwards)
        found.append((digest(engine.module), engine.get_global_grad_norm(), engine.loss_scale))
        engine.destroy()
    return found


class Block(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(width, 24), nn.Linear(24, width), nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.drop(functional.gelu(self.up(x))))


def score(scores: torch.Tensor, words: torch.Tensor) -> dict[str, torch.Tensor]:
    loss = functional.cross_entropy(functional.dropout(scores, 0.1).flatten(0, 1), words.flatten())
    return {"loss": loss, "largest": scores.max()}


def pipeline(stages: int, recompute: int = 0, **more: Any) -> PipelineModule:
    specs = [
        LayerSpec(nn.Embedding, WORDS, 16),
        *[LayerSpec(Block) for _ in range(4)],
        LayerSpec(nn.Linear, 16, WORDS),
    ]
    return PipelineModule(
        specs,
        num_stages=stages,
        loss_fn=score,
        seed_layers=True,
        partition_method="uniform",
        activation_checkpoint_interval=recompute,
        **more,
    )


def layers_digest(engine: Any) -> str:
    """SHA-256 of every layer's parameters, from the ranks that hold it; collective."""
    mine: dict[str, bytes] = {}
    for index in range(6):
        layer = engine.module.layer_module(index)
        if layer is not None:
            params = list(layer.parameters())
            whole = any(hasattr(param, "ds_shape") for param in params)
            with GatheredParameters(params) if whole else nullcontext():
                for at, param in enumerate(params):
                    mine[f"{index}.{at}"] = param.detach().float().cpu().numpy().tobytes()
    everyone: dict[str, bytes] = {}
    for found in all_gather_object(mine, comm_world(), label="layers"):
        for key, value in found.items():
            assert everyone.setdefault(key, value) == value, f"replicas differ in {key}"
    return hashlib.sha256(b"".join(everyone[key] for key in sorted(everyone))).hexdigest()


def pipeline_step(engine: Any, number: int) -> float:
    passes, turn = engine.gradient_accumulation_steps(), engine.optimizer.turn
    slots = [turn.sharing.slot(turn.group.rank, at) for at in range(passes)]
    data = [words(number, 99 if slot is None else slot) for slot in slots]
    return float(engine.train_batch(iter([(x, x.roll(1, 1)) for x in data])))


def train_pipeline(
    rank: int, world: int, stages: int, configs: list[Mapping[str, Any]], steps: int, **more: Any
) -> list[tuple[Any, ...]]:
    """Of each configuration: the digest, the last loss and its other term, the last norm."""
    found = []
    for config in configs:
        torch.manual_seed(0)
        engine = zeropipe.initialize(model=pipeline(stages, **more), config=dict(config))[0]
        losses = [pipeline_step(engine, number) for number in range(steps)]
        terms = float(engine.loss_terms["largest"])
        found.append((layers_digest(engine), losses[-1], terms, engine.get_global_grad_norm()))
        engine.destroy()
    return found
