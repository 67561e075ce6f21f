"""A plan of one rank has the bytes that the engine's own report counts in a run, and says what a user can do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import zeropipe
from zeropipe.errors import ConfigError, UsageError
from zeropipe.planning.devices import device_of, parse_bytes
from zeropipe.planning.plan import plan, rehearse_all

pytestmark = pytest.mark.process
WIDTH = 256


@pytest.fixture(autouse=True)
def _no_world() -> None:
    """A world is imagined only where there is none, and other tests of this process have left theirs."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _model() -> nn.Module:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(6)))


def _config(stage: int, **more: object) -> dict[str, object]:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": stage},
        **more,
    }


def _batch() -> torch.Tensor:
    return torch.randn(4, WIDTH)


@pytest.mark.parametrize("extra", [{}, {"bf16": {"enabled": True}}], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_states_are_those_of_a_run(stage: int, extra: dict[str, object]) -> None:
    dtype = torch.bfloat16 if extra else torch.float32
    config = _config(stage, **extra)
    found = plan(_model, lambda: _batch().to(dtype), config, world=1).fullest.resting
    engine, *_ = zeropipe.initialize(model=_model(), config=config)
    for _ in range(2):
        engine.backward(engine(_batch().to(dtype)).float().square().mean())
        engine.step()
    parameters, gradients, state = (row.bytes for row in engine.memory_report())
    engine.destroy()
    assert found.get("parameters", 0) == pytest.approx(parameters, rel=0.005)
    assert found.get("gradients", 0) == pytest.approx(gradients, rel=0.005)
    assert found.get("masters", 0) + found["moments"] == pytest.approx(state, rel=0.005, abs=64)


def test_a_world_of_any_size_and_its_ranks() -> None:
    found = plan(_model, _batch, _config(3), world=1024)
    assert [one.place.rank for one in found.rehearsals] == [0, 512, 1023]
    assert found.fullest.samples == 4 * 1024
    assert found.fullest.parameters == 6 * WIDTH * (WIDTH + 1)
    assert found.fits
    assert found.links()["inside a node"] > 0
    assert found.seconds.total > 0
    assert json.loads(json.dumps(found.to_json()))["world"] == 1024


def test_what_does_not_fit_says_by_how_much_and_what_to_change() -> None:
    found = plan(_model, _batch, _config(0), world=4, device_memory="200MB")
    assert not found.fits
    assert "too much" in found.verdict()


def test_what_is_offloaded_already_is_no_advice() -> None:
    away = {"stage": 3, **{f"offload_{what}": {"device": "cpu"} for what in ("optimizer", "param")}}
    either = "use more devices, or offload_optimizer / offload_param"
    for zero, ways in (({"stage": 3}, either), (away, "use more devices")):
        found = plan(_model, _batch, _config(3, zero_optimization=zero), world=2, device="a100")
        full = found.fullest
        trained = replace(full.trained, peak=full.peak.peak + 1, kinds={"gradients": 1})
        found = replace(found, rehearsals=(replace(full, trained=trained),), memory=found.device.base)
        assert found.advice() == f"Most of it are gradients, sharded already: {ways}"


def test_what_offload_puts_beside_a_gpu_is_no_part_of_the_device() -> None:
    offloaded = _config(3)
    offloaded["zero_optimization"] = {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    with_it = plan(_model, _batch, offloaded, world=2, device="h200")
    without = plan(_model, _batch, _config(3), world=2, device="h200")
    resting = with_it.fullest.resting
    assert resting["host: moments"] == without.fullest.resting["moments"]
    assert not any(kind.startswith("host") for kind in with_it.fullest.peak.kinds)
    assert with_it.peak < without.peak


def test_files_are_planned_where_there_are_none(tmp_path: Path) -> None:
    """Another machine has the folder and the disk."""
    parts = {
        f"offload_{part}": {"device": "nvme", "nvme_path": "/no/such/folder"}
        for part in ("optimizer", "param")
    }
    config = _config(3)
    config["zero_optimization"] = {"stage": 3, **parts}
    wide = 1 << 12

    def model() -> nn.Module:
        return nn.Sequential(*(nn.Linear(wide, wide) for _ in range(4)))  # in a folder that is not there

    found = plan(model, lambda: torch.randn(1, wide), config, world=2, ranks=[1]).fullest
    sharded = 4 * 4 * wide * (wide + 1) // 2
    assert found.resting["disk: moments"] == pytest.approx(2 * sharded, rel=0.01)
    assert not any(kind.startswith("disk") for kind in found.peak.kinds)
    assert list(tmp_path.iterdir()) == []


def test_the_program_s_line_is_named() -> None:
    def batch() -> torch.Tensor:
        raise FileNotFoundError("/data/tokens.bin")

    with pytest.raises(
        UsageError, match=r"FileNotFoundError: /data/tokens.bin; found .*test_plan.py:\d+: raise"
    ):
        plan(_model, batch, _config(1), world=2)


def test_a_rehearsal_leaves_nothing_behind(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Not where the run that it rehearses has its checkpoints, scalars and record."""
    config = _config(
        1,
        report={"folder": str(tmp_path / "run")},
        csv_monitor={"enabled": True, "output_path": str(tmp_path / "csv")},
        flops_profiler={"enabled": True, "output_file": str(tmp_path / "flops.txt")},
    )

    def program() -> None:
        engine, *_ = zeropipe.initialize(model=_model(), config=config)
        assert engine.load_checkpoint(str(tmp_path)) == (None, None)
        print("from the program")
        while True:
            engine.backward(engine(_batch()).float().square().mean())
            engine.step()
            assert engine.save_checkpoint(str(tmp_path))
            assert engine.save_16bit_model(str(tmp_path))

    found = rehearse_all(program, 2)
    assert found.fullest.parameters == 6 * WIDTH * (WIDTH + 1)
    assert list(tmp_path.iterdir()) == []
    assert "from the program" not in capfd.readouterr().out


def test_the_model_that_the_program_built_is_a_kind_of_its_own() -> None:
    built = plan(_model, _batch, _config(2), world=4).fullest.built.kinds
    assert "activations" not in built


def test_a_program_that_wants_a_value_gets_one_that_is_assumed() -> None:
    def loss(output: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        value = output.float().square().mean()
        assert value.item() == 2.5
        return value

    plan(_model, _batch, _config(0), world=2, loss=loss, assume=2.5)


def test_sizes_and_devices() -> None:
    assert [parse_bytes(text) for text in ("80GB", "24 GiB", "512M", "1000")] == [
        80 * 10**9,
        24 << 30,
        512 * 10**6,
        1000,
    ]
    with pytest.raises(ConfigError, match="80GB"):
        parse_bytes("many")
    with pytest.raises(ConfigError, match="80GB"):
        parse_bytes("inf")
    with pytest.raises(ConfigError, match="h200"):
        device_of("tpu")


def test_a_device_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"name": "mine", "kind": "cuda", "memory": 10**9, "flops": {"float32": 1e12}}))
    found = device_of(str(path))
    assert (found.name, found.memory, found.launch) == ("mine", 10**9, device_of("h200").launch)
    for wrong in (
        {"memory": "much"},
        {"speed": 3},
        [],
        {"kind": "gpu"},
        {"memory": -1},
        {"inside": 0},
        {"overlap": 2.0},
        {"ranks_per_node": True},
        {"flops": {"float32": "fast"}},
        {"flops": {"bfloat16": 1e12}},
        {"slower": {"mm float32": None}},
    ):
        path.write_text(json.dumps(wrong))
        with pytest.raises(ConfigError, match=r"mine\.json"):
            device_of(str(path))
