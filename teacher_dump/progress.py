"""What a person sees of a running dump: a bar on a terminal, a log line per shard elsewhere."""

from __future__ import annotations

import logging
import sys
import time

from tqdm import tqdm

from pipeline.shard import ShardRecord

log = logging.getLogger("teacher_dump")


class DumpProgress:
    """Shards, tokens, tokens/s, time left and bytes/token of the shards written by this process."""

    def __init__(self, shards: int, tokens: int, done_shards: int) -> None:
        self.shards, self.done = shards, done_shards
        self.bytes = self.tokens = self.finished_tokens = 0
        self.planned = tokens
        self.started = time.monotonic()
        self.bar = tqdm(
            total=tokens,
            unit="tok",
            unit_scale=True,
            disable=not sys.stderr.isatty(),
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} tok {rate_fmt} ETA {remaining}{postfix}",
            dynamic_ncols=True,
        )
        self._describe()

    def _describe(self) -> None:
        self.bar.set_description_str(f"shards {self.done}/{self.shards}", refresh=False)
        if self.finished_tokens:
            self.bar.set_postfix_str(f"{self.bytes / self.finished_tokens:.0f} B/tok", refresh=False)
        self.bar.refresh()

    def start_clock(self) -> None:
        """Loading is over: rates count from now."""
        self.started = time.monotonic()
        if not self.bar.disable:  # a bar that is off has no clock
            self.bar.unpause()
            self.bar.start_t = self.bar.last_print_t

    def add_tokens(self, count: int) -> None:
        self.tokens += count
        self.bar.update(count)

    def shard_done(self, record: ShardRecord) -> None:
        self.done += 1
        self.bytes += record.bytes
        self.finished_tokens += record.tokens
        self._describe()
        if self.bar.disable:
            rate = self.tokens / max(time.monotonic() - self.started, 1e-9)
            left = max(self.planned - self.tokens, 0) / max(rate, 1e-9)
            log.info(
                "%s committed (%d of %d): %d rows, %d tokens, %.0f B/token, %.0f tok/s, about %.0f s left",
                record.name,
                self.done,
                self.shards,
                record.rows,
                record.tokens,
                record.bytes / max(record.tokens, 1),
                rate,
                left,
            )

    def shard_by_other(self, tokens: int) -> None:
        """A shard that another process committed."""
        self.done += 1
        self.planned -= tokens
        self.bar.total = self.planned
        self._describe()

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.bar.disable:
            log.info(text)
        else:
            self.bar.write(text, file=sys.stderr)

    def close(self) -> None:
        self.bar.close()
