"""The clock: boundaries, counts, and what of it is saved."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from zeropipe.config.batch import BatchSizes
from zeropipe.runtime.engine.parts import Clock


def clock(gas: int = 1, micro: int = 1, world: int = 1) -> Clock:
    return Clock(BatchSizes(gas * micro * world, micro, gas, world))


@given(gas=st.integers(1, 9), steps=st.integers(0, 40))
def test_every_gas_th_micro_step_is_a_boundary(gas: int, steps: int) -> None:
    ticking = clock(gas, 2, 3)
    for _ in range(steps):
        boundary = ticking.is_boundary
        assert boundary == ((ticking.micro_steps + 1) % gas == 0)
        ticking.tick()
        assert not ticking.last_step_applied
        if boundary:
            ticking.stepped(applied=True)
    assert ticking.micro_steps == steps
    assert ticking.global_steps == steps // gas
    assert ticking.global_samples == steps // gas * gas * 6
    assert ticking.last_step_applied == (steps > 0 and steps % gas == 0)


def test_a_forced_boundary_overrides_the_count_until_it_is_taken_back() -> None:
    ticking = clock(4)
    ticking.forced_boundary = True
    assert ticking.is_boundary
    ticking.tick()
    assert ticking.is_boundary
    ticking.forced_boundary = False
    ticking.micro_steps = 3
    assert not ticking.is_boundary
    ticking.forced_boundary = None
    assert ticking.is_boundary


@given(applied=st.lists(st.booleans(), max_size=20))
def test_skipped_steps_are_counted(applied: list[bool]) -> None:
    ticking = clock(1, 5)
    for ok in applied:
        ticking.tick()
        ticking.stepped(applied=ok)
    assert ticking.skipped_steps == applied.count(False)
    assert ticking.global_steps == len(applied)
    assert ticking.last_step_applied == (bool(applied) and applied[-1])


@given(
    micro=st.integers(0, 99), steps=st.integers(0, 99), samples=st.integers(0, 999), skipped=st.integers(0, 9)
)
def test_the_counts_are_saved_and_the_batch_is_not(
    micro: int, steps: int, samples: int, skipped: int
) -> None:
    first = clock(3)
    first.micro_steps, first.global_steps, first.global_samples, first.skipped_steps = (
        micro,
        steps,
        samples,
        skipped,
    )
    first.forced_boundary = True
    second = clock(2)
    second.load_state_dict(first.state_dict())
    # Gradients of an unfinished window are not saved, so it starts over; without a count the steps say it.
    begun = (micro or steps * 2) // 2 * 2
    assert second.state_dict() == first.state_dict() | {"micro_steps": begun}
    assert second.batch.gradient_accumulation_steps == 2
    assert second.forced_boundary is None
