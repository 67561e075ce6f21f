"""Adapters of peft on zeropipe: the numbers of plain PyTorch, and adapter files that load without it."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from tests.clients.compare import assert_same_bits, assert_same_story
from tests.clients.configs import ds_config
from tests.clients.ranks import Ranks

CASES = [(0, False), (1, False), (2, False), (3, False), (3, True)]


@pytest.fixture(scope="module")
def plain(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def run(kind: str, precision: str = "fp32", sharded: bool = False) -> dict[str, Any]:
        given = {"folder": str(tmp_path_factory.mktemp("plain")), "kind": kind, "precision": precision}
        if sharded:
            ranks.run("trainer_tasks.save_plain", 1, folder=given["folder"])
        return ranks.run("peft_tasks.train", config=None, sharded=sharded, **given)[0]

    return run


@pytest.mark.parametrize("kind", ["lora", "lora+head", "adalora"])
@pytest.mark.parametrize(("stage", "sharded"), CASES, ids=lambda value: str(value))
def test_adapters_train_and_are_saved(ranks: Ranks, plain, tmp_path, stage: int, sharded: bool, kind: str):
    """``sharded``: the frozen model is loaded inside ``zero.Init``, the adapters are added to it as they are."""
    ranks.run("trainer_tasks.save_plain", 1, folder=str(tmp_path))
    given = {"folder": str(tmp_path), "config": ds_config(stage), "kind": kind, "sharded": sharded}
    found = ranks.run("peft_tasks.train", **given)[0]
    expected = plain(kind)
    assert_same_story(found, expected, "losses", "counts", "files")
    assert_same_bits(found["frozen"], expected["frozen"])
    if kind != "adalora":  # which saves the ranks that it kept alone
        loaded = ranks.run("reload_tasks.adapter", 1, folder=str(tmp_path / "adapter"))[0]
        assert_same_bits({name: loaded[name] for name in found["weights"]}, found["weights"])


@pytest.mark.parametrize("kind", ["lora", "lora+head", "adalora"])
@pytest.mark.parametrize(("stage", "sharded"), CASES, ids=lambda value: str(value))
def test_adapters_in_bf16(ranks: Ranks, plain, tmp_path, stage: int, sharded: bool, kind: str):
    ranks.run("trainer_tasks.save_plain", 1, folder=str(tmp_path))
    given = {"folder": str(tmp_path), "config": ds_config(stage), "kind": kind, "sharded": sharded}
    found = ranks.run("peft_tasks.train", precision="bf16", **given)[0]
    # On a base model that has 16 bits from the start peft makes AdaLoRA's counts of ranks trainable.
    expected = plain(kind, "bf16", sharded)
    assert_same_story(found, expected, "losses", "counts", "files")
    assert_same_bits(found["frozen"], expected["frozen"])


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_that_peft_keeps_in_fp32_stay_and_are_saved_in_fp32(
    ranks: Ranks, plain, tmp_path, stage: int, checkpointing: bool
):
    """On a base model in bf16 peft keeps its adapters in fp32; the engine cast them, and bf16 adapters were saved."""
    ranks.run("trainer_tasks.save_plain", 1, folder=str(tmp_path))
    again = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    given = {"folder": str(tmp_path), "config": ds_config(stage), "kind": "lora", "sharded": True}
    found = ranks.run("peft_tasks.train", precision="bf16", **given, **(again if checkpointing else {}))[0]
    expected = plain("lora", "bf16", True)
    assert_same_story(found, expected, "losses", "counts", "files")
    assert {value.dtype for value in found["frozen"].values()} == {torch.bfloat16}
    assert {value.dtype for value in found["weights"].values()} == {torch.float32}
    assert_same_bits(found["weights"], expected["weights"])
    assert found["saved"] and {value.dtype for value in found["saved"].values()} == {torch.float32}
    assert_same_bits(found["saved"], expected["saved"])


@pytest.mark.parametrize("stage", [2, 3])
def test_resume_in_the_middle(ranks: Ranks, plain, tmp_path, stage: int):
    given = {"folder": str(tmp_path), "config": ds_config(stage)}
    whole = ranks.run("peft_tasks.train", **given)[0]
    again = ranks.run("peft_tasks.train", checkpoint=str(tmp_path / "checkpoint-3"), **given)[0]
    assert_same_story(again, whole, "losses")


@pytest.mark.parametrize(
    ("stage", "away"),
    [(0, False), (1, False), (2, False), (3, False), (3, True)],
    ids=lambda value: str(value),
)
def test_adalora_allots_its_ranks_from_the_gradients(ranks: Ranks, stage: int, away: bool):
    """``away``: the adapters are no longer whole between uses, and are gathered for the allotment."""
    expected = ranks.run("peft_tasks.allocate", 1, stage=None)[0]
    found = ranks.run("peft_tasks.allocate", stage=stage, away=away)[0]
    assert_same_story(found, expected, "losses")
    assert len(found["sensitivity"]) == 12 and any(value.any() for value in found["sensitivity"].values())
    assert_same_bits(found["sensitivity"], expected["sensitivity"])
