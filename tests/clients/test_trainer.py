"""transformers' Trainer on zeropipe gives what the same script gives under plain PyTorch."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.clients.compare import NORM, REORDERED, assert_close, assert_same_bits, assert_same_story, relative
from tests.clients.configs import ds_config
from tests.clients.ranks import Ranks

STAGES = (0, 1, 2, 3)
# What the config's WarmupDecayLR gives in DeepSpeed: the first step's rate is used twice.
CONFIG_RATES = (0.0, 0.0, 0.005, 0.01, 0.0075, 0.005)


@pytest.fixture(scope="module")
def plain(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``plain(task, **how)``: the run of that task without DeepSpeed, made once."""

    @cache
    def run(task: str, **given: Any) -> dict[str, Any]:
        folder = str(tmp_path_factory.mktemp("plain"))
        return ranks.run(f"trainer_tasks.{task}", folder=folder, config=None, **given)[0]

    return run


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_clients_optimizer_and_schedule(ranks: Ranks, plain, tmp_path, stage: int, precision: str):
    given = {"precision": precision, "gradient_accumulation_steps": 1}
    found = ranks.run("trainer_tasks.train", folder=str(tmp_path), config=ds_config(stage), **given)[0]
    expected = plain("train", **given)
    assert_same_story(found, expected, "losses", "eval", "lrs")
    if precision == "fp32":  # DDP's norm of bf16 gradients is rounded to bf16
        assert relative(found["norms"], expected["norms"]) < NORM


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_configs_optimizer_and_schedule_from_a_file(ranks: Ranks, plain, tmp_path, stage, precision):
    given = {"precision": precision, "gradient_accumulation_steps": 1}
    config = ds_config(stage, optimizer=True)
    found = ranks.run("trainer_tasks.train", folder=str(tmp_path), config=config, file=True, **given)[0]
    expected = plain("train", lrs=CONFIG_RATES, **given)
    assert_same_story(found, expected, "losses", "eval")
    assert found["lrs"][:-1] == pytest.approx(CONFIG_RATES[1:])  # the client logs the coming step's rate


@pytest.mark.parametrize("stage", STAGES)
def test_accumulation_and_clipping(ranks: Ranks, plain, tmp_path, stage: int):
    given = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
    found = ranks.run("trainer_tasks.train", folder=str(tmp_path), config=ds_config(stage), **given)[0]
    expected = plain("train", **given)
    assert min(expected["norms"]) > 0.5  # each step is clipped
    assert_close(found["weights"], expected["weights"], REORDERED)
    assert relative(found["losses"], expected["losses"]) < NORM
    assert relative(found["norms"], expected["norms"]) < NORM


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_resume_in_the_middle_gives_the_same_bits(ranks: Ranks, tmp_path, stage: int, precision: str):
    config = ds_config(stage, optimizer=stage in (0, 3))
    given = {"folder": str(tmp_path), "config": config, "precision": precision}
    whole = ranks.run("trainer_tasks.resume", checkpoint=None, **given)[0]
    (tmp_path / "checkpoint-6").rename(tmp_path / "first")
    again = ranks.run("trainer_tasks.resume", checkpoint=str(tmp_path / "checkpoint-3"), **given)[0]
    assert_same_story(again, whole, "losses", "norms", "lrs")
    assert (tmp_path / "checkpoint-6" / "global_step6").is_dir()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_best_model_evaluation_generation_and_save(ranks: Ranks, plain, tmp_path, stage: int, precision: str):
    given = {"precision": precision, "gradient_accumulation_steps": 1}
    found = ranks.run("trainer_tasks.life", folder=str(tmp_path), config=ds_config(stage), **given)
    expected = plain("life", **given)
    assert_same_story(found[0], expected, "losses", "eval", "after", "best")
    assert found[0]["best"] == "checkpoint-2"
    assert_same_bits(found[0]["weights"], found[0]["remembered"])
    assert found[0]["tokens"].equal(expected["tokens"])
    assert found[0]["logits"].equal(expected["logits"])
    loaded = ranks.run("reload_tasks.model", 1, folder=str(tmp_path / "final"))[0]
    assert_same_bits(loaded, found[0]["weights"])


@pytest.mark.parametrize("optimizer", [False, True])
def test_a_saved_model_is_evaluated_in_shards_without_training(ranks: Ranks, tmp_path: Path, optimizer: bool):
    ranks.run("trainer_tasks.save_plain", 1, folder=str(tmp_path))
    expected = ranks.run("trainer_tasks.evaluate", folder=str(tmp_path), config=None)[0]
    config = ds_config(3, optimizer=optimizer)
    found = ranks.run("trainer_tasks.evaluate", folder=str(tmp_path), config=config)[0]
    assert found["sharded"] and not expected["sharded"]
    assert found["loss"] == expected["loss"]
    assert_same_bits(found["weights"], expected["weights"])
