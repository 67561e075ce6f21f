"""The fetch plan: what is gathered when, as pure data."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeropipe.runtime.zero.gather.fetch_plan import Budget, Phase, Step, Visit, parse_plan, plan, show_plan

ENOUGH = 10**9
FORWARD_BACKWARD = "F0 F1 F2 B2 B1 B0"


def visits_of(text: str) -> list[Visit]:
    return [Visit.parse(word) for word in text.split()]


def planned(text: str, numel: Sequence[int], budget: Budget) -> str:
    return show_plan(plan(visits_of(text), numel, budget))


def test_without_budgets_each_unit_is_fetched_at_its_visit() -> None:
    assert planned(FORWARD_BACKWARD, [5, 6, 7], Budget(0, 0, 0)) == (
        "F0 fetch 0 | F1 fetch 1 | F2 fetch 2 | B2 fetch 2 | B1 fetch 1 | B0 fetch 0"
    )


def test_the_last_forward_is_the_first_backward_and_stays() -> None:
    assert planned(FORWARD_BACKWARD, [5, 6, 7], Budget(0, ENOUGH, 0)) == (
        "F0 fetch 0 | F1 fetch 1 | F2 fetch 2 keep | B2 | B1 fetch 1 | B0 fetch 0"
    )


def test_a_prefetch_of_one_unit() -> None:
    assert planned(FORWARD_BACKWARD, [5, 5, 5], Budget(5, ENOUGH, 0)) == (
        "F0 fetch 0 1 | F1 fetch 2 keep | F2 keep | B2 | B1 fetch 0 | B0"
    )


def test_what_would_be_fetched_again_at_once_stays() -> None:
    # What waits and what is live is the same, and nothing is sent twice.
    steps = planned(FORWARD_BACKWARD, [5, 5, 5], Budget(10, ENOUGH, 0))
    assert steps == "F0 fetch 0 1 2 keep | F1 keep | F2 keep | B2 | B1 | B0"
    # A nearer one is missing: that has the room.
    assert planned("F0 F1 F2 F3 F0", [5] * 4, Budget(5, ENOUGH, 0)).startswith("F0 fetch 0 1 | F1")


def test_small_units_wait_until_they_are_one_message() -> None:
    budget = Budget(4, ENOUGH, 0, together=2)
    visits = " ".join(f"F{unit}" for unit in range(9))
    assert planned(visits, [1] * 9, budget) == (
        "F0 fetch 0 1 2 3 4 | F1 | F2 fetch 5 6 | F3 | F4 fetch 7 8 | F5 | F6 | F7 | F8"
    )


def test_live_parameters_limit_the_prefetch() -> None:
    assert planned("F0 F1 F2", [5, 5, 5], Budget(ENOUGH, 10, 0)) == "F0 fetch 0 1 | F1 fetch 2 | F2"


def test_a_unit_used_again_soon_is_kept() -> None:
    steps = planned("F0 F1 F0 F2 F0", [4, 3, 9], Budget(0, ENOUGH, 3))
    assert steps == "F0 fetch 0 keep | F1 fetch 1 | F0 | F2 fetch 2 | F0 fetch 0"


def test_what_is_in_the_way_is_never_skipped() -> None:
    # Unit 1 does not fit the bucket: unit 2 behind it is not fetched before it, or 1 would come late.
    assert planned("F0 F1 F2", [1, 9, 1], Budget(5, ENOUGH, 0)) == "F0 fetch 0 | F1 fetch 1 2 | F2"


def test_a_unit_without_elements_costs_nothing() -> None:
    assert planned("F0 F1", [0, 3], Budget(0, 0, 0)) == "F0 fetch 0 | F1 fetch 1"


def test_nothing_visited_is_no_plan() -> None:
    assert plan([], [], Budget(1, 1, 1)) == ()


units = st.integers(1, 6)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Visit], list[int], Budget]:
    count = draw(units)
    numel = draw(st.lists(st.integers(0, 40), min_size=count, max_size=count))
    visit = st.builds(Visit, st.sampled_from(Phase), st.integers(0, count - 1))
    budget = st.builds(Budget, *[st.integers(0, 100) | st.just(ENOUGH)] * 3)
    return draw(st.lists(visit, max_size=30)), numel, draw(budget)


@given(problems())
def test_every_unit_is_there_at_its_visit_and_no_budget_is_exceeded(
    problem: tuple[list[Visit], list[int], Budget],
) -> None:
    visits, numel, budget = problem
    live: set[int] = set()
    unused: set[int] = set()
    for at, step in enumerate(plan(visits, numel, budget)):
        assert step.visit == visits[at]
        for unit in step.fetch:
            assert unit not in live, "fetched twice"
            live.add(unit)
            unused.add(unit)
        assert step.visit.unit in live
        unused.discard(step.visit.unit)
        if step.fetch[step.fetch[:1] == (step.visit.unit,) :]:  # something was fetched ahead
            assert sum(numel[u] for u in unused) <= budget.prefetch_bucket_size
            assert sum(numel[u] for u in live) <= budget.max_live_parameters
        assert sum(numel[u] for u in live) <= budget.max_live_parameters + numel[step.visit.unit]
        if not step.keep:
            live.remove(step.visit.unit)
    assert not live, "what is fetched is used, and what is kept is used again"


@given(problems())
def test_what_is_fetched_ahead_is_what_comes_next(problem: tuple[list[Visit], list[int], Budget]) -> None:
    visits, numel, budget = problem
    for at, step in enumerate(plan(visits, numel, budget)):
        coming = [visit.unit for visit in visits[at:]]
        places = [coming.index(unit) for unit in step.fetch]
        assert places == sorted(places)


@given(problems())
def test_zero_budgets_fetch_exactly_at_each_visit(problem: tuple[list[Visit], list[int], Budget]) -> None:
    visits, _, _ = problem
    ones = [1] * 6
    for step in plan(visits, ones, Budget(0, 0, 0)):
        assert (step.fetch, step.keep) == ((step.visit.unit,), False)


@given(problems())
def test_a_plan_prints_and_parses(problem: tuple[list[Visit], list[int], Budget]) -> None:
    steps = plan(*problem)
    assert parse_plan(show_plan(steps)) == steps
    assert all(Step.parse(str(step)) == step for step in steps)


@pytest.mark.parametrize("text", ["F1", "B12 keep", "F0 fetch 3", "F0 fetch 3 1 2 keep"])
def test_steps_parse(text: str) -> None:
    assert str(Step.parse(text)) == text


def by_looking_at_every_visit(visits: Sequence[Visit], numel: Sequence[int], budget: Budget) -> str:
    """The rule in its plainest words, which take the square of the time."""
    live: list[int] = []
    waiting: list[int] = []
    steps = []
    for at, visit in enumerate(visits):
        fetch = [] if visit.unit in live else [visit.unit]
        live += fetch
        waiting = [unit for unit in waiting if unit != visit.unit]
        absent = {later.unit for later in visits[at + 1 :]} - set(live)
        room = min(
            budget.prefetch_bucket_size - sum(numel[u] for u in waiting),
            budget.max_live_parameters - sum(numel[u] for u in live),
        )
        worth = min(room, sum(numel[u] for u in absent)) >= budget.together
        next_is_absent = at + 1 < len(visits) and visits[at + 1].unit not in live
        for later in visits[at + 1 :] if fetch or worth or next_is_absent else []:
            if later.unit in live:
                continue
            size = numel[later.unit]
            if sum(numel[u] for u in waiting) + size > budget.prefetch_bucket_size:
                break
            if sum(numel[u] for u in live) + size > budget.max_live_parameters:
                break
            for where in (fetch, live, waiting):
                where.append(later.unit)
        rest = [later.unit for later in visits[at + 1 :]]
        keep = visit.unit in rest and sum(numel[u] for u in live) <= budget.max_live_parameters
        if keep:
            between = set(rest[: rest.index(visit.unit)])
            keep = not between or sum(numel[u] for u in between) <= budget.max_reuse_distance
            # Or else the next visit would fetch it again.
            then = [u for u in waiting if u != rest[0]]
            if (
                between <= set(live)
                and sum(numel[u] for u in (*then, visit.unit)) <= budget.prefetch_bucket_size
            ):
                keep = True
                waiting.append(visit.unit)
        if not keep:
            live.remove(visit.unit)
        steps.append(Step(visit, tuple(fetch), keep))
    return show_plan(steps)


@given(
    st.lists(st.integers(0, 5), max_size=14),
    st.lists(st.integers(0, 8), min_size=6, max_size=6),
    st.tuples(*[st.sampled_from([0, 1, 3, 6, 12, ENOUGH])] * 3, st.sampled_from([0, 2, 5])),
)
def test_the_plan_is_that_of_looking_at_every_visit(
    units: list[int], numel: list[int], budget: tuple[int, int, int, int]
) -> None:
    visits = [Visit(Phase.FORWARD, unit) for unit in units]
    found = show_plan(plan(visits, numel, Budget(*budget)))
    assert found == by_looking_at_every_visit(visits, numel, Budget(*budget))


@pytest.mark.parametrize("budget", [Budget(3 * 2**21, ENOUGH, 0), Budget(2**40, 2**40, 2**40)])
def test_a_plan_of_many_units_takes_time_that_grows_with_their_number(budget: Budget) -> None:
    """It grew with the square: 8,000 units took 10 s, these 40 s."""
    units = range(16_000)
    visits = [Visit(Phase.FORWARD, unit) for unit in units] + [
        Visit(Phase.BACKWARD, u) for u in reversed(units)
    ]
    begun = time.process_time()
    plan(visits, [4096] * len(units), budget)
    assert time.process_time() - begun < 4.0  # s; 0.3 on an idle machine
