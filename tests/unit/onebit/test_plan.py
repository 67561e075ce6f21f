"""When what is sent, and how much: the sets of steps of the papers, counted, printed, checked against the run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from zeropipe.cli.main import app
from zeropipe.errors import ConfigError
from zeropipe.runtime.fp16.onebit.plan import (
    Job,
    Phase,
    Phases,
    Rules,
    check,
    compressed_bytes,
    dense_bytes,
    dense_plan,
    human,
    phases_of,
    plan,
    stretches,
    walk,
)

BERT_LARGE = 340_000_000
# 0/1 Adam's BERT-Large run (arXiv 2202.06009, section 6, and the configuration published with it): 152k + 10k steps,
# learning rate warm-up 12.5k, halved every 32,678 steps; 1-bit Adam's warm-up there is 23k steps.
PAPER = Job(BERT_LARGE, 162_000, 128, element_bytes=2, tensors=400)
PAPER_RULES = Rules(12_500, 16, 32_678, 16)


def test_a_compressed_step_sends_a_16th_of_16_bit_and_a_32nd_of_32_bit() -> None:
    for element_bytes, ratio in ((2, 16), (4, 32)):
        job = Job(10**8, 10, 8, element_bytes=element_bytes, tensors=100)
        scales = 2 * 7 * 4 * 13  # an eighth of 100 tensors is 12 and a half
        padding = 2 * 7 * (64 // 8 + 4)  # of the shards, and one scale more by it
        assert 0 <= compressed_bytes(job) - dense_bytes(job) // ratio - scales < padding


@pytest.mark.process
def test_one_bit_adam_with_15_percent_warm_up_sends_5_times_less_than_fp16() -> None:
    job = Job(BERT_LARGE, 100_000, 64, tensors=400)
    ours = plan("OnebitAdam", Phases(Rules(15_000)), job)
    assert 4.8 < ours.times_less_than(dense_plan(job)) < 5.0  # 1 / (0.15 + 0.85 / 16) = 4.92


@pytest.mark.process
def test_zero_one_adam_at_the_papers_settings() -> None:
    """Exchanges as in the paper (54 % fewer), though ranks wait in every step. Its "up
    to 87 %" less data, over all of its tasks, is 85 % here."""
    ours = plan("ZeroOneAdam", Phases(PAPER_RULES), PAPER)
    one_bit = plan("OnebitAdam", Phases(Rules(23_000)), PAPER)
    assert ours.times_less_than(dense_plan(PAPER)) > 26
    assert round(100 * ours.saves("exchanges", one_bit)) == 54
    assert ours.sum("rounds") == one_bit.sum("rounds") == PAPER.steps
    assert round(100 * ours.saves("bytes", one_bit)) == 85
    longer = plan("OnebitAdam", Phases(Rules(28_800)), PAPER)
    assert round(100 * ours.saves("bytes", longer)) == 87
    base = replace(PAPER, steps=118_000)  # BERT-Base
    assert round(plan("ZeroOneAdam", Phases(PAPER_RULES), base).times_less_than(dense_plan(base))) == 26
    assert {row.phase for row in ours.rows} == {Phase.VARIANCE, Phase.COMPRESSED, Phase.SYNC, Phase.LOCAL}


def test_stages_nodes_and_one_rank() -> None:
    job = Job(10**6, 10, 8, element_bytes=2)
    sharded = Job(10**6, 10, 8, element_bytes=2, stage=1)
    gathered = compressed_bytes(sharded) - compressed_bytes(job)
    assert 0 <= gathered - dense_bytes(job) // 2 < 16 * 8 * 2  # parameters are gathered, padding included
    one_node = Job(10**6, 10, 8, element_bytes=4, node_size=8)
    assert compressed_bytes(one_node) == dense_bytes(one_node)  # nobody to send bits to: an all-reduce
    alone = plan("OnebitAdam", Phases(Rules(5)), Job(10**6, 10, 1))
    assert alone.sum("bytes") == alone.sum("rounds") == alone.sum("exchanges") == 0


def test_what_cannot_be_planned_is_named() -> None:
    with pytest.raises(ConfigError, match=r"does not compress.*'AdamW'"):
        phases_of("AdamW", {})
    with pytest.raises(ConfigError, match="never start"):
        check(Phases(Rules(100)), "OnebitAdam", Job(10, 50, 2))
    with pytest.raises(ConfigError, match=r"stage 0 or 1, found 2"):
        check(Phases(Rules(10)), "OnebitAdam", Job(10, 50, 2, stage=2))
    with pytest.raises(ConfigError, match="local_step_clipper to 1"):
        check(Phases(PAPER_RULES), "ZeroOneAdam", Job(10, 50, 2, stage=1))
    with pytest.raises(ConfigError, match="divisor of 4, found 3"):
        Job(10, 50, 4, node_size=3)
    with pytest.raises(ConfigError, match=r"params.*at least 1"):
        Job(0, 50, 4)


