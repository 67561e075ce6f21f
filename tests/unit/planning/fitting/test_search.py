"""The search finds what looking at everything finds, with fewer looks, wherever time and memory keep their laws."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeropipe.config.parse import parse_config
from zeropipe.planning.fitting.choices import ALL, NONE, OFFLOADS, Choice, Cut, Space, alike, cuts
from zeropipe.planning.fitting.search import Search, Seen, holds_no_less


class World:
    """Made-up costs that keep the laws of ``search.py``: convex in the micro-batch, dearer where memory is saved."""

    def __init__(self, seed: int, ranks: int) -> None:
        self._seed, self._ranks, self.looks = seed, ranks, 0

    def _number(self, *of: object) -> float:
        return random.Random(f"{self._seed} {of}").random()

    def __call__(self, choice: Choice) -> Seen:
        self.looks += 1
        c = choice
        sharded = {0: 0.0, 1: 0.5, 2: 0.7, 3: 1.0}[c.stage] * (1 - 1 / (c.shard or self._ranks))
        resting = 1000 * (1 - 0.9 * sharded) * (1, 0.4, 0.1)[OFFLOADS.index(c.offload)]
        each = 10 + 90 * self._number("activations")
        held = each * (0.2 if c.recompute else 1.0)
        first, second = 100 * self._number(c.family, "a"), 200 * self._number(c.family, "b")
        needed = resting + max(first + held * c.micro, second + held * c.micro / 3)
        micro = max(self._number("launch"), self._number("work") * c.micro)
        micro *= (
            1 + c.recompute * self._number("recompute") + OFFLOADS.index(c.offload) * self._number("away")
        )
        micro += self._number("sent", c.stage, c.shard)
        return Seen(int(needed), int(resting), c.accumulation * micro, why=str(int(needed)))


@given(
    st.integers(0, 10**6), st.sampled_from([2, 4, 16]), st.floats(0.02, 1.3), st.sampled_from([1, 8, 24, 64])
)
def test_it_finds_what_looking_at_everything_finds(seed: int, ranks: int, share: float, batch: int) -> None:
    every = Space(batch * ranks, ranks, node=4).choices()
    memory, look = int(1100 * share), World(seed, ranks)
    fits = {one: seen.seconds for one in every if (seen := look(one)).needed <= memory}
    look.looks = 0
    search = Search(every, memory, look)
    found = search.run()
    assert (found is None) == (not fits)
    assert look.looks <= len(every)
    if found is not None:
        assert fits[found] == pytest.approx(min(fits.values()))
        for one in search.refusals(found):
            assert one.choice not in fits
            assert one.seconds <= fits[found]


@given(
    st.integers(0, 10**6),
    st.sampled_from([2, 4]),
    st.floats(0.1, 1.2),
    st.sampled_from([8, 24]),
    st.floats(1, 1.4),
)
def test_what_a_better_look_refuses_is_passed_over(
    seed: int, ranks: int, share: float, batch: int, more: float
) -> None:
    """As ``fit`` does: the cheap look sees too little, and what it finds is looked at again."""
    every = Space(batch * ranks, ranks, node=4).choices()
    memory, look = int(1100 * share), World(seed, ranks)

    def better(choice: Choice) -> Seen:
        seen = look(choice)
        return replace(seen, needed=int(more * seen.needed))

    fits = {one: seen.seconds for one in every if (seen := better(one)).needed <= memory}
    look.looks = 0
    search = Search(every, memory, look)
    while (found := search.run()) is not None and (seen := better(found)).needed > memory:
        search.refuse(found, seen)
    assert look.looks <= 2 * len(every)
    assert (found is None) == (not fits)
    if found is not None:
        assert fits[found] == pytest.approx(min(fits.values()))


def test_it_looks_at_few() -> None:
    every = Space(64 * 16, 16, node=8).choices()
    looks = []
    for seed in range(20):
        look = World(seed, 16)
        Search(every, 500, look).run()
        looks.append(look.looks)
    assert len(every) > 200
    assert sum(looks) / 20 < 40


def test_what_lies_between_steps_refuses_all_that_hold_more() -> None:
    look = World(0, 16)
    search = Search(Space(256, 16, 8, offload=(NONE,)).choices(), 90, look)
    assert search.run() is None
    assert look.looks == 1  # stage 3 over all ranks; no other holds less
    assert {one.choice.stage for one in search.refusals(None)} == {0, 1, 2, 3}
    three, small = Choice(3, 1, 1), Choice(3, 1, 1, shard=2)
    assert holds_no_less(Choice(2, 1, 1), three)
    assert holds_no_less(small, three)
    assert not holds_no_less(Choice(2, 1, 1), small)
    assert not holds_no_less(replace(three, cut=Cut(2, "1f1b", 1)), three)


def test_a_choice_that_cannot_be_run_is_refused_with_its_reason() -> None:
    def look(choice: Choice) -> Seen:
        return Seen(0, 0, 0, "no such optimizer", fails=True) if choice.stage else World(1, 4)(choice)

    search = Search(Space(4, 4, 4).choices(), 10**6, look)
    found = search.run()
    assert found is not None
    assert found.stage == 0
    assert {one.why for one in search.refusals(found)} == {"no such optimizer"}


def test_pipelines_are_ordered_by_their_schedules() -> None:
    """A bubble that a smaller micro-batch makes smaller; looked at without a model of it, sizes would come in vain."""

    def look(choice: Choice) -> Seen:
        looks.append(choice)
        assert choice.cut is not None
        return Seen(choice.micro, 0, Search._units(choice) + choice.accumulation * 0.01)

    for memory in (10, 25, 1000):
        looks: list[Choice] = []
        every = Space(32, 4, 4, stages=(1,), offload=(NONE,), cuts=cuts(4, 8)).choices()
        found = Search(every, memory, look).run()
        seen = {one: look(one) for one in every}
        best = min(one.seconds for one in seen.values() if one.needed <= memory)
        assert found is not None
        assert seen[found].seconds <= 1.1 * best


def test_what_a_configuration_becomes() -> None:
    given = {
        "train_batch_size": 64,
        "zero_optimization": {
            "stage": 3,
            "mics_shard_size": 2,
            "offload_param": {"device": "nvme", "nvme_path": "/x"},
        },
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW"},
    }
    written = Choice(2, 4, 8, offload="optimizer").written(given, ranks=2)
    assert written == {
        **given,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 8,
        "zero_optimization": {
            "stage": 2,
            "mics_shard_size": -1,
            "offload_param": {"device": "none", "nvme_path": "/x"},
            "offload_optimizer": {"device": "cpu"},
        },
    }
    assert given["zero_optimization"]["stage"] == 3
    parse_config(written)
    assert (
        Choice(3, 4, 8, offload=ALL).written(given, 2)["zero_optimization"]["offload_param"]["device"]
        == "nvme"
    )
    cut = Choice(1, 1, 8, recompute=True, cut=Cut(4, "interleaved", 2)).written(
        {"zero_optimization": True}, 1
    )
    assert cut["pipeline"] == {
        "schedule": "interleaved", "stages": 4, "num_chunks": 2, "activation_checkpoint_interval": 1
    }  # fmt: skip
    assert cut["zero_optimization"] == {"stage": 1}


def test_the_schedules_that_deal_out_layers_alike() -> None:
    assert {one.schedule for one in alike(4, "1f1b", 1)} == {
        "gpipe",
        "1f1b",
        "zb-h1",
        "interleaved",
        "interleaved-zb",
    }
    assert {one.schedule for one in alike(4, "zbv", 2)} == {"zbv", "dualpipev"}
    assert all(one.ranks * one.chunks <= 8 for one in cuts(16, 8))
    assert {one.ranks for one in cuts(16, 64, ranks=(4,))} == {4}
