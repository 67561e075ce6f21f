"""What the ranks do in ``test_sequences.py``: Trainer and Accelerate with ranks that share sequences, and one process
that has them whole."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import deepspeed
import torch
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DeepSpeedPlugin, DeepSpeedSequenceParallelConfig, InitProcessGroupKwargs
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments

from tests.clients.configs import ds_config
from tests.clients.tiny import VOCABULARY, in_16_bits, llama
from tests.clients.trainer_tasks import weights

LENGTH = 18  # tokens of a sample: 4 ranks do not divide it
PROMPT = 5
LR = 0.05


class Texts(Dataset[dict[str, torch.Tensor]]):
    """Sequences with a prompt that is not learnt. ``packed``: three texts in one, positions start again with each.
    ``padded``: the last tokens are none, and masked."""

    def __init__(self, size: int, kind: str) -> None:
        generator = torch.Generator().manual_seed(5)
        self.ids = torch.randint(3, VOCABULARY, (size, LENGTH), generator=generator)
        self.kind = kind

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.ids[index]
        labels = ids.clone()
        labels[: PROMPT + index % 3] = -100
        sample = {"input_ids": ids, "labels": labels}
        if self.kind == "packed":
            starts = (0, 4 + index % 4, 11)
            sample["position_ids"] = torch.cat(
                [torch.arange(end - start) for start, end in zip(starts, (*starts[1:], LENGTH), strict=True)]
            )
            labels[list(starts)] = -100
        if self.kind == "padded":
            sample["attention_mask"] = (torch.arange(LENGTH) < LENGTH - 1 - index % 5).long()
            labels[sample["attention_mask"] == 0] = -100
        return sample


def _model(precision: str, **changes: Any) -> torch.nn.Module:
    model = llama(attn_implementation="sdpa", use_cache=False, **changes)
    return in_16_bits(model, torch.bfloat16) if precision == "bf16" else model


def _sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR)


def plain(
    rank: int,
    world: int,
    *,
    steps: int,
    shape: tuple[int, int],
    precision: str = "fp32",
    kind: str = "causal",
    gas: int = 1,
    **changes: Any,
) -> dict[str, Any]:
    """One process, whole sequences, each with the mean over its own tokens, in the order of ``shape``: (ranks, ranks
    to a sequence). A rank's loader has every so-many-th sample, and ranks of a sequence take turns."""
    world, sp = shape
    samples = [
        [
            turn // sp * world + first + turn % sp
            for turn in range(step * gas, step * gas + gas)
            for first in range(0, world, sp)
        ]
        for step in range(steps)
    ]
    model, data = _model(precision, **changes), Texts(24, kind)
    masters = [p.detach().float().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(masters, lr=LR)
    losses, norms = [], []
    for ours in samples:
        told = 0.0
        for sample in ours:
            batch = {k: v.unsqueeze(0) for k, v in data[sample].items()}
            loss = model(**batch).loss / len(ours)
            loss.backward()
            told += loss.item()
        for param, master in zip(model.parameters(), masters, strict=True):
            master.grad = param.grad.float()
            param.grad = None
        norms.append(float(torch.nn.utils.clip_grad_norm_(masters, 1e9)))
        optimizer.step()
        for param, master in zip(model.parameters(), masters, strict=True):
            param.data.copy_(master)
        losses.append(told)
    return {"losses": losses, "norms": norms, "weights": weights(model)}


def _parallelism(sp: int, world: int) -> ParallelismConfig:
    return ParallelismConfig(
        dp_shard_size=world // sp,
        sp_backend="deepspeed",
        sp_size=sp,
        sp_handler=DeepSpeedSequenceParallelConfig(
            sp_seq_length=LENGTH, sp_seq_length_is_variable=True, sp_attn_implementation="sdpa"
        ),
    )


class Told(Trainer):
    """Says each step's norm, and the loss with all its digits."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.told.append(float(loss))
        return loss


def trainer(
    rank: int,
    world: int,
    *,
    folder: str,
    stage: int,
    sp: int,
    steps: int,
    precision: str = "fp32",
    kind: str = "causal",
    checkpoint: str | None = None,
    save: int = 0,
    checkpointing: bool = False,
    evaluate: bool = False,
    gas: int = 1,
    **changes: Any,
) -> dict[str, Any]:
    """The Trainer of transformers; ``save``: a checkpoint every so many steps."""
    args = TrainingArguments(
        folder,
        use_cpu=True,
        deepspeed=ds_config(stage, gradient_clipping=0.0),
        parallelism_config=_parallelism(sp, world),
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=gas,
        max_steps=steps,
        optim="sgd",
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="steps" if save else "no",
        save_steps=save or 1,
        report_to=[],
        disable_tqdm=True,
        bf16=precision == "bf16",
        remove_unused_columns=False,
        gradient_checkpointing=checkpointing,
        train_sampling_strategy="sequential",
    )
    model = llama(attn_implementation="sdpa", use_cache=False, **changes)
    data = Texts(24, kind)
    run = Told(model, args, train_dataset=data, eval_dataset=Texts(4, kind))
    run.told = []
    run.train(resume_from_checkpoint=checkpoint)
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    found = {
        "losses": run.told,
        "norms": [float(entry["grad_norm"]) for entry in logs],
        "weights": weights(run.model),
        "batch": run.model_wrapped.train_batch_size(),
    }
    if evaluate:
        found["eval"] = run.evaluate()["eval_loss"]
    return found


def accelerate(
    rank: int,
    world: int,
    *,
    folder: str,
    stage: int,
    sp: int,
    steps: int,
    precision: str = "fp32",
    kind: str = "causal",
    gas: int = 1,
    **changes: Any,
) -> dict[str, Any]:
    """A loop of one's own, with the loss of accelerate's own example."""
    from deepspeed.utils import groups

    file = Path(folder) / f"ds{rank}.json"
    file.write_text(json.dumps(ds_config(stage, gradient_clipping=0.0)))
    accelerator = Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=str(file), gradient_accumulation_steps=gas),
        parallelism_config=_parallelism(sp, world),
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
    )
    model = llama(attn_implementation="sdpa", use_cache=False, **changes)
    loader = DataLoader(Texts(24, kind), batch_size=1)
    model, optimizer, loader = accelerator.prepare(model, _sgd(model), loader)
    assert len(loader) == 24 * sp // world
    group = groups._get_sequence_parallel_group()
    losses, norms = [], []
    for batch in islice(loader, steps * gas):
        with accelerator.accumulate(model):
            labels = batch["shift_labels"]
            logits = model(**batch).logits
            loss = accelerator.unwrap_model(model).loss_function(
                logits=logits, labels=None, shift_labels=labels, vocab_size=VOCABULARY
            )
            parts = torch.distributed.nn.functional.all_gather(loss, group=group)
            counts = torch.distributed.nn.functional.all_gather((labels != -100).sum(), group=group)
            loss = sum(p * c for p, c in zip(parts, counts, strict=True) if c > 0) / sum(counts)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss))
        norms.append(model.get_global_grad_norm())
    assert isinstance(model, deepspeed.DeepSpeedEngine)
    return {
        "losses": losses,
        "norms": norms,
        "weights": weights(model.module),
        "batch": model.train_batch_size(),
        "steps": model.global_steps,
    }
