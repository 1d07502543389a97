"""Harm done on purpose to caches, checkpoints and their writers; `make chaos` prints what came of it."""
