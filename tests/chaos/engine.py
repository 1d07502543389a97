"""The real engine: `kill -9` of a dump through vLLM, a device without memory, and a rank of the teacher that is killed.

The toy teacher of `helpers_dump` on a CPU, through the command line. What a GPU without memory says is raised where
vLLM would raise it; everything that follows is real.
"""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from helpers_dump import REPOSITORY, SHARDS, dump_command, environment, write_toy_corpus, write_toy_teacher

from chaos.checks import committed_shards, leftovers
from chaos.children import in_fresh_interpreter
from chaos.figure import Figure
from chaos.recorded import differences, rows_of
from chaos.several import lives
from chaos.trials import scratch
from pipeline.verify import verify_cache

KILLS, SMALL_KILLS = 12, 2
IN_ONE_DUMP = 3
LIMIT_SECONDS = 240
WHILE_LOADING = 0.2
"""Share of the kills that come before the engine runs."""
TOKENS_PER_SHARD = 512
ROWS_PER_STEP = ("--engine.rows_per_step", "2")
"""Small steps: a dump takes a while after its first shard."""

WITHOUT_MEMORY = """
import sys
import torch
from teacher_dump import capture
real, calls = capture.head_topk, 0
def head_topk(*arguments, **more):
    global calls
    calls += 1
    if calls == {call}:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.27 GiB.")
    return real(*arguments, **more)
capture.head_topk = head_topk
from pipeline.errors import run_command
from teacher_dump.__main__ import main
sys.exit(run_command(main))
"""
NO_ROOM_TO_START = """
import sys
from vllm import LLMEngine
def refuse(*arguments, **more):
    raise ValueError("Free memory on device cuda:0 (10.21/139.72 GiB) on startup is less than desired GPU memory "
                     "utilization (0.9, 125.75 GiB). Decrease GPU memory utilization or reduce GPU memory used by "
                     "other processes.")
LLMEngine.from_engine_args = refuse
from pipeline.errors import run_command
from teacher_dump.__main__ import main
sys.exit(run_command(main))
"""


def run(seed: int, small: bool) -> list[Figure]:
    return in_fresh_interpreter("chaos.engine", seed, small)


def experiments(seed: int, small: bool) -> list[Figure]:
    with scratch(memory=False) as name:
        place = Place(Path(name))
        figures = [kills(place, random.Random(seed), SMALL_KILLS if small else KILLS), memory(place)]
        return figures if small else [*figures, killed_rank(place)]


