"""Any two of the triple give the third; the offered fixes are solutions."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeropipe.config.batch import BatchSizes, solve_batch
from zeropipe.errors import ConfigError

sizes = st.integers(1, 64)


@given(micro=sizes, gas=sizes, world=sizes, hidden=st.sets(st.integers(0, 2), max_size=1))
def test_any_two_give_the_third(micro: int, gas: int, world: int, hidden: set[int]) -> None:
    train = micro * gas * world
    shown = [None if place in hidden else value for place, value in enumerate((train, micro, gas))]
    assert solve_batch(*shown, world) == BatchSizes(train, micro, gas, world)


@given(micro=sizes, world=sizes)
def test_one_alone_means_no_accumulation(micro: int, world: int) -> None:
    expected = BatchSizes(micro * world, micro, 1, world)
    assert solve_batch(None, micro, None, world) == expected
    assert solve_batch(micro * world, None, None, world) == expected


def test_nothing_at_all_is_one_sample_per_rank() -> None:
    assert solve_batch(None, None, None, 3) == BatchSizes(3, 1, 1, 3)


NAMES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


@given(
    train=st.none() | st.integers(1, 200),
    micro=st.none() | sizes,
    gas=st.none() | sizes,
    world=st.integers(1, 16),
)
def test_solved_or_every_offered_number_solves_it(
    train: int | None, micro: int | None, gas: int | None, world: int
) -> None:
    values = [train, micro, gas]
    try:
        solved = solve_batch(*values, world)
    except ConfigError as error:
        fix = str(error).partition("Fix: ")[2]
        offers = re.findall(r"set (\w+) to (\d+)(?: or (\d+))?", fix)
        offers += [(name, number, "") for name, number in re.findall(r"add (\w+), for example (\d+)", fix)]
        assert offers
        for name, *numbers in offers:
            for number in filter(None, numbers):
                mended = list(values)
                mended[NAMES.index(name)] = int(number)
                solve_batch(*mended, world)
    else:
        product = solved.micro_batch_size * solved.gradient_accumulation_steps * world
        assert solved.train_batch_size == product
        for asked, got in zip(
            values,
            (solved.train_batch_size, solved.micro_batch_size, solved.gradient_accumulation_steps),
            strict=True,
        ):
            assert asked in (None, got)


def test_prints_as_the_equation() -> None:
    assert str(solve_batch(32, 2, None, 8)) == "32 = 2 per rank x 2 accumulation x 8 rank(s)"


def test_world_is_checked_first() -> None:
    with pytest.raises(ConfigError, match="world size; expected a whole number"):
        solve_batch(8, 4, 2, 0)
