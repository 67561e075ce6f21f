"""Difficulties by step as DeepSpeed 0.19.8 gives them, files of rows, metrics, and which samples a step draws."""

from __future__ import annotations

import pickle
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from zeropipe.errors import CheckpointError, ConfigError, UsageError
from zeropipe.runtime.curriculum import CurriculumScheduler, ProgressiveLayerDrop
from zeropipe.runtime.data_pipeline.analyzer import DataAnalyzer
from zeropipe.runtime.data_pipeline.indexed import (
    MMapIndexedDataset,
    MMapIndexedDatasetBuilder,
    write_rows,
)
from zeropipe.runtime.data_pipeline.sampler import DeepSpeedDataSampler, SampledLoader


def section(kind: str, low: int, high: int, **options: Any) -> dict[str, Any]:
    return {"min_difficulty": low, "max_difficulty": high, "schedule_type": kind, "schedule_config": options}


# (section, {step: difficulty}), found by running DeepSpeed 0.19.8.
FOUND: list[tuple[dict[str, Any], dict[int, int]]] = [
    (
        section("fixed_linear", 8, 64, total_curriculum_step=30, difficulty_step=8),
        {0: 8, 4: 8, 5: 16, 8: 16, 9: 24, 17: 32, 18: 40, 29: 56, 30: 64, 44: 64},
    ),
    (
        section("fixed_linear", 5, 61, total_curriculum_step=30, difficulty_step=8),
        {0: 8, 5: 8, 6: 16, 10: 16, 11: 24, 31: 56, 32: 61, 44: 61},
    ),
    (
        section("fixed_root", 5, 61, total_curriculum_step=37, difficulty_step=4, root_degree=2),
        {0: 8, 1: 12, 2: 16, 3: 20, 4: 20, 5: 24, 41: 60, 42: 61},
    ),
    (
        section("fixed_root", 8, 64, total_curriculum_step=37, difficulty_step=1, root_degree=3),
        {0: 8, 1: 24, 2: 29, 3: 32, 36: 63, 37: 64, 40: 64},
    ),
    (
        section("fixed_discrete", 5, 61, difficulty=[8, 40, 64], max_step=[5, 10]),
        {0: 8, 5: 8, 6: 40, 10: 40, 11: 64, 44: 64},
    ),
]


@pytest.mark.parametrize(("given", "wanted"), FOUND)
def test_difficulties_are_those_of_deepspeed(given: dict[str, Any], wanted: dict[int, int]) -> None:
    scheduler = CurriculumScheduler(given)
    assert {step: scheduler.get_difficulty(step) for step in wanted} == wanted
    # Step by step, and at once after a resume.
    walked = [scheduler.update_difficulty(step) for step in range(45)]
    assert {step: walked[step] for step in wanted} == wanted
    resumed = CurriculumScheduler(given)
    resumed.set_state(scheduler.get_state())
    assert resumed.get_current_difficulty() == walked[-1]


