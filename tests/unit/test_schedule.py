"""Delta-distillation's numbers."""

from __future__ import annotations

import math

import pytest

from student.training.schedule import DeltaSchedule, StepCounter


def test_starts_at_its_start_and_falls_towards_its_end() -> None:
    alpha = DeltaSchedule(0.8, 0.5, 0.05)
    assert alpha.at(0, 0) == 0.8
    assert alpha.at(0, 1) == pytest.approx(0.5 + 0.3 / (1 + math.log(2)))
    values = [alpha.at(0, k) for k in range(1000)]
    assert values == sorted(values, reverse=True) and values[-1] > 0.5


def test_each_epoch_begins_lower_until_the_end_is_reached() -> None:
    alpha = DeltaSchedule(0.8, 0.5, 0.05)
    assert [alpha.at(epoch, 0) for epoch in range(9)] == pytest.approx([0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.5, 0.5])
    assert alpha.at(7, 12) == 0.5
    tau = DeltaSchedule(2.0, 1.0, 0.05)
    assert tau.at(3, 4) == pytest.approx(1 + 0.85 / (1 + math.log(5)))


def test_without_delta_it_is_fixed() -> None:
    assert {DeltaSchedule(0.3, 0.1, None).at(epoch, k) for epoch in range(3) for k in range(3)} == {0.3}


@pytest.mark.parametrize(("start", "end", "delta"), [(0.5, 0.8, 0.05), (0.8, 0.5, -0.1)])
def test_a_rising_schedule_is_a_mistake(start: float, end: float, delta: float) -> None:
    with pytest.raises(ValueError, match="falls"):
        DeltaSchedule(start, end, delta)


def test_counter_restarts_with_each_epoch_and_survives_a_checkpoint() -> None:
    counter = StepCounter()
    counter.enter(0)
    counter.step()
    counter.step()
    counter.enter(0)
    assert (counter.epoch, counter.k) == (0, 2)
    restored = StepCounter()
    restored.load_state_dict(counter.state_dict())
    assert restored == counter
    counter.enter(1)
    assert (counter.epoch, counter.k) == (1, 0)
