"""What CONTRIBUTING says of new parts is true: each is added to a copy of the tree, as one file and a line, and used.

The copy is changed as a contributor would change the tree, so a table that asks for a second line fails here.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.launch import ROOT, python


@dataclass(frozen=True)
class Addition:
    """``file``: the new one; ``lines``: {file: (text that is there, what it becomes)}; ``use``: a script."""

    file: str
    text: str
    lines: Mapping[str, tuple[tuple[str, str], ...]]
    use: str


OPTIMIZER = Addition(
    "runtime/optimizers/sign.py",
    '''"""Steps by the sign of the gradient alone: J. Bernstein et al., signSGD, algorithm 1 (arXiv 1802.04434)."""

import torch


class SignSGD(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(param.grad.sign(), alpha=group["lr"])
''',
    {
        "runtime/optimizers/registry.py": (
            (
                "from zeropipe.runtime.optimizers.shard_view import",
                "from zeropipe.runtime.optimizers.sign import SignSGD\n"
                "from zeropipe.runtime.optimizers.shard_view import",
            ),
            ("(*TORCHS, Lion)", "(*TORCHS, Lion, SignSGD)"),
            ('        "Muon": _muon,\n', '        "Muon": _muon,\n        "SignSGD": _plain(SignSGD),\n'),
        )
    },
    """
from torch import nn, ones
import zeropipe
config = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "SignSGD", "params": {"lr": 0.5}}}
for stage in (1, 3):
    model = nn.Linear(4, 1, bias=False)
    nn.init.zeros_(model.weight)
    engine, *_ = zeropipe.initialize(model=model, config=config | {"zero_optimization": {"stage": stage}})
    engine.backward(engine(ones(2, 4)).mean())
    engine.step()
    assert engine.module.state_dict()["weight"].tolist() == [[-0.5] * 4]
    engine.destroy()
""",
)

SCHEDULE = Addition(
    "runtime/pipe/one_by_one.py",
    '''"""A micro-batch goes all the way forward and back before the next one starts: no overlap, the least memory."""

from zeropipe.runtime.pipe.instructions import Op, Schedule

BOTH = (Op.FORWARD, Op.BACKWARD)


def one_by_one(ranks, micro_batches, chunks=1):
    lines = [[(rank, op, m) for m in range(micro_batches) for op in BOTH] for rank in range(ranks)]
    return Schedule.made(lines, "one-by-one")
''',
    {
        "runtime/pipe/schedule.py": (
            (
                "from zeropipe.runtime.pipe.simulate import",
                "from zeropipe.runtime.pipe.one_by_one import one_by_one\n"
                "from zeropipe.runtime.pipe.simulate import",
            ),
            (
                "KINDS: tuple[Kind, ...] = (\n",
                "KINDS: tuple[Kind, ...] = (\n"
                '    Kind("one-by-one", one_by_one, (1, 1), 1, Placement.LOOP, lambda p, m, v: 1),\n',
            ),
        )
    },
    """
from zeropipe.runtime.pipe.schedule import make_schedule
from zeropipe.runtime.pipe.simulate import simulate
result = simulate(make_schedule("one-by-one", 3, 4))
assert result.peaks == (1, 1, 1), result.peaks
""",
)

RATE = Addition(
    "runtime/lr_schedules/constant.py",
    '''"""A learning rate that does not change: a run without a schedule, for scripts that need one."""

from zeropipe.runtime.lr_schedules.base import Schedule


class ConstantLR0(Schedule):
    def __init__(self, optimizer, lr=1e-3, last_batch_iteration=-1):
        super().__init__(optimizer, last_batch_iteration)
        self.lr = lr

        self._start()

    def _lrs(self, iteration):
        return [self.lr for _ in self.optimizer.param_groups]
''',
    {
        "runtime/lr_schedules/kinds.py": (
            (
                "from zeropipe.runtime.lr_schedules.config import",
                "from zeropipe.runtime.lr_schedules.constant import ConstantLR0\n"
                "from zeropipe.runtime.lr_schedules.config import",
            ),
            ("WarmupDecayLR, WarmupCosineLR)\n}", "WarmupDecayLR, WarmupCosineLR, ConstantLR0)\n}"),
        ),
        "runtime/lr_schedules/config.py": (("WARMUP_COSINE_LR]", 'WARMUP_COSINE_LR, "ConstantLR0"]'),),
    },
    """