def test_the_command_counts_gradients_in_the_dtype_in_which_they_travel(tmp_path: Path) -> None:
    """bf16 with communication_data_type fp32 used to be counted with two bytes for each gradient."""
    optimizer = {"type": "OneBitAdam", "params": {"freeze_step": 15}}
    for config, sent in (
        ({"bf16": {"enabled": True}}, "2.86 MiB"),
        ({"bf16": {"enabled": True}, "communication_data_type": "fp32"}, "5.72 MiB"),
        ({"communication_data_type": "fp16"}, "2.86 MiB"),
        ({}, "5.72 MiB"),
    ):
        result = run_plan(tmp_path, {"optimizer": optimizer, **config}, "--steps", "100")
        warm_up = next(line for line in result.output.splitlines() if line.startswith("  warm-up"))
        assert sent in warm_up, (config, result.output)


def test_units() -> None:
    assert [human(n) for n in (0, 999, 1024, 1536 * 1024, 5e12)] == [
        "0 B",
        "999 B",
        "1 KiB",
        "1.5 MiB",
        "4.55 TiB",
    ]


def run_plan(tmp_path: Path, config: dict[str, Any], *arguments: str) -> Any:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"train_micro_batch_size_per_gpu": 1, **config}))
    return CliRunner().invoke(
        app, ["onebit", "plan", "--config", str(file), "--params", "1000000", "--world", "4", *arguments]
    )


def test_the_command_prints_phases_beside_dense_adam(tmp_path: Path) -> None:
    config = {"optimizer": {"type": "OneBitAdam", "params": {"freeze_step": 15}}, "bf16": {"enabled": True}}
    result = run_plan(tmp_path, config, "--steps", "100", "--against-freeze-step", "30")
    assert result.exit_code == 0, result.output
    for text in ("1..15: 15 warm-up", "16..100: 85 compressed", "dense Adam", "1-bit Adam", "% fewer rounds"):
        assert text in result.output
    assert "OnebitAdam sends 4.9" in result.output


def test_the_command_takes_the_length_from_the_schedule_and_names_what_is_wrong(tmp_path: Path) -> None:
    config: dict[str, Any] = {"optimizer": {"type": "ZeroOneAdam", "params": {"var_freeze_step": 20}}}
    assert "pass --steps" in run_plan(tmp_path, config).output
    schedule = {"type": "WarmupDecayLR", "params": {"total_num_steps": 200, "warmup_num_steps": 20}}
    result = run_plan(tmp_path, config | {"scheduler": schedule})
    assert result.exit_code == 0 and "200 steps" in result.output and "variance" in result.output
    short = {"type": "WarmupDecayLR", "params": {"total_num_steps": 200, "warmup_num_steps": 50}}
    result = run_plan(tmp_path, config | {"scheduler": short})
    assert result.exit_code == 1 and "still warms up" in result.output


RULES = st.builds(Rules, st.integers(1, 60), st.integers(1, 9), st.integers(1, 40), st.integers(1, 17))


def words(start: Phases, steps: int) -> list[str]:
    return [phase.value for phase, _ in walk(start, steps)]


def test_one_bit_adam_is_dense_for_freeze_step_steps() -> None:
    assert words(Phases(Rules(2)), 4) == ["warm-up", "warm-up", "compressed", "compressed"]


@given(st.integers(1, 40), st.integers(0, 80))
def test_one_bit_adam_is_zero_one_adam_whose_gaps_never_grow(freeze: int, steps: int) -> None:
    """kappa = freeze_step and H = 1: the same steps are dense, and a resumed run stands where a walked one does."""
    ours = [(p.dense, s.updates) for p, s in walk(Phases(Rules(freeze)), steps)]
    assert ours == [(p.dense, s.updates) for p, s in walk(Phases(Rules(freeze, freeze, 1, 1)), steps)]
    *_, last = Phases(Rules(freeze)), *(state for _, state in walk(Phases(Rules(freeze)), steps))
    resumed = Phases(Rules(freeze)).resumed(last.to_json())
    assert (resumed.step, resumed.updates) == (last.step, last.updates)
    assert words(resumed, 50) == words(last, 50)


