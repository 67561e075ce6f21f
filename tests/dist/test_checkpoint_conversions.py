"""A checkpoint that was converted to the universal form or to torch's DCP goes on as the one that it came from.

Every number of every optimizer comes along: ``step`` alone used to, so that a 1-bit LAMB never moved again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import zeropipe
from tests.helpers.pool import Pools
from zeropipe.checkpoint.convert import compare
from zeropipe.checkpoint.loader import open_source
from zeropipe.checkpoint.sources.dcp import write_dcp
from zeropipe.checkpoint.sources.universal import write_universal

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

TORCH = {
    "adam": torch.optim.Adam,
    "amsgrad": lambda p, lr: torch.optim.AdamW(p, lr, amsgrad=True),
    "nadam": torch.optim.NAdam,  # mu_product
    "radam": torch.optim.RAdam,
    "adamax": torch.optim.Adamax,
    "asgd": torch.optim.ASGD,  # eta, mu
    "rprop": torch.optim.Rprop,
    "rmsprop": lambda p, lr: torch.optim.RMSprop(p, lr, momentum=0.9, centered=True),
    "sgd": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9),
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
}
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "lamb": ("Lamb", {}),
    "lion": ("Lion", {}),
    "1-bit adam, compressed": ("OneBitAdam", {"freeze_step": 2}),
    "1-bit adam, dense": ("OneBitAdam", {"freeze_step": 9}),
    "1-bit lamb, compressed": ("OneBitLamb", {"freeze_step": 2}),
    "1-bit lamb, dense": ("OneBitLamb", {"freeze_step": 5}),
    "0/1 adam": ("ZeroOneAdam", {"var_freeze_step": 40, "var_update_scaler": 2, "local_step_clipper": 1}),
    "0/1 adam, apart": (
        "ZeroOneAdam",
        {"var_freeze_step": 3, "local_step_scaler": 1, "local_step_clipper": 4},
    ),
}
FORMS: dict[str, Callable[..., Path]] = {"universal": write_universal, "dcp": write_dcp}


class Odd(nn.Module):
    """Parameters whose names hold dots, spaces, digits, and the words of the formats themselves."""

    def __init__(self) -> None:
        super().__init__()
        names = ("state", "step", "0", "exp_avg", "lamb_coeff of state", "param_groups", "é")
        self.parts = nn.ModuleDict({name: nn.Linear(5, 5) for name in names})
        self.exp_avg = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts.values():
            x = torch.tanh(part(x)) * self.exp_avg
        return x.square().mean()


def engine_of(kind: str, stage: int) -> Any:
    torch.manual_seed(3)
    model = Odd()
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
    }
    if kind in OURS:
        name, options = OURS[kind]
        config["optimizer"] = {"type": name, "params": {"lr": 0.01, "eps": 1e-6} | options}
        if name == "Lion":
            del config["optimizer"]["params"]["eps"]
        return zeropipe.initialize(model=model, config=config)[0]
    optimizer = TORCH[kind](model.parameters(), lr=0.01)
    return zeropipe.initialize(model=model, optimizer=optimizer, config=config)[0]


def train(engine: Any, rank: int, first: int, count: int) -> list[torch.Tensor]:
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(10 * step + rank)
        engine.backward(engine(torch.randn(4, 5, generator=generator)))
        engine.step()
    return [p.detach().clone() for p in engine.module.parameters()]


def goes_on(rank: int, size: int, kind: str, stage: int, folder: str) -> list[str]:
    """Names of the forms whose run is not, bit for bit, the one that never stopped.

    0/1 Adam is saved before a dense step: its error feedback, which outlives such a step, used to be left behind.
    """
    engine = engine_of(kind, stage)
    train(engine, rank, 0, 4)
    engine.save_checkpoint(f"{folder}/saved")
    wanted = train(engine, rank, 4, 4)
    engine.destroy()
    wrong = []
    for form in ("saved", *FORMS):
        if rank == 0 and form != "saved":
            source = open_source(f"{folder}/saved")
            FORMS[form](source, f"{folder}/{form}")
            different = list(compare(source, open_source(f"{folder}/{form}")))
            wrong += [f"{form}: {entry}" for entry in different[:1]]
        dist.barrier()
        engine = engine_of(kind, stage)
        engine.load_checkpoint(f"{folder}/{form}")
        found = train(engine, rank, 4, 4)
        engine.destroy()
        if not all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True)):
            wrong.append(form)
    return wrong


@pytest.mark.parametrize("kind", [*TORCH, *OURS])
def test_conversions_lose_no_number(pool: Pools, tmp_path: Path, kind: str) -> None:
    for stage in (0, 1):
        if (kind, stage) != ("0/1 adam, apart", 1):
            assert pool(2).run(goes_on, kind, stage, str(tmp_path / str(stage))) == [[], []], stage