def test_a_custom_schedule() -> None:
    scheduler = CurriculumScheduler({"min_difficulty": 1, "max_difficulty": 9, "schedule_type": "custom"})
    with pytest.raises(UsageError, match="set_custom_get_difficulty"):
        scheduler.update_difficulty(1)
    scheduler.set_custom_get_difficulty(lambda step: step * 2)
    assert [scheduler.update_difficulty(step) for step in range(7)] == [0, 2, 4, 6, 8, 10, 10]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, "min_difficulty, max_difficulty, schedule_type missing"),
        (
            section("fixed_linear", 1, 2),
            "schedule_config.total_curriculum_step, schedule_config.difficulty_step",
        ),
        (section("steep", 1, 2), "found 'steep'"),
        (
            section("fixed_linear", 1, 2, total_curriculum_step=0, difficulty_step=1),
            "expected above 0, found 0",
        ),
        (section("fixed_discrete", 1, 2, difficulty=[1, 2], max_step=[3, 4]), "expected 1 steps"),
    ],
)
def test_a_schedule_that_cannot_be_used(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        CurriculumScheduler(given)


def test_the_share_of_layers_falls_to_theta() -> None:
    drop = ProgressiveLayerDrop(theta=0.5, gamma=0.1)
    shares = []
    for step in range(3):
        drop.update_state(step)
        shares.append(drop.get_theta())
    assert shares == pytest.approx([1.0, 0.5 * np.exp(-0.1) + 0.5, 0.5 * np.exp(-0.2) + 0.5])
    assert drop.get_state() == {"progressive_layer_drop": True, "pld_theta": shares[-1]}


# ---- rows in files ----

# What DeepSpeed 0.19.8 wrote for the rows [1 2 3], [9] | [5 6] of int32.
THEIR_INDEX = (
    "4d4d494449445800000100000000000000040300000000000000030000000000000003000000010000000200000000000000000000000c"
    "000000000000001000000000000000000000000000000002000000000000000300000000000000"
)


def test_rows_are_the_files_that_deepspeed_writes(tmp_path) -> None:
    path = str(tmp_path / "rows")
    builder = MMapIndexedDatasetBuilder(f"{path}.bin", dtype=np.int32)
    builder.add_item(torch.tensor([1, 2, 3]))
    builder.add_item_numpy(np.array([9]))
    builder.end_document()
    builder.add_items([np.array([5, 6])])
    builder.end_document()
    builder.finalize(f"{path}.idx")
    assert (tmp_path / "rows.idx").read_bytes().hex() == THEIR_INDEX
    assert (tmp_path / "rows.bin").read_bytes() == np.array([1, 2, 3, 9, 5, 6], np.int32).tobytes()
    rows = pickle.loads(pickle.dumps(MMapIndexedDataset(path)))
    assert [row.tolist() for row in rows[0:3]] == [[1, 2, 3], [9], [5, 6]] == [r.tolist() for r in rows]
    assert rows[-1].tolist() == [5, 6] and rows.get(0, 1, 2).tolist() == [2, 3] and rows.size(0) == 3
    assert rows.doc_idx.tolist() == [0, 2, 3] and MMapIndexedDataset.exists(path)
    again = MMapIndexedDatasetBuilder(str(tmp_path / "two.bin"), dtype=np.int32)
    again.merge_file_(path)
    again.merge_file_(path)
    again.finalize(str(tmp_path / "two.idx"))
    merged = MMapIndexedDataset(str(tmp_path / "two"))
    assert len(merged) == 6 and merged.doc_idx.tolist() == [0, 2, 3, 5, 6]


def test_files_that_are_no_rows_say_so(tmp_path) -> None:
    path = str(tmp_path / "rows")
    with pytest.raises(UsageError, match="missing"):
        MMapIndexedDataset(path)
    write_rows(path, [np.array([1, 300]), np.empty(0, np.int64)])
    whole = (tmp_path / "rows.idx").read_bytes()
    assert MMapIndexedDataset(path).dtype == np.uint16
    (tmp_path / "rows.bin").write_bytes(b"\x00")
    with pytest.raises(UsageError, match="cut off"):
        MMapIndexedDataset(path)
    for damaged in (whole[:-1], b"something else, of some length"):
        (tmp_path / "rows.idx").write_bytes(damaged)
        with pytest.raises(UsageError, match="expected"):
            MMapIndexedDataset(path)
    with pytest.raises(UsageError, match="whole numbers"):
        MMapIndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=np.float32)


# ---- metrics of samples ----

SAMPLES = 50


