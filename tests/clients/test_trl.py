"""TRL's trainers on zeropipe: the numbers of plain PyTorch, several models in one process, generation in between."""

from __future__ import annotations

from typing import Any

import pytest

from tests.clients.compare import assert_same_story
from tests.clients.configs import ds_config
from tests.clients.ranks import Ranks

STAGES = (0, 1, 2, 3)
SHOWN = {
    "sft": ("loss", "mean_token_accuracy"),
    "dpo": ("loss", "rewards/margins", "logps/chosen"),
    "grpo": ("loss", "reward", "kl", "completions/mean_length"),
    "unwrapped": ("loss", "facts"),
}


@pytest.fixture(scope="module")
def folder(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Holds the model that every run starts from."""
    folder = str(tmp_path_factory.mktemp("trl"))
    ranks.run("trainer_tasks.save_plain", 1, folder=folder)
    return folder


@pytest.fixture(scope="module", params=SHOWN)
def plain(request: pytest.FixtureRequest, ranks: Ranks, folder: str) -> tuple[str, dict[str, Any]]:
    """A task and its run without DeepSpeed."""
    return request.param, ranks.run(f"trl_tasks.{request.param}", folder=folder, config=None)[0]


@pytest.mark.parametrize("stage", STAGES)
def test_the_numbers_of_plain_pytorch(ranks: Ranks, folder: str, plain, stage: int):
    task, expected = plain
    found = ranks.run(f"trl_tasks.{task}", folder=folder, config=ds_config(stage))[0]
    assert_same_story(found, expected, *SHOWN[task])
    if task == "dpo":
        assert found["kept"]  # training left the reference model alone
    if task == "unwrapped":
        assert found["held"] < expected["held"] if stage == 3 else found["held"] == expected["held"]
