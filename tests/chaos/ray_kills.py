"""kill -9 of workers, nodes and drivers of a dump on a Ray cluster, at random moments; it is done all the same."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from helpers_dump import dump, dump_command, rows, write_toy_corpus, write_toy_teacher
from helpers_ray import RayCluster, can_unshare, replayed, start_dump, within

from chaos.figure import Figure
from pipeline.verify import verify_cache

SHARDS = 60
ROWS = 8
"""Of a shard."""
LIMIT_SECONDS = 900.0
"""A round that is not done by then counts as broken."""


@dataclass
class Toll:
    """What was done to a dump and what came of it."""

    kills: Counter[str] = field(default_factory=Counter)
    missing: int = 0
    doubled: int = 0
    differing: int = 0
    leftovers: int = 0
    problems: int = 0
    runs_failed: int = 0
    rows: int = 0
    captured: int = 0
    seconds: float = 0.0

    @property
    def broken(self) -> int:
        return self.missing + self.doubled + self.differing + self.leftovers + self.problems + self.runs_failed

    def facts(self, counted: bool = True) -> dict[str, Any]:
        again = {
            "rows needed": self.rows,
            "rows captured": self.captured,
            "captured again": f"{(self.captured - self.rows) / self.rows:.1%}",
        }
        return {
            "kills": dict(sorted(self.kills.items())),
            "rows missing": self.missing,
            "rows doubled": self.doubled,
            "rows differing": self.differing,
            "temporaries and claims left over": self.leftovers,
            "problems that verify found": self.problems,
            "drivers that ended with an error": self.runs_failed,
            **(again if counted else {}),
            "seconds": round(self.seconds, 1),
        }


@dataclass(frozen=True)
class Place:
    """What all rounds work from."""

    folder: Path
    teacher: Path
    corpus: Path
    recorded: Path
    true: dict[str, dict[str, np.ndarray]]


def run(seed: int, small: bool) -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="chaos-ray-") as scratch:
        folder = Path(scratch)
        teacher = write_toy_teacher(folder / "teacher")
        corpus = write_toy_corpus(folder / "toy.jsonl", documents=4000)
        done = dump(teacher, corpus, folder / "recorded", SHARDS)
        assert done.returncode == 0, done.stderr
        place = Place(folder, teacher, corpus, folder / "recorded", rows(folder / "recorded"))
        figures = [_random_kills(place, seed, 6 if small else 36)]
        if not small:
            figures.append(_real_engine(place, seed, 6))
        if can_unshare():
            figures += _of_another_machine(place, small)
        return figures


def _holders(cache: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for path in (cache / "claims").glob("*.json"):
        try:
            found[path.stem] = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            continue
    return found


def _committed(cache: Path) -> int:
    return len(list(cache.glob("shard-*.json")))


def _count(toll: Toll, place: Place, cache: Path, steps: Path | None) -> None:
    """Look at what a dump that is said to be done has written."""
    found = rows(cache)
    toll.rows += sum(len(columns["length"]) for columns in place.true.values())
    ids: Counter[int] = Counter()
    for name, true in place.true.items():
        if name not in found:
            toll.missing += len(true["length"])
            continue
        columns = found[name]
        ids.update(columns["sequence_id"].tolist())
        toll.missing += len(set(true["sequence_id"].tolist()) - set(columns["sequence_id"].tolist()))
        if len(columns["length"]) != len(true["length"]):
            continue
        same = np.ones(len(true["length"]), bool)
        for column, values in true.items():
            for row in range(len(same)):
                a, b = np.asarray(values[row]), np.asarray(columns[column][row])
                same[row] &= a.shape == b.shape and a.tobytes() == b.tobytes()
        toll.differing += int((~same).sum())
    toll.doubled += sum(times - 1 for times in ids.values()) + ROWS * len(found.keys() - place.true.keys())
    toll.leftovers += len(list(cache.glob(".*.tmp"))) + len(_holders(cache))
    toll.problems += len(verify_cache(cache).problems)
    if steps is not None:
        toll.captured += sum(int(line.split()[1]) for line in steps.read_text().splitlines())


class Round:
    """One dump, its cluster, and what is done to them."""

    def __init__(self, place: Place, cluster: RayCluster, toll: Toll, number: int, command: list[str], cache: Path):
        self.place, self.cluster, self.toll, self.command, self.cache = place, cluster, toll, command, cache
        self.random = random.Random(number)
        self.driver = start_dump(cluster, command)
        self.started = time.monotonic()

    def over(self) -> bool:
        """Whether the dump is done; a driver that ended with an error is counted and started again, as a user would."""
        if self.driver.poll() is None:
            if time.monotonic() - self.started > LIMIT_SECONDS:
                self.driver.kill()
                print(self.driver.communicate()[0][-4000:])
                raise AssertionError(f"the dump hangs: {_holders(self.cache)}")
            return False
        output, _ = self.driver.communicate()
        if self.driver.returncode == 0:
            return True
        print(f"    a driver ended with {self.driver.returncode}: {output.splitlines()[-1] if output else ''}")
        self.toll.runs_failed += 1
        self.driver = start_dump(self.cluster, self.command)
        return False

    def kill(self, what: str) -> None:
        """Kill one; returns when it is done, or the dump is."""
        at_work = within(120, lambda: bool(_holders(self.cache)), self.driver)
        if not at_work or self.driver.poll() is not None:
            return
        time.sleep(self.random.uniform(0.0, 1.5))
        if what == "driver":
            self.driver.kill()
            self.driver.communicate()
            self.driver = start_dump(self.cluster, self.command)
        elif what == "node":
            self.cluster.remove(self.random.choice(self.cluster.nodes), gently=self.random.random() < 0.3)
            self.cluster.add()
        else:
            pids = sorted({int(holder["pid"]) for holder in _holders(self.cache).values()})
            if not pids or self.driver.poll() is not None:
                return
            try:
                os.kill(self.random.choice(pids), signal.SIGKILL)
            except ProcessLookupError:
                return
        self.toll.kills[what] += 1


def _random_kills(place: Place, seed: int, kills: int) -> Figure:
    toll, started = Toll(), time.monotonic()
    plan = ["worker", "worker", "node", "driver"] * (kills // 4 + 1)
    random.Random(seed).shuffle(plan)
    number = 0
    while sum(toll.kills.values()) < kills:
        number += 1
        cache, steps = place.folder / f"round-{number}", place.folder / f"steps-{number}"
        script = json.dumps({"pace": 0.25, "steps_file": str(steps)})
        command = replayed(place.teacher, place.corpus, cache, SHARDS, place.recorded, script)
        with RayCluster() as cluster:
            cluster.add(), cluster.add()
            trial = Round(place, cluster, toll, 1000 * seed + number, command, cache)
            while not trial.over():
                if sum(toll.kills.values()) < kills and _committed(cache) < SHARDS - 4:
                    trial.kill(plan[sum(toll.kills.values())])
                time.sleep(trial.random.uniform(0.2, 2.0))
        _count(toll, place, cache, steps)
        print(f"    round {number}: {dict(toll.kills)}, broken: {toll.broken}", flush=True)
    toll.seconds = time.monotonic() - started
    facts = {"rounds": number, "shards each": SHARDS + 1, "workers": 2, **toll.facts()}
    what = "kill -9 of workers, nodes and drivers on a Ray cluster of 3 nodes, recorded rows"
    return Figure("ray_kills", what, sum(toll.kills.values()), toll.broken, facts)


def _real_engine(place: Place, seed: int, kills: int) -> Figure:
    toll, started = Toll(), time.monotonic()
    plan = ["worker", "driver", "worker", "node", "worker", "driver"]
    number = 0
    while sum(toll.kills.values()) < kills:
        number += 1
        cache = place.folder / f"engine-{number}"
        command = dump_command(place.teacher, place.corpus, cache, SHARDS, "--gpus", "1")
        with RayCluster() as cluster:
            cluster.add()
            trial = Round(place, cluster, toll, 2000 * seed + number, command, cache)
            trial.random.uniform = lambda low, high: 0.2 * random.uniform(low, high)  # type: ignore[method-assign]
            while not trial.over():
                if sum(toll.kills.values()) < kills and _committed(cache) < SHARDS - 4:
                    trial.kill(plan[sum(toll.kills.values())])
                time.sleep(0.05)
        _count(toll, place, cache, None)
        print(f"    round {number}: {dict(toll.kills)}, broken: {toll.broken}", flush=True)
    toll.seconds = time.monotonic() - started
    facts = {"rounds": number, **toll.facts(counted=False)}
    return Figure("ray_kills", "the same with the real engine", sum(toll.kills.values()), toll.broken, facts)


def _of_another_machine(place: Place, small: bool) -> list[Figure]:
    """Workers whose processes this machine cannot look at, as if each node were another one."""
    return [_kill_apart(place, what) for what in (("worker", "driver") if small else ("worker", "driver", "node"))]


def _kill_apart(place: Place, what: str) -> Figure:
    toll, started = Toll(), time.monotonic()
    cache, steps = place.folder / f"apart-{what}", place.folder / f"apart-{what}-steps"
    script = json.dumps({"pace": 0.1, "steps_file": str(steps)})
    command = replayed(place.teacher, place.corpus, cache, SHARDS, place.recorded, script)
    with RayCluster() as cluster:
        node = cluster.add_apart()
        driver = start_dump(cluster, command)
        assert within(120, lambda: _committed(cache) > 2, driver)
        held = _holders(cache)
        if what == "worker":
            _engine_of(node).kill()
        elif what == "driver":
            driver.kill()
            driver.communicate()
            driver = start_dump(cluster, command)
        else:
            cluster.remove_apart(node)
            cluster.add_apart()
        killed = time.monotonic()
        toll.kills[what] += 1
        free = [_free_after(cache, name, holder, killed, driver) for name, holder in held.items()]
        output, _ = driver.communicate(timeout=LIMIT_SECONDS)
        if driver.returncode:
            print(output[-3000:])
        toll.runs_failed += driver.returncode != 0
    _count(toll, place, cache, steps)
    toll.seconds = time.monotonic() - started
    facts = {"seconds until its claims were free": max(free, default=0.0), **toll.facts()}
    return Figure("ray_kills", f"kill -9 of a {what} on another machine", 1, toll.broken, facts)


def _free_after(cache: Path, name: str, holder: dict[str, Any], killed: float, driver: Any) -> float:
    """Seconds from the kill until a holder's claim was gone."""
    within(LIMIT_SECONDS, lambda: _holders(cache).get(name, {}).get("id") != holder["id"], driver)
    return round(time.monotonic() - killed, 1)


def _engine_of(node: subprocess.Popen[bytes]) -> psutil.Process:
    """The only engine of a node that has process numbers of its own."""
    (engine,) = (p for p in psutil.Process(node.pid).children(recursive=True) if "RayEngine" in " ".join(p.cmdline()))
    return engine
