"""The watch over a training's losses, with a device that the host is ahead of: here the CPU plays it."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.errors import UserError
from student.training.finite import BEHIND, FIRST, FiniteWatch


class Training:
    """Steps of an optimiser on one weight, whose losses are given."""

    def __init__(self, factor: float = 5.0) -> None:
        self.watch = FiniteWatch(deferred=True)
        self.watch.factor = factor
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.optimizer = torch.optim.AdamW([self.weight], lr=0.1, fused=True)
        self.number = 0

    def step(self, *batches: tuple[float, ...], norm: float = 1.0) -> bool:
        """One step of batches, each the losses of all ranks; returns whether the weight moved."""
        before = self.weight.detach().clone()
        for index, losses in enumerate(batches):
            self.watch.loss(torch.tensor(losses), 0, self.number, [10 * self.number + index])
        self.weight.grad = torch.ones(3)
        self.watch.gradients(torch.tensor(norm), self.optimizer)
        self.optimizer.step()
        self.number += 1
        return not torch.equal(before, self.weight.detach())


def test_good_steps_are_taken() -> None:
    training = Training()
    assert all(training.step((3.0 - step / 100,)) for step in range(3 * BEHIND))
    training.watch.wait()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_step_is_not_taken_and_told_later(bad: float) -> None:
    training = Training()
    assert all(training.step((3.0,)) for _ in range(4))
    assert not training.step((bad,))
    for _ in range(BEHIND):  # the host is ahead, and the device goes on
        assert training.step((3.0,))
    with pytest.raises(UserError, match=rf"the loss is {bad} at step 4 on sequences \[40\]:"):
        training.step((3.0,))


def test_a_gradient_that_is_not_finite_names_all_of_the_steps_batches() -> None:
    training = Training()
    training.step((3.0,), (3.0,))
    assert not training.step((3.0,), (3.0,), norm=math.inf)
    with pytest.raises(UserError, match=r"the gradient norm is inf at step 1 on sequences \[10, 11\]:"):
        training.watch.wait()


def test_of_several_batches_and_ranks_the_one_that_was_bad() -> None:
    training = Training()
    training.step((3.0, 3.0), (3.0, 3.0))
    assert not training.step((3.0, 3.0), (math.nan, 3.0))
    with pytest.raises(UserError, match=r"at step 1 on sequences \[11\]:"):
        training.watch.wait()
    training = Training()
    assert not training.step((3.0, 3.0), (3.0, math.nan))
    with pytest.raises(UserError, match="at step 0 on rank 1's sequences, which it names itself"):
        training.watch.wait()


def test_an_explosion_is_measured_by_the_mean_of_good_steps() -> None:
    training = Training()
    assert all(training.step((2.0,)) for _ in range(FIRST))
    assert not training.step((math.nan,))  # counts for nothing
    assert training.step((10.9,)) and not training.step((14.0,))  # five times 2 and a nat are 11, then 13
    with pytest.raises(UserError, match=rf"nan at step {FIRST} "):
        training.watch.wait()
    with pytest.raises(
        UserError, match=r"the loss is 14, more than --explosion 5 times the mean .* on sequences \[220\]"
    ):
        training.watch.wait()


def test_first_steps_and_small_losses_may_jump() -> None:
    training = Training()
    assert all(training.step((loss,)) for loss in (11.0, 2.0, 60.0, 1.0))
    training = Training()
    assert all(training.step((0.05,)) for _ in range(FIRST)) and training.step((1.2,))
    training = Training(factor=0)
    assert all(training.step((2.0,)) for _ in range(FIRST)) and training.step((1e20,))
    training.watch.wait()


def test_a_loss_scaler_leaves_out_steps_itself() -> None:
    training = Training()
    training.watch.loss(torch.tensor([math.nan]), 0, 0, [7])
    training.watch.gradients(None, training.optimizer)
    assert not hasattr(training.optimizer, "found_inf")
    with pytest.raises(UserError, match=r"the loss is nan at step 0 on sequences \[7\]:"):
        training.watch.wait()
