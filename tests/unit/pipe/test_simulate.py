"""The simulator against what can be worked out by hand, and what it shows."""

import json

import pytest

from zeropipe.runtime.pipe.instructions import Instruction, Op, Schedule, with_sharding
from zeropipe.runtime.pipe.picture import chrome_trace, draw, text_grid
from zeropipe.runtime.pipe.schedule import make_schedule
from zeropipe.runtime.pipe.simulate import Costs, simulate


def test_text_grid_draws_gpipe():
    run = simulate(make_schedule("gpipe", 2, 2))
    assert text_grid(run.events, 2).splitlines() == [
        "0 | F0 F1 .  .  .  B0 -- B1 --",
        "1 | .  F0 F1 B0 -- B1 -- .  .",
    ]


def test_text_grid_marks_the_second_chunk():
    grid = text_grid(simulate(make_schedule("zbv", 2, 2)).events, 2)
    assert "F0'" in grid
    assert "W1" in grid


def test_a_transfer_delays_the_next_stage_but_keeps_nobody_busy():
    schedule = make_schedule("gpipe", 2, 1)
    assert simulate(schedule, Costs(transfer=0.5)).makespan == simulate(schedule).makespan + 2 * 0.5
    assert simulate(schedule, Costs(transfer=0.5)).busy == simulate(schedule).busy


def test_stages_may_cost_differently():
    run = simulate(make_schedule("1f1b", 2, 4), Costs(forward=(1.0, 3.0)))
    assert run.busy == (4 * 3.0, 4 * 5.0)
    assert run.makespan == 1 + 4 * 5 + 2


def test_activations_are_counted_in_the_users_unit():
    run = simulate(make_schedule("1f1b", 2, 4), Costs(activation=(10.0, 7.0)))
    assert run.peaks == (20.0, 7.0)


def test_inference_holds_one_activation():
    assert simulate(make_schedule("inference", 3, 5)).peak == 1


def test_weight_gradients_hold_their_activation_until_they_are_done():
    run = simulate(Schedule.parse("0F0,0I0,0F1,0W0,0I1,0W1\n"))
    assert run.peaks == (2.0,)


def test_chrome_trace_is_json_with_one_row_for_each_rank():
    data = json.loads(chrome_trace(simulate(make_schedule("1f1b", 3, 2)).events, 3))
    rows = [row for row in data["traceEvents"] if row["ph"] == "X"]
    assert {row["tid"] for row in rows} == {0, 1, 2}
    assert len(rows) == 3 * 2 * 2
    assert all(row["dur"] > 0 for row in rows)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_pictures_are_written(tmp_path, ending):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"plan.{ending}"
    draw(simulate(make_schedule("zbv", 2, 3)).events, 2, path, "zbv")
    assert path.stat().st_size > 1000


def test_split_costs_share_out_a_rank():
    assert Costs((2.0,), (4.0,), (6.0,)).share(2).of(Op.BACKWARD) == 5.0


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved", "zb-h1", "zbv", "dualpipev"])
def test_gradients_reduce_once_for_each_stage_whatever_the_micro_batches(name):
    schedule = with_sharding(make_schedule(name, 3, 7))
    simulate(schedule)
    for stage in range(schedule.num_stages):
        line = schedule.ranks[schedule.stage_rank[stage]]
        assert line.count(Instruction(stage, Op.REDUCE_GRAD)) == 1
        after = line[line.index(Instruction(stage, Op.REDUCE_GRAD)) :]
        assert not any(s.stage == stage and s.op in (Op.BACKWARD, Op.BACKWARD_WEIGHT) for s in after)
    assert Schedule.parse(str(schedule)) == schedule


def test_a_step_gathers_each_stage_once_and_releases_it():
    schedule = with_sharding(make_schedule("interleaved", 2, 4), sharded=True)
    for stage in range(4):
        line = schedule.ranks[schedule.stage_rank[stage]]
        assert line.count(Instruction(stage, Op.UNSHARD)) == line.count(Instruction(stage, Op.RESHARD)) == 1


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved", "zb-h1", "zbv", "dualpipev"])
def test_a_stage_is_never_used_while_it_is_released(name):
    """A weight gradient is a use: autograd looks at the parameter too."""
    schedule = with_sharding(make_schedule(name, 3, 6), sharded=True, tied_stages=(0, 2))
    gathers = sum(step.op is Op.UNSHARD for step in schedule.steps())
    assert gathers == schedule.num_stages
    for line in schedule.ranks:
        there: set[int] = set()
        for step in line:
            if step.op is Op.UNSHARD:
                there.add(step.stage)
            elif step.op is Op.RESHARD:
                there.remove(step.stage)
            elif step.op in (Op.FORWARD, Op.BACKWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT):
                assert step.stage in there
        assert not there


def test_tied_stages_reduce_at_the_end_in_stage_order_on_every_rank():
    schedule = with_sharding(make_schedule("1f1b", 3, 4), tied_stages=(0, 2))
    assert [str(s) for s in schedule.ranks[0][-2:]] == ["0REDUCE_TIED", "0REDUCE_GRAD"]
    assert (
        str(with_sharding(make_schedule("1f1b", 2, 4), sharded=True, tied_stages=(0, 1)).ranks[0][-1])
        == "0RESHARD"
    )
    assert [str(s) for s in schedule.ranks[2][-2:]] == ["2REDUCE_TIED", "2REDUCE_GRAD"]
    simulate(schedule)
