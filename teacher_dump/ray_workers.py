"""Stage one on a Ray cluster: an actor for each engine, which the driver gives one shard after another as it asks.

Ray places the actors, starts their processes and tells of their end. The driver knows which shards each has: those of a
lost engine go to others once their claims are free. All that must outlive the driver is in the cache.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.commit import new_claim_id
from pipeline.errors import UserError, one_line
from pipeline.schema import unit_name
from pipeline.shard import ShardRecord
from pipeline.stop_signals import raise_if_stopped
from pipeline.store import again, is_remote, remove
from teacher_dump.plan import Unit
from teacher_dump.progress import DumpProgress
from teacher_dump.ray_cluster import DeadClaims, EngineRoom
from teacher_dump.work import Work

POLL_SECONDS = 0.5
"""How long the driver waits for news before it looks at the cluster and at claims again."""
RECRUIT_SECONDS = 2.0
"""How often the driver looks whether there is room for further engines."""
PLACE_SECONDS = 30.0
"""After which it is told that engines have found no place yet."""
STOP_SECONDS = 20.0
"""What engines that are told to stop may take to leave nothing half done."""
ATTEMPTS = 3
"""Engines that a shard may take with it before it is given up. Those on a node that left are not counted."""
LOSSES = 5
"""Engines that a node may lose, without having committed a shard in between, before it gets no more of them."""


def _name(unit: Unit) -> str:
    return unit_name(unit.unit)


@dataclass
class Held:
    """A shard that an engine has, and its tokens captured so far."""

    unit: Unit
    tokens: int = 0


@dataclass
class Engine:
    """What the driver knows of one engine."""

    number: int
    actor: Any
    group: Any  # its placement group, if it has one
    call: Any  # what it is being asked; first of all, where it runs
    place: str = "not placed yet"
    node: str = ""
    ready: bool = False
    asks: str = ""  # "early": while it captures; "idle": it has nothing to do
    stopped: bool = False
    cut_off: bool = False
    held: dict[str, Held] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"worker {self.number} ({self.place})"


@dataclass
class Blocked:
    """A shard whose claim somebody else has, or had when last looked."""

    unit: Unit
    suspect: bool
    look_at: float = 0.0
    pause: float = 0.25


class RayWorkers:
    """The engines of one dump on a Ray cluster.

    Args:
        work: what `prepare` returned.
        units: what is to be committed.
        room: of the cluster.
        progress: is told of all engines together.
        start: makes an engine in its actor; None: the real one.
    """

    def __init__(
        self,
        work: Work,
        units: Sequence[Unit],
        room: EngineRoom,
        progress: DumpProgress,
        start: Callable[[Work], Any] | None = None,
    ) -> None:
        # Engines may run elsewhere: a relative place would be another one.
        self.work = work if is_remote(work.cache) else replace(work, cache=work.cache.absolute())
        self.room, self.progress, self._start = room, progress, start
        self._fresh = iter(units)  # there may be a million: not held as objects
        self.returned: deque[Unit] = deque()  # those that came back free of blame
        self.suspects: deque[Unit] = deque()  # lost with an engine: handed out alone, after all others
        self.blocked: dict[str, Blocked] = {}
        self.left = len(units)
        self.failures: dict[str, list[str]] = {}  # why a shard was lost, and how often
        self.given_up: dict[str, str] = {}
        self.engines: list[Engine] = []
        self.lost: list[str] = []
        self._claims = DeadClaims(room, self.work.cache)
        self._number = 0
        self._ready = False
        self._losses: Counter[str] = Counter()  # by node
        self._written_off: Counter[str] = Counter()  # places of a node that get no engine any more
        self._causes: Counter[str] = Counter()
        self._recruited = self._unplaced_since = -1e9
        self._told: set[str] = set()

    def run(self) -> list[str]:
        """Until every unit is committed or given up.

        Returns:
            A sentence for every engine that was lost on the way.

        Raises:
            UserError: shards were given up, or no engine can run; says which and why.
        """
        ray = self.room.ray
        marker = self.work.cache / "claims" / f".driver.{new_claim_id()}.tmp"
        try:
            if self.left:
                marker.parent.mkdir(parents=True, exist_ok=True)
                again(lambda: marker.write_text("engines look for this file"), marker)
                self._payload = ray.put(pickle.dumps((self.work, self._start)))
                self.progress.say(f"loading teacher {self.work.teacher.name} in vLLM on {self._cluster()}")
            while self.left:
                raise_if_stopped()
                self._recruit(marker)
                self._look_at_blocked()
                self._listen()
            deadline = time.monotonic() + STOP_SECONDS
            while any(e.ready and e.asks != "idle" for e in self.engines) and time.monotonic() < deadline:
                raise_if_stopped()
                self._listen()  # the last shards are committed, their claims not released yet
        finally:
            try:
                self._stop()
            finally:
                with contextlib.suppress(OSError):
                    remove(marker)
        if self.given_up:
            raise UserError(self._told_given_up())
        return self.lost

    # Engines.

    def _cluster(self) -> str:
        nodes = self.room.nodes()
        count, kind = self.room.count(nodes), "GPU" if self.room.on_gpu else "CPU"
        each = f" of {self.room.ranks} {kind}s" if self.room.ranks > 1 else ""
        return f"{count} {kind} worker{'s' * (count != 1)}{each}, {len(nodes)} Ray node{'s' * (len(nodes) != 1)}"

    def _recruit(self, marker: Path) -> None:
        """Start engines where there is room for more, and tell where there is none."""
        if time.monotonic() - self._recruited < RECRUIT_SECONDS:
            return
        self._recruited = time.monotonic()
        nodes = self.room.nodes()
        off = sum(self._written_off[node.id] for node in nodes)
        places = max(0, self.room.count(nodes) - off)
        while len(self.engines) < min(places, self.left):
            self._number += 1
            environment = {name: value for name, value in os.environ.items() if name.startswith("VLLM_")}
            actor, group = self.room.start(self._payload, marker, os.getcwd(), environment)
            self.engines.append(Engine(self._number, actor, group, actor.hello.remote()))
        if not self.engines and off:
            raise UserError(self._told_all_lost())
        unplaced = sum(not engine.node for engine in self.engines)
        if not unplaced and self.engines:
            self._unplaced_since = time.monotonic()
        elif not self.engines:
            self._say_once("waiting: the Ray cluster has no node that could run an engine now")
        elif time.monotonic() - max(self._unplaced_since, self.progress.started) > PLACE_SECONDS:
            self._say_once(f"{unplaced} of {len(self.engines)} workers wait for room on the Ray cluster")

    def _listen(self) -> None:
        """Take in what engines tell, for at most `POLL_SECONDS`."""
        ray = self.room.ray
        calls = {engine.call: engine for engine in self.engines}
        if not calls:
            time.sleep(POLL_SECONDS)
            return
        if ray.wait(list(calls), timeout=POLL_SECONDS)[0]:
            for call in ray.wait(list(calls), num_returns=len(calls), timeout=0)[0]:
                self._hear(calls[call])

    def _hear(self, engine: Engine) -> None:
        ray = self.room.ray
        try:
            told = ray.get(engine.call)
        except ray.exceptions.ActorUnavailableError:
            # What it told may be lost, so that it is of no more use; Ray will know what became of it.
            engine.cut_off, engine.call = True, engine.actor.hello.remote()
            return
        except ray.exceptions.RayError as error:
            self._lose(engine, *_cause(error, self._lives(engine.node)))
            return
        if engine.cut_off:
            self._lose(engine, "the connection to it was lost for a moment")
            return
        if not engine.node:
            engine.node, engine.place = told["node"], told["place"]
            self._claims.machine_is(told["node"], told["machine"])
        else:
            for message in told:
                self._take(engine, message)
        if engine in self.engines and not engine.stopped:
            engine.call = engine.actor.exchange.remote(self._answer(engine))

    def _take(self, engine: Engine, message: tuple[Any, ...]) -> None:
        progress = self.progress
        match message:
            case ("ready",):
                if not self._ready:
                    progress.ready()
                self._ready = engine.ready = True
                progress.working(sum(other.ready for other in self.engines))
            case ("ask", idle):
                engine.asks = "idle" if idle else "early"
            case ("captured", name, tokens):
                engine.held[name].tokens += tokens
                progress.captured(name, tokens)
            case ("committed", ShardRecord() as record):
                self._done(engine, record.name)
                self._losses[engine.node] = 0
                progress.committed(record)
            case ("by_other", name, tokens):
                self._done(engine, name)
                progress.by_other(name, tokens)
            case ("held", name):
                self.blocked[name] = Blocked(engine.held.pop(name).unit, name in self.failures)
            case ("failed", sentence, trace):
                if trace and sentence not in self._causes:
                    progress.say(trace)
                self._lose(engine, sentence, told=True)
            case ("stopped",):
                engine.stopped, engine.held = True, {}

    def _done(self, engine: Engine, name: str) -> None:
        del engine.held[name]
        self.failures.pop(name, None)
        self.left -= 1

    # Units.

    def _answer(self, engine: Engine) -> tuple[Unit | None] | None:
        """What an engine is told that asked for a unit; None: nothing yet."""
        if not engine.asks:
            return None
        unit = self._unit_for(engine)
        if unit is not None:
            engine.held[_name(unit)] = Held(unit)
        elif engine.asks == "idle":
            return None
        engine.asks = ""
        return (unit,)

    def _unit_for(self, engine: Engine) -> Unit | None:
        if any(name in self.failures for name in engine.held):
            return None  # nothing beside a suspect, so that it is known what ended the engine
        unit = next(self._fresh, None)
        if unit is None and self.returned:
            unit = self.returned.popleft()
        if unit is None and self.suspects and engine.asks == "idle":
            unit = self.suspects.popleft()
        return unit

    def _look_at_blocked(self) -> None:
        now = time.monotonic()
        for name, entry in list(self.blocked.items()):
            if now < entry.look_at:
                continue
            if self._claims.free(name):
                del self.blocked[name]
                (self.suspects if entry.suspect else self.returned).append(entry.unit)
            else:
                entry.look_at, entry.pause = now + entry.pause, min(5.0, 1.5 * entry.pause)
        if self.blocked and len(self.blocked) == self.left:
            self._say_once(
                f"waiting for {self.left} shard{'s' * (self.left > 1)}: other processes write them, or it is not sure "
                "yet that their writers on lost machines are gone"
            )

    # Losses.

    def _lives(self, node: str) -> bool:
        return not node or any(other.id == node for other in self.room.nodes())

    def _lose(self, engine: Engine, cause: str, node_left: bool = False, told: bool = False) -> None:
        """An engine is gone.

        Args:
            cause: as a sentence goes on.
            node_left: its whole node is gone: nobody's fault.
            told: it said so itself: another one on its place would end in the same way, unless a shard is to blame.
        """
        self.engines.remove(engine)
        self.room.end(engine.actor, engine.group)
        holding = f" while it held {', '.join(engine.held)}" if engine.held else ""
        for name, held in engine.held.items():
            self.progress.captured(name, -held.tokens)
            if not node_left:
                self.failures.setdefault(name, []).append(cause)
            if len(self.failures.get(name, ())) >= ATTEMPTS:
                self.given_up[name] = cause
                self.left -= 1
                self.progress.say(f"{name} has ended {ATTEMPTS} workers and is given up")
            else:
                self.blocked[name] = Blocked(held.unit, name in self.failures)
        if not node_left:
            self._losses[engine.node] += 1
            if told and not engine.ready or self._losses[engine.node] >= LOSSES:
                self._written_off[engine.node] += 1
        self.progress.working(sum(other.ready for other in self.engines))
        said = "for the same reason" if cause in self._causes else f": {cause}"
        self._causes[cause] += 1
        if engine.node:
            self.lost.append(f"{engine.label} stopped{holding}: {cause}")
        if self.left:
            self.progress.say(f"{engine.label} stopped{holding}{said if said[0] == ':' else ' ' + said}")
        self._recruited = -1e9
        if not engine.node and self._losses[""] >= LOSSES:
            raise UserError(f"engines cannot be started on the Ray cluster: {cause}")

    def _told_all_lost(self) -> str:
        causes = "; ".join(f"{cause} ({times} times)" if times > 1 else cause for cause, times in self._causes.items())
        return f"all workers stopped with {self.left} shards left: {causes}"

    def _told_given_up(self) -> str:
        told = "; ".join(f"{name}: {cause}" for name, cause in list(self.given_up.items())[:5])
        more = f"; and {len(self.given_up) - 5} more" if len(self.given_up) > 5 else ""
        count = f"{len(self.given_up)} shard{'s' * (len(self.given_up) > 1)}"
        return (
            f"{count} could not be written in {ATTEMPTS} attempts, each of which ended a worker: {told}{more}. All "
            "others are committed; mend the cause and run the same command"
        )

    def _say_once(self, sentence: str) -> None:
        if sentence not in self._told:
            self._told.add(sentence)
            self.progress.say(sentence)

    def _stop(self) -> None:
        """End the engines; those that still have shards are first asked to give them up."""
        busy = [engine for engine in self.engines if engine.held]
        try:
            for engine in busy:
                engine.actor.stop.remote()
            deadline = time.monotonic() + STOP_SECONDS
            while (working := [e for e in busy if e in self.engines and not e.stopped]) and time.monotonic() < deadline:
                ready, _ = self.room.ray.wait([engine.call for engine in working], timeout=POLL_SECONDS)
                for engine in working:
                    if engine.call in ready:
                        self._hear(engine)
        finally:
            for engine in self.engines:
                self.room.end(engine.actor, engine.group)


def _cause(error: Exception, node_lives: bool) -> tuple[str, bool]:
    """Why an engine is gone, and whether its node is."""
    text = str(error)
    if not node_lives or "its node has died" in text:
        return "its node left the Ray cluster", True
    if "running low on memory" in text:
        return "Ray ended it, since its node ran out of memory", False
    if "worker process has died" in text:
        return "its process was killed or crashed", False
    return f"Ray lost it ({one_line(text)[:300]})", False
