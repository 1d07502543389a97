"""A run folder: what it says of itself, its checkpoints, and what must fit together for it to go on."""
