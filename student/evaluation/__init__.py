"""What the evaluating commands share: language models, metrics, tasks, distances of attention maps."""
