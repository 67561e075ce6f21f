"""What an engine tells: nothing by default; lines, timings and scalars where the config asks for them."""

from __future__ import annotations

import csv
import gc
import logging
import math
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import zeropipe
from tests.helpers.data import mlp_batch, token_batch
from tests.helpers.launch import run_torchrun
from tests.helpers.models import MLP, NastyModel, build
from tests.helpers.pool import RankFailure
from tests.helpers.referee import assert_bitwise, weights_of
from tests.helpers.train import config
from zeropipe.comm.record import SEAM
from zeropipe.errors import CheckpointError, ConfigError
from zeropipe.pipe import PipelineModule
from zeropipe.reporting.page import run_page
from zeropipe.reporting.record import read

STAGES = (0, 1, 2)
mlp = partial(build, MLP)


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def logged(rank: int, world: int, extra: dict[str, Any], steps: int = 6) -> list[str]:
    logger, handler = logging.getLogger("zeropipe"), Lines()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        engine, *_ = zeropipe.initialize(model=mlp(), config=config(2, world, gas=2, **extra))
        for step in range(steps):
            for micro in range(2):
                engine.backward(engine(*mlp_batch(step, rank, micro)))
                engine.step()
        engine.destroy()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    return handler.lines


def test_steps_per_print_is_one_line_from_the_first_rank(pool):
    first, second = pool(2).run(logged, {"steps_per_print": 2})
    assert second == []
    assert [line.split(" | ")[0] for line in first] == ["step 2", "step 4", "step 6"]
    assert "lr 0.01" in first[0] and "skipped 0" in first[0] and "loss " in first[0]
    assert "samples/s" in first[2]  # the first two steps are warm-up


@pytest.mark.parametrize("never", [math.inf, None, 1000])
def test_no_line_unless_asked_for(pool, never):
    assert pool(2).run(logged, {"steps_per_print": never}) == [[], []]


def test_dump_state(pool):
    (line,), second = pool(2).run(logged, {"dump_state": True})
    assert second == []
    assert "engine on cpu, batch 4 = 1 per rank x 2 accumulation x 2 rank(s)" in line
    assert "zero_optimization.stage 2" in line and "optimizer.type 'AdamW'" in line


def test_wall_clock_and_memory_breakdown(pool):
    first, second = pool(2).run(logged, {"wall_clock_breakdown": True, "memory_breakdown": True}, 2)
    assert second == []
    assert len(first) == 4
    for line in first[::2]:
        assert all(f"{phase} " in line for phase in ("forward", "backward", "step")) and "ms (" in line
    for line in first[1::2]:
        assert all(kind in line for kind in ("parameters", "gradients", "optimizer state", "ratio 1.0000"))


def scalars(rank: int, world: int, folder: str) -> tuple[list[float], list[float]]:
    extra = {
        "csv_monitor": {"enabled": True, "output_path": folder, "job_name": "run"},
        "scheduler": {"type": "StepLR", "params": {"step_size": 1, "gamma": 0.5}},
    }
    engine, *_ = zeropipe.initialize(model=mlp(), config=config(1, world, gas=2, **extra))
    losses, norms = [], []
    for step in range(3):
        total = 0.0
        for micro in range(2):
            loss = engine(*mlp_batch(step, rank, micro))
            engine.backward(loss)
            engine.step()
            total += loss.item() / 2
        losses.append(total)
        norms.append(engine.get_global_grad_norm())
    engine.destroy()
    return losses, norms


def test_the_monitor_writes_the_scalars_of_each_step(pool, tmp_path):
    (losses, norms), _ = pool(2).run(scalars, str(tmp_path))
    folder = tmp_path / "run"

    def column(name: str) -> list[tuple[int, float]]:
        rows = list(csv.reader((folder / f"Train_Samples_{name}.csv").open()))[1:]
        return [(int(step), float(value)) for step, value in rows]

    samples = [4, 8, 12]  # 2 ranks x 2 micro-batches of one
    assert [step for step, _ in column("train_loss")] == samples
    assert [value for _, value in column("train_loss")] == pytest.approx(losses, rel=1e-6)  # fp32 means
    assert column("lr") == list(zip(samples, [0.005, 0.0025, 0.00125], strict=True))
    assert [value for _, value in column("grad_norm")] == pytest.approx(norms)
    assert len(list(folder.iterdir())) == 4


