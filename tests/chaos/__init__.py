"""Harm done on purpose to caches, checkpoints and the processes that write them; `make chaos` prints what came of it."""
