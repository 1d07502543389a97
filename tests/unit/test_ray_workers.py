"""The driver of a dump on Ray, against engines that do what they are told: who gets which shard, and who no more."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import stop_signals
from pipeline.errors import UserError
from pipeline.schema import unit_name
from pipeline.shard import ShardRecord
from pipeline.stop_signals import interrupt_on_sigterm, stops_wait
from teacher_dump import ray_workers
from teacher_dump.plan import Unit
from teacher_dump.progress import DumpProgress
from teacher_dump.ray_cluster import EngineRoom, Node
from teacher_dump.ray_workers import ATTEMPTS, LOSSES, RayWorkers


class RayError(Exception):
    pass


class ActorUnavailableError(RayError):
    pass


CRASH = RayError("The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR")


@dataclass(frozen=True)
class Work:
    cache: Path
    teacher: Any


class Ref:
    """Its value does not change, however often it is asked for."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = functools.cache(call)


class FakeEngine:
    """Answers at once. `act(engine, unit)` gives what it tells of a unit, or raises."""

    def __init__(self, number: int, node: str, act: Callable[[FakeEngine, Unit], list[tuple[Any, ...]]]) -> None:
        self.number, self.node, self._act = number, node, act
        self.ended = False
        self.given: list[str] = []
        self.started = False
        self.hello = SimpleNamespace(remote=lambda: Ref(self._hello))
        self.exchange = SimpleNamespace(remote=lambda answer: Ref(lambda: self._exchange(answer)))
        self.stopping = False
        self.stop = SimpleNamespace(remote=lambda: setattr(self, "stopping", True))

    def _hello(self) -> dict[str, str]:
        return {"node": self.node, "machine": self.node, "place": f"CPU of {self.node}"}

    def _exchange(self, answer: tuple[Unit | None] | None) -> list[tuple[Any, ...]]:
        if not self.started:
            self.started = True
            return [("loading",), ("ready",), ("ask", True)]
        if self.stopping:
            return [("stopped",)]
        if answer is None:
            return []
        unit = answer[0]
        assert unit is not None
        self.given.append(unit_name(unit.unit))
        return self._act(self, unit)


class FakeRay:
    exceptions = SimpleNamespace(RayError=RayError, ActorUnavailableError=ActorUnavailableError)

    def put(self, value: Any) -> Any:
        return value

    def wait(self, refs: list[Any], num_returns: int = 1, timeout: float = 0) -> tuple[list[Any], list[Any]]:
        return refs[:num_returns], refs[num_returns:]

    def get(self, ref: Any) -> Any:
        return ref.call()


class FakeRoom:
    """A cluster of named nodes with a place each."""

    ranks, on_gpu = 1, False

    def __init__(self, nodes: list[str], act: Callable[[FakeEngine, Unit], list[tuple[Any, ...]]]) -> None:
        self.ray, self.names, self.act = FakeRay(), nodes, act
        self.engines: list[FakeEngine] = []

    def nodes(self) -> list[Node]:
        return [Node(name, name, 1.0, 0.0) for name in self.names]

    def count(self, nodes: list[Node]) -> int:
        return len(nodes)

    def start(self, *_: Any) -> tuple[Any, Any]:
        busy = [engine.node for engine in self.engines if not engine.ended]
        node = next(name for name in self.names if name not in busy)
        self.engines.append(FakeEngine(len(self.engines) + 1, node, self.act))
        return self.engines[-1], None

    def end(self, actor: FakeEngine, group: Any) -> None:
        actor.ended = True


class Claims:
    """Claims that are free after having been asked for `after` times."""

    after = 1

    def __init__(self, *_: Any) -> None:
        self.asked: dict[str, int] = {}

    def machine_is(self, node: str, machine: str) -> None:
        pass

    def free(self, name: str) -> bool:
        self.asked[name] = self.asked.get(name, 0) + 1
        return self.asked[name] >= self.after


def commits(engine: FakeEngine, unit: Unit) -> list[tuple[Any, ...]]:
    name = unit_name(unit.unit)
    record = ShardRecord(
        unit.unit, "train", f"{name}.parquet", 9, "", "", 8, 512, False, {}, 1.0, 0.1, "c", "d", {}, "cpu", 1.0
    )
    return [("captured", name, 512), ("committed", record), ("ask", True)]