SILENT = """
import sys
import torch, zeropipe
from tests.helpers.models import NastyModel, build
from tests.helpers.data import token_batch
from tests.helpers.train import config
zeropipe.init_distributed()
rank = torch.distributed.get_rank()
for stage in (0, 1, 2):
    settings = config(stage, 2, fp16={"enabled": stage == 1}, scheduler={"type": "WarmupLR", "params": {}})
    data = [tuple(t[0] for t in token_batch(i, batch=1)) for i in range(20)]
    engine, _, loader, _ = zeropipe.initialize(model=build(NastyModel), config=settings, training_data=data)
    for tokens, targets in loader:
        engine.backward(engine(tokens, targets))
        engine.step()
    assert engine.global_steps == 10
    engine.destroy()
torch.distributed.destroy_process_group()
"""


def test_a_run_prints_nothing(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SILENT)
    root = Path(__file__).resolve().parents[2]
    done = run_torchrun(script, 2, env={"PYTHONPATH": f"{root / 'src'}:{root}"})
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""


# Weights out and in.


def sixteen_bit(rank: int, world: int, folder: str) -> None:
    for stage in STAGES:
        for extra, dtype in (({}, torch.float32), ({"bf16": {"enabled": True}}, torch.bfloat16)):
            model = build(NastyModel)
            engine, *_ = zeropipe.initialize(model=model, config=config(stage, world, **extra))
            engine.backward(engine(*token_batch(0, rank)))
            engine.step()
            assert engine.save_16bit_model(folder, "weights.bin")
            found = torch.load(f"{folder}/weights.bin", weights_only=True)
            assert_bitwise(found, dict(model.state_dict()))
            assert found["wide.weight"].dtype == dtype
            assert found["embed.weight"].data_ptr() == found["head.weight"].data_ptr()
            whole = sum(
                value.untyped_storage().nbytes() for name, value in found.items() if name != "head.weight"
            )
            assert whole == sum(
                value.numel() * value.element_size() for name, value in found.items() if name != "head.weight"
            )
            assert engine.save_16bit_model(folder, "trained.bin", exclude_frozen_parameters=True)
            trained = torch.load(f"{folder}/trained.bin", weights_only=True)
            assert set(found) - set(trained) == {"frozen.weight"}
            gathered = engine._zero3_consolidated_16bit_state_dict()
            assert isinstance(gathered, dict) and bool(gathered) == (rank == 0)
            engine.destroy()


def sharded_weights(rank: int, world: int, folder: str) -> None:
    for gather in (False, True):
        zero = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": gather}
        model = build(NastyModel)
        engine, *_ = zeropipe.initialize(
            model=model, config=config(3, world, zero_optimization=zero, bf16={"enabled": True})
        )
        engine.backward(engine(*token_batch(0, rank)))
        engine.step()
        assert engine.save_16bit_model(folder, "sharded.bin") is gather
        whole = dict(model.state_dict())  # collective
        if gather:
            found = torch.load(f"{folder}/sharded.bin", weights_only=True)
            assert_bitwise(found, whole)
            assert found["embed.weight"].data_ptr() == found["head.weight"].data_ptr()
            stage_2, *_ = zeropipe.initialize(
                model=build(NastyModel), config=config(2, world, bf16={"enabled": True})
            )
            stage_2.backward(stage_2(*token_batch(0, rank)))
            stage_2.step()
            assert_bitwise(found, dict(stage_2.module.state_dict()))
            stage_2.destroy()
        engine.destroy()


