"""What an engine tells the model's forward in each step (lengths, layers to keep), and data drawn by difficulty."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import zeropipe
from tests.helpers.referee import assert_bitwise, weights_of
from tests.helpers.train import config
from zeropipe.errors import ConfigError
from zeropipe.runtime.data_pipeline.indexed import write_rows

LENGTH = {"min_difficulty": 2, "max_difficulty": 6, "schedule_type": "fixed_linear",
          "schedule_config": {"total_curriculum_step": 4, "difficulty_step": 2}}  # fmt: skip


class Told(nn.Module):
    """Cuts its sequences, and weighs its layers, as it is told."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.seen: list[tuple[int | None, float | None]] = []

    def forward(
        self,
        x: torch.Tensor,
        curriculum_seqlen: int | None = None,
        progressive_layer_drop: bool = False,
        pld_theta: float | None = None,
    ) -> torch.Tensor:
        self.seen.append((curriculum_seqlen, pld_theta))
        x = x[:, :curriculum_seqlen]
        for layer in self.layers:
            x = x + (pld_theta or 1.0) * layer(x)
        return x.square().mean()


def told(rank: int, world: int, stage: int, folder: str, stop: int) -> tuple[list[Any], dict[str, Any]]:
    """Four steps of two micro-steps; after ``stop`` steps another engine goes on from a checkpoint."""
    settings = config(
        stage, world, gas=2, curriculum_learning={"enabled": True, "curriculum_type": "seqlen", **LENGTH},
        progressive_layer_drop={"enabled": True, "theta": 0.5, "gamma": 0.3},
    )  # fmt: skip
    seen: list[Any] = []
    engine, *_ = zeropipe.initialize(model=Told(), config=settings)
    for step in range(4):
        if step == stop:
            engine.save_checkpoint(folder)
            seen += engine.module.seen
            engine.destroy()
            engine, *_ = zeropipe.initialize(model=Told(), config=settings)
            engine.load_checkpoint(folder)
        for micro in range(2):
            generator = torch.Generator().manual_seed(step * 10 + micro * 2 + rank)
            engine.backward(engine(torch.randn(3, 6, 4, generator=generator)))
            engine.step()
    assert engine.curriculum_enabled_legacy() and engine.pld_enabled()
    assert engine.curriculum_scheduler_legacy.get_current_difficulty() == 6
    assert engine.progressive_layer_drop.get_theta() == seen[-1][1] if stop == 4 else True
    with torch.no_grad():
        engine.eval()
        engine(torch.zeros(1, 6, 4))
    assert engine.module.seen.pop() == (None, None)
    return seen + engine.module.seen, weights_of(engine.module)


def test_an_engine_that_goes_back_to_an_earlier_checkpoint_goes_back_in_its_curriculum(tmp_path):
    """As scripts do after a loss that is not finite: the same engine loads, from the maximum on."""
    settings = config(0, 1, curriculum_learning={"enabled": True, "curriculum_type": "seqlen", **LENGTH})
    engine, *_ = zeropipe.initialize(model=Told(), config=settings)

    def train(steps: int) -> list[int | None]:
        engine.module.seen.clear()
        for _ in range(steps):
            engine.backward(engine(torch.ones(1, 6, 4)))
            engine.step()
        return [length for length, _ in engine.module.seen]

    train(1)
    engine.save_checkpoint(str(tmp_path))
    first = train(5)
    assert first == [4, 4, 6, 6, 6]
    engine.load_checkpoint(str(tmp_path))
    assert train(5) == first
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 3])
def test_forward_is_told_lengths_and_layers_and_a_resumed_run_the_same(pool, tmp_path, stage):
    through = pool(2).run(told, stage, str(tmp_path / "none"), -1)
    resumed = pool(2).run(told, stage, str(tmp_path), 2)
    for (seen, weights), (again, others) in zip(through, resumed, strict=True):
        theta = [0.5 * float(np.exp(-0.3 * step)) + 0.5 for step in range(4)]
        assert [length for length, _ in seen] == [2, 2, 4, 4, 4, 4, 6, 6]
        assert [share for _, share in seen] == pytest.approx([share for share in theta for _ in range(2)])
        assert again == seen
        assert_bitwise(weights, others)