import torch
from zeropipe.runtime.lr_schedules import build
optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=1.0)
schedule = build("ConstantLR0", optimizer, {"lr": 0.25})
schedule.step()
assert schedule.get_last_lr() == [0.25]
""",
)

FORMAT = Addition(
    "checkpoint/sources/plain_torch.py",
    '''"""A state dict that a script saved by itself, ``weights.pt`` in a folder: weights alone."""

import torch

from zeropipe.checkpoint.save.files import load_torch
from zeropipe.checkpoint.sources import Checkpoint, Value, dtype_name
from zeropipe.checkpoint.save.records import ModuleRest, TrainState

NAME = "weights.pt"


def parse_plain_torch(folder, tag):
    tensors = load_torch(folder / NAME)
    values = tuple(
        Value(name, tuple(t.shape), dtype_name(t), "param", NAME, 0, lambda t=t: t) for name, t in tensors.items()
    )
    first = next(iter(tensors.values()))
    return Checkpoint(
        folder, tag, 0, dtype_name(first), "", 1, {}, values, (), {},
        read_groups=tuple, read_rules=lambda: None, rest_of=lambda _: ModuleRest(), train_state=lambda _: TrainState(),
    )
''',
    {
        "checkpoint/save/tags.py": (
            ("if n in (MANIFEST_NAME, INDEX_NAME)", 'if n in (MANIFEST_NAME, INDEX_NAME, "weights.pt")'),
        ),
        "checkpoint/loader.py": (
            (
                "from zeropipe.checkpoint.sources.universal import",
                "from zeropipe.checkpoint.sources.plain_torch import NAME, parse_plain_torch\n"
                "from zeropipe.checkpoint.sources.universal import",
            ),
            (
                '    if (path / "zero").is_dir():',
                "    if (path / NAME).exists():\n        return parse_plain_torch(path, tag)\n"
                '    if (path / "zero").is_dir():',
            ),
        ),
    },
    """
from pathlib import Path
import torch
from zeropipe.checkpoint.export import export
from zeropipe.checkpoint.loader import open_source
folder = Path("run/hand")
folder.mkdir(parents=True)
torch.save({"a": torch.arange(3.0)}, folder / "weights.pt")
[file] = export(open_source(folder), "out", safetensors=False)
assert torch.load(file)["a"].tolist() == [0.0, 1.0, 2.0]
""",
)

TRANSPORT = Addition(
    "comm/counted.py",
    '''"""The backend's own algorithms, counted."""

from zeropipe.comm.native import Native


class Counted(Native):
    def __init__(self):
        self.calls = 0

    def all_reduce(self, call, tensor):
        self.calls += 1
        return super().all_reduce(call, tensor)
''',
    {},
    """
import os, tempfile, torch, torch.distributed as dist
import torch.multiprocessing as mp
from zeropipe.comm.collectives import all_reduce, carried_by
from zeropipe.comm.counted import Counted
from zeropipe.comm.group import world

def main(rank, path):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    transport, value = Counted(), torch.ones(3)
    with carried_by(transport):
        all_reduce(value, world(), label="test")
    assert transport.calls == 1 and value.tolist() == [2.0, 2.0, 2.0]
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(main, (tempfile.mktemp(),), nprocs=2)
""",
)

KEY = Addition(
    "",
    "",
    {
        "config/schema.py": (
            (
                '    schedule: Annotated[str, Lowercase] = key("1f1b", "The schedule by name.")\n',
                '    schedule: Annotated[str, Lowercase] = key("1f1b", "The schedule by name.")\n'
                '    patience: Count = key(60, "Seconds to wait for the stage before.", gt=0)\n',
            ),
        )
    },
    """
import pytest
from zeropipe.config.parse import parse_config
base = {"train_micro_batch_size_per_gpu": 1}
assert parse_config(base | {"pipeline": {"patience": 5}}).pipeline.patience == 5
with pytest.raises(ValueError, match="patience"):
    parse_config(base | {"pipeline": {"patience": 0}})
""",
)

ADDITIONS = {
    "optimizer": OPTIMIZER,
    "pipeline schedule": SCHEDULE,
    "learning-rate schedule": RATE,
    "checkpoint format": FORMAT,
    "collective algorithm": TRANSPORT,
    "config key": KEY,
}


@pytest.mark.process
@pytest.mark.parametrize("kind", ADDITIONS)
def test_a_new_part_is_one_file_and_a_line_in_one_table(tmp_path: Path, kind: str) -> None:
    addition = ADDITIONS[kind]
    package = tmp_path / "src" / "zeropipe"
    shutil.copytree(ROOT / "src" / "zeropipe", package, ignore=shutil.ignore_patterns("__pycache__"))
    if addition.file:
        (package / addition.file).write_text(addition.text)
    for name, changes in addition.lines.items():
        text = (package / name).read_text()
        for old, new in changes:
            assert text.count(old) == 1, f"{name}: {old!r}"
            text = text.replace(old, new)
        (package / name).write_text(text)
    script = tmp_path / "use.py"
    script.write_text(addition.use)
    done = python(script, env={"PYTHONPATH": str(tmp_path / "src")}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
