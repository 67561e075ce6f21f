"""Copies in memory of whatever an engine may hold: modules with state of their own, pipelines, 1-bit optimizers,
offload, MiCS. What goes on from memory goes on as from the checkpoint on disk of the same step."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import zeropipe
from tests.dist import test_checkpoint_modules as modules
from tests.dist import test_pipe_engine as pipes
from tests.dist.pipe_models import specs
from tests.dist.test_checkpoint_conversions import Odd
from tests.dist.test_checkpoint_variants import in_files
from tests.helpers.checkpointing import make_engine, train
from tests.helpers.pool import Pools
from tests.helpers.stateful import OLD_SPECTRAL, STATEFUL
from zeropipe.runtime.resilience.copies import ENGINES

Make = Callable[
    [int, dict[str, Any]], tuple[Any, Callable[[int], list[float]]]
]  # (seed, section): (engine, train)


@contextmanager
def kept(folder: str) -> Iterator[dict[str, Any]]:
    gc.collect()
    ENGINES._taken.clear()  # as in a process that was started anew
    os.makedirs(folder, exist_ok=True)
    yield {"memory": {"every": 1, "folder": folder}}


def same(make: Make, folder: str) -> list[str]:
    """What differs between going on from memory and from disk."""
    with kept(folder) as section:
        engine, run = make(0, section)
        run(3)
        engine.save_checkpoint(f"{folder}/disk")
        del engine, run
    found: list[tuple[Any, ...]] = []
    for source in ("memory", "disk"):
        with kept(folder) as section:
            engine, run = make(1, section if source == "memory" else {})
            told = engine.resume(f"{folder}/disk")
            if (told.step, told.source) != (3, source):
                return [f"{told}"]
            state = modules.values(engine)
            # Before the others train on, and copy.
            dist.barrier()
            found.append((state, run(2), modules.values(engine)))
            del engine, run
    (first, losses, last), (wanted, others, end) = found
    different = modules.differences(first, wanted) + modules.differences(last, end)
    return different if losses == others else [*different, f"losses {losses} {others}"]


def stateful(
    rank: int, world: int, folder: str, names: list[str], stage: int, extra: dict[str, Any]
) -> list[str]:
    wrong = []
    for number, name in enumerate(names):

        def make(seed: int, section: dict[str, Any], name: str = name) -> Any:
            engine = modules.engine_of(name, stage, seed, checkpoint=section, **extra)
            return engine, lambda steps: modules.train(engine, steps)

        wrong += [f"{name}: {text}" for text in same(make, f"{folder}/{number}")]
    return wrong


@pytest.mark.parametrize(
    ("stage", "extra", "names"),
    [
        (
            1,
            {"bf16": {"enabled": True}},
            ("the root", "BatchNorm", "weight_norm", "renamed", "extra state, bytes"),
        ),
        pytest.param(3, {}, ("packed", "assigned", "derived"), marks=pytest.mark.soak),
        *(pytest.param(stage, {}, tuple(STATEFUL), marks=pytest.mark.soak) for stage in (0, 3)),
        pytest.param(1, {"bf16": {"enabled": True}}, tuple(STATEFUL), marks=pytest.mark.soak),
    ],
)
def test_modules_with_state_of_their_own(
    pool: Pools, tmp_path: Path, stage: int, extra: dict[str, Any], names: tuple[str, ...]
) -> None:
    known = [n for n in names if stage < 3 or n not in OLD_SPECTRAL]
    known = [
        n for n in known if not extra or n not in ("parametrized orthogonal", "FakeQuantize")
    ]  # fp32 alone
    assert pool(2).run(stateful, str(tmp_path), known, stage, extra, timeout=120.0) == [[], []]


PIECES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "1-bit adam": (0, "OneBitAdam", {"freeze_step": 2}),
    "1-bit adam, stage 1": (1, "OneBitAdam", {"freeze_step": 2}),
    "1-bit lamb": (0, "OneBitLamb", {"freeze_step": 2}),
    "0/1 adam, apart": (
        0, "ZeroOneAdam", {"var_freeze_step": 2, "local_step_scaler": 1, "local_step_clipper": 4},
    ),
}  # fmt: skip


def compressed(rank: int, world: int, folder: str, kind: str) -> list[str]:
    stage, name, options = PIECES[kind]

    def make(seed: int, section: dict[str, Any]) -> Any:
        torch.manual_seed(seed)
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "zero_optimization": {"stage": stage},
            "gradient_clipping": 0.0,
            "checkpoint": section,
            "optimizer": {"type": name, "params": {"lr": 0.01, "eps": 1e-6} | options},
        }
        engine = zeropipe.initialize(model=Odd(), config=config)[0]

        def run(steps: int) -> list[float]:
            losses = []
            for _ in range(steps):
                generator = torch.Generator().manual_seed(10 * engine.global_steps + rank)
                loss = engine(torch.randn(4, 5, generator=generator))
                engine.backward(loss)
                engine.step()
                losses.append(loss.item())
            return losses

        return engine, run

    return same(make, folder)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(k, marks=[] if k in ("1-bit adam, stage 1", "0/1 adam, apart") else pytest.mark.soak)
        for k in PIECES
    ],
)
def test_what_1_bit_optimizers_owe(pool: Pools, tmp_path: Path, kind: str) -> None:
    assert pool(2).run(compressed, kind_folder(tmp_path), kind) == [[], []]


def kind_folder(path: Path) -> str:
    return str(path / "copies")


SECTIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "optimizer on the host": (2, {"stage": 2, "offload_optimizer": {"device": "cpu"}}),
    "both in files": (2, {
        "stage": 3,
        "offload_optimizer": {"device": "nvme", "nvme_path": "FILES"},
        "offload_param": {"device": "nvme", "nvme_path": "FILES"},
    }),
    "mics": (4, {"stage": 3, "mics_shard_size": 2}),
}  # fmt: skip


def placed(rank: int, world: int, folder: str, name: str) -> list[str]:
    os.makedirs(f"{folder}/files", exist_ok=True)

    def make(seed: int, section: dict[str, Any]) -> Any:
        zero = in_files(SECTIONS[name][1], f"{folder}/files")
        engine = make_engine(zero["stage"], seed=seed, zero_optimization=zero, checkpoint=section)
        return engine, lambda steps: train(engine, steps, rank)

    return same(make, folder)


@pytest.mark.parametrize("name", SECTIONS)
def test_state_in_other_places(pool: Pools, tmp_path: Path, name: str) -> None:
    ranks = SECTIONS[name][0]
    assert pool(ranks).run(placed, kind_folder(tmp_path), name) == [[]] * ranks


def piped(rank: int, world: int, folder: str, pp: int, stage: int, tied: bool) -> list[str]:
    def make(seed: int, section: dict[str, Any]) -> Any:
        settings = pipes.config(stage, checkpoint=section)
        engine = pipes.engine_of(pp, world // pp, specs(blocks=4, tied=tied), settings)
        return engine, lambda steps: pipes.train(engine, steps)

    return same(make, folder)


@pytest.mark.parametrize(
    ("ranks", "pp", "stage", "tied"),
    [
        (4, 2, 1, True),
        pytest.param(2, 2, 0, False, marks=pytest.mark.soak),
        pytest.param(4, 2, 3, True, marks=pytest.mark.soak),
    ],
)
def test_pipelines(pool: Pools, tmp_path: Path, ranks: int, pp: int, stage: int, tied: bool) -> None:
    assert pool(ranks).run(piped, kind_folder(tmp_path), pp, stage, tied) == [[]] * ranks
