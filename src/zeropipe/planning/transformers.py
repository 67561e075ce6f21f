"""A program of a transformers configuration alone: its causal language model on tokens, trained."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from zeropipe.config.parse import Source, parse_config
from zeropipe.errors import ConfigError
from zeropipe.planning.plan import train


def program_of(path: Path, config: Source, batch: int, seq: int) -> Callable[[], None]:
    """Trains the model of ``path`` (config.json) on ``batch`` samples of ``seq`` tokens a micro-step.

    Raises ConfigError where transformers is not installed, or does not know the file.
    """
    try:
        transformers: Any = import_module("transformers")
    except ImportError as error:
        raise ConfigError("--hf needs transformers", fix="pip install transformers") from error
    try:
        shape = transformers.AutoConfig.from_pretrained(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"transformers cannot read {path}", found=str(error)) from error
    stage = parse_config(config).zero_optimization.stage

    def program() -> None:
        import zeropipe
        from zeropipe.runtime.zero.gather.init import Init

        with Init(config_dict_or_path=config, enabled=stage == 3):
            model = transformers.AutoModelForCausalLM.from_config(shape)
        model.train()
        engine, *_ = zeropipe.initialize(model=model, config=config)
        del model

        def tokens() -> dict[str, torch.Tensor]:
            ids = torch.randint(0, shape.vocab_size, (batch, seq))
            return {"input_ids": ids, "labels": ids}

        train(engine, tokens, None)

    return program
