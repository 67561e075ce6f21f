"""What the ranks do in ``test_accelerate.py``: a training loop of one's own on Accelerate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import deepspeed
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DeepSpeedPlugin,
    DummyOptim,
    DummyScheduler,
    InitProcessGroupKwargs,
    set_seed,
)
from torch.utils.data import DataLoader

from tests.clients.configs import ds_config
from tests.clients.tiny import Tokens, llama
from tests.clients.trainer_tasks import LR, Masters, weights

STEPS = 6


def accelerator(stage: int | None, how: str, precision: str, gas: int, folder: str, rank: int) -> Accelerator:
    """``how``: "plugin" gives numbers to DeepSpeedPlugin, the others a file with ``"auto"`` values."""
    if stage is None:
        return Accelerator(cpu=True, gradient_accumulation_steps=gas)
    if how == "plugin":
        plugin = DeepSpeedPlugin(
            zero_stage=stage,
            gradient_accumulation_steps=gas,
            gradient_clipping=1e6,  # never reached; 0.0 would become 1.0
            zero3_save_16bit_model=True,
            zero3_init_flag=False,
        )
    else:
        file = Path(folder) / f"ds{rank}.json"
        config = ds_config(stage, optimizer=how == "dummies", gradient_clipping=0.0)
        if "optimizer" in config:  # Accelerate fills in neither
            config["optimizer"]["params"].update(betas=[0.9, 0.999], eps=1e-8)
        file.write_text(json.dumps(config))
        plugin = DeepSpeedPlugin(hf_ds_config=str(file), gradient_accumulation_steps=gas)
    mixed = "bf16" if precision == "bf16" else "no"
    # With cpu=True Accelerate leaves the plugin aside and uses DDP. Without a GPU it takes the CPU anyway, but finds
    # out about the other ranks only where the backend is named.
    return Accelerator(
        mixed_precision=mixed,
        deepspeed_plugin=plugin,
        gradient_accumulation_steps=gas,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
    )


def loop(
    rank: int,
    world: int,
    *,
    stage: int | None,
    folder: str,
    how: str = "plugin",
    precision: str = "fp32",
    gas: int = 1,
    save_at: int | None = None,
    load: bool = False,
    clip: float | None = None,
) -> dict[str, Any]:
    """Train; ``save_at``: save_state before that step; ``load``: begin at step 3 with what was saved there."""
    set_seed(3)
    acc = accelerator(stage, how, precision, gas, folder, rank)
    model = llama()
    if stage is None and precision == "bf16":
        model = model.to(torch.bfloat16)
    loader = DataLoader(Tokens(96), batch_size=2, shuffle=False)
    if how == "dummies" and stage is not None:
        optimizer: Any = DummyOptim(model.parameters(), lr=LR, weight_decay=0.1)
        scheduler: Any = DummyScheduler(optimizer, total_num_steps=STEPS * world, warmup_num_steps=2)
    else:
        groups = [{"params": list(model.parameters()), "lr": LR, "weight_decay": 0.1}]
        masters = stage is None and precision == "bf16"
        optimizer = Masters(groups) if masters else torch.optim.AdamW(groups, fused=True)
        # What DeepSpeed's WarmupDecayLR gives: its first two steps have the rate of step 0.
        rates = [0, 0, 0.5, 1, 0.75, 0.5] if how == "dummies" else [0.5, 1, 0.8, 0.6, 0.4, 0.2]
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: [*rates, 0.0][min(step // world, STEPS)]
        )
    model, optimizer, loader, scheduler = acc.prepare(model, optimizer, loader, scheduler)
    start = 0
    if load:
        acc.load_state(f"{folder}/state")
        start = 3
    losses, norms, rates_seen = [], [], []
    for micro, batch in enumerate(loader):
        step = micro // gas
        if step < start:
            continue
        if step >= STEPS:
            break
        if step == save_at and micro % gas == 0:
            acc.save_state(f"{folder}/state")
        with acc.accumulate(model):
            loss = model(**batch).loss
            acc.backward(loss)
            if clip is not None and acc.sync_gradients:
                norms.append(acc.clip_grad_norm_(model.parameters(), clip))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        losses.append(acc.gather(loss.detach()).mean().item())
        rates_seen.append(optimizer.param_groups[0]["lr"])
    state = acc.get_state_dict(model)
    kept = {name: value.detach().clone() for name, value in state.items()}  # saving empties the dict
    bare = acc.unwrap_model(model)
    assert stage is None or isinstance(model, deepspeed.DeepSpeedEngine)
    if stage is not None:
        bare.save_pretrained(
            f"{folder}/saved", is_main_process=acc.is_main_process, save_function=acc.save, state_dict=state
        )
    found = {
        "losses": losses,
        "norms": [float(n) for n in norms if n is not None],
        "rates": rates_seen,
        "state": kept,
        "weights": weights(bare),
    }
    acc.free_memory()
    return found