class Place:
    """Teacher, corpus and undisturbed cache of these trials."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.teacher = write_toy_teacher(folder / "teacher")
        self.corpus = write_toy_corpus(folder / "corpus.jsonl", documents=1500)
        started = time.monotonic()
        process = self.start(folder / "undisturbed")
        while not committed_shards(folder / "undisturbed") and process.poll() is None:
            time.sleep(0.01)
        self.load_seconds = time.monotonic() - started
        while committed_shards(folder / "undisturbed") <= SHARDS and process.poll() is None:
            time.sleep(0.01)
        self.dump_seconds = time.monotonic() - started - self.load_seconds
        assert process.wait() == 0, self.words(folder / "undisturbed")
        self.rows = rows_of(folder / "undisturbed")

    def start(self, cache: Path, *more: str, program: str | None = None) -> subprocess.Popen[bytes]:
        """The dump command; its words go to a file beside the cache."""
        command = dump_command(self.teacher, self.corpus, cache, SHARDS, *ROWS_PER_STEP, *more)
        if program is not None:
            command = [command[0], "-c", program, *command[3:]]
        with open(cache.with_name(f"{cache.name}.txt"), "wb") as words:
            return subprocess.Popen(command, env=environment(), cwd=REPOSITORY, stdout=words, stderr=words)

    def words(self, cache: Path) -> str:
        return cache.with_name(f"{cache.name}.txt").read_text(errors="replace")

    def wrong(self, cache: Path, whole: bool) -> list[str]:
        """What is visible and not whole or not the undisturbed rows; `whole`: nothing may be missing or left."""
        if not (cache / "manifest.json").is_file():
            return ["no manifest"] if whole else []
        result = verify_cache(cache)
        missing = {f"{name}.json" for name in result.missing}
        found = [str(problem) for problem in result.problems if problem.file not in missing]
        found += differences(self.rows, rows_of(cache), whole=whole) if not found else []
        return found + (leftovers(cache) if whole else [])


def kills(place: Place, rng: random.Random, trials: int) -> Figure:
    """SIGKILL while vLLM loads or captures; up to `IN_ONE_DUMP` in one dump, then the same command to its end."""
    corrupt, different, moments, redone = list[str](), list[str](), list[str](), list[int]()
    caches = 0
    while len(redone) < trials:
        cache = place.folder / f"killed-{caches}"
        caches += 1
        for _ in range(min(IN_ONE_DUMP, trials - len(redone))):
            before = committed_shards(cache)
            if before > SHARDS:
                break
            process = place.start(cache)
            if rng.random() < WHILE_LOADING:
                time.sleep(rng.uniform(0, place.load_seconds))
            else:
                wait_for(lambda cache=cache, before=before: committed_shards(cache) > before, process)
                left = (SHARDS - before) / (SHARDS + 1)
                time.sleep(rng.uniform(0, left * place.dump_seconds))
            process.send_signal(signal.SIGKILL)
            process.wait()
            redone.append(len(list((cache / "claims").glob("*.json"))))
            moments.append(f"{committed_shards(cache)}")
            corrupt += place.wrong(cache, whole=False)
        if place.start(cache).wait(LIMIT_SECONDS):
            different.append(f"the last run: {place.words(cache)[-300:]}")
        different += place.wrong(cache, whole=True)
    found: dict[str, Any] = {
        "corrupt visible shards": len(corrupt),
        "caches not identical": f"{len(different)} of {caches}",
        "work redone, shards (at most)": f"mean {sum(redone) / trials:.2f}, worst {max(redone)} "
        f"of {TOKENS_PER_SHARD} tokens",
        "shards committed when killed": f"{', '.join(moments)} of {SHARDS + 1}",
        "an undisturbed run": f"{place.load_seconds:.1f} s to the first shard, {place.dump_seconds:.1f} s after it",
    }
    if corrupt or different:
        found["examples"] = [*corrupt, *different][:4]
    return Figure("engine", "SIGKILL of a dump through vLLM", trials, len(corrupt) + len(different), found)


def memory(place: Place) -> Figure:
    """A device without memory, at the start and at a step: one sentence that names the option; the next run goes on."""
    wrong: list[str] = []
    said: dict[str, Any] = {}
    for name, program, option in (
        ("at the start", NO_ROOM_TO_START, "engine.gpu_memory_utilization"),
        ("at a step", WITHOUT_MEMORY.format(call=4), "engine.rows_per_step"),
    ):
        cache = place.folder / f"memory-{name.replace(' ', '-')}"
        process = place.start(cache, program=program)
        status = process.wait(LIMIT_SECONDS)
        said[f"no memory {name}"] = sentence(place.words(cache))
        wrong += judged(status, place.words(cache), option)
        wrong += [f"after no memory {name}: {problem}" for problem in visible_problems(cache)]
        if place.start(cache).wait(LIMIT_SECONDS):
            wrong.append(f"the next run: {place.words(cache)[-300:]}")
        elif committed_shards(cache) != SHARDS + 1 or leftovers(cache):
            wrong.append(f"after the next run: {leftovers(cache)}")
    return Figure("engine", "a device without memory", 2, len(wrong), {**said, **({"wrong": wrong} if wrong else {})})


def killed_rank(place: Place) -> Figure:
    """One of the two ranks of a teacher is killed while it captures: the run stops with one sentence."""
    cache = place.folder / "rank"
    process = place.start(cache, "--engine.tensor_parallel", "2")
    wait_for(lambda: committed_shards(cache) > 0, process)
    ranks = [pid for pid in descendants(process.pid) if "VLLM" in title(pid) or "Worker" in title(pid)]
    wrong = [] if ranks else [f"no rank was found: {[title(pid) for pid in descendants(process.pid)]}"]
    killed = time.monotonic()
    if ranks:
        subprocess.run(["kill", "-9", str(ranks[-1])], check=True)
    try:
        status = process.wait(LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        wrong.append(f"it hung for {LIMIT_SECONDS} s")
        process.kill()
        status = process.wait()
    seconds = time.monotonic() - killed
    said = sentence(place.words(cache))
    wrong += judged(status, place.words(cache), "died")
    wrong += [f"rank {pid} is left" for pid in ranks if lives(pid)]
    wrong += visible_problems(cache)
    if place.start(cache, "--engine.tensor_parallel", "2").wait(LIMIT_SECONDS):
        wrong.append(f"the next run: {place.words(cache)[-300:]}")
    elif committed_shards(cache) != SHARDS + 1 or leftovers(cache):
        wrong.append(f"after the next run: {leftovers(cache)}")
    found = {"it said": said, "stopped after": f"{seconds:.1f} s"}
    return Figure(
        "engine", "SIGKILL of a rank of the teacher", 1, len(wrong), found | ({"wrong": wrong} if wrong else {})
    )


def judged(status: int, words: str, option: str) -> list[str]:
    """What is wrong with the end of a run whose engine failed."""
    errors = [line for line in words.splitlines() if line.startswith("error:")]
    wrong = []
    if status != 2 or len(errors) != 1:
        wrong.append(f"status {status} and {len(errors)} sentences: {words[-500:]}")
    elif option not in errors[0]:
        wrong.append(f"{option} is not named: {errors[0]}")
    if "Traceback" in words:
        wrong.append(f"a traceback: {words[words.index('Traceback') :][:300]}")
    return wrong


def sentence(words: str) -> str:
    return next((line for line in words.splitlines() if line.startswith("error:")), words[-200:])


def visible_problems(cache: Path) -> list[str]:
    if not (cache / "manifest.json").is_file():
        return []
    result = verify_cache(cache)
    return [str(p) for p in result.problems if p.file not in {f"{name}.json" for name in result.missing}]


def wait_for(condition: Any, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)


def descendants(pid: int) -> list[int]:
    try:
        children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [*children, *(grandchild for child in children for grandchild in descendants(child))]


def title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") + Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""
