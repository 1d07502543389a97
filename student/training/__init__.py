"""Around a training step: the loss put together, schedules, ranks, callbacks, what stops a run."""
