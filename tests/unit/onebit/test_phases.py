"""When what is sent: the sets of steps of the papers, counted, printed, and checked against the run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeropipe.errors import ConfigError
from zeropipe.runtime.fp16.onebit.phases import (
    OneBitPhases,
    Phase,
    Phases,
    Stretch,
    ZeroOnePhases,
    ZeroOneRules,
    check_against_run,
    stretches,
    totals,
    walk,
)

RULES = st.builds(ZeroOneRules, st.integers(1, 60), st.integers(1, 9), st.integers(1, 40), st.integers(1, 17))


def words(start: Phases, steps: int) -> list[str]:
    return [phase.value for phase, _ in walk(start, steps)]


def test_one_bit_adam_is_dense_for_freeze_step_steps() -> None:
    assert words(OneBitPhases(2), 4) == ["warm-up", "warm-up", "compressed", "compressed"]


@given(RULES)
def test_variance_updates_follow_the_rule(rules: ZeroOneRules) -> None:
    """k_(j+1) - k_j = 2 ** floor(j / kappa), from step 1 until var_freeze_step."""
    found = [state.step for phase, state in walk(ZeroOnePhases(rules), 100) if phase is Phase.VARIANCE]
    expected, step, j = [], 1, 0
    while step <= rules.var_freeze_step:
        expected.append(step)
        step += 2 ** (j // rules.var_update_scaler)
        j += 1
    assert found == expected


@given(RULES)
def test_exchanges_follow_the_rule(rules: ZeroOneRules) -> None:
    """Never more than the interval apart, every step before var_freeze_step, and local steps only in between."""
    last, clipper = 0, rules.local_step_clipper
    for phase, state in walk(ZeroOnePhases(rules), 200):
        interval = rules.interval(state.step - 1)
        assert 1 <= interval <= clipper
        if phase is Phase.LOCAL:
            assert state.step > rules.var_freeze_step and state.step - last < interval
        else:
            assert state.step - last <= max(interval, 1) and state.last_sync == state.step
            last = state.step
        if phase is Phase.COMPRESSED:
            assert interval == 1


def test_the_interval_doubles_every_so_many_steps_up_to_the_clipper() -> None:
    rules = ZeroOneRules(10, 1, 5, 6)
    assert [rules.interval(step) for step in (0, 9, 10, 14, 15, 19, 20, 24, 25, 1000)] == [
        1,
        1,
        1,
        1,
        2,
        2,
        4,
        4,
        6,
        6,
    ]


@given(st.one_of(RULES.map(ZeroOnePhases), st.integers(1, 50).map(OneBitPhases)), st.integers(0, 150))
def test_a_plan_covers_each_step_once_prints_and_parses(start: Phases, steps: int) -> None:
    plan = stretches(start, steps)
    assert [s.first for s in plan] == [1, *(s.last + 1 for s in plan)][: len(plan)]
    assert (plan[-1].last if plan else 0) == steps
    assert sum(totals(plan).values()) == steps
    for stretch in plan:
        assert sum(count for _, count in stretch.counts) == stretch.last - stretch.first + 1
        assert Stretch.parse(str(stretch)) == stretch


@given(RULES, st.integers(0, 80), st.integers(1, 80))
def test_a_saved_state_goes_on_as_if_never_stopped(rules: ZeroOneRules, before: int, after: int) -> None:
    state = ZeroOnePhases(rules).forwarded(before)
    resumed = ZeroOnePhases(rules).resumed(state.to_json())
    assert resumed == state
    assert words(resumed, after) == words(ZeroOnePhases(rules), before + after)[before:]


def test_other_rules_take_effect_on_a_saved_state() -> None:
    saved = OneBitPhases(10).forwarded(6).to_json()
    assert words(OneBitPhases(5).resumed(saved), 1) == ["compressed"]
    assert words(OneBitPhases(8).resumed(saved), 3) == ["warm-up", "warm-up", "compressed"]


def test_a_raised_var_freeze_step_goes_on_with_variance_updates() -> None:
    """The update that came due while the variance was frozen lay in the past, was waited for, and never came again."""
    saved = ZeroOnePhases(ZeroOneRules(6, 2, 100, 1)).forwarded(10).to_json()
    rules = ZeroOneRules(100, 2, 100, 1)
    assert saved["next_update"] <= saved["step"]
    later, usual = words(ZeroOnePhases(rules).resumed(saved), 60), words(ZeroOnePhases(rules), 70)[10:]
    assert later[0] == "variance"
    assert abs(later.count("variance") - usual.count("variance")) <= 1


@given(RULES, RULES, st.integers(0, 80))
def test_after_any_change_of_rules_the_variance_moves_as_often_as_the_new_ones_say(
    old: ZeroOneRules, new: ZeroOneRules, before: int
) -> None:
    state = ZeroOnePhases(new).resumed(ZeroOnePhases(old).forwarded(before).to_json())
    waited = 0
    for phase, after in walk(state, 100):
        waited = 0 if phase is Phase.VARIANCE else waited + 1
        if after.step > new.var_freeze_step:
            assert phase is not Phase.VARIANCE
        else:  # the gap before the coming update, of the old rules at first
            updates = max(state.updates - 1, 0)
            assert waited < max(1 << updates // new.var_update_scaler, 1 << updates // old.var_update_scaler)
        assert isinstance(after, ZeroOnePhases)
        state = after


def test_compression_that_never_starts_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"never start.*freeze_step below the run's 1000 steps, found 100000.*150"
    ):
        check_against_run(OneBitPhases(100000), 1000, None)
    check_against_run(OneBitPhases(100000), None, None)
    check_against_run(OneBitPhases(999), 1000, 100)
    # 0/1 Adam compresses between variance updates from the start, so a large var_freeze_step is legitimate
    check_against_run(ZeroOnePhases(ZeroOneRules(10**6, 16, 32678, 16)), 1000, 100)


def test_a_warm_up_shorter_than_the_schedules_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"learning rate still warms up.*at least the schedule's 500.*found 100"
    ):
        check_against_run(OneBitPhases(100), 1000, 500)
    with pytest.raises(ConfigError, match="var_freeze_step"):
        check_against_run(ZeroOnePhases(ZeroOneRules(100, 16, 32678, 16)), 1000, 500)
