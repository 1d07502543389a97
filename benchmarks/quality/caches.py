"""The caches that arms need, dumped where they are missing: by `python -m teacher_dump`, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.quality.arms import DUMPS, HELDOUT_CACHE, OTHER_CACHE, Arm, Budget
from pipeline.cache import Cache
from pipeline.errors import UserError

GPU_MEMORY = 0.1
"""Share of the GPU's memory that must be free for an engine to start: several run at once, beside a student."""


@dataclass(frozen=True)
class CacheNeed:
    """A dump of manifests/dumps, and how much of it is wanted in `folder`."""

    name: str
    folder: Path
    shards: int
    heldout: int
    options: dict[str, Any]

    def is_there(self) -> bool:
        try:
            cache = Cache(self.folder)
        except UserError:
            return False
        return len(cache.shards("train")) >= self.shards and len(cache.shards("heldout")) >= self.heldout

    def command(self) -> list[str]:
        given = {"cache": self.folder, "shards": self.shards, **self.options}
        words = [f"--{name}={value}" for name, value in given.items()]
        return [sys.executable, "-m", "teacher_dump", "--manifest", str(DUMPS / f"{self.name}.yaml"), *words]


def needs(arms: Iterable[Arm], budget: Budget, scratch: Path) -> dict[str, CacheNeed]:
    """By name, what the arms train on and are judged by; each budget's caches have a folder of their own."""
    names = dict.fromkeys([HELDOUT_CACHE, *(name for arm in arms for name in arm.dumps()), OTHER_CACHE])
    found = {}
    for name in names:
        manifest = yaml.safe_load((DUMPS / f"{name}.yaml").read_text(encoding="utf-8"))
        shards = 1 if name == OTHER_CACHE else budget.shards
        options = dict(budget.dump)
        if torch.cuda.is_available():
            options |= {"engine.gpu_memory_utilization": GPU_MEMORY, "gpus": min(torch.cuda.device_count(), shards)}
        folder = scratch / "caches" / budget.name / name
        found[name] = CacheNeed(name, folder, shards, manifest.get("heldout_shards", 1), options)
    return found


class Dumps:
    """The dumps that are under way; a context manager that ends them when it is left.

    On a GPU all run at once: most of each is waiting for vLLM to start and for text. Elsewhere one after another.

    Args:
        wanted: what `needs` returned; what is there already is left alone.
        logs: folder for what the dumps say.
    """

    def __init__(self, wanted: dict[str, CacheNeed], logs: Path) -> None:
        self.wanted, self.logs = wanted, logs
        self.ready = {name for name, need in wanted.items() if need.is_there()}
        self.failed: dict[str, str] = {}
        self._waiting = [name for name in wanted if name not in self.ready]
        self._running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
        self._at_once = len(self._waiting) if torch.cuda.is_available() else 1
        logs.mkdir(parents=True, exist_ok=True)
        self.poll()

    @property
    def done(self) -> bool:
        return not self._waiting and not self._running

    def poll(self) -> None:
        """See what has ended, and start what may."""
        for name, (process, started) in list(self._running.items()):
            if process.poll() is None:
                continue
            del self._running[name]
            took = time.monotonic() - started
            if process.returncode == 0 and self.wanted[name].is_there():
                self.ready.add(name)
                print(f"dumped {name} in {took:.0f} s", flush=True)
            else:
                log = self._log(name)
                said = log.read_text(encoding="utf-8", errors="replace").splitlines()
                self.failed[name] = f"the dump of {name} failed, see {log}: {' / '.join(said[-3:])}"
                print(self.failed[name], file=sys.stderr, flush=True)
        while self._waiting and len(self._running) < self._at_once:
            name = self._waiting.pop(0)
            with open(self._log(name), "wb") as said_to:
                process = subprocess.Popen(
                    self.wanted[name].command(), stdin=subprocess.DEVNULL, stdout=said_to, stderr=subprocess.STDOUT,
                    env={**os.environ, "VLLM_NO_USAGE_STATS": "1"}, start_new_session=True,
                )  # fmt: skip
            self._running[name] = process, time.monotonic()
            print(f"dumping {name}: {self.wanted[name].shards} shards into {self.wanted[name].folder}", flush=True)

    def _log(self, name: str) -> Path:
        return self.logs / f"dump-{name}.log"

    def __enter__(self) -> Dumps:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._waiting.clear()
        for process, _ in self._running.values():
            process.terminate()  # a dump keeps what it committed, and goes on from there
        for process, _ in self._running.values():
            process.wait()
