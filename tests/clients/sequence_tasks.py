"""What the ranks do in ``test_sequences.py``: Trainer and Accelerate with ranks that share sequences, and one process
that has them whole."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DeepSpeedPlugin, DeepSpeedSequenceParallelConfig, InitProcessGroupKwargs
from torch.utils.data import DataLoader, Dataset
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Trainer,
    TrainingArguments,
)

from tests.clients.configs import ds_config
from tests.clients.tiny import SEED, VOCABULARY, in_16_bits, llama, llama_config
from tests.clients.trainer_tasks import weights

STOCK = 12  # samples
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


def _tiny(window: int = 0) -> torch.nn.Module:
    """``window``: a Mistral, whose tokens see that many before them."""
    if not window:
        return llama(attn_implementation="sdpa", use_cache=False)
    given = llama_config(attn_implementation="sdpa", use_cache=False).to_dict()
    torch.manual_seed(SEED)
    return MistralForCausalLM(MistralConfig(**given | {"sliding_window": window, "model_type": "mistral"}))


def _model(precision: str, window: int = 0) -> torch.nn.Module:
    model = _tiny(window)
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
    window: int = 0,
    evaluate: bool = False,
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
    model, data = _model(precision, window), Texts(STOCK, kind)
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
    found = {"losses": losses, "norms": norms, "weights": weights(model)}
    if evaluate:
        # As Trainer: the mean over samples, whose numbers of tokens are left aside.
        batches = [{k: v.unsqueeze(0) for k, v in sample.items()} for sample in Texts(4, kind)]
        with torch.no_grad():
            found["eval"] = sum(model.eval()(**batch).loss.item() for batch in batches) / len(batches)
    return found


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
    model = _tiny()
    data = Texts(STOCK if gas == 1 else steps * gas, kind)
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
    window: int = 0,
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
    model = _tiny(window)
    loader = DataLoader(Texts(STOCK, kind), batch_size=1)
    model, optimizer, loader = accelerator.prepare(model, _sgd(model), loader)
    assert len(loader) == STOCK * sp // world
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


def own_loop(rank: int, world: int, *, folder: str, stage: int, steps: int, compiled: bool) -> dict[str, Any]:
    """No client around the model, which is registered by its name and computes its MLPs and its loss in tiles."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import (
        TiledFusedLogitsLoss,
        TiledMLP,
        UlyssesSPAttentionHF,
        UlyssesSPDataLoaderAdapter,
    )
    from deepspeed.utils import groups
    from transformers.models.llama import modeling_llama

    untiled = modeling_llama.LlamaMLP.forward
    modeling_llama.LlamaMLP.forward = lambda self, x: TiledMLP.apply(
        untiled, self, x, 3, list(self.parameters())
    )
    deepspeed.init_distributed(dist_backend="gloo")
    name = f"{folder}/saved"
    mpu = UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=name,
        core_attn_implementation="sdpa",
        sequence_parallel_size=world,
        micro_batch_size=1,
        seq_length=LENGTH,
        seq_length_is_variable=True,
    )
    model = AutoModelForCausalLM.from_pretrained(name)
    config = {
        "train_batch_size": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "sequence_parallel_size": world,
    }
    engine = deepspeed.initialize(model=model, optimizer=_sgd(model), config=config, mpu=mpu)[0]
    if compiled:
        engine.compile(backend="eager")
    # Each rank has other samples.
    mine = [
        {k: v.unsqueeze(0) for k, v in Texts(STOCK, "packed")[i].items()} for i in range(rank, STOCK, world)
    ]
    loader = UlyssesSPDataLoaderAdapter(
        mine,
        sp_rank=groups._get_sequence_parallel_rank(),
        sp_group=groups._get_sequence_parallel_group(),
        sp_world_size=groups._get_sequence_parallel_world_size(),
        device=engine.device,
    )

    def loss_of(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model.lm_head(x).float(), y, reduction="sum")

    losses, norms = [], []
    for batch in islice(loader, steps):
        labels = batch.pop("shift_labels")
        if compiled:
            total = engine(**batch, shift_labels=labels, labels=labels).loss * (labels != -100).sum()
        else:
            hidden = engine.module.model(**batch).last_hidden_state
            total = TiledFusedLogitsLoss.apply(
                loss_of, engine.module, hidden, labels, None, 2, [engine.module.lm_head.weight], "sum"
            )
        group = mpu.get_sequence_parallel_group()
        count = sum(torch.distributed.nn.functional.all_gather((labels != -100).sum(), group=group))
        loss = sum(torch.distributed.nn.functional.all_gather(total, group=group)) / count
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
        norms.append(engine.get_global_grad_norm())
    return {
        "losses": losses,
        "norms": norms,
        "weights": weights(engine.module),
        "batch": engine.train_batch_size(),
    }