@pytest.fixture
def dump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RayWorkers]:
    monkeypatch.setattr(ray_workers, "DeadClaims", Claims)
    monkeypatch.setattr(ray_workers, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(ray_workers, "RECRUIT_SECONDS", 0.0)

    def make(room: FakeRoom, units: int) -> RayWorkers:
        work: Any = Work(tmp_path, SimpleNamespace(name="toy"))
        the_room: Any = room
        progress = DumpProgress("toy", units, units * 512, 0)
        return RayWorkers(work, [Unit(i, "train", i, i + 1) for i in range(units)], the_room, progress)

    return make


def test_every_shard_is_handed_out_once(dump: Callable[..., RayWorkers]) -> None:
    room = FakeRoom(["a", "b", "c"], commits)
    workers = dump(room, 20)
    assert workers.run() == []
    assert sorted(name for engine in room.engines for name in engine.given) == [f"shard-{i:05d}" for i in range(20)]
    assert all(engine.given and engine.ended for engine in room.engines) and len(room.engines) == 3
    assert workers.progress.written == {f"shard-{i:05d}" for i in range(20)}
    assert workers.progress.tokens == 20 * 512


def test_no_more_engines_than_shards(dump: Callable[..., RayWorkers]) -> None:
    room = FakeRoom(["a", "b", "c"], commits)
    dump(room, 2).run()
    assert len(room.engines) == 2


def test_the_next_shard_is_asked_for_early_and_none_is_an_answer(dump: Callable[..., RayWorkers]) -> None:
    """An engine that captures is answered at once even when there is nothing more, or it would stand still."""
    held: list[Unit] = []

    def act(engine: FakeEngine, unit: Unit) -> list[tuple[Any, ...]]:
        held.append(unit)
        return [("captured", unit_name(unit.unit), 100), ("ask", False)]

    class Early(FakeEngine):  # commits all it holds once it is told that there is no more
        def _exchange(self, answer: tuple[Unit | None] | None) -> list[tuple[Any, ...]]:
            if answer is not None and answer[0] is None:
                told = [message for unit in held for message in commits(self, unit)[1:2]]
                return [*told, ("ask", True)]
            return super()._exchange(answer)

    room = FakeRoom(["a"], act)
    room.start = lambda *_: (room.engines.append(Early(1, "a", act)) or room.engines[-1], None)  # type: ignore[method-assign]
    workers = dump(room, 3)
    workers.run()
    assert [unit.unit for unit in held] == [0, 1, 2] and len(workers.progress.written) == 3


def test_a_shard_that_kills_is_given_up_and_its_neighbours_are_not(dump: Callable[..., RayWorkers]) -> None:
    """Engines hold two shards at a time; those that were beside the poison come last, alone, and are written."""
    hands: dict[int, list[Unit]] = {}
    alone: list[bool] = []

    def act(engine: FakeEngine, unit: Unit) -> list[tuple[Any, ...]]:
        held = hands.setdefault(engine.number, [])
        if unit.unit == 1:
            alone.append(not held)
            raise CRASH
        if unit.unit == 0 and engine.number == 1:
            held.append(unit)
            return [("captured", unit_name(unit.unit), 100), ("ask", False)]
        return commits(engine, unit)

    room = FakeRoom(["a"], act)
    workers = dump(room, 6)
    with pytest.raises(UserError, match="1 shard could not be written in 3 attempts") as caught:
        workers.run()
    assert "shard-00001: its process was killed or crashed" in str(caught.value)
    assert workers.progress.written == {f"shard-{i:05d}" for i in (0, 2, 3, 4, 5)}
    assert alone == [False] + [True] * (ATTEMPTS - 1)
    assert len(workers.lost) == ATTEMPTS
    assert workers.lost[0].startswith("worker 1 (CPU of a) stopped while it held shard-00000, shard-00001: ")
    assert workers.progress.tokens == 5 * 512, "tokens lost with an engine are not counted"


def test_nodes_that_leave_are_nobodys_fault(dump: Callable[..., RayWorkers]) -> None:
    left = 0

    def act(engine: FakeEngine, unit: Unit) -> list[tuple[Any, ...]]:
        nonlocal left
        if unit.unit == 0 and left < 2 * LOSSES:
            left += 1
            room.names = [f"node-{left}"]
            raise RayError("The actor died because its node has died.")
        return commits(engine, unit)

    room = FakeRoom(["node-0"], act)
    workers = dump(room, 2)
    lost = workers.run()
    assert len(lost) == 2 * LOSSES and all("its node left the Ray cluster" in sentence for sentence in lost)
    assert len(workers.progress.written) == 2


def test_what_every_engine_refuses_ends_the_run(dump: Callable[..., RayWorkers], monkeypatch: Any) -> None:
    monkeypatch.setattr(FakeEngine, "_exchange", lambda self, answer: [("loading",), ("failed", "set it to true", "")])
    room = FakeRoom(["a", "b"], commits)
    with pytest.raises(UserError, match="all workers stopped with 5 shards left: set it to true .2 times"):
        dump(room, 5).run()
    assert len(room.engines) == 2, "the same place would refuse again"


def test_engines_that_crash_at_their_start_are_not_started_for_ever(
    dump: Callable[..., RayWorkers], monkeypatch: Any
) -> None:
    def crash(self: FakeEngine, answer: Any) -> list[tuple[Any, ...]]:
        raise CRASH

    monkeypatch.setattr(FakeEngine, "_exchange", crash)
    room = FakeRoom(["a"], commits)
    with pytest.raises(UserError, match="all workers stopped with 2 shards left: its process was killed or crashed"):
        dump(room, 2).run()
    assert len(room.engines) == LOSSES


def test_shards_that_others_hold_come_back_when_they_are_free(
    dump: Callable[..., RayWorkers], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Claims, "after", 3)
    seen: list[int] = []

    def act(engine: FakeEngine, unit: Unit) -> list[tuple[Any, ...]]:
        seen.append(unit.unit)
        name = unit_name(unit.unit)
        if unit.unit == 0 and seen.count(0) == 1:
            return [("held", name), ("ask", True)]
        if unit.unit == 0:
            return [("by_other", name, 512), ("ask", True)]
        return commits(engine, unit)

    workers = dump(FakeRoom(["a"], act), 3)
    started = time.monotonic()
    assert workers.run() == []
    assert seen == [0, 1, 2, 0] and workers.progress.by_others == {"shard-00000": 512}
    assert time.monotonic() - started > 0.5, "claims are looked at with pauses"


def test_an_engine_out_of_reach_for_a_moment_is_replaced(dump: Callable[..., RayWorkers]) -> None:
    """What it told meanwhile may be lost."""

    def act(engine: FakeEngine, unit: Unit) -> list[tuple[Any, ...]]:
        if engine.number == 1:
            raise ActorUnavailableError("unavailable")
        return commits(engine, unit)

    room = FakeRoom(["a"], act)
    lost = dump(room, 2).run()
    assert lost == ["worker 1 (CPU of a) stopped while it held shard-00000: the connection to it was lost for a moment"]
    assert room.engines[0].ended and set(room.engines[1].given) == {"shard-00000", "shard-00001"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_that_comes_while_a_message_is_taken_in(
    dump: Callable[..., RayWorkers], monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """What an engine told is taken in whole, and once, before the dump stops."""
    monkeypatch.setattr(stop_signals, "_came", False)
    room = FakeRoom(["a", "b"], commits)
    workers = dump(room, 20)
    answer = workers._answer

    def answer_and_stop(engine: Any) -> tuple[Unit | None] | None:
        given = answer(engine)
        if "shard-00006" in engine.held:
            os.kill(os.getpid(), number)
        return given

    monkeypatch.setattr(workers, "_answer", answer_and_stop)
    before = {stop: signal.getsignal(stop) for stop in (signal.SIGINT, signal.SIGTERM)}
    interrupt_on_sigterm()
    try:
        with pytest.raises(KeyboardInterrupt), stops_wait():  # as in every dump
            workers.run()
    finally:
        for stop, handler in before.items():
            signal.signal(stop, handler)
    assert len(workers.progress.written) == 20 - workers.left < 20
    assert all(engine.ended for engine in room.engines)


def resources(**of_nodes: dict[str, float]) -> Any:
    nodes = [
        {"NodeID": name, "Alive": True, "NodeManagerHostname": name, "Resources": has} for name, has in of_nodes.items()
    ]
    return SimpleNamespace(nodes=lambda: nodes)


@pytest.mark.parametrize(
    "gpus, ranks, nodes, expected",
    [
        (0, 1, {"a": {"CPU": 8.0, "GPU": 8.0}, "b": {"CPU": 8.0, "GPU": 4.0}, "head": {"CPU": 2.0}}, (12, 1.0, 0)),
        (0, 4, {"a": {"CPU": 8.0, "GPU": 8.0}, "b": {"CPU": 8.0, "GPU": 7.0}}, (3, 1.0, 0)),
        (4, 2, {"a": {"CPU": 8.0, "GPU": 8.0}}, (2, 1.0, 0)),
        (16, 1, {"a": {"CPU": 8.0, "GPU": 8.0}}, (16, 1.0, 0)),  # more may join
        (0, 1, {"a": {"CPU": 8.0}, "b": {"CPU": 4.0}, "head": {}}, (2, 4, 4)),
        (4, 1, {"a": {"CPU": 8.0}, "b": {"CPU": 4.0}}, (4, 2, 2)),
        (4, 2, {"a": {"CPU": 8.0}, "b": {"CPU": 4.0}}, (2, 4, 2)),
        (4, 1, {"a": {"CPU": 2.0}}, (4, 0.5, 1)),
    ],
)
def test_room_for_engines(gpus: int, ranks: int, nodes: dict[str, Any], expected: tuple[Any, ...]) -> None:
    room = EngineRoom(resources(**nodes), gpus, ranks)
    assert (room.count(room.nodes()), room.cpus, room.threads) == expected


@pytest.mark.parametrize(
    "gpus, ranks, nodes, told",
    [
        (3, 2, {"a": {"GPU": 4.0}}, "--gpus 3: each engine takes 2"),
        (0, 4, {"a": {"GPU": 2.0}, "b": {"GPU": 2.0}}, "no node of the Ray cluster has more than 2 GPUs"),
        (2, 1, {"head": {}}, "offers neither a GPU nor a CPU"),
    ],
)
def test_room_that_cannot_be(gpus: int, ranks: int, nodes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        EngineRoom(resources(**nodes), gpus, ranks)
