"""Lightning's two DeepSpeed strategies on zeropipe; both ask for CUDA by type, see ``lightning_tasks._Host``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.clients.compare import assert_same_bits, assert_same_story
from tests.clients.ranks import Ranks

STAGES = (1, 2, 3)


@pytest.fixture(scope="module", params=["fit", "fabric"])
def plain(request: pytest.FixtureRequest, ranks: Ranks, tmp_path_factory) -> tuple[str, dict[str, Any]]:
    """A task and its run under DDP."""
    folder = str(tmp_path_factory.mktemp("plain"))
    return request.param, ranks.run(f"lightning_tasks.{request.param}", folder=folder, stage=None)[0]


@pytest.mark.parametrize("stage", STAGES)
def test_training_checkpoint_and_resume(ranks: Ranks, plain, tmp_path, stage: int):
    task, expected = plain
    given = {"folder": str(tmp_path), "stage": stage}
    if task == "fit":
        found = ranks.run("lightning_tasks.fit", **given)[0]
        ranks.run("lightning_tasks.fit", epochs=1, **given)
        again = ranks.run("lightning_tasks.fit", checkpoint=str(tmp_path / "epoch1.ckpt"), **given)[0]
        assert found["engine"] == "DeepSpeedEngine"
        assert_same_bits(found["converted"], found["weights"])
    else:
        found = ranks.run("lightning_tasks.fabric", save_at=2, **given)[0]
        again = ranks.run("lightning_tasks.fabric", load=True, **given)[0]
    assert_same_story(found, expected, "losses")
    assert again["losses"] == found["losses"][2:]
    assert_same_bits(again["weights"], found["weights"])


@pytest.mark.parametrize("stage", [2, 3])
def test_bf16_converts_to_the_masters(ranks: Ranks, tmp_path, stage: int):
    found = ranks.run("lightning_tasks.fit", folder=str(tmp_path), stage=stage, precision="bf16-true")[0]
    assert str(next(iter(found["weights"].values())).dtype) == "torch.bfloat16"
    assert_same_bits({name: value.bfloat16() for name, value in found["converted"].items()}, found["weights"])
    masters = found["converted"].values()
    assert any(not torch.equal(value, value.bfloat16().float()) for value in masters), (
        "these are the rounded values"
    )
