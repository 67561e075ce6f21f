"""The fp32 weights of a checkpoint without an engine: the functions and the command that users know by this name."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from zeropipe.checkpoint.export import export
from zeropipe.checkpoint.loader import open_source
from zeropipe.checkpoint.sources import Weight
from zeropipe.checkpoint.sources.parallel import weights
from zeropipe.errors import CheckpointError

Folder = str | os.PathLike[str]


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: Folder,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    lazy_mode: bool = False,
) -> dict[str, Any]:
    """The whole model's state dict in fp32 on the CPU; tied names share a tensor; integer buffers keep their dtype.

    ``lazy_mode``: values are objects whose ``contiguous()`` reads the tensor. Raises CheckpointError.
    """
    source = open_source(checkpoint_dir, tag)
    state: dict[str, Any] = {}
    for weight in weights(source, exclude_frozen=exclude_frozen_parameters):
        # One object for all names that are tied, as the module has it.
        value: torch.Tensor | Weight = weight if lazy_mode else weight.contiguous()
        state |= dict.fromkeys(source.names_of(weight.name), value)
    return state


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: Folder,
    output_dir: Folder,
    max_shard_size: str | int | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Write the fp32 weights into ``output_dir`` as ``pytorch_model*.bin`` or ``model*.safetensors`` with an index.

    ``max_shard_size=None``: one file. Raises CheckpointError.
    """
    source = open_source(checkpoint_dir, tag)
    export(
        source,
        output_dir,
        # No limit: larger than any file.
        max_shard_size=2**62 if max_shard_size is None else max_shard_size,
        safetensors=safe_serialization,
        exclude_frozen=exclude_frozen_parameters,
    )


def load_state_dict_from_zero_checkpoint(
    model: torch.nn.Module, checkpoint_dir: Folder, tag: str | None = None
) -> torch.nn.Module:
    """Put the checkpoint's fp32 weights into ``model``, one at a time, and return it (on the CPU).

    Names that the checkpoint or the model lacks are passed over.
    """
    model = model.cpu()
    state = get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag, lazy_mode=True)
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name in state and isinstance(tensor, torch.Tensor):
                # As stored: an integer buffer stays one, and copying casts the others.
                value = state[name].read()
                if value.shape != tensor.shape:
                    raise CheckpointError(
                        f"{name} does not fit the model",
                        expected=tuple(tensor.shape),
                        found=tuple(value.shape),
                    )
                tensor.data.copy_(value)
    return model


def get_model_state_file(checkpoint_dir: Folder, zero_stage: int) -> str:
    """The model file that describes the whole model: rank 0's. Raises FileNotFoundError."""
    name = "zero_pp_rank_0_mp_rank_00_model_states.pt" if zero_stage >= 3 else "mp_rank_00_model_states.pt"
    path = Path(checkpoint_dir) / name
    if not path.is_file():
        raise FileNotFoundError(f"can't find model states file at '{path}'")
    return str(path)


def get_checkpoint_files(checkpoint_dir: Folder, glob_pattern: str) -> list[str]:
    """Files that match, by their numbers. Raises FileNotFoundError where there are none."""
    # Rank 10 comes after rank 9.
    found = sorted(
        map(str, Path(checkpoint_dir).glob(glob_pattern)),
        key=lambda path: ([int(digits) for digits in re.findall(r"\d+", os.path.basename(path))], path),
    )
    if not found:
        raise FileNotFoundError(f"can't find {glob_pattern} files in directory '{checkpoint_dir}'")
    return found


def get_optim_files(checkpoint_dir: Folder) -> list[str]:
    """Every rank's optimizer file, in the order of ranks."""
    return get_checkpoint_files(checkpoint_dir, "*_optim_states.pt")


def get_model_state_files(checkpoint_dir: Folder) -> list[str]:
    return get_checkpoint_files(checkpoint_dir, "*_model_states.pt")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command ``zero_to_fp32.py CHECKPOINT_FOLDER OUTPUT_FOLDER``."""
    parser = argparse.ArgumentParser(prog="zero_to_fp32.py", description="Write a checkpoint's fp32 weights.")
    parser.add_argument("checkpoint_dir", help="the folder that was saved to, e.g. with `latest` in it")
    parser.add_argument("output_dir", help="where the weights go")
    parser.add_argument("--max_shard_size", default="5GB", help="largest file; default 5GB")
    parser.add_argument("--safe_serialization", action="store_true", help="write safetensors")
    parser.add_argument("-t", "--tag", default=None, help="default: what `latest` names")
    parser.add_argument("--exclude_frozen_parameters", action="store_true", help="leave frozen ones out")
    parser.add_argument("-d", "--debug", action="store_true", help="accepted; without effect")
    given = vars(parser.parse_args(arguments))
    del given["debug"]
    convert_zero_checkpoint_to_fp32_state_dict(**given)
