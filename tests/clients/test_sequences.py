"""Trainer and Accelerate with ranks that share sequences train as one process does on the whole of them."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tests.clients.compare import assert_close
from tests.clients.ranks import Ranks

STAGES = (0, 1, 2, 3)
STEPS = 3
# Orders of additions, of sums over 18 tokens, 64 words and two layers: some ulps of fp32.
EXACT, WEIGHTS = 2e-6, 2e-6
# bf16 has 8 bits, and rounds in other places where the tokens of a product are divided.
ROUGH = 1e-2


@pytest.fixture(scope="module")
def plain(ranks: Ranks) -> Any:
    @cache
    def run(**given: Any) -> dict[str, Any]:
        return ranks.run("sequence_tasks.plain", 1, steps=STEPS, **given)[0]

    return run


def compare(found: list[dict[str, Any]], expected: dict[str, Any], world: int, sp: int, bound: float) -> None:
    # Each rank tells the loss of its own sequence; a step's is the mean over them.
    per_step = [sum(one["losses"][step] for one in found) / world for step in range(STEPS)]
    assert per_step == pytest.approx(expected["losses"], rel=bound)
    assert found[0]["norms"] == pytest.approx(expected["norms"], rel=bound * 5)
    assert found[0]["batch"] == world // sp
    if bound == EXACT:
        for one in found:
            assert_close(one["weights"], expected["weights"], WEIGHTS)


@pytest.mark.parametrize("kind", ["causal", "packed", "padded"])
@pytest.mark.parametrize(("world", "sp"), [(2, 2), (4, 4), (4, 2)])
@pytest.mark.parametrize("stage", STAGES)
def test_the_trainer(ranks: Ranks, plain, tmp_path, stage: int, world: int, sp: int, kind: str):
    """With 4 ranks the two key heads are fewer than the ranks, and 18 tokens are filled up to 20."""
    given = {"stage": stage, "sp": sp, "steps": STEPS, "kind": kind, "folder": str(tmp_path)}
    found = ranks.run("sequence_tasks.trainer", world, **given)
    compare(found, plain(shape=(world, sp), kind=kind), world, sp, EXACT)


@pytest.mark.parametrize(("world", "sp", "kind"), [(2, 2, "packed"), (4, 2, "causal")])
@pytest.mark.parametrize("stage", STAGES)
def test_accelerate(ranks: Ranks, plain, tmp_path, stage: int, world: int, sp: int, kind: str):
    given = {"stage": stage, "sp": sp, "steps": STEPS, "kind": kind, "folder": str(tmp_path)}
    found = ranks.run("sequence_tasks.accelerate", world, **given)
    compare(found, plain(shape=(world, sp), kind=kind), world, sp, EXACT)


@pytest.mark.parametrize("task", ["trainer", "accelerate"])
@pytest.mark.parametrize("stage", STAGES)
def test_bf16(ranks: Ranks, plain, tmp_path, stage: int, task: str):
    given = {"stage": stage, "sp": 2, "steps": STEPS, "precision": "bf16", "folder": str(tmp_path)}
    found = ranks.run(f"sequence_tasks.{task}", 2, **given)
    compare(found, plain(shape=(2, 2), precision="bf16"), 2, 2, ROUGH)
