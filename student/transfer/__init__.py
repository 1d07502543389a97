"""The teacher's own weights and attention put into a student before it is distilled."""
