"""The options of the example's command line, each checked before a rank is started."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch


def read(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--text", type=Path, help="file or folder to learn from (default: the Python standard library)")
    add(
        "--folder", type=Path, default=Path("runs/gpt"), help="checkpoints and results (default: %(default)s)"
    )
    add("--fresh", action="store_true", help="forget what is in the folder and start anew")
    add("--config", type=_json, metavar="JSON", help="file with the keys that DeepSpeed users know")
    add("--nproc", type=_positive, default=torch.cuda.device_count() or 2, help="ranks on this machine")
    add("--stage", type=int, choices=(0, 1, 2, 3), help="ZeRO stage (default: the config's, or 2)")
    add("--dtype", choices=("fp32", "bf16", "fp16"), help="precision (default: the config's, or fp32)")
    add("--steps", type=_positive, default=1000, help="length of the run (default: %(default)s)")
    add("--save-every", type=_positive, default=50, metavar="STEPS")
    add("--measure-every", type=_positive, default=100, metavar="STEPS", help="on held-out text")
    add(
        "--prompt", default="class Server:\n\tdef __init__(self, ", help="what the printed sample begins with"
    )
    add("--sample", type=_positive, default=600, metavar="BYTES", help="length of the printed sample")
    return parser.parse_args()


def _positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def _json(path: str) -> dict[str, Any]:
    try:
        value = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{path} holds no JSON object")
    return value
