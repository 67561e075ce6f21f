"""What it takes to load weights into shards: memory, bytes read and time, beside plain transformers and DeepSpeed.

    python -m benchmarks.loading.run --peer-python PATH_OF_A_PYTHON_WITH_DEEPSPEED

A Llama of 1.25 GB and a small mixture of experts, cut across files, in bf16, at 1, 2 and 4 ranks; needs transformers.
The script is the same for all (``worker.py``), and so are the bits of what is loaded. A peak is of resident memory
beyond what the process had before, with the pages of mapped files; the bound is 1.15 of a shard and the largest tensor.
Bytes are those that ``read`` and its kin gave, and the most pages of mapped weights that were resident at once.
Without ZeRO nothing is read before it is used: the model's tensors are the mapped files.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.common.report import MB, write
from benchmarks.loading.worker import MARK

ROOT = Path(__file__).resolve().parents[2]
COMMON = {"vocab_size": 32000, "num_key_value_heads": 4, "max_position_embeddings": 512}
LLAMA = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 11, "num_attention_heads": 16}
EXPERTS = {"hidden_size": 1024, "intermediate_size": 1792, "num_hidden_layers": 4, "num_attention_heads": 8}
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama, 1.25 GB": ("LlamaConfig", COMMON | LLAMA),
    "Mixtral shape, 0.49 GB": ("MixtralConfig", COMMON | EXPERTS | {"num_local_experts": 8}),
}
# Name -> the way of worker.py, whether the peer's interpreter runs it.
CONTENDERS = {
    "transformers, no ZeRO": ("plain", False),
    "zeropipe, from_pretrained": ("stage3", False),
    "zeropipe, zero.Init(weights=)": ("init", False),
    "DeepSpeed, from_pretrained": ("stage3", True),
}


def main() -> None:
    arguments = _arguments()
    folder = Path(tempfile.mkdtemp(prefix="loading-", dir=arguments.folder))
    numbers: dict[str, Any] = {}
    try:
        for name, (config, sizes) in MODELS.items():
            _python(sys.executable, "-c", _MAKE, config, json.dumps(sizes), json.dumps(TINY), str(folder))
            for world in arguments.worlds:
                for contender, (way, peer) in CONTENDERS.items():
                    python = arguments.peer_python if peer else sys.executable
                    if python:
                        found = numbers.setdefault(name, {}).setdefault(str(world), {})
                        found[contender] = _load(python, world, way, folder)
                # After each, since it takes long: what was measured is not lost with the rest.
                write(arguments.out, "Weights straight into shards", _text(numbers), {"loads": numbers})
            shutil.rmtree(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


_MAKE = """
import json, sys, torch, transformers
kind, sizes, tiny, folder = getattr(transformers, sys.argv[1]), *map(json.loads, sys.argv[2:4]), sys.argv[4]
for more, where in ((tiny, folder + "/tiny"), ({}, folder)):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(kind(**{**sizes, **more}), dtype=torch.bfloat16)
    model.save_pretrained(where, max_shard_size="200MB")
"""


def _load(python: str, world: int, way: str, folder: Path) -> Any:
    module = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    out = _python(python, *module, "-m", "benchmarks.loading.worker", way, str(folder))
    return json.loads(next(line for line in out.splitlines() if line.startswith(MARK)).removeprefix(MARK))


def _python(python: str, *arguments: str) -> str:
    """What it prints. Raises RuntimeError with the end of its errors."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment["PYTHONPATH"] = path
    command = [python, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise RuntimeError(f"{python} {' '.join(arguments[:4])}: {done.stderr[-3000:]}")
    return done.stdout


def _text(numbers: dict[str, Any]) -> str:
    lines = [f"transformers {version('transformers')}, bf16, gloo; weights in files of at most 200 MB", ""]
    for name, worlds in numbers.items():
        lines += [
            f"## {name}\n",
            "| ranks | contender | peak of a rank, MB | of shard + largest tensor | read by all, MB | of the weights "
            "| s | bits |",
            "|---:|---|---:|---:|---:|---:|---:|---|",
        ]
        for world, contenders in worlds.items():
            usual = contenders["transformers, no ZeRO"][0]["bits"]
            total = contenders["transformers, no ZeRO"][0]["shard"]
            for contender, ranks in contenders.items():
                peak = max(ranks, key=lambda rank: rank["peak"])
                shard = total / int(world) + peak["largest"]
                read = sum(rank["read"] + rank["mapped"] for rank in ranks)
                lines.append(
                    f"| {world} | {contender} | {peak['peak'] / MB:.0f} | {peak['peak'] / shard:.2f} | {read / MB:.0f} "
                    f"| {read / total:.2f} | {max(rank['seconds'] for rank in ranks):.1f} "
                    f"| {'same' if ranks[0]['bits'] == usual else 'others'} |"
                )
        lines.append("")
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument(
        "--peer-python", default="", help="an interpreter that has DeepSpeed and transformers"
    )
    parser.add_argument("--folder", default=None, help="where to write; default: a temporary folder")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    return parser.parse_args()


if __name__ == "__main__":
    main()
