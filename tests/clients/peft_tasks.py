"""What the ranks do in ``test_peft.py``: adapters on a frozen model, trained by transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from tests.clients.tiny import SEED, Tokens, llama
from tests.clients.trainer_tasks import STEPS, arguments, weights

TARGETS = ["q_proj", "v_proj"]


class Allocate(TrainerCallback):
    """AdaLoRA's own step: its ranks are allotted from the gradients, so before they are cleared."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].base_model.update_and_allocate(state.global_step)


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
    folder: str, config: dict[str, Any] | None, kind: str, sharded: bool, **changes: Any
) -> Trainer:
    args = arguments(folder, config, weight_decay=0.0, **changes)
    given = {"attn_implementation": "eager"}
    base = AutoModelForCausalLM.from_pretrained(f"{folder}/saved", **given) if sharded else llama()
    torch.manual_seed(SEED + 1)
    model = get_peft_model(base, adapters(kind))
    callbacks = [Allocate()] if kind == "adalora" else []
    return Trainer(model, args, train_dataset=Tokens(48), callbacks=callbacks)


def train(
    rank: int,
    world: int,
    *,
    folder: str,
    config: dict[str, Any] | None,
    kind: str = "lora",
    sharded: bool = False,
    checkpoint: str | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """``sharded``: the base model comes from a folder (inside ``zero.Init`` under stage 3)."""
    trainer = trainer_of(
        folder,
        config,
        kind,
        sharded,
        gradient_accumulation_steps=1,
        save_strategy="steps",
        save_steps=3,
        **changes,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(f"{folder}/adapter")
    found = weights(trainer.model)
    trained = [name for name, param in trainer.model.named_parameters() if param.requires_grad]
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "counts": trainer.model.get_nb_trainable_parameters(),
        "weights": {name: found[name] for name in trained},
        "frozen": {name: value for name, value in found.items() if name not in trained},
        "files": sorted(p.name for p in Path(f"{folder}/adapter").iterdir()),
    }


def reload(rank: int, world: int, *, folder: str) -> dict[str, Any]:
    """The adapter that was saved, on the same base model, without zeropipe: its parameters by name."""
    import sys

    sys.modules["zeropipe"] = None  # type: ignore[assignment]
    model = PeftModel.from_pretrained(llama(), f"{folder}/adapter")
    return {name: param.detach().clone() for name, param in model.named_parameters()}
