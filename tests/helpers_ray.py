"""A Ray cluster of several nodes on this machine, and drivers that dump on it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers_dump import REPOSITORY, dump_command, environment

STORE_BYTES = 80 << 20


class RayCluster:
    """A head without a place for engines, and nodes of one CPU each. Everything of it ends with `close`."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets want short paths
        self.environment = environment(
            RAY_TMPDIR=str(self.folder),
            RAY_USAGE_STATS_ENABLED="0",
            PYTHONPATH=os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "tests"))),
        )
        self._before = dict(os.environ)
        os.environ.update(self.environment)
        os.environ.pop("RAY_ADDRESS", None)
        arguments = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE_BYTES}
        self._cluster = Cluster(initialize_head=True, head_node_args=arguments)
        self.address: str = self._cluster.address
        self.nodes: list[Any] = []
        self.apart: list[subprocess.Popen[bytes]] = []

    def add(self, num_gpus: int = 0) -> Any:
        """A node; its GPUs are names only."""
        node = self._cluster.add_node(num_cpus=1, num_gpus=num_gpus, object_store_memory=STORE_BYTES)
        self.nodes.append(node)
        return self.nodes[-1]

    def remove(self, node: Any, gently: bool = False) -> None:
        """At once, as when a machine loses its power; `gently`: as when it is shut down."""
        count = self.living()
        self.nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=gently)
        assert within(60, lambda: self.living() < count)

    def add_apart(self, hidden: Path | None = None) -> subprocess.Popen[bytes]:
        """A node with process numbers of its own, as another machine has: nobody here can look whether its processes
        live. `hidden`: a folder that is another one there."""
        ray = Path(sys.executable).with_name("ray")
        start = f"exec {ray} start --address {self.address} --num-cpus 1 --object-store-memory {STORE_BYTES} --block"
        mount = f"mount -t tmpfs none {hidden} && " if hidden else ""
        unshare = ["unshare", "--pid", "--fork", "--mount-proc", "--mount", "--kill-child", "sh", "-c", mount + start]
        log = (self.folder / "apart.log").open("a")
        self.apart.append(subprocess.Popen(unshare, stdout=log, stderr=log, env=self.environment))
        count = self.living() + 1
        assert within(60, lambda: self.living() == count), (self.folder / "apart.log").read_text()
        return self.apart[-1]

    def remove_apart(self, node: subprocess.Popen[bytes]) -> None:
        count = self.living()
        self.apart.remove(node)
        node.kill()
        node.wait()
        assert within(60, lambda: self.living() < count)

    def remove_all(self) -> None:
        """All but the head."""
        for node in list(self.nodes):
            self.remove(node, gently=True)
        for process in list(self.apart):
            self.remove_apart(process)

    def living(self) -> int:
        return len(self._cluster.global_state._live_node_ids())

    def close(self) -> None:
        for process in list(self.apart):
            self.remove_apart(process)
        self._cluster.shutdown()
        os.environ.clear()
        os.environ.update(self._before)
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> RayCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def can_unshare() -> bool:
    """Whether this machine lets us start nodes with `add_apart`."""
    try:
        command = ["unshare", "--pid", "--fork", "--mount-proc", "--mount", "--kill-child", "true"]
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def start_dump(cluster: RayCluster, command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*command, "--ray", cluster.address],
        env=cluster.environment,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def replayed(
    teacher: Path, corpus: Path, cache: Path, shards: int, recorded: Path, script: str, *more: str
) -> list[str]:
    """The command of `dump_command`, with engines that replay the rows of the cache `recorded`."""
    command = dump_command(teacher, corpus, cache, shards, *more)
    at = command.index("teacher_dump")
    return [*command[:at], "replayed_dump", str(recorded), script, *command[at + 1 :]]


def within(seconds: float, condition: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> bool:
    """Whether `condition` came true in time, and while `process` ran."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline and (process is None or process.poll() is None):
        time.sleep(0.01)
    return condition()
