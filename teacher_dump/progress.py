"""What a person sees of a running dump: a bar on a terminal, a log line per shard elsewhere."""

from __future__ import annotations

import logging
import sys
import threading
import time

from tqdm import tqdm

from pipeline.shard import ShardRecord
from pipeline.stop_signals import stops_come

log = logging.getLogger("teacher_dump")


class DumpProgress:
    """Shards, tokens, tokens/s, time left and bytes/token of the shards written by this run.

    Is the `Report` of a single engine, and what the reports of several are added up in. Any thread may call it.

    Attributes:
        written: names of the shards that this run committed.
        by_others: those that other processes committed meanwhile, with their tokens.
    """

    def __init__(self, teacher: str, shards: int, tokens: int, done_shards: int) -> None:
        self.teacher = teacher
        self.shards, self.done = shards, done_shards
        self.bytes = self.tokens = self.finished_tokens = 0
        self.written: set[str] = set()
        self.planned = tokens
        self.started = time.monotonic()
        self.by_others: dict[str, int] = {}
        self.engines = 0
        self._waited_for = 0
        self._lock = threading.RLock()
        self.bar = tqdm(
            total=tokens,
            unit="tok",
            unit_scale=True,
            disable=sys.stderr is None or not sys.stderr.isatty(),  # None: the process was started without one
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} tok {rate_fmt} ETA {remaining}{postfix}",
            dynamic_ncols=True,
        )
        self._describe()

    def _describe(self) -> None:
        self.bar.set_description_str(f"shards {self.done}/{self.shards}{self._engines()}", refresh=False)
        if self.finished_tokens:
            self.bar.set_postfix_str(f"{self.bytes / self.finished_tokens:.0f} B/tok", refresh=False)
        self.bar.refresh()

    def _engines(self) -> str:
        return f", {self.engines} worker{'s' * (self.engines > 1)}" if self.engines else ""

    def loading(self) -> None:
        self.say(f"loading teacher {self.teacher} in vLLM")

    def ready(self) -> None:
        """Loading is over: rates count from now."""
        self.started = time.monotonic()
        if not self.bar.disable:  # a bar that is off has no clock
            self.bar.unpause()
            self.bar.start_t = self.bar.last_print_t

    def working(self, engines: int) -> None:
        """So many engines of a cluster capture now."""
        with self._lock:
            self.engines = engines
            self._describe()

    def claimed(self, name: str) -> None:
        pass

    def captured(self, name: str, tokens: int) -> None:
        """Tokens that went through the teacher; a negative number for those that were lost with their worker."""
        with self._lock:
            self.tokens += tokens
            self.bar.update(tokens)

    def committed(self, record: ShardRecord) -> None:
        with self._lock:
            if record.name in self.by_others:  # another worker told that it is there before its writer did
                self.planned += self.by_others.pop(record.name)
                self.bar.total = self.planned
            else:
                self.done += 1
            self.written.add(record.name)
            self.bytes += record.bytes
            self.finished_tokens += record.tokens
            self._describe()
            if self.bar.disable:
                rate = self.tokens / max(time.monotonic() - self.started, 1e-9)
                left = max(self.planned - self.tokens, 0) / max(rate, 1e-9)
                log.info(
                    "%s committed (%d of %d%s): %d rows, %d tokens, %.0f B/token, %.0f tok/s, about %.0f s left",
                    record.name,
                    self.done,
                    self.shards,
                    self._engines(),
                    record.rows,
                    record.tokens,
                    record.bytes / max(record.tokens, 1),
                    rate,
                    left,
                )

    def by_other(self, name: str, tokens: int) -> None:
        with self._lock:
            if name in self.written or name in self.by_others:
                return
            self.by_others[name] = tokens
            self.done += 1
            self.planned -= tokens
            self.bar.total = self.planned
            self._describe()

    def waits(self, shards: int) -> None:
        """Nothing is left but shards that processes outside this run hold; said once for each number of them."""
        if shards != self._waited_for:
            self.say(f"waiting for {shards} shard{'s' * (shards > 1)} that other processes are writing")
        self._waited_for = shards

    def wait(self, names: list[str], seconds: float) -> None:
        self.waits(len(names))
        with stops_come():
            time.sleep(seconds)

    def say(self, text: str) -> None:
        """A line above the bar."""
        with self._lock:
            if self.bar.disable:
                log.info(text)
            else:
                self.bar.write(text, file=sys.stderr)

    def close(self) -> None:
        self.bar.close()
