"""What the ranks do in ``test_trl.py``: supervised, preference and online training with TRL."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.models import unwrap_model_for_generation

from tests.clients.tiny import LENGTH, Tokens, tokenizer, words
from tests.clients.trainer_tasks import LR, weights

STEPS = 4


def settings(folder: str, config: dict[str, Any] | None, **changes: Any) -> dict[str, Any]:
    """What all of TRL's configurations share."""
    return {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": False,
        "deepspeed": config,
        "per_device_train_batch_size": 2,
        "max_steps": STEPS,
        "learning_rate": LR,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 7,
        **changes,
    }


def story(trainer: Any, *names: str) -> dict[str, Any]:
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    found = {name: [entry[name] for entry in logs] for name in ("loss", *names)}
    return {**found, "weights": weights(trainer.model)}


def sft(rank: int, world: int, *, folder: str, config: dict[str, Any] | None) -> dict[str, Any]:
    data = Dataset.from_dict({"text": [words(row) for row in Tokens(24).ids]})
    args = SFTConfig(**settings(folder, config), max_length=LENGTH)
    trainer = SFTTrainer(f"{folder}/saved", args, train_dataset=data, processing_class=tokenizer())
    trainer.train()
    return story(trainer, "mean_token_accuracy")


def dpo(rank: int, world: int, *, folder: str, config: dict[str, Any] | None) -> dict[str, Any]:
    """Two models in one process: the one that learns and the reference."""
    good, bad = Tokens(24).ids, Tokens(24, seed=9).ids
    data = Dataset.from_dict(
        {
            "prompt": [words(row[:4]) for row in good],
            "chosen": [" " + words(row[4:12]) for row in good],
            "rejected": [" " + words(row[4:12]) for row in bad],
        }
    )
    args = DPOConfig(**settings(folder, config), max_length=LENGTH, beta=0.1)
    reference = AutoModelForCausalLM.from_pretrained(f"{folder}/saved")
    trainer = DPOTrainer(f"{folder}/saved", reference, args, train_dataset=data, processing_class=tokenizer())
    before = weights(trainer.ref_model)
    trainer.train()
    after = weights(trainer.ref_model)
    kept = all(torch.equal(before[name], after[name]) for name in before)
    return {**story(trainer, "rewards/margins", "logps/chosen"), "kept": kept}


def ascending(completions: list[str], **_: Any) -> list[float]:
    """A reward that a policy can earn: the share of words that follow a smaller one."""
    rewards = []
    for text in completions:
        ids = [int(word[1:]) for word in text.split() if word.startswith("w")]
        pairs = list(pairwise(ids))
        rewards.append(sum(a < b for a, b in pairs) / max(1, len(pairs)))
    return rewards


def grpo(rank: int, world: int, *, folder: str, config: dict[str, Any] | None) -> dict[str, Any]:
    """Samples from the model in each step, then learns; a reference model beside it."""
    data = Dataset.from_dict({"prompt": [words(row[:4]) for row in Tokens(24).ids]})
    args = GRPOConfig(
        **settings(folder, config), num_generations=2, max_completion_length=6, beta=0.05, temperature=1.0
    )
    trainer = GRPOTrainer(
        f"{folder}/saved", ascending, args, train_dataset=data, processing_class=tokenizer()
    )
    trainer.train()
    return story(trainer, "reward", "kl", "completions/mean_length")


def unwrapped(rank: int, world: int, *, folder: str, config: dict[str, Any] | None) -> dict[str, Any]:
    """Generation inside ``unwrap_model_for_generation`` in the middle of training, which then goes on."""
    data = Dataset.from_dict({"text": [words(row) for row in Tokens(24).ids]})
    args = SFTConfig(**settings(folder, config), max_length=LENGTH)
    prompt = Tokens(2, seed=3 + rank).ids[:, :4]
    facts: list[Any] = []

    class Sample(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            engine = trainer.model_wrapped
            with unwrap_model_for_generation(engine, trainer.accelerator) as model:
                model.eval()
                facts.append(all(param.numel() for param in model.parameters()))
                facts.append(model.generate(prompt, max_new_tokens=6, do_sample=False).tolist())
                model.train()

    trainer = SFTTrainer(
        f"{folder}/saved", args, train_dataset=data, processing_class=tokenizer(), callbacks=[Sample()]
    )
    trainer.train()
    return {**story(trainer), "facts": facts, "held": sum(p.numel() for p in trainer.model.parameters())}
