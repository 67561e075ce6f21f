"""``from_pretrained`` under stage 3 beside the same line without it, in one process."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Transpose, WeightConverter
from transformers.integrations import HfDeepSpeedConfig

from tests.clients.tiny import llama_config

SIZES = llama_config().to_dict()
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 32}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "qwen": ("Qwen2MoeConfig", EXPERTS),
    "resnet": ("ResNetConfig", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
}
CONFIG = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
USED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "pad_token_id")  # fmt: skip


def save(
    rank: int, world: int, *, folder: str, kind: str, dtype: str = "bfloat16", torch_file: bool = False
) -> None:
    """A model of random weights, cut across files."""
    name, more = KINDS[kind]
    given = {key: SIZES[key] for key in USED} if kind not in ("resnet", "gpt2") else {}
    config = getattr(transformers, name)(**given, **more)
    torch.manual_seed(3)
    model = (
        (AutoModel if kind == "resnet" else AutoModelForCausalLM)
        .from_config(config)
        .to(getattr(torch, dtype))
    )
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor))
    model.save_pretrained(folder, max_shard_size="15KB")
    if torch_file:
        state: dict[str, torch.Tensor] = {}
        for file in Path(folder).glob("*.safetensors"):
            state |= load_file(file)
            file.unlink()
        (Path(folder) / "model.safetensors.index.json").unlink()
        torch.save(state, f"{folder}/pytorch_model.bin")


def change(rank: int, world: int, *, folder: str, kind: str) -> None:
    """A head in the files of a model where it is tied (the same as the embedding, or another), or a transposed one."""
    file = next(
        path for path in Path(folder).glob("*.safetensors") if "model.embed_tokens.weight" in load_file(path)
    )
    state = load_file(file)
    table = state["model.embed_tokens.weight"]
    heads = {"same": table.clone(), "other": table + 1, "transposed": table.t().contiguous()}
    state["lm_head.weight"] = heads[kind]
    save_file(state, file, metadata={"format": "pt"})
    index = Path(folder) / "model.safetensors.index.json"
    text = index.read_text()
    entry = f'"model.embed_tokens.weight": "{file.name}"'
    index.write_text(text.replace(entry, f'{entry}, "lm_head.weight": "{file.name}"'))


def load(
    rank: int,
    world: int,
    *,
    folder: str,
    how: str = "causal",
    precision: str = "bf16",
    counted: bool = False,
    transposed: bool = False,
    **given: Any,
) -> dict[str, Any]:
    """What differs between the two models and their reports, and what the second load read."""
    import deepspeed

    kinds = {"causal": AutoModelForCausalLM, "base": AutoModel, "classes": AutoModelForSequenceClassification}
    deepspeed.init_distributed("gloo")
    if transposed:
        turned = WeightConverter("lm_head.weight", "lm_head.weight", operations=[Transpose()])
        register_checkpoint_conversion_mapping("llama", [turned], overwrite=True)
    plain, expected = kinds[how].from_pretrained(folder, output_loading_info=True, **given)
    if precision == "bf16":
        for param in plain.parameters():
            param.data = param.data.bfloat16()
    kept = HfDeepSpeedConfig(CONFIG | ({"bf16": {"enabled": True}} if precision == "bf16" else {}))
    read = 0
    for _ in range(1 + counted):  # the first use reads modules of Python, too
        before = _read()
        model, report = kinds[how].from_pretrained(folder, output_loading_info=True, **given)
        read = _read() - before
    assert all(hasattr(param, "ds_id") for param in model.parameters()) and kept.is_zero3()
    state, wanted = model.state_dict(), plain.state_dict()
    names = set(wanted) - set(expected["missing_keys"]) - {name for name, *_ in expected["mismatched_keys"]}
    alike = {name for name in names if torch.equal(state[name], wanted[name])}
    alike -= {name for name in names if state[name].dtype != wanted[name].dtype}
    assert list(state) == list(wanted)
    assert all(bool(torch.isfinite(value.float()).all()) for value in state.values())
    ties = [model.get_parameter(name) is model.get_parameter(source) for name, source in _ties(plain)]
    gc.collect()
    keys = ("missing_keys", "unexpected_keys", "mismatched_keys")
    return {
        "different": sorted(names - alike),
        "report": {key: sorted(map(str, report[key])) for key in keys},
        "expected": {key: sorted(map(str, expected[key])) for key in keys},
        "ties": ties,
        "read": read,
    }


def init(rank: int, world: int, *, folder: str, sizes: dict[str, int]) -> tuple[list[str], str]:
    """What differs between ``zero.Init(weights=)`` around a constructor and ``from_pretrained``; the error."""
    import deepspeed

    import zeropipe

    deepspeed.init_distributed("gloo")
    wanted = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    config = AutoConfig.from_pretrained(folder, **sizes)
    try:
        with zeropipe.zero.Init(config_dict_or_path=CONFIG | {"bf16": {"enabled": True}}, weights=folder):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except zeropipe.errors.CheckpointError as error:
        return [], str(error)
    state = model.state_dict()
    assert list(state) == list(wanted)
    return [name for name, value in wanted.items() if not torch.equal(state[name], value)], ""


def _ties(model: torch.nn.Module) -> list[tuple[str, str]]:
    """Names of one parameter."""
    seen: dict[torch.Tensor, str] = {}
    every = model.named_parameters(remove_duplicate=False)
    return [(name, seen[param]) for name, param in every if seen.setdefault(param, name) != name]


def refused(rank: int, world: int, *, folder: str) -> tuple[str, str]:
    """How a load fails that meets a cut file."""
    import deepspeed

    deepspeed.init_distributed("gloo")
    kept = HfDeepSpeedConfig(CONFIG)
    assert AutoConfig.from_pretrained(folder) and kept
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except RuntimeError as error:
        return type(error).__name__, str(error)
    return "", ""


def _read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])
