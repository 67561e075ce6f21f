"""Offload changes where tensors live and not one bit of them; in files the state may be larger than memory."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.test_data_parallel import STEPS, gpt, nasty
from tests.dist.test_zero3 import NOTHING_PERSISTS, train3
from tests.helpers.data import gpt_batch, token_batch
from tests.helpers.referee import assert_bitwise
from tests.helpers.train import config, train
from zeropipe.errors import OffloadError, UnsupportedOptimizerError, UsageError

PIECE = 4096  # sub_group_size of these tests: the models step in several pieces


def offloaded(world: int, folder: Path, state: str, param: str, **extra: Any) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": 3, **NOTHING_PERSISTS, "sub_group_size": PIECE}
    zero |= extra.pop("zero", {})
    for key, device in (("offload_optimizer", state), ("offload_param", param)):
        zero[key] = {"device": device, "nvme_path": str(folder)}
    return config(3, world, zero_optimization=zero, **extra)


@pytest.mark.parametrize("stage", [1, 2])
def test_cpu_is_the_same_place_on_a_cpu_run(pool, stage):
    expected = pool(2).run(train, nasty, token_batch, config(stage, 2), STEPS)
    zero = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    ours = pool(2).run(train, nasty, token_batch, config(stage, 2, zero_optimization=zero), STEPS)
    assert_bitwise(ours[1]["weights"], expected[1]["weights"])


PLACES = [("cpu", "cpu"), ("nvme", "none"), ("none", "nvme"), ("nvme", "nvme")]


@pytest.mark.native
@pytest.mark.parametrize(("optimizer", "param"), PLACES)
@pytest.mark.parametrize("model", ["gpt", "nasty"])
def test_not_a_bit_changes(pool, tmp_path, model, optimizer, param):
    factory, make = (gpt, gpt_batch) if model == "gpt" else (nasty, token_batch)
    extra = {"gas": 2, "gradient_clipping": 0.5}
    expected = pool(2).run(train3, factory, make, config(3, 2, **extra), STEPS)
    ours = pool(2).run(train3, factory, make, offloaded(2, tmp_path, optimizer, param, **extra), STEPS)
    for mine, other in zip(ours, expected, strict=True):
        assert_bitwise(mine["weights"], other["weights"])
        assert_bitwise(mine["losses"], other["losses"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.native
@pytest.mark.parametrize(("optimizer", "param"), PLACES[1:])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_not_a_bit_changes_in_16_bits(pool, tmp_path, precision, optimizer, param):
    extra = {precision: {"enabled": True}}
    expected = pool(2).run(train3, gpt, gpt_batch, config(3, 2, **extra), STEPS)
    ours = pool(2).run(train3, gpt, gpt_batch, offloaded(2, tmp_path, optimizer, param, **extra), STEPS)
    assert_bitwise(ours[1]["weights"], expected[1]["weights"])


SGD = {"type": "SGD", "params": {"lr": 0.1}}
OPTIMIZERS = [
    SGD,
    {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
    {"type": "Adagrad", "params": {"lr": 0.01}},
    {"type": "NAdam", "params": {"lr": 0.01}},
    {"type": "Lion", "params": {"lr": 0.001}},
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: "-".join([o["type"], *o["params"]]))
def test_every_elementwise_optimizer_steps_in_pieces(pool, tmp_path, optimizer):
    expected = pool(1).run(train3, nasty, token_batch, config(3, 1, optimizer=optimizer), STEPS)
    settings = offloaded(1, tmp_path, "nvme", "nvme", optimizer=optimizer, zero={"sub_group_size": 160})
    ours = pool(1).run(train3, nasty, token_batch, settings, STEPS)
    assert_bitwise(ours[0]["weights"], expected[0]["weights"])


def test_an_optimizer_that_needs_whole_tensors_is_refused(pool, tmp_path):
    settings = offloaded(1, tmp_path, "nvme", "none", optimizer={"type": "Lamb", "params": {"lr": 0.01}})
    assert "Lamb" in pool(1).run(_error, settings)[0]


def _error(rank: int, world: int, settings: dict[str, Any]) -> str:
    import zeropipe

    with pytest.raises((OffloadError, UnsupportedOptimizerError)) as error:
        zeropipe.initialize(model=gpt(), config=settings)
    return str(error.value)


def test_a_folder_that_is_not_there_is_said_on_every_rank(pool, tmp_path):
    texts = pool(2).run(_error_of_one, tmp_path)
    assert "is not a folder" in texts[1]
    assert "rank 1" in texts[0]


def _error_of_one(rank: int, world: int, folder: Path) -> str:
    import zeropipe

    there = folder if rank == 0 else folder / "gone"
    with pytest.raises(Exception) as error:
        zeropipe.initialize(model=gpt(), config=offloaded(2, there, "nvme", "nvme"))
    return str(error.value)


@pytest.mark.parametrize("param", ["none", "nvme"])
def test_state_in_files_is_read_written_saved_and_loaded_like_any_other(pool, tmp_path, param):
    folder = tmp_path / "files"
    folder.mkdir()
    settings = offloaded(2, folder, "nvme", param)
    for uninterrupted, resumed, plain in pool(2).run(_save_and_go_on, settings, tmp_path / "saved"):
        assert_bitwise(resumed, uninterrupted)
        assert_bitwise(plain, uninterrupted)


def _save_and_go_on(rank: int, world: int, settings: dict[str, Any], folder: Path) -> Any:
    """Weights of a run, of one that resumes it from files, and of one that resumes it without offload."""
    import zeropipe
    from zeropipe.utils import (
        safe_get_full_fp32_param,
        safe_get_full_optimizer_state,
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
    )

    def make(settings: dict[str, Any]) -> Any:
        return zeropipe.initialize(model=gpt(), config=settings)[0]

    def steps(engine: Any, begin: int, end: int) -> None:
        for step in range(begin, end):
            engine.backward(engine(*gpt_batch(step, rank)))
            engine.step()

    def finish(engine: Any) -> dict[str, torch.Tensor]:
        steps(engine, 2, 4)
        weights = {n: safe_get_full_fp32_param(p) for n, p in engine.module.named_parameters()}
        engine.destroy()
        return weights

    first = make(settings)
    steps(first, 0, 2)
    for param in first.module.parameters():
        safe_set_full_fp32_param(param, safe_get_full_fp32_param(param) * 1.5)
        moment = safe_get_full_optimizer_state(param, "exp_avg")
        safe_set_full_optimizer_state(param, moment * 2, "exp_avg")
        assert torch.equal(safe_get_full_optimizer_state(param, "exp_avg"), moment * 2)
    first.save_checkpoint(folder)
    uninterrupted = finish(first)
    second = make(settings)
    second.load_checkpoint(folder)
    resumed = finish(second)
    third = make(config(3, world))
    third.load_checkpoint(folder)
    return uninterrupted, resumed, finish(third)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_states_go_and_come_back(pool, stage, precision):
    extra = {} if precision == "fp32" else {precision: {"enabled": True}}
    settings = config(stage, 2, gas=2, **extra)
    for ours, expected, moved in pool(2).run(_there_and_back, settings):
        assert_bitwise(ours, expected)
        assert moved


def _there_and_back(rank: int, world: int, settings: dict[str, Any]) -> Any:
    """Weights of a run that moves its states between calls, of one that does not, and whether storage moved."""
    import zeropipe
    from zeropipe.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    weights, moved = [], []
    for moves in (True, False):
        engine, optimizer, _, _ = zeropipe.initialize(model=nasty(), config=settings)
        params = dict(engine.module.named_parameters())

        def go(*include: str, engine: Any = engine, optimizer: Any = optimizer, moves: bool = moves) -> None:
            before = {t.data_ptr() for t in _storages(optimizer)}
            if moves:
                engine.offload_states(include or None)
                moved.append(before != {t.data_ptr() for t in _storages(optimizer)})

        for step in range(3):
            for micro in range(2):
                go("optim_states", "lp_params")
                loss = engine(*token_batch(step, rank, micro))
                go()
                engine.reload_states()
                engine.backward(loss)
                go("lp_grads", "hp_params")
                engine.step()
            go()
            state = safe_get_full_optimizer_state(params["wide.weight"], "exp_avg")
            assert torch.isfinite(state).all()
        weights.append({n: safe_get_full_fp32_param(p) for n, p in params.items()})
        engine.destroy()
    return weights[0], weights[1], any(moved)


def _storages(optimizer: Any) -> list[torch.Tensor]:
    tensors = [partition.master for partition in optimizer.partitions]
    tensors += [tensor for partition in optimizer.partitions for tensor in partition.values.stored()[0]]
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if value.dim()]
    return [t for t in tensors if t.numel()]


def test_what_cannot_be_moved_is_said(pool):
    device, kind = pool(1).run(_refusals)[0]
    assert "expected cpu, found nvme" in device
    assert "found moments" in kind


def _refusals(rank: int, world: int) -> list[str]:
    import zeropipe

    engine = zeropipe.initialize(model=gpt(), config=config(1, 1))[0]
    texts = []
    for arguments in ({"device": "nvme"}, {"include": ["moments"]}):
        with pytest.raises(UsageError) as error:
            engine.offload_states(**arguments)
        texts.append(str(error.value))
    engine.destroy()
    return texts


def test_nothing_is_left_after_destroy(pool, tmp_path):
    first, later = pool(1).run(_leftovers, offloaded(1, tmp_path, "nvme", "nvme"))[0]
    assert later == first


def _leftovers(rank: int, world: int, settings: dict[str, Any]) -> Any:
    import gc
    import threading

    import zeropipe

    def round_trip() -> tuple[int, int, int]:
        engine = zeropipe.initialize(model=gpt(), config=settings)[0]
        engine.backward(engine(*gpt_batch(0)))
        engine.step()
        engine.destroy()
        del engine
        gc.collect()
        maps = Path("/proc/self/maps").read_text().count("zeropipe-offload-")
        return maps, len(os.listdir("/proc/self/fd")), threading.active_count()

    first = round_trip()
    for _ in range(3):
        later = round_trip()
    return first, later


def test_what_is_larger_than_the_memory_limit_trains(tmp_path):
    """In fresh processes: a state that does not fit, and parameters that alone do not, train in files, to the same
    bits as in memory without a limit."""
    assert "can't allocate memory" in _alone("memory", "limited", tmp_path).stderr
    free = _alone("memory", "free", tmp_path)
    for place, limit in (("files", "limited"), ("built in files", "tight")):
        limited = _alone(place, limit, tmp_path)
        assert limited.returncode == 0, limited.stderr
        assert limited.stdout == free.stdout


def _alone(place: str, limit: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.dist.test_zero_offload", place, limit, str(folder)]
    root = Path(__file__).parents[2]
    # glibc keeps large blocks that were freed unless told to give them back: see docs/offload.md.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, cwd=root, env=env
    )


WIDTH, LAYERS = 1024, 12  # 12 M parameters: 48 MiB, with gradients and Adam's state 192 MiB
TIGHT = 44 * 2**20  # less than the parameters alone
ROOM = 130 * 2**20  # bytes of memory that the limited process may add to what it has when torch is loaded


def main(place: str, limit: str, folder: str) -> None:
    """One process: build, limit the memory, train two steps, print a checksum of the weights and the losses."""
    import resource

    import zeropipe
    from zeropipe.utils import safe_get_full_fp32_param

    torch.set_num_threads(1)
    torch.manual_seed(0)
    warm = torch.nn.Linear(8, 8)
    warm(torch.ones(1, 8)).sum().backward()  # threads and libraries that the first use brings
    torch.optim.AdamW(warm.parameters(), fused=True).step()
    zeropipe.init_distributed()  # its threads have stacks
    before = _data_bytes()
    room = {"limited": ROOM, "tight": TIGHT}.get(limit)
    if room is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (before + room, before + room))
    device = "none" if place == "memory" else "nvme"
    budgets = {"sub_group_size": 2**20, "stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}
    settings = offloaded(1, Path(folder), device, device, zero=budgets)
    context = zeropipe.zero.Init(config_dict_or_path=settings) if place == "built in files" else nullcontext()
    with context:
        layers = [m for _ in range(LAYERS) for m in (torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh())]
        model = torch.nn.Sequential(*layers)
    engine = zeropipe.initialize(model=model, config=settings)[0]
    for step in range(2):
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step))
        loss = engine(x).square().mean()
        engine.backward(loss)
        engine.step()
        print(loss.item())
    sums = [safe_get_full_fp32_param(p).double().sum().item() for p in engine.module.parameters()]
    print(sums)
    engine.destroy()


def _data_bytes() -> int:
    """What RLIMIT_DATA counts."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmData")).split()[1]) * 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
