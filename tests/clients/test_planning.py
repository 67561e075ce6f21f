"""Scripts of the clients under ``zeropipe plan``, and the models of transformers by their configuration alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.unit.cli.test_planning import _run, _script

transformers = pytest.importorskip("transformers")
SIZES = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ROTARY = {**SIZES, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64}
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**ROTARY),
    "qwen2": lambda: transformers.Qwen2Config(**ROTARY, num_key_value_heads=2),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "bert": lambda: transformers.BertConfig(**ROTARY, architectures=["BertForMaskedLM"]),
    "mixtral": lambda: transformers.MixtralConfig(**ROTARY, num_key_value_heads=2, num_local_experts=4),
    "t5": lambda: transformers.T5Config(
        vocab_size=64, d_model=32, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
        architectures=["T5ForConditionalGeneration"],
    ),
}  # fmt: skip
TRAINER = """
import sys
sys.path.insert(0, {root!r})
from transformers import Trainer, TrainingArguments
from tests.clients.tiny import Tokens, llama
args = TrainingArguments(
    {folder!r}, deepspeed="ds.json", per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=9,
    dataloader_num_workers=1, logging_steps=1, report_to=[],
)
Trainer(llama(), args, train_dataset=Tokens(90)).train()
"""
ACCELERATE = """
import sys
sys.path.insert(0, {root!r})
import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import DummyOptim
from tests.clients.tiny import Tokens, llama
accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config="ds.json"))
model = llama()
optimizer = DummyOptim(model.parameters())
loader = torch.utils.data.DataLoader(Tokens(90), batch_size=2, num_workers=2)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for batch in loader:
    loss = model(**batch).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
"""
DEEPSPEED = """
import sys
sys.path.insert(0, {root!r})
import argparse, deepspeed, torch
from tests.clients.tiny import Tokens, llama
parser = deepspeed.add_config_arguments(argparse.ArgumentParser())
parser.add_argument("--local_rank", type=int, default=-1)
args = parser.parse_args(["--deepspeed", "--deepspeed_config", "ds.json"])
deepspeed.init_distributed()
torch.cuda.set_device(args.local_rank)
with deepspeed.zero.Init(config_dict_or_path="ds.json"):
    model = llama()
engine, _, loader, _ = deepspeed.initialize(args=args, model=model, training_data=Tokens(90))
for batch in loader:
    engine.backward(engine(**{{name: t.to(engine.local_rank) for name, t in batch.items()}}).loss)
    engine.step()
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _config(folder: Path, stage: int, **more: object) -> Path:
    path, optimizer = folder / "ds.json", {"type": "AdamW", "params": {"lr": 1e-3}}
    path.write_text(
        json.dumps(
            {
                "train_micro_batch_size_per_gpu": 2,
                "zero_optimization": {"stage": stage},
                "optimizer": optimizer,
                **more,
            }
        )
    )
    return path


@pytest.mark.parametrize("model", MODELS)
def test_models_by_their_configuration(tmp_path: Path, model: str) -> None:
    shape, found = tmp_path / "config.json", tmp_path / "plan.json"
    shape.write_text(MODELS[model]().to_json_string())
    options = ["--config", _config(tmp_path, 3), "--hf", shape, "--batch", 2, "--seq", 64, "--json", found]
    code, text = _run("plan", "--world", 2, "--device", "a100", *options)
    assert code == 0, text
    plan = json.loads(found.read_text())
    assert plan["parameters"] > 10_000
    assert plan["ranks"][0]["kinds"]["activations"] > 0


@pytest.mark.parametrize(
    ("shape", "seq", "said"),
    [
        (lambda: transformers.ViTConfig(hidden_size=32), 16, "no language model"),
        (MODELS["llama"], 65, "at most the model's 64 positions"),
        (lambda: transformers.MixtralConfig(**ROTARY, num_key_value_heads=2), 64, "modeling_mixtral.py"),
    ],
)
def test_what_cannot_be_planned_says_why(tmp_path: Path, shape, seq: int, said: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**shape().to_dict(), "experts_implementation": "eager"}, default=str))
    code, text = _run(
        "plan", "--config", _config(tmp_path, 3), "--hf", path, "--batch", 2, "--seq", seq, "--world", 2
    )
    assert code == 1
    assert said in text


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(
    "script", [TRAINER, ACCELERATE, DEEPSPEED], ids=["trainer", "accelerate", "deepspeed"]
)
def test_scripts(tmp_path: Path, script: str, stage: int) -> None:
    auto = {"gradient_accumulation_steps": "auto", "train_micro_batch_size_per_gpu": "auto"}
    auto["optimizer"] = {"type": "AdamW", "params": {"lr": "auto"}}
    _config(tmp_path, stage, **(auto if script == TRAINER else {}))
    root, found = str(Path(__file__).parents[2]), tmp_path / "plan.json"
    path = _script(tmp_path, script.format(root=root, folder=str(tmp_path / "out")))
    code, text = _run("plan", "--world", 2, "--device", "h200", "--json", found, path)
    assert code == 0, text
    plan = json.loads(found.read_text())
    assert plan["settings"]["zero_optimization.stage"] == stage
    assert plan["ranks"][0]["kinds"]["moments"] > 0


def test_the_micro_batch_is_that_of_the_configuration(tmp_path: Path) -> None:
    """It was 1 whatever the configuration said, and took too little memory for it."""
    shape, found, held = tmp_path / "config.json", tmp_path / "plan.json", []
    shape.write_text(MODELS["llama"]().to_json_string())
    for config, more in (({}, ()), ({"train_micro_batch_size_per_gpu": None}, ("--batch", 2))):
        options = ["--config", _config(tmp_path, 0, **config), "--hf", shape, "--seq", 64, "--json", found]
        code, text = _run("plan", *options, *more)
        assert code == 0, text
        held.append(json.loads(found.read_text())["ranks"][0]["kinds"]["activations"])
    assert held[0] == held[1]
    code, text = _run("plan", "--config", _config(tmp_path, 0), "--hf", shape, "--seq", 64, "--batch", 4)
    assert code == 1
    assert "expected 2, the micro-batch of" in text


def test_the_configuration_that_fits_a_model_by_its_configuration(tmp_path: Path) -> None:
    shape, chosen = tmp_path / "config.json", tmp_path / "fits.json"
    shape.write_text(MODELS["llama"]().to_json_string())
    given = _config(tmp_path, 0, train_batch_size=8)
    options = ["--config", given, "--hf", shape, "--seq", 64, "--fit", "-o", chosen, "--keep", "offload"]
    code, text = _run("plan", "--world", 2, "--device", "a100", *options, "--keep", "shard")
    assert code == 0, text
    written = json.loads(chosen.read_text())
    assert written["train_batch_size"] == 8
    assert written["train_micro_batch_size_per_gpu"] == 4  # it fits whole, without recomputing
    assert "recompute" not in text.partition("chosen:")[2]
