"""Every schedule, for every size: it runs, in a legal order, within its memory, at the promised bubble."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zeropipe.errors import ScheduleError
from zeropipe.runtime.pipe.instructions import (
    Instruction,
    Op,
    Schedule,
    known_taken,
    queues,
    with_transfers,
)
from zeropipe.runtime.pipe.schedule import KINDS, choose, find_kind, make_schedule
from zeropipe.runtime.pipe.simulate import Costs, simulate
from zeropipe.runtime.pipe.zero_bubble import zbv

NAMES = [kind.name for kind in KINDS]
ZERO_BUBBLE = ("zb-h1", "interleaved-zb", "zbv")

# (schedule, chunks): bubble at p4 m8 and p8 m16, peak activations at p4 m8. The figures of the papers.
FIGURES = {
    ("gpipe", 1): (0.375, 0.4375, 8),
    ("1f1b", 1): (0.375, 0.4375, 4),
    ("interleaved", 2): (0.1875, 0.2188, 5.5),
    ("interleaved", 4): (0.0938, 0.1094, 4.75),
    ("zb-h1", 1): (0.125, 0.1458, 4),
    ("interleaved-zb", 2): (0.0625, 0.0729, 4),
    ("zbv", 2): (0.0625, 0.0729, 4),
    ("dualpipev", 2): (0.0625, 0.0729, 4.5),
}


@pytest.mark.parametrize(("name", "chunks"), FIGURES)
def test_bubble_and_peak_meet_the_published_figures(name, chunks):
    small, large, peak = FIGURES[name, chunks]
    at_p4 = simulate(make_schedule(name, 4, 8, chunks))
    at_p8 = simulate(make_schedule(name, 8, 16, chunks))
    assert round(at_p4.bubble, 4) <= small
    assert round(at_p8.bubble, 4) <= large
    assert at_p4.peak <= peak


@pytest.mark.parametrize("name", NAMES)
def test_what_a_step_makes_is_what_the_next_stage_needs(name):
    """One rule says it of compute steps and of the transfers between them, in both directions."""
    schedule = make_schedule(name, 3, 4)
    made = [schedule.made_by(step) for step in schedule.steps()]
    needed = [schedule.needed_by(step) for step in schedule.steps()]
    messages = {message for message in made if message is not None}
    assert messages == {message for message in needed if message is not None}
    assert len(messages) == sum(message is not None for message in made)  # nothing is made twice
    for message in messages:
        assert abs(message.target - message.source) == 1
        assert schedule.made_by(message.send) == message == schedule.needed_by(message.receive)
        assert message.ranks == (schedule.stage_rank[message.source], schedule.stage_rank[message.target])


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(NAMES), st.integers(1, 6), st.integers(1, 12), st.integers(0, 3))
def test_what_a_message_acknowledges_was_taken_and_never_becomes_less(name, ranks, micro_batches, ahead):
    """A receive that is opened early has taken nothing yet: transfers that a schedule states change nothing."""
    schedule = make_schedule(name, ranks, micro_batches)
    known = known_taken(schedule)
    assert known == known_taken(with_transfers(schedule, ahead))
    there = queues(schedule)
    assert known.keys() == {message for queue in there.values() for message in queue}
    for pair, queue in there.items():
        counts = [known[message] for message in queue]
        assert counts == sorted(counts)
        assert all(count <= len(there.get(pair[::-1], ())) for count in counts)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ranks", range(1, 7))
def test_every_size_runs_in_order_and_within_memory(name, ranks):
    kind = find_kind(name)
    for micro_batches in (1, 2, 5, 7, 8, 12):
        for chunks in range(kind.chunks[0], min(4, kind.chunks[1]) + 1):
            schedule = make_schedule(name, ranks, micro_batches, chunks)
            run = simulate(schedule)  # raises on a deadlock, a missing step or a wrong order
            assert run.peak <= kind.peak(ranks, micro_batches, chunks) + 1e-9
            assert schedule.num_stages == ranks * chunks
            assert schedule.micro_batches == micro_batches
            assert Schedule.parse(str(schedule)) == schedule
            if name in ZERO_BUBBLE and micro_batches >= ranks:
                best = ranks - 1 + 3 * micro_batches * chunks  # in steps of one chunk
                slack = (
                    0 if micro_batches % ranks == 0 or name == "zb-h1" else (ranks + 1) // 2
                )  # packs do not come out even
                assert run.makespan <= best + slack


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(NAMES), st.integers(1, 6), st.integers(1, 12), st.integers(1, 4), st.integers(0, 3))
def test_receives_follow_the_sends_in_every_queue(name, ranks, micro_batches, chunks, ahead):
    kind = find_kind(name)
    chunks = max(kind.chunks[0], min(chunks, kind.chunks[1]))
    schedule = make_schedule(name, ranks, micro_batches, chunks)
    full = with_transfers(schedule, ahead)
    simulate(full)  # checks the order of its receives, and that opening them early changes nothing
    for (source, target), messages in queues(schedule).items():
        sends = [s for s in full.ranks[source] if s in {m.send for m in messages}]
        receives = [s for s in full.ranks[target] if s in {m.receive for m in messages}]
        assert sends == [m.send for m in messages]
        assert receives == [m.receive for m in messages]
    boundaries = sum(a != b for a, b in zip(schedule.stage_rank, schedule.stage_rank[1:], strict=False))
    directions = 2 if kind.trains else 1
    assert sum(map(len, queues(schedule).values())) == boundaries * directions * micro_batches


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(NAMES), st.integers(1, 5), st.integers(2, 9))
def test_leaving_micro_batches_out_keeps_a_schedule_valid(name, ranks, micro_batches):
    schedule = make_schedule(name, ranks, micro_batches)
    fewer = schedule.only(micro_batches - 1)
    assert fewer.micro_batches == micro_batches - 1
    assert simulate(fewer).peak <= simulate(schedule).peak


def test_backward_orders_that_plain_accumulation_has():
    """GPipe and 1F1B sum gradients in the order of the micro-batches: bitwise equality rests on it."""
    for name in ("gpipe", "1f1b", "interleaved", "zb-h1"):
        for line in make_schedule(name, 3, 5).ranks:
            for stage in {s.stage for s in line}:
                done = [
                    s.micro_batch
                    for s in line
                    if s.stage == stage and s.op in (Op.BACKWARD, Op.BACKWARD_WEIGHT)
                ]
                assert done == sorted(done)


def test_zero_bubble_keeps_the_order_of_weight_gradients():
    for name in ("interleaved-zb", "zbv", "dualpipev"):
        for line in make_schedule(name, 4, 10).ranks:
            for stage in {s.stage for s in line}:
                done = [
                    s.micro_batch
                    for s in line
                    if s.stage == stage and s.op in (Op.BACKWARD, Op.BACKWARD_WEIGHT)
                ]
                assert done == sorted(done)


def test_a_slow_wire_never_leaves_the_scheduler_stuck():
    """With a transfer time every greedy preference of ZBV once filled its memory with first chunks and stopped."""
    for transfer in (0.1, 0.5, 3.0):
        for ranks, micro_batches in ((2, 5), (4, 8), (5, 3)):
            schedule = zbv(ranks, micro_batches, costs=Costs(transfer=transfer))
            assert simulate(schedule, Costs(transfer=transfer)).peak <= ranks


def test_costs_shape_a_played_schedule():
    costs = Costs(transfer=0.5)
    aware, blind = zbv(4, 8, costs=costs), zbv(4, 8)
    assert simulate(aware, costs).makespan < simulate(blind, costs).makespan


def test_choose_obeys_the_limit_and_prefers_the_quickest():
    plans = choose(4, 8, memory=4)
    assert all(plan.peak <= 4 for plan in plans)
    assert [p.makespan for p in plans] == sorted(p.makespan for p in plans)
    assert plans[0].bubble < 0.0625
    assert not choose(4, 8, memory=0.5)
    assert {p.schedule.name for p in choose(4, 8, memory=100)} >= {"gpipe", "dualpipev", "interleaved"}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: make_schedule("1f2b", 4, 8), ["'1f2b'", "'1f1b'"]),
        (lambda: make_schedule("zbv", 4, 8, 3), ["zbv", "expected 2", "found 3"]),
        (lambda: make_schedule("interleaved", 4, 8, 0), ["at least 1", "found 0"]),
        (lambda: make_schedule("gpipe", 0, 8), ["at least one", "0 ranks"]),
        (lambda: make_schedule("0F0,0B0\n0F1,0B1\n", 2, 2), ["stage 0", "two ranks"]),
        (lambda: make_schedule("0F0,0B0\n2F0,2B0\n", 2, 1), ["without a gap", "[0, 2]"]),
        (lambda: make_schedule("0F0,0Q0\n", 1, 1), ["'0Q0'", "2F0"]),
        (lambda: make_schedule("0F0,0B0\n1F0\n", 2, 1), ["rank 1", "1B0", "found nothing"]),
        (lambda: make_schedule("0F0,0I0\n1F0,1B0\n", 2, 1), ["rank 0", "0I0 and 0W0"]),
        (lambda: make_schedule("0F0,0B0,0I0,0W0\n", 1, 1), ["either 0B0", "'0W0'"]),
        (lambda: make_schedule("0F0,0F0,0B0\n", 1, 1), ["0F0", "2 times"]),
        (lambda: make_schedule("0B0,0F0\n", 1, 1), ["0B0", "0F0 before it"]),
        (lambda: make_schedule("0F0,0W0,0I0\n", 1, 1), ["0W0", "0I0 before it"]),
        (lambda: Costs.parse("1,2"), ["F,B,W", "'1,2'"]),
        (lambda: Costs.parse("1,2,-1"), ["none negative"]),
        (lambda: Costs.from_mapping({"forwards": 1}), ["'forwards'"]),
    ],
)
def test_mistakes_name_what_is_wrong(call, words):
    with pytest.raises(ScheduleError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


def test_a_deadlock_names_stage_instruction_and_what_it_waits_for():
    text = "0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n"
    with pytest.raises(ScheduleError) as caught:
        simulate(Schedule.parse(text))
    for word in ("rank 0 stands before 0B0", "stage 1", "rank 1 stands before 1F1", "micro-batch 1"):
        assert word in str(caught.value)


def test_receives_in_another_order_than_the_sends_are_refused():
    text = (
        "0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1\n"
        "1RECV_F1,1RECV_F0,1F0,1B0,1SEND_B0,1F1,1B1,1SEND_B1\n"
    )
    with pytest.raises(ScheduleError, match="another order"):
        simulate(Schedule.parse(text))


def test_a_user_may_write_a_schedule_by_hand():
    text = "# mine\n0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n"
    run = simulate(make_schedule(text, 2, 2))
    assert run.schedule.name == "mine"
    assert run.makespan == 9


def test_no_step_is_lost():
    """The list scheduler once stopped when its last events coincided: count everything."""
    for name in NAMES:
        schedule = make_schedule(name, 4, 6)
        per_stage = Counter((s.stage, s.op) for s in schedule.steps())
        assert all(count <= 6 for count in per_stage.values())
        assert all(per_stage[s, Op.FORWARD] == 6 for s in range(schedule.num_stages))


def test_micro_batch_is_demanded_where_it_belongs():
    with pytest.raises(ScheduleError, match="a micro-batch"):
        Instruction(0, Op.FORWARD)
    with pytest.raises(ScheduleError, match="no micro-batch"):
        Instruction(0, Op.UNSHARD, 1)
