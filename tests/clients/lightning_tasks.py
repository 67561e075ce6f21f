"""What the ranks do in ``test_lightning.py``: Lightning's Trainer and Fabric with their DeepSpeed strategies."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric import Fabric
from lightning.fabric.accelerators import CUDAAccelerator as FabricCUDAAccelerator
from lightning.fabric.strategies import DeepSpeedStrategy as FabricDeepSpeed
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.deepspeed import convert_zero_checkpoint_to_fp32_state_dict
from torch.utils.data import DataLoader

from tests.clients.tiny import Tokens, llama
from tests.clients.trainer_tasks import LR, weights

STEPS = 4
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Learner(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = llama()
        self.seen: list[float] = []

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        loss = self.model(**batch).loss
        self.seen.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=LR, weight_decay=0.1, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Collect(Callback):
    """The weights at the end, while the strategy still holds them."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}

    def on_train_end(self, trainer: Any, module: pl.LightningModule) -> None:
        self.weights = weights(module)


class _Host:
    """Lightning lets its DeepSpeed strategies run under a CUDAAccelerator only; these two name the CPU.

    All else is Lightning's own. Its strategy wants device indices that are the local ranks.
    """

    def setup_device(self, device: torch.device) -> None:
        pass

    def setup(self, trainer: Any) -> None:
        pass

    def teardown(self) -> None:
        pass

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device("cpu", index) for index in range(int(devices))]

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def is_available() -> bool:
        return True


class HostAccelerator(_Host, CUDAAccelerator):
    pass


class FabricHostAccelerator(_Host, FabricCUDAAccelerator):
    pass


def fit(
    rank: int,
    world: int,
    *,
    folder: str,
    stage: int | None,
    epochs: int = 2,
    precision: str = "32-true",
    checkpoint: str | None = None,
) -> dict[str, Any]:
    """Two steps an epoch; a checkpoint at the end, converted to one file of fp32 weights."""
    pl.seed_everything(5, verbose=False)
    if stage is None:
        how: dict[str, Any] = {"strategy": "ddp", "accelerator": "cpu"}
    else:
        strategy = DeepSpeedStrategy(stage=stage, process_group_backend="gloo", logging_batch_size_per_gpu=2)
        how = {"strategy": strategy, "accelerator": HostAccelerator(), "precision": precision}
    collect = Collect()
    trainer = pl.Trainer(
        **how,
        devices=world,
        max_epochs=epochs,
        callbacks=[collect],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=True,
    )
    learner = Learner()
    trainer.fit(learner, DataLoader(Tokens(8), batch_size=2), ckpt_path=checkpoint)
    path = f"{folder}/epoch{epochs}.ckpt"
    trainer.save_checkpoint(path)
    engine = type(trainer.strategy.model).__name__
    found = {
        "losses": learner.seen,
        "weights": collect.weights,
        "steps": trainer.global_step,
        "engine": engine,
    }
    if stage is not None and rank == 0:
        state = convert_zero_checkpoint_to_fp32_state_dict(path, f"{folder}/whole.pt")["state_dict"]
        found["converted"] = {name: value.clone() for name, value in state.items()}
        found["files"] = sorted(str(p.relative_to(path)) for p in Path(path).rglob("*"))
    return found


def fabric(
    rank: int, world: int, *, folder: str, stage: int | None, save_at: int | None = None, load: bool = False
) -> dict[str, Any]:
    """A loop of one's own on Fabric; ``save_at``, ``load``: as in ``accelerate_tasks.loop``."""
    if stage is None:
        maker = Fabric(accelerator="cpu", devices=world, strategy="ddp")
    else:
        strategy = FabricDeepSpeed(stage=stage, process_group_backend="gloo", logging_batch_size_per_gpu=2)
        strategy.config["gradient_clipping"] = 0.0  # DeepSpeed clips at 1.0 unless told; Fabric says nothing
        maker = Fabric(accelerator=FabricHostAccelerator(), devices=world, strategy=strategy)
    maker.launch()
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.1, fused=True)
    model, optimizer = maker.setup(model, optimizer)
    loader = maker.setup_dataloaders(DataLoader(Tokens(8 * STEPS), batch_size=2))
    start = 0
    if load:
        start = maker.load(f"{folder}/fabric", {"model": model, "optimizer": optimizer})["step"]
    losses = []
    for step, batch in enumerate(loader):
        if step < start:
            continue
        if step >= STEPS:
            break
        if step == save_at:
            maker.save(f"{folder}/fabric", {"model": model, "optimizer": optimizer, "step": step})
        loss = model(**batch).loss
        maker.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    module = model.module
    return {"losses": losses, "weights": weights(getattr(module, "module", module))}
