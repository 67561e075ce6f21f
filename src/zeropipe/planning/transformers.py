"""A program of a transformers configuration alone: its language model on tokens, trained."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from zeropipe.config.parse import Source, parse_config
from zeropipe.errors import ConfigError
from zeropipe.planning.plan import train

# By how the first of the file's architectures ends; any other is a causal language model.
_AUTO = {"MaskedLM": "AutoModelForMaskedLM", "ConditionalGeneration": "AutoModelForSeq2SeqLM"}


def program_of(
    path: Path, config: Source, batch: int, seq: int, recompute: bool = False
) -> Callable[[], None]:
    """Trains the model of ``path`` (config.json) on ``batch`` samples of ``seq`` tokens a micro-step.

    ``recompute``: with the model's own gradient checkpointing. Raises ConfigError where transformers is not installed,
    does not know the file, or has no language model of it.
    """
    try:
        transformers: Any = import_module("transformers")
    except ImportError as error:
        raise ConfigError("--hf needs transformers", fix="pip install transformers") from error
    try:
        shape = transformers.AutoConfig.from_pretrained(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"transformers cannot read {path}", found=str(error)) from error
    words = shape.get_text_config()
    longest = getattr(words, "max_position_embeddings", None)
    if longest and seq > longest:
        raise ConfigError("--seq", expected=f"at most the model's {longest} positions", found=seq)
    architecture = next(iter(shape.architectures or ()), "")
    kind = next((auto for end, auto in _AUTO.items() if architecture.endswith(end)), "AutoModelForCausalLM")
    stage = parse_config(config).zero_optimization.stage

    def program() -> None:
        import zeropipe
        from zeropipe.runtime.zero.gather.init import Init

        try:
            with Init(config_dict_or_path=config, enabled=stage == 3):
                model = getattr(transformers, kind).from_config(shape)
        except ValueError as error:
            raise ConfigError(
                f"transformers has no language model of {path}",
                expected="a model that takes tokens and labels",
                found=f"{type(shape).__name__}: {str(error).partition(':')[0]}",
                fix="give a training script in place of --hf",
            ) from None
        model.train()
        if recompute:
            model.gradient_checkpointing_enable()
        engine, *_ = zeropipe.initialize(model=model, config=config)
        del model

        def tokens() -> dict[str, torch.Tensor]:
            ids = torch.randint(0, words.vocab_size, (batch, seq))
            return {"input_ids": ids, "labels": ids}

        train(engine, tokens, None)

    return program
