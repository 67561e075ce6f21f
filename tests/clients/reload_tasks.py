"""What clients saved, read in a process that has no zeropipe and cannot import it."""

from __future__ import annotations

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.clients.tiny import llama


def _forbid() -> None:
    assert "zeropipe.runtime.engine" not in sys.modules
    sys.modules["zeropipe"] = sys.modules["deepspeed"] = None  # type: ignore[assignment]


def model(rank: int, world: int, *, folder: str) -> dict[str, torch.Tensor]:
    """The parameters by name of a saved model, in the dtype of the file."""
    _forbid()
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return {name: param.detach().clone() for name, param in loaded.named_parameters()}


def adapter(rank: int, world: int, *, folder: str) -> dict[str, torch.Tensor]:
    """The parameters by name of the tiny model with the adapter that was saved."""
    _forbid()
    loaded = PeftModel.from_pretrained(llama(), folder)
    return {name: param.detach().clone() for name, param in loaded.named_parameters()}