class _Bare(torch.nn.Module):
    """A model with an attention of its own, if any."""

    def __init__(self, *layers: str) -> None:
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation="sdpa", layer_types=layers)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return position_ids


def refused(rank: int, world: int) -> None:
    import pytest
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    from zeropipe.errors import DesyncError, UsageError
    from zeropipe.runtime.sequence_parallel.place import initialize_sequence_parallel

    deepspeed.init_distributed(dist_backend="gloo")

    def register(model: Any, attention: str = "sdpa", **given: Any) -> Any:
        return UlyssesSPAttentionHF.register_with_transformers(
            model, attention, sequence_parallel_size=world, micro_batch_size=1, **given
        )

    with pytest.raises(UsageError, match=r"core_attn_implementation.*sdpa.*found eager.*use 'sdpa'"):
        register(_tiny(), "eager")
    assert UlyssesSPAttentionHF.register_with_transformers("any", "sdpa", 1, 1) is None
    model, ids = _tiny(), torch.arange(3, 11).view(1, 8)
    whole = model.eval()(ids).logits
    register(model, disable_in_eval=True)
    with pytest.raises(UsageError, match="evaluates whole sequences and was not registered"):
        _tiny().eval()(ids)
    model.train()
    # A rank's place is known without position_ids; in evaluation each has a whole sequence of its own.
    mine = ids.chunk(world, 1)[rank]
    torch.testing.assert_close(model(mine).logits, whole.chunk(world, 1)[rank], rtol=2e-6, atol=2e-6)
    assert model.eval()(ids).logits.equal(whole)
    model.train()
    with pytest.raises(DesyncError, match=r"the shape \[batch, tokens\] of a part"):
        model(ids[:, : 4 + rank])
    with pytest.raises(UsageError, match=r"attention of a sequence to itself.*found a mask for each head"):
        model(mine, attention_mask=torch.zeros(1, 4, 8, 8))
    with pytest.raises(UsageError, match="cache"):
        model(mine, past_key_values=model(mine, use_cache=True).past_key_values)
    with pytest.raises(UsageError, match=r"BloomForCausalLM.*takes attn_implementation=.sdpa.*found eager"):
        register(BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2)))
    with pytest.raises(UsageError, match=r"layers of type linear_attention"):
        register(_Bare("full_attention", "linear_attention"))
    own = _Bare("full_attention")
    register(own)
    with pytest.raises(UsageError, match=r"_Bare.*none of its layers did.*DistributedAttention"):
        own(mine)
    # Registered again, with another size of sequences, and no more: nothing is left of it.
    register(model)
    torch.testing.assert_close(model(mine).logits, whole.chunk(world, 1)[rank], rtol=2e-6, atol=2e-6)
    initialize_sequence_parallel(1)
    assert model.eval()(ids).logits.equal(whole)


