"""A training under ``zeropipe.run`` that says of each step what it has made: a disturbed run can be compared."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import zeropipe
from tests.helpers.agent import Life, arm
from zeropipe.comm.record import SEAM
from zeropipe.runtime.dataloader import RepeatingLoader


class Rows(torch.utils.data.Dataset):
    """Samples by number."""

    def __init__(self, count: int = 96) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(count, 12, generator=generator)
        self.y = torch.randn(count, 5, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, at: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[at], self.y[at]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 33),
        nn.LayerNorm(33),
        nn.GELU(),
        nn.Dropout(0.1),
        nn.Linear(33, 17),
        nn.GELU(),
        nn.Linear(17, 5),
    )


def config(stage: int, dtype: str = "fp32", **more: Any) -> dict[str, Any]:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    optimizer = {"type": "AdamW", "params": {"lr": 0.01}}
    made: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2, "gradient_clipping": 0.5,
        "zero_optimization": zero, "optimizer": optimizer,
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 8}},
    }  # fmt: skip
    if dtype == "bf16":
        made["bf16"] = {"enabled": True}
    return made | more


def digest(engine: Any) -> str:
    """Of this rank's masters and moments."""
    found = hashlib.sha256()
    for partition in engine.optimizer.partitions:
        moments = engine.optimizer.state[partition.master]
        for tensor in (partition.master.detach(), *(moments[key] for key in sorted(moments))):
            found.update(torch.as_tensor(tensor).double().numpy().tobytes())
    return found.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Said:
    """One line of a rank's log."""

    what: str  # "step", or "begin"
    life: int
    rank: int
    step: int  # that are done
    at: float  # s, of the monotonic clock
    digest: str = ""
    source: str = ""  # of what the run went on with
    events: int = 0  # collectives so far


def pipeline() -> Any:
    """The same layers, cut in two."""
    from zeropipe.pipe import PipelineModule

    return PipelineModule(list(model()), num_stages=2, loss_fn=lambda out, y: (out - y).square().mean())


def train(
    folder: str,
    settings: dict[str, Any],
    steps: int,
    save_every: int | None,
    stages: int = 1,
    own: bool = False,
    raises: tuple[int, int, int] | None = None,
) -> None:
    """In a rank: train ``steps`` steps, saving in ``folder``.

    ``own``: in a loop of the program's own. ``raises``: rank, step, and the number of lives in which it raises there.
    """
    rank, life = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    events: list[int] = []  # how many, once the loop has begun

    def count(event: object) -> None:
        events[0] += 1

    def say(what: str, step: int, digest: str = "", source: str = "") -> None:
        said = Said(what, life, rank, step, time.monotonic(), digest, source, sum(events))
        line = json.dumps([getattr(said, name) for name in Said.__slots__]) + "\n"
        with open(f"{folder}/said-{rank}", "ab", buffering=0) as file:
            file.write(line.encode())

    def begin(step: int, source: str) -> None:
        say("begin", step, source=source)
        events.append(0)
        SEAM.listeners.append(count)
        arm()

    def loop(run: zeropipe.Run) -> None:
        engine = zeropipe.initialize(model=model(), training_data=Rows(), config=settings)[0]
        for x, y in run.batches(engine, until=steps):
            micro_step(engine, x, y, run.resumed)
            if engine.was_step_applied():
                run.state["steps"] = [*run.state.get("steps", []), engine.global_steps]
        assert run.state["steps"] == list(range(1, steps + 1)), (
            "what a program keeps comes back with the rest"
        )

    def piped(run: zeropipe.Run) -> None:
        engine = zeropipe.initialize(model=pipeline(), training_data=Rows(), config=settings)[0]
        for step in run.steps(engine, until=steps):
            if step == run.resumed.step:
                begin(step, run.resumed.source)
            engine.train_batch()
            say("step", engine.global_steps, digest(engine))

    def micro_step(engine: Any, x: torch.Tensor, y: torch.Tensor, resumed: Any) -> None:
        if not events:
            begin(resumed.step, resumed.source)
        if raises is not None and (rank, engine.global_steps) == raises[:2] and life < raises[2]:
            raise ValueError("a bad batch")
        out = engine(x.to(next(engine.module.parameters()).dtype))
        engine.backward((out - y).square().mean())
        engine.step()
        if engine.was_step_applied():
            say("step", engine.global_steps, digest(engine))

    if own:
        zeropipe.init_distributed()
        engine = zeropipe.initialize(model=model(), training_data=Rows(), config=settings)[0]
        resumed = engine.resume(folder)
        data = RepeatingLoader(engine.training_dataloader)
        while engine.global_steps < steps:
            micro_step(engine, *next(data), resumed)
        engine.destroy()
    else:
        zeropipe.run(loop if stages == 1 else piped, folder, save_every=save_every)


def said(folder: Path) -> list[Said]:
    """What the ranks have said, in the order in which they said it."""
    lines = [line for path in folder.glob("said-*") for line in path.read_text().splitlines()]
    return sorted((Said(*json.loads(line)) for line in lines), key=lambda one: one.at)


def digests(folder: Path, life: int | None = None) -> dict[tuple[int, int], set[str]]:
    """{(rank, step): what it has made}, in one life or in all; one each where all lives have made the same."""
    found: dict[tuple[int, int], set[str]] = {}
    for one in said(folder):
        if one.what == "step" and life in (None, one.life):
            found.setdefault((one.rank, one.step), set()).add(one.digest)
    return found


@dataclass(frozen=True, slots=True)
class Return:
    """How a run came back after a life that ended badly."""

    source: str
    repeated: int  # steps that some rank had done and all do again
    seconds: float  # from the new processes' start until all have done a step


def returns(lives: list[Life], folder: Path) -> list[Return]:
    found, lines = [], said(folder)
    for number, life in enumerate(lives[1:], 1):
        before = max([0, *(one.step for one in lines if one.life < number and one.what == "step")])
        begun = [one for one in lines if one.life == number and one.what == "begin"]
        first = [
            one.at for one in lines if one.life == number and one.step == (begun[0].step + 1 if begun else -1)
        ]
        if len(first) == life.world:  # else it was harmed before
            found.append(Return(begun[0].source, before - begun[0].step, max(first) - life.began))
    return found
