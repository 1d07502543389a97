"""What things cost, measured: each module prints a table and writes `results/NAME.json`; none passes or fails."""