def refused(rank: int, world: int) -> list[str]:
    texts = []
    for name, section in (("curriculum_learning", LENGTH), ("progressive_layer_drop", {})):
        with pytest.raises(ConfigError) as caught:
            zeropipe.initialize(
                model=nn.Linear(2, 2), config=config(1, world, **{name: {"enabled": True, **section}})
            )
        texts.append(str(caught.value))
    return texts


def test_a_forward_that_does_not_take_it_is_named(pool):
    for length, layers in pool(2).run(refused):
        assert "curriculum_seqlen" in length and "found forward(input)" in length
        assert "progressive_layer_drop, pld_theta" in layers


def in_a_pipeline(rank: int, world: int) -> list[int]:
    torch.manual_seed(0)
    module = zeropipe.PipelineModule(
        [nn.Linear(4, 4), nn.Linear(4, 4)], num_stages=2, loss_fn=lambda out, _: out.square().mean()
    )
    settings = config(0, 1, gas=2, curriculum_learning={"enabled": True, **LENGTH})
    engine, *_ = zeropipe.initialize(model=module, config=settings)
    lengths: list[int] = []

    def cut(batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        lengths.append(engine.curriculum_scheduler_legacy.get_current_difficulty())
        return batch[:, : lengths[-1]], batch

    engine.set_batch_fn(cut)
    for _ in range(4):
        engine.train_batch(iter([torch.ones(1, 6, 4)] * 2))
    return lengths


def test_a_pipeline_cuts_its_data_itself(pool):
    for lengths in pool(2).run(in_a_pipeline):
        assert lengths == [2, 2, 4, 4, 4, 4, 6, 6]


def drawn(rank: int, world: int, folder: str, stop: int) -> list[int]:
    """The samples of the steps from ``stop`` on, of a run that was saved there by however many ranks."""
    metric = {
        "index_to_sample_path": f"{folder}/samples", "index_to_metric_path": f"{folder}/values",
        "difficulty_type": "value", **LENGTH,
    }  # fmt: skip
    learning = {"enabled": True, "curriculum_metrics": {"size": metric}}
    settings = config(
        1,
        4,
        data_efficiency={
            "enabled": True,
            "data_sampling": {"enabled": True, "curriculum_learning": learning},
        },
    )
    settings["train_micro_batch_size_per_gpu"] = 4 // world
    data = torch.utils.data.TensorDataset(torch.arange(24.0).view(24, 1))
    engine, _, loader, _ = zeropipe.initialize(model=nn.Linear(1, 1), config=settings, training_data=data)
    if stop:
        engine.load_checkpoint(f"{folder}/saved", "there")
    found: list[int] = []
    stream = iter(loader)
    for step in range(stop, 6):
        (batch,) = next(stream)
        found += batch.flatten().int().tolist()
        engine.backward(engine(batch).mean())
        engine.step()
        if not stop and step == 1:
            engine.save_checkpoint(f"{folder}/saved", "there")
    return found


def test_samples_by_difficulty_through_a_checkpoint_at_other_numbers_of_ranks(pool, tmp_path):
    write_rows(str(tmp_path / "samples"), list(np.arange(24).reshape(6, 4)))
    write_rows(str(tmp_path / "values"), list(np.arange(1, 7).reshape(6, 1)))
    whole = pool(1).run(drawn, str(tmp_path), 0)[0]
    steps = [whole[i : i + 4] for i in range(0, 24, 4)]
    for sample, limit in zip(whole, (limit for limit in (2, 4, 4, 6, 6, 6) for _ in range(4)), strict=True):
        assert sample < 4 * limit
    pair = pool(2).run(drawn, str(tmp_path), 2)
    together = [[*pair[0][i : i + 2], *pair[1][i : i + 2]] for i in range(0, 8, 2)]
    assert together == steps[2:]
