"""What the ranks do in ``test_trainer*.py``: scripts for transformers' Trainer, with and without ``deepspeed``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import deepspeed
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from tests.clients.tiny import Tokens, in_16_bits, llama

STEPS = 6
LR = 1e-2


def arguments(folder: str, config: dict[str, Any] | str | None = None, **changes: Any) -> TrainingArguments:
    given: dict[str, Any] = {
        "output_dir": folder,
        "use_cpu": True,
        "deepspeed": config,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "learning_rate": LR,
        "weight_decay": 0.1,
        "warmup_steps": 2,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 7,
        **changes,
    }
    return TrainingArguments(**given)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Whole values by name, whatever the stage; collective."""
    found = {}
    for name, param in model.named_parameters():
        with deepspeed.zero.GatheredParameters([param]):
            found[name] = param.detach().clone()
    return found


class Masters(torch.optim.Optimizer):
    """AdamW on fp32 copies of a 16-bit model's parameters: what mixed precision means, in a few lines of PyTorch.

    ``scale``: what losses were multiplied by; halved, and the step skipped, where a gradient is no number.
    """

    def __init__(self, groups: list[dict[str, Any]], scale: float = 1.0) -> None:
        super().__init__(groups, {"lr": LR})
        self.scale, self.skipped, self.overflow = scale, 0, False
        own = [{**g, "params": [p.detach().float() for p in g["params"]]} for g in self.param_groups]
        self.inner = torch.optim.AdamW(own, fused=True)

    def step(self, closure: Any = None) -> None:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.overflow = not all(bool(grad.isfinite().all()) for grad in grads)
        if self.overflow:
            self.scale, self.skipped = self.scale / 2, self.skipped + 1
            return
        for group, own in zip(self.param_groups, self.inner.param_groups, strict=True):
            own["lr"] = group["lr"]
            for param, master in zip(group["params"], own["params"], strict=True):
                master.grad = None if param.grad is None else param.grad.float() / self.scale
        self.inner.step()
        for group, own in zip(self.param_groups, self.inner.param_groups, strict=True):
            for param, master in zip(group["params"], own["params"], strict=True):
                param.data.copy_(master)


def make_trainer(
    folder: str,
    config: dict[str, Any] | str | None,
    *,
    precision: str = "fp32",
    lrs: list[float] | None = None,
    callbacks: list[TrainerCallback] | None = None,
    pretrained: str | None = None,
    **changes: Any,
) -> Trainer:
    """The script of every test here.

    Without ``config`` it is plain PyTorch: bf16 then means a bf16 model with fp32 masters, as the engine makes it.
    ``lrs``: the learning rate of each step, in place of the client's schedule. ``pretrained``: load the model
    from there, which under stage 3 means inside ``zero.Init``.
    """
    plain = config is None
    args = arguments(folder, config, bf16=precision == "bf16" and not plain, **changes)
    model = llama() if pretrained is None else AutoModelForCausalLM.from_pretrained(pretrained)
    optimizer = scheduler = None
    if plain and (precision == "bf16" or lrs is not None):
        if precision == "bf16":
            model = in_16_bits(model, torch.bfloat16)
        # The client decays no norms; an optimizer of the config decays all parameters.
        decayed = [p for p in model.parameters() if p.ndim > 1 or lrs is not None]
        others = [p for p in model.parameters() if p.ndim == 1 and lrs is None]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        groups = [{**group, "lr": LR if lrs is None else 1.0} for group in groups if group["params"]]
        optimizer = Masters(groups) if precision == "bf16" else torch.optim.AdamW(groups, fused=True)
    if plain and lrs is not None:
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [*lrs, 0.0][step])
    return Trainer(
        model,
        args,
        train_dataset=Tokens(48),
        eval_dataset=Tokens(12, seed=1),
        optimizers=(optimizer, scheduler),
        callbacks=callbacks,
    )


def story(trainer: Trainer) -> dict[str, Any]:
    """What a run showed and left behind."""
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert isinstance(trainer.model_wrapped, deepspeed.DeepSpeedEngine) == trainer.is_deepspeed_enabled
    return {
        "losses": [entry["loss"] for entry in logs],
        "norms": [float(entry["grad_norm"]) for entry in logs],
        "lrs": [entry["learning_rate"] for entry in logs],
        "eval": [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry],
        "weights": weights(trainer.model),
    }


def train(
    rank: int, world: int, *, folder: str, config: dict[str, Any] | None, file: bool = False, **changes: Any
) -> dict[str, Any]:
    """A run with evaluation in the middle; ``file``: the config is given as a path."""
    path = Path(folder) / f"ds_config{rank}.json"
    path.write_text(json.dumps(config))
    given = str(path) if file and config is not None else config
    trainer = make_trainer(folder, given, eval_strategy="steps", eval_steps=3, **changes)
    trainer.train()
    return story(trainer)


def resume(rank: int, world: int, *, folder: str, checkpoint: str | None, **given: Any) -> dict[str, Any]:
    """Save every third step; ``checkpoint``: go on from there."""
    trainer = make_trainer(folder, save_strategy="steps", save_steps=3, **given)
    trainer.train(resume_from_checkpoint=checkpoint)
    return {**story(trainer), "files": sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*"))}


class Remember(TrainerCallback):
    """Keeps the weights of one step."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.weights: dict[str, torch.Tensor] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.weights = weights(kwargs["model"])


def life(rank: int, world: int, *, folder: str, **given: Any) -> dict[str, Any]:
    """Train, take the best model back, evaluate, predict, generate, save."""
    remember = Remember(2)
    trainer = make_trainer(
        folder,
        callbacks=[remember],
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # so that the best is the first, which is not what the run ends with
        gradient_checkpointing=True,
        **given,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    after = trainer.evaluate()["eval_loss"]
    logits = trainer.predict(Tokens(4, seed=2)).predictions
    prompt = Tokens(2, seed=3 + rank).ids[:, :4]
    trainer.model.eval()
    trainer.model.gradient_checkpointing_disable()
    owner = trainer.model if given["config"] is None else trainer.model_wrapped  # DDP has no generate
    tokens = owner.generate(prompt, max_new_tokens=6, do_sample=False, synced_gpus=True)
    trainer.save_model(f"{folder}/final")
    return {
        "after": after,
        "best": Path(best).name,
        "logits": torch.from_numpy(logits),
        "tokens": tokens,
        "remembered": remember.weights,
        **story(trainer),
    }


def evaluate(rank: int, world: int, *, folder: str, **given: Any) -> dict[str, Any]:
    """Evaluate a saved model without training: under stage 3 an engine without an optimizer."""
    trainer = make_trainer(folder, pretrained=f"{folder}/saved", **given)
    loss = trainer.evaluate()["eval_loss"]
    sharded = all(hasattr(p, "ds_shape") for p in trainer.model.parameters())
    return {"loss": loss, "sharded": sharded, "weights": weights(trainer.model)}


def save_plain(rank: int, world: int, *, folder: str, **changes: Any) -> None:
    """The tiny model, as ``from_pretrained`` reads it."""
    llama(**changes).save_pretrained(f"{folder}/saved")
