"""Agreement before the first step: a difference between ranks is an error that names it, on every rank."""

from __future__ import annotations

import pytest

from tests.helpers.pool import PerRank, Pools
from zeropipe.comm.agreement import agree, first_difference
from zeropipe.comm.group import new_groups, world
from zeropipe.comm.record import record
from zeropipe.errors import DesyncError

SAME = {"config": "stage 2", "layout": "3 tensors", "order": "a,b,c"}


def ask(rank: int, size: int, items: dict[str, str]) -> tuple[str, int]:
    """The message that this rank gets (empty: all agree) and how many collectives it took."""
    with record() as events:
        try:
            agree(items, world())
        except DesyncError as error:
            return str(error), len(events)
        return "", len(events)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_equal_items_cost_one_small_collective(pool: Pools, size: int) -> None:
    assert pool(size).run(ask, SAME) == [("", 0 if size == 1 else 1)] * size


@pytest.mark.parametrize("odd", [0, 1, 3])
def test_the_odd_rank_and_the_first_difference_are_named_on_every_rank(pool: Pools, odd: int) -> None:
    items = [{**SAME, "layout": "4 tensors", "order": "x"} if r == odd else SAME for r in range(4)]
    answers = pool(4).run(ask, PerRank(items))
    assert len(set(answers)) == 1
    message = answers[0][0]
    assert f"rank {odd} has '4 tensors'" in message
    assert "3 of 4 ranks have '3 tensors'" in message
    assert "layout" in message
    assert "order" not in message  # a later difference
    assert "Fix:" in message


def test_a_missing_item_and_a_different_order_are_differences(pool: Pools) -> None:
    less = {key: value for key, value in SAME.items() if key != "order"}
    message = pool(2).run(ask, PerRank([SAME, less]))[0][0]
    assert "order" in message
    assert "(absent)" in message
    turned = dict(reversed(SAME.items()))
    assert "order of their items" in pool(2).run(ask, PerRank([SAME, turned]))[1][0]


def agree_in_rows(rank: int, size: int) -> str:
    row = new_groups([[0, 1], [2, 3]])
    try:
        agree({"k": "odd" if rank == 3 else "usual"}, row)
    except DesyncError as error:
        return str(error)
    return ""


def test_agreement_is_within_the_group_and_names_global_ranks(pool: Pools) -> None:
    answers = pool(4).run(agree_in_rows)
    assert answers[:2] == ["", ""]
    assert "rank 3 has 'odd'" in answers[2]


def test_long_values_are_cut_in_the_message() -> None:
    message = first_difference([{"k": "x" * 10_000}, {"k": "y"}, {"k": "y"}], (0, 1, 2))
    assert len(message) < 1000
    assert "rank 0" in message


def test_two_items_that_join_to_the_same_text_still_differ(pool: Pools) -> None:
    items = [{"a": "1", "b": "2"}, {"a": "1\0b\x012"}]
    assert "ranks disagree" in pool(2).run(ask, PerRank(items))[0][0]
