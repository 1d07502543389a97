"""One server that processes of tests are forked from: it has imported what they need, which saves four seconds each.

Python has a single such server in a process, and the names that were set last are what it imports: they are set here
only, so that what a test measures does not depend on which tests are run beside it.
"""

from __future__ import annotations

import multiprocessing

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["benchmarks.many_shards_cases", "student.__main__", "student.data.loader", "teacher_dump.pending"]
)
