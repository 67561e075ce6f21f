"""What the ranks do in ``test_peft.py``: adapters on a frozen model, trained by transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer
from transformers.integrations import HfDeepSpeedConfig

from tests.clients.tiny import SEED, Tokens, in_16_bits, llama
from tests.clients.trainer_tasks import LR, STEPS, Masters, arguments, weights
from zeropipe.errors import UnavailableParameterError

TARGETS = ["q_proj", "v_proj"]


def adapters(kind: str) -> Any:
    if kind == "adalora":
        return AdaLoraConfig(
            init_r=16, target_r=8, tinit=1, tfinal=1, deltaT=1, total_step=STEPS, target_modules=TARGETS
        )
    modules = ["lm_head"] if kind == "lora+head" else None
    # Of rank 16, so that every size is a multiple of 16 (see tiny.py); some dropout would need one more seed.
    return LoraConfig(
        r=16, lora_alpha=16, target_modules=TARGETS, modules_to_save=modules, task_type="CAUSAL_LM"
    )


def trainer_of(
    folder: str, config: dict[str, Any] | None, kind: str, sharded: bool, precision: str, **changes: Any
) -> Trainer:
    bf16 = precision == "bf16"
    args = arguments(folder, config, weight_decay=0.0, bf16=bf16 and config is not None, **changes)
    given: dict[str, Any] = {"attn_implementation": "eager"}
    if bf16:
        given["dtype"] = torch.bfloat16  # as the base model is made inside zero.Init
    base = AutoModelForCausalLM.from_pretrained(f"{folder}/saved", **given) if sharded else llama()
    torch.manual_seed(SEED + 1)
    model = get_peft_model(base, adapters(kind))
    optimizer = None
    if bf16 and config is None:
        if not sharded:  # then nothing has 16 bits yet; otherwise peft keeps its adapters in fp32 on purpose
            in_16_bits(model, torch.bfloat16)
        trained = [param for param in model.parameters() if param.requires_grad]
        optimizer = Masters([{"params": trained, "lr": LR, "weight_decay": 0.0}])
    return Trainer(model, args, train_dataset=Tokens(48), optimizers=(optimizer, None))


def train(
    rank: int,
    world: int,
    *,
    folder: str,
    config: dict[str, Any] | None,
    kind: str = "lora",
    sharded: bool = False,
    checkpoint: str | None = None,
    precision: str = "fp32",
    **changes: Any,
) -> dict[str, Any]:
    """``sharded``: the base model comes from a folder (inside ``zero.Init`` under stage 3)."""
    trainer = trainer_of(
        folder,
        config,
        kind,
        sharded,
        precision,
        gradient_accumulation_steps=1,
        save_strategy="steps",
        save_steps=3,
        **changes,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(f"{folder}/adapter")
    trainer.accelerator.wait_for_everyone()  # plain PyTorch does not wait until rank 0 has written
    found = weights(trainer.model)
    trained = [name for name, param in trainer.model.named_parameters() if param.requires_grad]
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "counts": trainer.model.get_nb_trainable_parameters(),
        "weights": {name: found[name] for name in trained},
        "frozen": {name: value for name, value in found.items() if name not in trained},
        "files": sorted(p.name for p in Path(f"{folder}/adapter").iterdir()),
        "saved": load_file(f"{folder}/adapter/adapter_model.safetensors") if rank == 0 else {},
    }


def allocate(rank: int, world: int, *, stage: int | None, away: bool = False) -> dict[str, Any]:
    """AdaLoRA allots its ranks from the gradients between backward and step; Trainer with DeepSpeed has none then.

    A loop of one's own has them. The same batch on each rank, so that one process alone is the reference.
    ``away``: no parameter persists at stage 3, so that the allotment raises unless they are gathered around it.
    """
    base = llama()
    torch.manual_seed(SEED + 1)
    model = get_peft_model(base, adapters("adalora"))
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, fused=True)
    engine = None
    if stage is not None:
        config = {
            "train_batch_size": world,
            "gradient_clipping": 0.0,
            "zero_optimization": {
                "stage": stage,
                **({"stage3_param_persistence_threshold": 0} if away else {}),
            },
            "zero_allow_untested_optimizer": True,
        }
        told = HfDeepSpeedConfig(config)  # how peft learns where gradients are; it must stay alive
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=told.config)[0]
    losses = []
    data = Tokens(4 * STEPS).ids
    for step in range(STEPS):
        ids = data[4 * step : 4 * step + 4]
        loss = (engine or model)(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        (engine.backward if engine else torch.Tensor.backward)(loss)
        if away:
            with pytest.raises(UnavailableParameterError, match="GatheredParameters"):
                model.base_model.update_and_allocate(step)
            with deepspeed.zero.GatheredParameters(trained, modifier_rank=0):
                model.base_model.update_and_allocate(step)
        else:
            model.base_model.update_and_allocate(step)
        if step == 2:  # the last step forgets them
            ipt = model.base_model.rankallocator.ipt
            seen = {name: value.detach().clone() for name, value in ipt.items()}
        (engine or optimizer).step()
        optimizer.zero_grad()
    found = weights(model)
    return {
        "losses": losses,
        "weights": {name: found[name] for name in found if "lora_" in name},
        "sensitivity": seen,
    }
