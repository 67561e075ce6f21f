"""A table of SHA-256 of the weights after 20 steps, to show that a rebuilt tree computes the same bits.

    run() { PYTHONPATH=$1/src torchrun --standalone --nproc_per_node 2 -m tests.golden.digests --out $2; }
    run path/to/the/old/checkout old.json; run . new.json
    python -m tests.golden.digests --compare old.json new.json

Bits depend on the processor and on torch's build, so both tables are made on one machine, and none is kept here. Only
names that users have are called: the same script runs on any commit. A case that raises is recorded as its error,
which has to be the same on both sides too.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import zeropipe
from tests.dist.pipe_models import VOCAB, loss_of, specs
from tests.helpers.models import TinyGPT, build

STEPS, GAS, SEQ = 20, 2, 8
ADAMW = {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1}}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": ADAMW,
    "SGD": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
    "Lion": {"type": "Lion", "params": {"lr": 1e-4}},
    "Lamb": {"type": "Lamb", "params": {"lr": 1e-3}},
    "Muon": {"type": "Muon", "params": {"lr": 1e-3}},
}
ONEBIT: dict[str, dict[str, Any]] = {
    "OneBitAdam": {"type": "OneBitAdam", "params": {"lr": 1e-3, "freeze_step": 8}},
    "OneBitLamb": {"type": "OneBitLamb", "params": {"lr": 1e-3, "freeze_step": 8}},
    "ZeroOneAdam": {"type": "ZeroOneAdam", "params": {"lr": 1e-3, "var_freeze_step": 12}},
}
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8}},
}
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zbv")


def cases(files: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, what ``train`` or ``train_pipeline`` takes)."""
    for stage, precision, name in itertools.product(range(4), PRECISIONS, OPTIMIZERS):
        yield (
            f"stage{stage} {precision} {name}",
            {"zero": {"stage": stage}, "precision": precision, "name": name},
        )
    for stage, precision, name in itertools.product((0, 1), ("fp32", "bf16"), ONEBIT):
        yield (
            f"stage{stage} {precision} {name}",
            {"zero": {"stage": stage}, "precision": precision, "name": name},
        )
    for stage, precision, device in itertools.product((1, 2, 3), ("fp32", "bf16"), ("cpu", "nvme")):
        place = {"device": device} | ({"nvme_path": files} if device == "nvme" else {})
        zero = {"stage": stage, "offload_optimizer": place} | ({"offload_param": place} if stage == 3 else {})
        yield f"stage{stage} {precision} AdamW offload {device}", {"zero": zero, "precision": precision}
    for precision, threshold in itertools.product(PRECISIONS, (0, 10_000)):
        zero = {"stage": 3, "stage3_param_persistence_threshold": threshold}
        yield (
            f"stage3 {precision} AdamW Init persist {threshold}",
            {"zero": zero, "precision": precision, "init": True},
        )
    for stage, precision in itertools.product(range(4), ("fp32", "fp16")):
        call = {"zero": {"stage": stage}, "precision": precision, "clip": 0.1}
        yield f"stage{stage} {precision} AdamW clip", call
    for schedule, stage, precision in itertools.product(SCHEDULES, range(4), ("fp32", "bf16")):
        call = {"zero": {"stage": stage}, "precision": precision, "schedule": schedule}
        yield f"pipe {schedule} stage{stage} {precision} AdamW", call


def settings(zero: dict[str, Any], precision: str, name: str = "AdamW", clip: float = 0.0) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": GAS,
        "gradient_clipping": clip,
        "optimizer": (OPTIMIZERS | ONEBIT)[name],
        "zero_optimization": zero,
    } | PRECISIONS[precision]


def tokens(vocab: int, *seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(s * 1000**i for i, s in enumerate(seed)))
    return tuple(torch.randint(vocab, (2, SEQ), generator=generator) for _ in range(2))  # type: ignore[return-value]


def train(rank: int, init: bool = False, **given: Any) -> str:
    config = settings(**given)
    if init:
        with zeropipe.zero.Init(config_dict_or_path=config):
            model = build(TinyGPT)
    else:
        model = build(TinyGPT)
    engine = zeropipe.initialize(model=model, config=config)[0]
    for step, micro in itertools.product(range(STEPS), range(GAS)):
        x, y = tokens(64, step, micro, rank)
        engine.backward(engine(x, y))
        engine.step()
    return digest(engine)


def train_pipeline(rank: int, schedule: str, **given: Any) -> str:
    module = zeropipe.pipe.PipelineModule(specs(6), num_stages=2, loss_fn=loss_of, schedule=schedule)
    engine = zeropipe.initialize(model=module, config=settings(**given))[0]
    for step in range(STEPS):
        engine.train_batch(iter([tokens(VOCAB, step, micro) for micro in range(GAS)]))
    return digest(engine)


def digest(engine: Any) -> str:
    """Of this rank's parameters and buffers, whole, in their order; the engine ends here."""
    found = hashlib.sha256()
    with zeropipe.zero.GatheredParameters(list(engine.module.parameters())):
        for name, tensor in engine.module.state_dict().items():
            found.update(name.encode())
            found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    engine.destroy()
    return found.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="", help="cases whose name has this")
    parser.add_argument("--compare", nargs=2, type=Path)
    chosen = parser.parse_args()
    if chosen.compare:
        sys.exit(compare(*(json.loads(path.read_text()) for path in chosen.compare)))
    torch.set_num_threads(1)
    zeropipe.init_distributed()
    rank, table = zeropipe.comm.get_rank(), {}
    files = chosen.out.with_suffix(".offload").absolute()
    files.mkdir(exist_ok=True)
    for name, call in cases(str(files)):
        if chosen.only not in name:
            continue
        torch.manual_seed(0)
        try:
            mine = (train_pipeline if "schedule" in call else train)(rank, **call)
        except Exception as error:
            traceback.print_exc()
            mine = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        table[name] = mine
    path = chosen.out.with_suffix(f".{rank}.json")
    path.write_text(json.dumps(table, indent=1))
    zeropipe.comm.barrier()
    if rank == 0:
        both = [json.loads(chosen.out.with_suffix(f".{r}.json").read_text()) for r in range(2)]
        chosen.out.write_text(json.dumps({name: [half[name] for half in both] for name in both[0]}, indent=1))
        print(
            f"{len(table)} cases, {sum(':' in value for value in table.values())} of them errors: {chosen.out}"
        )


def compare(old: dict[str, list[str]], new: dict[str, list[str]]) -> int:
    other = [name for name in old | new if old.get(name) != new.get(name)]
    for name in other:
        print(f"{name}: {old.get(name)} -> {new.get(name)}")
    print(f"{len(old | new) - len(other)} of {len(old | new)} cases have the same bits on both ranks")
    return bool(other)


if __name__ == "__main__":
    main()
