"""Which students are worth having: arms of experiments as manifests, trained side by side, evaluated, tabulated.

arms.py       manifests/experiments/*.yaml, the questions they answer, and how much an arm is trained
caches.py     the caches that arms need: dumped by `python -m teacher_dump` where they are missing
trial.py      one arm in this process: trained, evaluated, a row of figures
online.py     the arm that asks its teacher at every step
worker.py     a process that takes one trial after another, so that imports and compilation are paid once
pool.py       several of them on one GPU, within a limit of minutes
results.py    benchmarks/results/quality.json
tables.py     means, deviations, differences to a question's reference
report.py     docs/results.md and its plots, out of quality.json alone
"""

import time

STARTED = time.monotonic()
"""When this process began to import it: before what takes long."""
