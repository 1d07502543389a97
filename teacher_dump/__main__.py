"""`python -m teacher_dump`: run the teacher over a corpus and write a cache."""

from __future__ import annotations

import logging
import sys

from pipeline.config import parse_into
from pipeline.errors import run_command

DESCRIPTION = (
    "Stream a corpus through a Transformer teacher in vLLM and write top-k logits, tails and pooled attention to "
    "compressed Parquet shards. Run the same command again to go on after an interruption."
)


def main() -> int:
    from teacher_dump.settings import DumpConfig

    config = parse_into(DumpConfig, "python -m teacher_dump", DESCRIPTION, "--manifest")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    from pipeline.stop_signals import interrupt_on_sigterm
    from teacher_dump.dump import run_dump

    interrupt_on_sigterm()
    result = run_dump(config)
    print(
        f"{config.cache}: {result.shards} shards, {result.tokens:,} tokens "
        f"({result.written} shards written now, {result.seconds:.0f} s)"
    )
    for sentence in result.lost:
        print(f"note: {sentence}; the other workers wrote its shards", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
