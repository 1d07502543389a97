"""The actor that holds one engine on a Ray cluster. Its thread does what a local worker does, with the driver's units.

Nothing of torch is imported before the actor has set its environment: what it works from comes pickled.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import threading
from collections import deque
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.claim_file import HOLDER_FACTS
from pipeline.claim_holders import this_machine
from pipeline.errors import UserError
from pipeline.schema import unit_name
from pipeline.store import again, is_file, remove

if TYPE_CHECKING:
    from pipeline.shard import ShardRecord
    from teacher_dump.plan import Unit
    from teacher_dump.work import Work

TELL_SECONDS = 1.0
"""How long an actor waits for something worth telling before it tells how many tokens it has captured."""
NODE = "ray_node"
"""The Ray node a claim's holder runs on, in the claim."""


class Stopped(BaseException):
    """The driver wants no more of this engine: what is not committed is given up."""


class RayEngine:
    """One engine, started when the actor is created.

    Args:
        work: a pickled `Work` and the function that makes the engine, or None.
        marker: a file the driver made in the cache.
        folder: the driver's working folder, for relative paths.
        threads: cores it may use; 0: its part of the node's, going by GPUs.
        environment: variables of the driver's that decide how vLLM runs.
    """

    def __init__(self, work: bytes, marker: Path, folder: str, threads: int, environment: dict[str, str]) -> None:
        import ray

        context = ray.get_runtime_context()
        self._node = context.get_node_id()
        self._host = socket.gethostname()
        gpus = context.get_accelerator_ids().get("GPU", [])
        self._place = f"GPU{'s' * (len(gpus) > 1)} {','.join(gpus)} of {self._host}" if gpus else f"CPU of {self._host}"
        HOLDER_FACTS[NODE] = self._node
        os.environ.update(environment)
        os.environ["OMP_NUM_THREADS"] = str(threads or _own_cores(ray, self._node, len(gpus)))
        with contextlib.suppress(OSError):
            os.chdir(folder)
        self._open_mailbox()
        threading.Thread(target=self._run, args=(work, marker), name="engine", daemon=True).start()

    def _open_mailbox(self) -> None:
        self._changed = threading.Condition()
        self._messages: list[tuple[Any, ...]] = []
        self._tokens: dict[str, int] = {}
        self._answers: deque[tuple[Any, ...]] = deque()
        self._stop = False

    # What the driver calls.

    def hello(self) -> dict[str, str]:
        """Where this engine runs: its Ray node, its machine as claims call it, and its place in words."""
        return {"node": self._node, "machine": this_machine(), "place": self._place}

    def exchange(self, answer: tuple[Any, ...] | None) -> list[tuple[Any, ...]]:
        """Take the driver's answer to an earlier question; return what is to be told, as soon as there is something."""
        with self._changed:
            if answer is not None:
                self._answers.append(answer)
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._messages, TELL_SECONDS)
            self._flush_tokens()
            messages, self._messages = self._messages, []
        return messages

    def stop(self) -> None:
        """End the thread soon: claims are given up, and the last message is `stopped`."""
        with self._changed:
            self._stop = True
            self._changed.notify_all()

    # The thread.

    def _run(self, pickled: bytes, marker: Path) -> None:
        from teacher_dump.workers import told

        try:
            work, start = pickle.loads(pickled)
            check_storage(work, marker, self._host)
            self._work(work, start)
        except Stopped:
            self._tell("stopped")
        except BaseException as error:
            self._tell("failed", *told(error))

    def _work(self, work: Work, start: Any) -> None:
        from teacher_dump.shard_loop import ShardTaker

        with ShardTaker(work, self, start) as taker:
            taker.start()  # before anything is claimed: other engines may be faster
            while True:
                taker.settle()
                first = self._ask(idle=True)
                if first is not None:
                    taker.take(chain([first], self._more()), self._held_elsewhere)

    def _more(self) -> Iterator[Unit]:
        """Units as long as the driver has any; asked for while the one before is still captured."""
        while (unit := self._ask(idle=False)) is not None:
            yield unit

    def _ask(self, idle: bool) -> Unit | None:
        """The next unit, None if there is none now; an idle engine is answered when there is one."""
        with self._changed:
            self._tell("ask", idle)
            self._changed.wait_for(lambda: self._answers or self._stop)
            self._end_if_stopped()
            return self._answers.popleft()[0]

    def _held_elsewhere(self, unit: Unit) -> None:
        self._tell("held", unit_name(unit.unit))

    def _end_if_stopped(self) -> None:
        if self._stop:
            raise Stopped

    def _tell(self, *message: Any) -> None:
        with self._changed:
            self._flush_tokens()
            self._messages.append(message)
            self._changed.notify_all()

    def _flush_tokens(self) -> None:
        self._messages += [("captured", name, tokens) for name, tokens in self._tokens.items()]
        self._tokens.clear()

    # Its `Report`.

    def loading(self) -> None:
        self._tell("loading")

    def ready(self) -> None:
        self._end_if_stopped()
        self._tell("ready")

    def claimed(self, name: str) -> None:
        pass

    def captured(self, name: str, tokens: int) -> None:
        with self._changed:
            self._end_if_stopped()
            self._tokens[name] = self._tokens.get(name, 0) + tokens

    def committed(self, record: ShardRecord) -> None:
        self._tell("committed", record)

    def by_other(self, name: str, tokens: int) -> None:
        self._tell("by_other", name, tokens)


def _own_cores(ray: Any, node: str, gpus: int) -> int:
    """This engine's part of the node's cores, as many as it has of the node's GPUs."""
    resources: dict[str, float] = next((entry["Resources"] for entry in ray.nodes() if entry["NodeID"] == node), {})
    cores = min(len(os.sched_getaffinity(0)), int(resources.get("CPU", 1)) or 1)
    return max(1, int(cores * max(gpus, 1) / max(resources.get("GPU", 1), 1)))


def check_storage(work: Work, marker: Path, host: str) -> None:
    """See that this machine has the driver's cache, teacher and corpus, not folders of the same names.

    Raises:
        UserError: names the machine, the folder and the remedy.
    """
    own = marker.with_name(f"{marker.name}.{os.getpid()}.{host}.tmp")
    try:
        again(lambda: own.write_text(host), own)  # makes a network file system look at the folder anew
        seen = is_file(marker)
        remove(own)
    except OSError as error:
        raise UserError(
            f"{host} cannot write to the cache {work.cache} ({error.strerror or error}): a dump on several machines "
            "needs a cache on storage that all of them share (a network folder, or a URL such as s3://bucket/cache)"
        ) from None
    if not seen:
        raise UserError(
            f"{host} does not see what the driver wrote to {work.cache}: that folder is local to each machine; use one "
            "that all of them share (a network folder, or a URL such as s3://bucket/cache)"
        )
    if not (work.teacher.path / "config.json").is_file():
        raise UserError(
            f"{host} does not find the teacher in {work.teacher.path}: put it on storage that all machines share, in "
            "the same place"
        )
    first = work.plan.files[0].path
    if "://" not in first and not Path(first).is_file():
        raise UserError(
            f"{host} does not find the corpus file {first}: put the corpus on storage that all machines share, in the "
            "same place"
        )
