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

from tests.clients.configs import FP16, ds_config
from tests.clients.tiny import Tokens, in_16_bits, llama
from tests.clients.trainer_tasks import LR, Masters, weights

STEPS = 6


def accelerator(
    stage: int | None,
    how: str,
    precision: str,
    gas: int,
    folder: str,
    rank: int,
    zero: dict[str, Any] | None,
    clip: float | None,
) -> Accelerator:
    """``how``: "plugin" gives numbers to DeepSpeedPlugin, "launch" nothing (``accelerate launch`` has told), the
    others a file with ``"auto"`` values."""
    if stage is None:
        return Accelerator(cpu=True, gradient_accumulation_steps=gas)
    if how == "launch":
        return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
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
        extra = {"fp16": FP16} if precision == "fp16" else {}
        config = ds_config(
            stage, optimizer=how == "dummies", gradient_clipping=clip or 0.0, zero=zero, **extra
        )
        if "optimizer" in config:  # Accelerate fills in neither
            config["optimizer"]["params"].update(betas=[0.9, 0.999], eps=1e-8)
        file.write_text(json.dumps(config))
        plugin = DeepSpeedPlugin(hf_ds_config=str(file), gradient_accumulation_steps=gas)
    mixed = "no" if precision == "fp32" else precision
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
    zero: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train; ``save_at``: save_state before that step; ``load``: begin at step 3 with what was saved there."""
    set_seed(3)
    acc = accelerator(stage, how, precision, gas, folder, rank, zero, clip)
    model = llama()
    masters = stage is None and precision != "fp32"
    if masters:
        model = in_16_bits(model, torch.bfloat16 if precision == "bf16" else torch.float16)
    loader = DataLoader(Tokens(96), batch_size=2, shuffle=False)
    if how == "dummies" and stage is not None:
        optimizer: Any = DummyOptim(model.parameters(), lr=LR, weight_decay=0.1)
        scheduler: Any = DummyScheduler(optimizer, total_num_steps=STEPS * world, warmup_num_steps=2)
    else:
        groups = [{"params": list(model.parameters()), "lr": LR, "weight_decay": 0.1}]
        scale = 2.0 ** FP16["initial_scale_power"] if precision == "fp16" else 1.0
        optimizer = Masters(groups, scale) if masters else torch.optim.AdamW(groups, fused=True)
        # What DeepSpeed's WarmupDecayLR gives: its first two steps have the rate of step 0.
        rates = [0, 0, 0.5, 1, 0.75, 0.5] if how == "dummies" else [0.5, 1, 0.8, 0.6, 0.4, 0.2]
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: [*rates, 0.0][min(step // world, STEPS)]
        )
    own = optimizer
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
            acc.backward(loss * own.scale if masters else loss)
            if clip is not None and acc.sync_gradients:
                norms.append(acc.clip_grad_norm_(model.parameters(), clip))
            optimizer.step()
            if not (masters and own.overflow):
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
        "scales": (own.scale, own.skipped) if masters else (scale_of(model), skipped(model)),
        "state": kept,
        "weights": weights(bare),
    }
    acc.free_memory()
    return found


def scale_of(engine: Any) -> float:
    return engine.optimizer.cur_scale if isinstance(engine, deepspeed.DeepSpeedEngine) else 1.0


def skipped(engine: Any) -> int:
    return engine.skipped_steps if isinstance(engine, deepspeed.DeepSpeedEngine) else 0