def sft(rank: int, world: int, *, folder: str, stage: int | None) -> dict[str, Any]:
    """TRL's supervised training, whose packed sequences end where they do; on shared sequences with a ``stage``."""
    from datasets import Dataset as Rows
    from trl import SFTConfig, SFTTrainer

    from tests.clients.tiny import tokenizer, words
    from tests.clients.trl_tasks import settings

    texts = [words(row[: 5 + index % 7]) for index, row in enumerate(Texts(40, "causal").ids)]
    shared = {} if stage is None else {"parallelism_config": _parallelism(world, world)}
    config = None if stage is None else ds_config(stage, gradient_clipping=0.0)
    args = SFTConfig(
        **settings(folder, config, max_steps=STOCK // 4, optim="sgd", lr_scheduler_type="constant", **shared),
        max_length=LENGTH,
        packing=True,
        padding_free=False,
        model_init_kwargs={"attn_implementation": "sdpa"},
    )
    run = SFTTrainer(
        f"{folder}/saved", args, train_dataset=Rows.from_dict({"text": texts}), processing_class=tokenizer()
    )
    run.train()
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    return {
        "losses": [entry["loss"] for entry in logs],
        "norms": [float(entry["grad_norm"]) for entry in logs],
        "weights": weights(run.model),
    }


def lora(rank: int, world: int, *, stage: int | None, steps: int) -> dict[str, Any]:
    """Adapters on a frozen model, of which an engine of 2 ranks sees parts of sequences."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from peft import LoraConfig, get_peft_model

    from zeropipe.runtime.sequence_parallel.data import shard_batch

    torch.manual_seed(SEED)
    model = get_peft_model(_tiny(), LoraConfig(r=4, lora_alpha=8, init_lora_weights=False))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LR)
    data = [{k: v.unsqueeze(0) for k, v in sample.items()} for sample in Texts(STOCK, "causal")]
    losses = []
    if stage is None:
        for batch in data[:steps]:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return {"losses": losses, "weights": {n: p for n, p in weights(model).items() if "lora" in n}}
    deepspeed.init_distributed(dist_backend="gloo")
    mpu = UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", world, 1)
    config = {"train_batch_size": 1, "gradient_clipping": 0.0, "zero_optimization": {"stage": stage}}
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=mpu)[0]
    for batch in data[:steps]:
        part = shard_batch(batch, rank, world)
        counted = (batch["labels"][:, 1:] != -100).sum()
        share = (part["shift_labels"] != -100).sum() / counted
        loss = engine(**part, labels=part["shift_labels"]).loss * share
        engine.backward(loss * world)
        engine.step()
        losses.append(float(loss))
    return {"losses": losses, "weights": {n: p for n, p in weights(engine.module).items() if "lora" in n}}


def flash(rank: int, world: int) -> None:
    """An attention that finds packed sequences by their positions, as flash attention does."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers import masking_utils
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from zeropipe.runtime.sequence_parallel.data import shard_batch

    def core(
        module: Any, q: Any, k: Any, v: Any, mask: Any, position_ids: Any, scaling: float, **_: Any
    ) -> Any:
        groups = module.num_key_value_groups
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        packs = (position_ids == 0).cumsum(-1)
        seen = (packs[:, None, :, None] == packs[:, None, None, :]).tril()
        if mask is not None:
            seen = seen & mask[:, None, None, :].bool()
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scaling)
        return out.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("flash_tiny", core)
    masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.register("flash_tiny", masking_utils.flash_attention_mask)
    deepspeed.init_distributed(dist_backend="gloo")
    for kind in ("packed", "padded"):
        batch = {k: v.unsqueeze(0) for k, v in Texts(STOCK, kind)[1].items()}
        counted = batch["labels"][0] != -100
        expected = _tiny()(**batch).logits[:, counted]
        model = _tiny()
        model.config._attn_implementation = "flash_tiny"
        UlyssesSPAttentionHF.register_with_transformers(model, "flash_tiny", world, 1)
        part = shard_batch(batch, rank, world)
        logits = [torch.empty(0)] * world
        torch.distributed.all_gather_object(logits, model(**part).logits.detach())
        found = torch.cat(logits, 1)[:, :LENGTH][:, counted]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)