class Sequences(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.arange((index * 7) % 13 + 1)


def lengths(batch: list[torch.Tensor]) -> torch.Tensor:
    return torch.tensor([len(one) for one in batch])


def vocabulary(batch: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(batch).bincount(minlength=20)


def analyzer(folder: str, **changed: Any) -> DataAnalyzer:
    given: dict[str, Any] = {
        "dataset": Sequences(), "num_workers": 3, "batch_size": 4, "metric_names": ["seqlen", "vocab"],
        "metric_functions": [lengths, vocabulary],
        "metric_types": ["single_value_per_sample", "accumulate_value_over_samples"],
        "save_path": folder, "collate_fn": lambda batch: batch,
    }  # fmt: skip
    return DataAnalyzer(**(given | changed))


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("metrics"))
    for worker in range(3):
        analyzer(folder, worker_id=worker).run_map()
    analyzer(folder).run_reduce()
    return folder


def test_the_analyzer_sorts_samples_by_their_metric(metrics: str) -> None:
    wanted = [len(Sequences()[i]) for i in range(SAMPLES)]
    read = {
        what: [row.tolist() for row in MMapIndexedDataset(f"{metrics}/seqlen/seqlen_{what}")]
        for what in ("sample_to_metric", "index_to_metric", "index_to_sample")
    }
    assert [value for (value,) in read["sample_to_metric"]] == wanted
    assert [value for (value,) in read["index_to_metric"]] == sorted(set(wanted))
    for (value,), samples in zip(read["index_to_metric"], read["index_to_sample"], strict=True):
        assert samples == [i for i in range(SAMPLES) if wanted[i] == value]
    (counts,) = MMapIndexedDataset(f"{metrics}/vocab/vocab_metric_value")
    assert counts.tolist() == [sum(length > token for length in wanted) for token in range(20)]


def test_an_analysis_that_cannot_be_done(tmp_path) -> None:
    with pytest.raises(UsageError, match=r"lacks the parts of workers \[0, 1, 2\]"):
        analyzer(str(tmp_path)).run_reduce()
    with pytest.raises(UsageError, match="one for each of 4 samples"):
        analyzer(str(tmp_path), metric_functions=[lambda batch: torch.zeros(3), vocabulary]).run_map()
    with pytest.raises(UsageError, match="found median"):
        analyzer(str(tmp_path), metric_types=["median", "median"])


# ---- what is drawn ----


def efficiency(folder: str, epochs: int = 2, **metric: Any) -> dict[str, Any]:
    seqlen = {
        "index_to_sample_path": f"{folder}/seqlen/seqlen_index_to_sample",
        "index_to_metric_path": f"{folder}/seqlen/seqlen_index_to_metric",
        "difficulty_type": "value",
        **section("fixed_linear", 3, 13, total_curriculum_step=6, difficulty_step=1),
    }
    learning = {"enabled": True, "curriculum_metrics": {"seqlen": seqlen | metric}}
    return {"seed": 7, "data_sampling": {"num_epochs": epochs, "curriculum_learning": learning}}


def sampler(
    given: dict[str, Any], rank: int = 0, world: int = 1, micro: int = 2, gas: int = 2, **more: Any
) -> DeepSpeedDataSampler:
    return DeepSpeedDataSampler(given, SAMPLES, micro, rank, world, gradient_accumulation_steps=gas, **more)


def test_a_step_draws_what_is_allowed_and_each_sample_once_before_any_comes_again(metrics: str) -> None:
    drawn = list(sampler(efficiency(metrics)))
    assert len(drawn) == SAMPLES and all(len(batch) == 2 for batch in drawn)
    schedule = CurriculumScheduler(section("fixed_linear", 3, 13, total_curriculum_step=6, difficulty_step=1))
    for number, batch in enumerate(drawn):
        limit = schedule.get_difficulty(number // 2 + 1)
        assert all(len(Sequences()[i]) <= limit for i in batch), (number, limit)
    flat = [i for batch in drawn for i in batch]
    # From the sixth step on all are allowed: nothing comes twice until all were drawn.
    assert set(flat) == set(range(SAMPLES)) and flat != sorted(flat)
    assert len(set(flat[:SAMPLES])) >= SAMPLES - 2
    assert drawn == list(sampler(efficiency(metrics)))
    assert drawn != list(sampler(efficiency(metrics) | {"seed": 8}))


def test_ranks_share_the_samples_of_one(metrics: str) -> None:
    alone = [i for batch in sampler(efficiency(metrics), micro=4, gas=2) for i in batch]
    pair = [list(sampler(efficiency(metrics), rank, 2)) for rank in range(2)]
    together = [i for batches in zip(*pair, strict=True) for batch in batches for i in batch]
    assert together == alone[: len(together)]


def test_percentiles_and_one_cluster(metrics: str) -> None:
    share = {"difficulty_type": "percentile", **section("custom", 1, 100)}
    some = sampler(efficiency(metrics, **share))
    some.set_custom_curriculum_learning_schedule({"seqlen": lambda step: 10 if step < 5 else 100})
    first = [i for batch in islice(some, 8) for i in batch]
    easiest = sorted(range(SAMPLES), key=lambda i: (len(Sequences()[i]), i))[:5]
    assert set(first) == set(easiest)
    one = sampler(efficiency(metrics, clustering_type="single_cluster"))
    assert {i for batch in islice(one, 25) for i in batch} == set(range(SAMPLES))
    assert one.state_dict()["current_difficulties"] == {"seqlen": 13}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_loader_yields_what_was_left_also_on_other_ranks(metrics: str, workers: int) -> None:
    def loader(rank: int = 0, world: int = 1, micro: int = 4) -> SampledLoader:
        made = sampler(efficiency(metrics), rank, world, micro)
        return SampledLoader(Sequences(), made, lambda batch: [len(one) for one in batch], workers)

    before = torch.get_rng_state()
    whole = list(loader())
    first = loader()
    stream = iter(first)
    for _ in range(7):  # in the middle of a step, while workers are ahead
        next(stream)
    saved = first.state_dict()
    assert saved["consumed_samples"] == 28 and saved["current_difficulties"] == {"seqlen": 9}
    again = loader()
    again.load_state_dict(saved)
    assert list(again) == whole[7:] and len(again) == 25
    pair = [loader(rank, 2, 2) for rank in range(2)]
    for one in pair:
        one.load_state_dict(saved)
    assert [a + b for a, b in zip(*pair, strict=True)] == whole[7:]
    assert torch.equal(before, torch.get_rng_state())


def test_the_data_is_told_the_difficulty(metrics: str) -> None:
    loader = SampledLoader(Sequences(), sampler(efficiency(metrics)), lambda batch: batch)
    loader.post_process(
        lambda batch, state: [one[: state["current_difficulties"]["seqlen"] - 2] for one in batch]
    )
    assert max(len(one) for one in next(iter(loader))) <= 2


def test_what_does_not_fill_a_batch(metrics: str) -> None:
    given = efficiency(metrics, epochs=1)
    assert len(list(sampler(given, micro=4))) == 12 == sampler(given, micro=4).micro_batches
    filled = list(sampler(given, micro=4, drop_last=False))
    assert len(filled) == 13 and all(len(batch) == 4 for batch in filled)


@pytest.mark.parametrize(
    ("done", "shape"), [(8, (1, 2)), (8, (4, 2)), (7, (1, 1)), (7, (1, 2)), (7, (4, 2)), (8, (3, 1))]
)
def test_a_run_that_goes_on_with_steps_of_another_size_goes_on_in_difficulty(
    metrics: str, done: int, shape: tuple[int, int]
) -> None:
    """Saved at the end of step 4, or within it: the next whole step is the next of the curriculum."""
    given = efficiency(metrics, schedule_config={"total_curriculum_step": 1000, "difficulty_step": 1})
    first = sampler(given)  # steps of 2 x 2 samples
    for _, _ in zip(range(done), first, strict=False):
        pass
    assert first.place.step == 4
    micro, gas = shape
    after = sampler(given, micro=micro, gas=gas)
    after.load_state_dict(first.state_dict())
    walk = iter(after)
    steps = [after.place.step for _, _ in zip(range(3 * gas), walk, strict=False)]
    begins = (
        4 if done == 7 and micro * gas > 2 else 5
    )  # half of a step was over, which may be a whole one here
    assert steps == [step for step in range(begins, begins + 3) for _ in range(gas)]


def test_a_curriculum_that_cannot_be_drawn_from(metrics: str) -> None:
    with pytest.raises(UsageError, match="no sample to train on; found seqlen at most 0"):
        next(
            iter(sampler(efficiency(metrics, **section("fixed_discrete", 1, 5, difficulty=[0], max_step=[]))))
        )
    with pytest.raises(UsageError, match="index_to_metric_path is missing"):
        sampler(efficiency(metrics, index_to_metric_path=None))
    with pytest.raises(UsageError, match="knows sample 39"):
        DeepSpeedDataSampler(efficiency(metrics), 10, 1, 0, 1)
    with pytest.raises(UsageError, match="found median"):
        sampler(efficiency(metrics, difficulty_type="median"))
    with pytest.raises(CheckpointError, match="curriculum's sampler"):
        sampler(efficiency(metrics)).load_state_dict({"epoch": 1})