def test_save_16bit_model_at_stage_3_gathers_if_it_may(pool, tmp_path):
    pool(2).run(sharded_weights, str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["sharded.bin"]
    first, second = pool(2).outputs()
    assert "stage3_gather_16bit_weights_on_model_save: true" in first
    assert second == ""


def test_save_16bit_model(pool, tmp_path):
    pool(2).run(sixteen_bit, str(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["trained.bin", "weights.bin"]


def unwritable(rank: int, world: int, folder: str) -> None:
    engine, *_ = zeropipe.initialize(model=mlp(), config=config(0, world))
    with pytest.raises(CheckpointError, match=r"the weights cannot be written: .*Fix"):
        engine.save_16bit_model(folder + "/a file/inside", "weights.bin")
    engine.destroy()


def test_a_file_that_cannot_be_written_is_told_to_every_rank(pool, tmp_path):
    (tmp_path / "a file").write_text("")
    pool(2).run(unwritable, str(tmp_path))


def loaded(rank: int, world: int) -> list[Any]:
    other = build(NastyModel, seed=5)
    results = []
    for stage in STAGES:
        engine, *_ = zeropipe.initialize(
            model=build(NastyModel), config=config(stage, world, bf16={"enabled": True})
        )
        outcome = engine.load_module_state_dict(other.state_dict())
        assert not outcome.missing_keys and not outcome.unexpected_keys
        assert_bitwise(dict(engine.module_state_dict()), dict(other.bfloat16().state_dict()))
        with pytest.raises(RuntimeError, match="Missing key"):
            engine.load_module_state_dict({})
        assert engine.load_module_state_dict({}, strict=False).missing_keys
        engine.backward(engine(*token_batch(0, rank)))
        engine.step()  # from the loaded values: the masters have followed
        results.append(weights_of(engine.module))
        other = build(NastyModel, seed=5)
        engine.destroy()
        fresh, *_ = zeropipe.initialize(model=other, config=config(stage, world, bf16={"enabled": True}))
        fresh.backward(fresh(*token_batch(0, rank)))
        fresh.step()
        assert_bitwise(results[-1], weights_of(other))
        fresh.destroy()
        other = build(NastyModel, seed=5)
    return results


def test_a_loaded_state_dict_is_what_training_goes_on_from(pool):
    for results in pool(2).run(loaded):
        assert_bitwise(results, [results[0]] * 3)


def loader(rank: int, world: int) -> list[int]:
    data = list(range(12))
    seen: list[int] = []
    engine, _, given, _ = zeropipe.initialize(
        model=mlp(),
        config={"train_batch_size": 4, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}},
        training_data=data,
        collate_fn=lambda samples: torch.tensor(samples) * 10,
    )
    assert engine.training_dataloader is given
    for batch in given:
        assert batch.shape == (2,)
        seen += batch.tolist()
    ordered = engine.deepspeed_io(data, batch_size=3, route="eval")
    assert [x for batch in ordered for x in batch.tolist()] == [10 * i for i in data[rank::world]]
    engine.destroy()
    return seen


def test_training_data_is_dealt_out_to_the_ranks(pool):
    first, second = pool(2).run(loader)
    assert sorted(first + second) == [10 * i for i in range(12)]


def buffers(rank: int, world: int) -> None:
    """Rank 0's initial values are everyone's: parameters, frozen ones, buffers; also where layouts are odd."""
    for stage in STAGES:
        model = build(NastyModel, seed=rank)
        model.register_buffer("mean", torch.full((3,), float(rank)))
        model.register_buffer("turned", torch.arange(6.0).view(2, 3).t() + rank)
        engine, *_ = zeropipe.initialize(model=model, config=config(stage, world))
        expected = build(NastyModel, seed=0)
        for name, param in expected.named_parameters():
            assert_bitwise(dict(model.named_parameters())[name].detach(), param.detach(), name)
        assert not model.mean.any()
        assert torch.equal(model.turned, torch.arange(6.0).view(2, 3).t())
        assert model.calls.dtype == torch.int64
        engine.destroy()


def test_every_rank_starts_from_the_first_ranks_values(pool):
    pool(3).run(buffers)


def recorded(rank: int, world: int, folder: str, stage: int) -> None:
    extra = {"report": {"folder": folder}, "gradient_clipping": 1.0}
    engine, *_ = zeropipe.initialize(model=mlp(), config=config(stage, world, gas=2, **extra))
    for step in range(4):
        for micro in range(2):
            engine.backward(engine(*mlp_batch(step, rank, micro)))
            engine.step()
        if step == 2:
            engine.save_checkpoint(folder)
    engine.report(Path(folder) / "page.html")
    if stage < 3:
        engine.destroy()


@pytest.mark.parametrize("stage", [2, 3])
def test_a_record_of_each_rank_and_its_page(pool, tmp_path, stage):
    pool(2).run(recorded, str(tmp_path), stage)
    run = read(tmp_path)
    assert [one.number for one in run.ranks] == [0, 1]
    for one in run.ranks:
        assert [row["step"] for row in one.steps] == [1, 2, 3, 4]
        assert [row["samples"] for row in one.steps] == [4, 8, 12, 16]
        assert all(
            row["loss"] > 0 and row["grad_norm"] > 0 and sum(row["sent"].values()) for row in one.steps
        )
        assert [row["tag"] for row in one.saves] == ["global_step3"]
        names = [name for name, _, _ in one.phases[0]["phases"]]
        assert names == ["forward", "backward", "step"] * 2
        assert one.ended is (stage < 3)  # a rank that was killed has not said so
    assert run.start["settings"]["zero_optimization.stage"] == stage
    assert "report.folder" in run.start["changed"]
    assert (tmp_path / "page.html").read_text().count("<h2>") >= 5


def in_a_pipeline(rank: int, world: int, folder: str) -> None:
    settings = config(1, 1, gas=4, report={"folder": folder})
    module = PipelineModule(
        [torch.nn.Linear(8, 8) for _ in range(4)], num_stages=2, loss_fn=torch.nn.MSELoss()
    )
    engine, *_ = zeropipe.initialize(model=module, config=settings)
    data = iter([(torch.ones(1, 8), torch.zeros(1, 8))] * 12)
    for _ in range(3):
        engine.train_batch(data)
    engine.destroy()


def test_a_pipeline_records_its_grid_as_planned_and_as_it_ran(pool, tmp_path):
    pool(2).run(in_a_pipeline, str(tmp_path))
    run = read(tmp_path)
    for rank, one in enumerate(run.ranks):
        (grid,) = one.grids
        assert grid["rank"] == rank
        assert [word for word, _, _ in grid["ran"]] == [word for word, _, _ in grid["planned"]]
        assert len(grid["ran"]) == 8  # four micro-batches, forward and backward
    assert "As it ran" in run_page(run)


def test_a_folder_that_cannot_be_written_to_is_named(pool, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RankFailure, match=r"report\.folder"):
        pool(2).run(recorded, str(tmp_path / "file"), 2)


def test_a_folder_that_one_rank_cannot_write_to_is_told_to_all(pool, tmp_path):
    first, second = pool(2).run(one_cannot_write, str(tmp_path))
    assert first == second
    assert "report.folder" in first


def one_cannot_write(rank: int, world: int, folder: str) -> str:
    """The same folder on both ranks; rank 0's file in it is a directory."""
    if rank == 0:
        (Path(folder) / "record-00000.jsonl").mkdir()
    try:
        zeropipe.initialize(model=mlp(), config=config(1, world, report={"folder": folder}))
    except ConfigError as error:
        return str(error)
    return "no error"


def full_disk(rank: int, world: int, folder: str) -> tuple[int, list[str]]:
    logger, handler = logging.getLogger("zeropipe"), Lines()
    logger.addHandler(handler)
    try:
        engine, *_ = zeropipe.initialize(model=mlp(), config=config(1, world, report={"folder": folder}))
        if rank == 0:
            engine.report.recorder._file.close()
            engine.report.recorder._file = Path("/dev/full").open("w")  # noqa: SIM115  # the recorder closes it
        for step in range(3):
            engine.backward(engine(*mlp_batch(step, rank, 0)))
            engine.step()
        engine.destroy()
        return engine.global_steps, handler.lines
    finally:
        logger.removeHandler(handler)


def test_a_full_disk_ends_the_record_and_not_the_training(pool, tmp_path):
    (steps, lines), (others, quiet) = pool(2).run(full_disk, str(tmp_path))
    assert (steps, others) == (3, 3)
    assert len([line for line in lines if "the record in" in line and "ends here" in line]) == 1
    assert quiet == []


def forgotten(rank: int, world: int, folder: str) -> bool:
    engine = zeropipe.initialize(model=mlp(), config=config(1, world, report={"folder": folder}))[0]
    engine.backward(engine(*mlp_batch(0, rank, 0)))
    engine.step()
    module, before = weakref.ref(engine.module), len(SEAM.listeners)
    del engine
    gc.collect()
    return module() is None and len(SEAM.listeners) == before - 1


def test_a_record_keeps_no_engine_alive(pool, tmp_path):
    assert pool(2).run(forgotten, str(tmp_path)) == [True, True]