@given(RULES)
def test_variance_updates_follow_the_rule(rules: Rules) -> None:
    """k_(j+1) - k_j = 2 ** floor(j / kappa), from step 1 until var_freeze_step."""
    found = [state.step for phase, state in walk(Phases(rules), 100) if phase is Phase.VARIANCE]
    expected, step, j = [], 1, 0
    while step <= rules.freeze_step:
        expected.append(step)
        step += 2 ** (j // rules.var_update_scaler)
        j += 1
    assert found == expected


@given(RULES)
def test_exchanges_follow_the_rule(rules: Rules) -> None:
    """Never more than the interval apart, every step before var_freeze_step, and local steps only in between."""
    last, clipper = 0, rules.local_step_clipper
    for phase, state in walk(Phases(rules), 200):
        interval = rules.interval(state.step - 1)
        assert 1 <= interval <= clipper
        if phase is Phase.LOCAL:
            assert state.step > rules.freeze_step and state.step - last < interval
        else:
            assert state.step - last <= max(interval, 1) and state.last_sync == state.step
            last = state.step
        if phase is Phase.COMPRESSED:
            assert interval == 1


def test_the_interval_doubles_every_so_many_steps_up_to_the_clipper() -> None:
    rules = Rules(10, 1, 5, 6)
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


@given(st.one_of(RULES, st.builds(Rules, st.integers(1, 50))).map(Phases), st.integers(0, 150))
def test_a_plan_covers_each_step_once_and_prints(start: Phases, steps: int) -> None:
    cut = stretches(start, steps)
    assert [first for first, _, _ in cut] == [1, *(last + 1 for _, last, _ in cut)][: len(cut)]
    assert (cut[-1][1] if cut else 0) == steps
    lines = str(plan("OnebitAdam", start, Job(10, steps, 2))).splitlines() if steps else []
    for (first, last, counts), line in zip(cut, lines[1:], strict=False):
        assert counts.total() == last - first + 1
        assert line.startswith(f"  steps {first}..{last}: {next(iter(counts.values()))} ")


@given(RULES, st.integers(0, 80), st.integers(1, 80))
def test_a_saved_state_goes_on_as_if_never_stopped(rules: Rules, before: int, after: int) -> None:
    state = Phases(rules).forwarded(before)
    resumed = Phases(rules).resumed(state.to_json())
    assert resumed == state
    assert words(resumed, after) == words(Phases(rules), before + after)[before:]


def test_other_rules_take_effect_on_a_saved_state() -> None:
    saved = Phases(Rules(10)).forwarded(6).to_json()
    assert words(Phases(Rules(5)).resumed(saved), 1) == ["compressed"]
    assert words(Phases(Rules(8)).resumed(saved), 3) == ["warm-up", "warm-up", "compressed"]


def test_a_raised_var_freeze_step_goes_on_with_variance_updates() -> None:
    """The update that came due while the variance was frozen lay in the past, was waited for, and never came again."""
    saved = Phases(Rules(6, 2, 100, 1)).forwarded(10).to_json()
    rules = Rules(100, 2, 100, 1)
    assert saved["next_update"] <= saved["step"]
    later, usual = words(Phases(rules).resumed(saved), 60), words(Phases(rules), 70)[10:]
    assert later[0] == "variance"
    assert abs(later.count("variance") - usual.count("variance")) <= 1


@given(RULES, RULES, st.integers(0, 80))
def test_after_any_change_of_rules_the_variance_moves_as_often_as_the_new_ones_say(
    old: Rules, new: Rules, before: int
) -> None:
    state = Phases(new).resumed(Phases(old).forwarded(before).to_json())
    waited = 0
    for phase, after in walk(state, 100):
        waited = 0 if phase is Phase.VARIANCE else waited + 1
        if after.step > new.freeze_step:
            assert phase is not Phase.VARIANCE
        else:  # the gap before the coming update, of the old rules at first
            updates = max(state.updates - 1, 0)
            assert waited < max(1 << updates // new.var_update_scaler, 1 << updates // old.var_update_scaler)
        state = after


def test_compression_that_never_starts_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"never start.*freeze_step below the run's 1000 steps, found 100000.*150"
    ):
        Phases(Rules(100000)).check_run(1000, None)
    Phases(Rules(100000)).check_run(None, None)
    Phases(Rules(999)).check_run(1000, 100)
    # 0/1 Adam compresses between variance updates from the start, so a large var_freeze_step is legitimate
    Phases(Rules(10**6, 16, 32678, 16)).check_run(1000, 100)


@pytest.mark.parametrize("value", [0, -1, 2.5, True, None, "3", float("nan")])
def test_what_is_no_number_of_steps_is_named(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"params\.freeze_step is a number of steps.*at least 1"):
        Rules(value)
    with pytest.raises(ConfigError, match=r"params\.var_update_scaler is a number of steps.*at least 1"):
        phases_of("ZeroOneAdam", {"var_update_scaler": value})
    assert Rules(3.0).freeze_step == 3 and phases_of("ZeroOneAdam", {})[1].rules.option == "var_freeze_step"


def test_a_warm_up_shorter_than_the_schedules_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"learning rate still warms up.*at least the schedule's 500.*found 100"
    ):
        Phases(Rules(100)).check_run(1000, 500)
    with pytest.raises(ConfigError, match="var_freeze_step"):
        Phases(Rules(100, 16, 32678, 16)).check_run(1000, 500)
