"""What checkpoint tests share: engines on the nasty model, and their whole state put together from all ranks."""

from __future__ import annotations

from typing import Any

import torch

import zeropipe
from tests.helpers.data import token_batch
from tests.helpers.models import NastyModel, build
from zeropipe.checkpoint.save.records import FP32, PARAM
from zeropipe.runtime.engine.state import optimizer_flats
from zeropipe.runtime.optimizers.state_kinds import numbers_by_tensor

Pieces = list[tuple[str, int, dict[str, torch.Tensor], dict[str, Any]]]


def make_engine(
    stage: int, precision: str = "fp32", *, optimizer: str = "AdamW", seed: int = 0, **config: Any
) -> Any:
    """An engine on ``NastyModel`` whose frozen layer and dead layer are in the optimizer's groups too."""
    model = build(NastyModel, seed=seed)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": optimizer, "params": {"lr": 1e-2}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}},
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,
    }
    if precision != "fp32":
        settings[precision] = {"enabled": True}
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay}, {"params": plain, "weight_decay": 0.0}]
    engine, *_ = zeropipe.initialize(model=model, config=settings | config, model_parameters=groups)
    return engine


def train(engine: Any, steps: int, rank: int) -> list[float]:
    """Losses of the next ``steps`` steps; the data depends on the step and the rank alone."""
    losses = []
    for _ in range(steps):
        loss = engine(*token_batch(engine.global_steps, rank))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def pieces(engine: Any) -> Pieces:
    """This rank's part of every master and moment: (parameter, first element, {key: 1D run}, scalars)."""
    found: Pieces = []
    for held in optimizer_flats(engine.optimizer):
        flat = held.flat
        numbers, _ = numbers_by_tensor(flat.scalars, [spec.name for spec in flat.layout.tensors])
        for piece in flat.layout.pieces(flat.shard):
            run = slice(piece.offset, piece.offset + piece.numel)
            cut = {key: tensor[run].clone() for key, tensor in flat.tensors.items()}
            shared = numbers[piece.tensor]
            if shared is None:  # never stepped: its moments mean nothing
                cut = {key: value for key, value in cut.items() if key in (FP32, PARAM)}
            scalars = {k: v.item() if torch.is_tensor(v) else v for k, v in (shared or {}).items()}
            found.append((flat.layout.tensors[piece.tensor].name, piece.start, cut, scalars))
    return found


def whole(ranks: list[Pieces]) -> dict[str, dict[str, Any]]:
    """Parameter -> key -> the whole 1D value, from all ranks' pieces; scalars beside them."""
    runs: dict[str, dict[int, tuple[dict[str, torch.Tensor], dict[str, Any]]]] = {}
    for rank in ranks:
        for name, start, cut, scalars in rank:
            runs.setdefault(name, {})[start] = (cut, scalars)
    state: dict[str, dict[str, Any]] = {}
    for name, parts in runs.items():
        ordered = [parts[start] for start in sorted(parts)]
        keys = ordered[0][0].keys()
        state[name] = {key: torch.cat([cut[key] for cut, _ in ordered]) for key in keys} | ordered[0][1]
    return state


def assert_same_state(left: dict[str, dict[str, Any]], right: dict[str, dict[str, Any]]) -> None:
    """Bit for bit; the message names the parameter and key."""
    assert left.keys() == right.keys()
    for name, entries in left.items():
        assert entries.keys() == right[name].keys(), name
        for key, value in entries.items():
            other = right[name][key]
            same = torch.equal(value, other) if torch.is_tensor(value) else value == other
            assert same, f"{key} of {name} differs"


def weights(engine: Any) -> dict[str, torch.Tensor]:
    """The module's state dict as this rank sees it, for unsharded parameters."""
    return {name: t.detach().clone() for name, t in engine.module.state_dict().items() if torch.is_tensor(t)}
