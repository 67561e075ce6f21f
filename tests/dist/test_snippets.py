"""Every Python block of the pages runs as it stands there, one after the other, on real ranks.

A page speaks of an engine, a model, a batch: ``GIVEN`` says what these names are for each page.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict

import zeropipe
from tests.helpers.launch import python
from tests.helpers.pages import PAGES, blocks

WIDTH = 16
CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "zero_optimization": {"stage": 2},
}
Names = dict[str, Any]


class Model(nn.Module):
    """Returns the loss where there is a target."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = (
            nn.Linear(WIDTH, WIDTH),
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, WIDTH),
        )

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        out = self.head(self.norm(self.body(x)))
        return out if y is None else F.mse_loss(out, y)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, WIDTH), torch.randn(4, WIDTH)


def basics() -> Names:
    x, y = batch()
    (x1, y1), (x2, y2) = batch(), batch()
    batches = [batch() for _ in range(2)]
    names = {"model": Model(), "batches": batches, "x": x, "y": y, "x1": x1, "y1": y1, "x2": x2, "y2": y2}
    return names | {"zeropipe": zeropipe, "torch": torch, "rank": dist.get_rank(), "loss_of": F.mse_loss}


def with_engine(**more: Any) -> Names:
    names = basics()
    names["engine"] = zeropipe.initialize(model=names["model"], config=CONFIG | more)[0]
    return names


def checkpoints() -> Names:
    names = with_engine()
    other = Model()
    return names | {
        "model": other,
        "optimizer": torch.optim.AdamW(other.parameters()),
        "get_state_dict": get_state_dict,
        "dcp": dcp,
    }


def elastic() -> Names:
    data = [batch() for _ in range(3)]
    rows = [(x[0], y[0]) for x, y in data] * 8
    return with_engine() | {"GPT": Model, "text": rows, "config": CONFIG}


def stage_3() -> Names:
    names, config = basics(), CONFIG | {"zero_optimization": {"stage": 3}}
    model = Model()
    smaller = nn.Linear(WIDTH, 4)
    for module in (model, smaller):
        zeropipe.zero.Init(module=module, config_dict_or_path=config)
    pair = {"a": model.head.weight, "b": smaller.weight, "n": 4}
    return names | pair | {"folder": ".", "zero": zeropipe.zero, "Model": Model, "config": config}


def pipelines() -> Names:
    from zeropipe.pipe import LayerSpec, PipeDataParallelTopology, PipelineParallelGrid

    def data() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            yield torch.randn(4, 512), torch.randn(4, 512)

    class Square(nn.Linear):
        def __init__(self, width: int) -> None:
            super().__init__(width, width)

    return basics() | {
        "Embed": Square,
        "Block": Square,
        "Head": Square,
        "config": CONFIG | {"zero_optimization": {"stage": 1}},
        "data": data(),
        "PipeDataParallelTopology": PipeDataParallelTopology,
        "PipelineParallelGrid": PipelineParallelGrid,
        "layers": [LayerSpec(nn.Linear, WIDTH, WIDTH) for _ in range(4)],
    }


def monitoring() -> Names:
    from zeropipe.config.parse import parse_config

    section = {"enabled": True, "output_path": "csv"}
    names = {"config": parse_config(CONFIG | {"csv_monitor": section}), "step": 3}
    return (
        basics() | names | {"block": nn.Linear(WIDTH, WIDTH), "h": torch.randn(4, WIDTH, requires_grad=True)}
    )


GIVEN: dict[str, Callable[[], Names]] = {
    "README.md": basics,
    "getting-started.md": basics,
    "checkpoints.md": checkpoints,
    "data-parallelism.md": with_engine,
    "elastic.md": elastic,
    "offload.md": lambda: with_engine() | {"generate": lambda *prompt: None},
    "optimizers.md": basics,
    "precision.md": basics,
    "reproducible.md": lambda: with_engine(reproducible={"slots": 4}) | {"dataset": list(range(64))},
    "sequence-parallelism.md": basics,
    "monitoring.md": monitoring,
    "zero.md": stage_3,
    "pipeline.md": pipelines,
}
WITH_PYTHON = {page.name: page for page in PAGES if any(block.language == "python" for block in blocks(page))}


def run_page(rank: int, world: int, page: Path, folder: str) -> int:
    with contextlib.chdir(folder):
        names = GIVEN[page.name]()
        found = [block for block in blocks(page) if block.language == "python"]
        for block in found:
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
            exec(code, names)
        engine = names.get("engine")
        if engine is not None:
            engine.destroy()
    return len(found)


ALONE = {"plan.md"}  # imagines a world, which is done where there is none


@pytest.mark.parametrize("name", sorted(ALONE))
def test_every_block_of_a_page_runs_in_a_process_alone(tmp_path, name):
    script = tmp_path / "page.py"
    script.write_text("\n".join(b.text for b in blocks(WITH_PYTHON[name]) if b.language == "python"))
    done = python(script, timeout=150)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", sorted(WITH_PYTHON.keys() - ALONE))
def test_every_block_of_a_page_runs(pool, tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))  # before any rank can read it
    torch.save(Model().state_dict(), tmp_path / "pytorch_model.bin")
    world = 4 if name == "pipeline.md" else 2
    assert pool(world).run(run_page, WITH_PYTHON[name], os.fspath(tmp_path))[0] > 0
