"""A tiny random Llama, its data and its tokenizer, all made here: nothing is downloaded.

All sizes are multiples of 16, so that torch's fused steps round alike however the parameters are cut, and the
same script under plain PyTorch must give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 64
LENGTH = 16  # tokens of a sample
SEED = 1234


def llama_config(**changes: Any) -> LlamaConfig:
    given = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "attn_implementation": "eager",
        **changes,
    }
    return LlamaConfig(**given)


def llama(**changes: Any) -> LlamaForCausalLM:
    """The same weights on every call."""
    torch.manual_seed(SEED)
    return LlamaForCausalLM(llama_config(**changes))


def in_16_bits(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """What an engine makes of an fp32 model: its parameters are cast, its rotary tables are not."""
    for param in model.parameters():
        param.data = param.data.to(dtype)
    return model


class Tokens(Dataset[dict[str, torch.Tensor]]):
    """``size`` samples of a sequence that can be learnt: each token is the last plus the sample's stride."""

    def __init__(self, size: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        first = torch.randint(3, VOCABULARY, (size, 1), generator=generator)
        stride = torch.randint(1, 5, (size, 1), generator=generator)
        steps = torch.arange(LENGTH).unsqueeze(0)
        self.ids = (first + stride * steps - 3) % (VOCABULARY - 3) + 3  # [size, LENGTH]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index].clone()}


def tokenizer() -> PreTrainedTokenizerFast:
    """Words ``w3`` ... ``w63`` and the three special tokens."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def words(ids: torch.Tensor) -> str:
    return " ".join(f"w{int(i)}" for i in ids)
