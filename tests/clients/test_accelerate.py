"""Accelerate with DeepSpeedPlugin, from numbers and from a file, gives what Accelerate gives with DDP."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tests.clients.compare import NORM, REORDERED, assert_close, assert_same_bits, assert_same_story, relative
from tests.clients.configs import offloaded
from tests.clients.ranks import Ranks

STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def plain(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def run(**given: Any) -> dict[str, Any]:
        folder = str(tmp_path_factory.mktemp("plain"))
        return ranks.run("accelerate_tasks.loop", stage=None, folder=folder, **given)[0]

    return run


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("how", ["plugin", "config", "dummies"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_loop_of_ones_own(ranks: Ranks, plain, tmp_path, stage: int, how: str, precision: str):
    given = {"how": how, "precision": precision}
    first, second = ranks.run("accelerate_tasks.loop", stage=stage, folder=str(tmp_path), **given)
    assert_same_story(first, plain(**given), "losses")
    assert_same_bits(first["state"], first["weights"])
    if stage == 3:
        assert second["state"] == {}  # one rank has it all
    saved = ranks.run("reload_tasks.model", 1, folder=str(tmp_path / "saved"))[0]
    assert_same_bits(saved, first["weights"])


@pytest.mark.parametrize("stage", STAGES)
def test_accumulation(ranks: Ranks, plain, tmp_path, stage: int):
    given = {"how": "config", "gas": 2}
    found = ranks.run("accelerate_tasks.loop", stage=stage, folder=str(tmp_path), **given)[0]
    expected = plain(**given)
    assert found["rates"] == expected["rates"]
    assert_close(found["weights"], expected["weights"], REORDERED)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_save_state_and_load_state(ranks: Ranks, tmp_path, stage: int, precision: str):
    given = {"stage": stage, "folder": str(tmp_path), "how": "config", "precision": precision}
    whole = ranks.run("accelerate_tasks.loop", save_at=3, **given)[0]
    again = ranks.run("accelerate_tasks.loop", load=True, **given)[0]
    assert again["losses"] == whole["losses"][3:]
    assert_same_bits(again["weights"], whole["weights"])


@pytest.mark.parametrize("stage", STAGES)
def test_fp16_with_a_dynamic_scale(ranks: Ranks, plain, tmp_path, stage: int):
    given = {"how": "config", "precision": "fp16"}
    found = ranks.run("accelerate_tasks.loop", stage=stage, folder=str(tmp_path), **given)[0]
    expected = plain(**given)
    assert 0 < expected["scales"][1] < len(expected["losses"]) - 1  # some steps overflow, some do not
    assert_same_story(found, expected, "losses", "rates", "scales")


@pytest.mark.parametrize("stage", [2, 3])
def test_fp16_goes_on_with_its_scale(ranks: Ranks, tmp_path, stage: int):
    given = {"stage": stage, "folder": str(tmp_path), "how": "config", "precision": "fp16"}
    whole = ranks.run("accelerate_tasks.loop", save_at=3, **given)[0]
    again = ranks.run("accelerate_tasks.loop", load=True, **given)[0]
    assert again["losses"] == whole["losses"][3:]
    assert again["scales"] == whole["scales"]
    assert_same_bits(again["weights"], whole["weights"])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("stage", "device"), [(2, "cpu"), (3, "cpu"), (3, "nvme")])
def test_offload(ranks: Ranks, plain, tmp_path, stage: int, device: str, precision: str):
    given = {"how": "config", "precision": precision}
    zero = offloaded(stage, device, str(tmp_path) if device == "nvme" else None)
    folder = str(tmp_path)
    found = ranks.run("accelerate_tasks.loop", stage=stage, folder=folder, zero=zero, save_at=3, **given)[0]
    assert_same_story(found, plain(**given), "losses", "scales")
    again = ranks.run("accelerate_tasks.loop", stage=stage, folder=folder, zero=zero, load=True, **given)[0]
    assert again["losses"] == found["losses"][3:]
    assert_same_bits(again["weights"], found["weights"])


@pytest.mark.parametrize("stage", STAGES)
def test_clip_grad_norm(ranks: Ranks, plain, tmp_path, stage: int):
    """The configuration's ``gradient_clipping`` clips; the client's call returns the norm before it."""
    given = {"how": "config", "clip": 0.5}
    found = ranks.run("accelerate_tasks.loop", stage=stage, folder=str(tmp_path), **given)[0]
    expected = plain(**given)
    assert min(expected["norms"]) > 0.5
    assert relative(found["norms"], expected["norms"]) < NORM
    assert_close(found["weights"], expected["weights"], REORDERED)
