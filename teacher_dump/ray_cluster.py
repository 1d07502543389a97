"""The Ray cluster a dump runs on: connecting to it, its room for engines, and claims whose holders are dead."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.claim_file import REFRESH_SECONDS
from pipeline.claim_holders import Silence, free, free_if_dead, held_by, this_machine
from pipeline.errors import UserError, one_line
from pipeline.stop_signals import interrupt_on_sigterm
from pipeline.store import is_remote
from teacher_dump.gpus import THREADS, visible_gpus
from teacher_dump.ray_engine import NODE, RayEngine

log = logging.getLogger("teacher_dump.ray")

AUTO, LOCAL = "auto", "local"
STORE_BYTES = 100 << 20
"""Of Ray's object store where Ray is started here: rows never pass through it."""
REACH_SECONDS = 10.0
LOST_NODE_SECONDS = 2.5 * REFRESH_SECONDS
"""A claim held on a node that Ray calls dead must not have been refreshed for so long: the node may only be cut off."""


@dataclass(frozen=True)
class Node:
    """A living node of the cluster."""

    id: str
    host: str
    cpus: float
    gpus: float


def import_ray(option: str) -> Any:
    """Ray, with its reports to its makers off.

    Raises:
        UserError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise UserError(
            f"--ray {option}: Ray is not installed here: install it with `pip install 'distil-xlstm[ray]'` (make setup "
            "does), or leave --ray out to use this machine without it"
        ) from None
    return ray


@contextlib.contextmanager
def connected(option: str, say: Callable[[str], None]) -> Iterator[Any]:
    """The `ray` module while this process is a driver of the cluster that `--ray` names.

    Args:
        option: an address, `auto` or `local`.
        say: told where Ray was started, if it was.

    Raises:
        UserError: Ray is not installed, or there is no such cluster.
    """
    ray = import_ray(option)
    if option.startswith("ray://"):
        raise UserError(
            f"--ray {option}: Ray Client is not supported: run the command on a machine of the cluster (--ray auto), "
            "or hand it in with `ray job submit`"
        )
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    _hush(ray)
    try:
        address = _cluster_here() if option == AUTO else option
        if address is None:
            say("no Ray cluster runs on this machine and RAY_ADDRESS is not set: Ray is started here alone")
            address = LOCAL
        if address == LOCAL:
            # Engines of GPUs take a CPU each, of which there must be as many.
            threads = None if visible_gpus() else _own_threads()
            quiet |= {"include_dashboard": False, "object_store_memory": STORE_BYTES, "num_cpus": threads}
            quiet |= {"_node_ip_address": "127.0.0.1"}  # nobody else needs to reach it
        else:
            _reach(address)
        ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        program = Path(sys.executable).with_name("ray")  # its folder need not be on PATH
        named = f" (RAY_ADDRESS is {os.environ.get('RAY_ADDRESS')})" if option == AUTO else ""
        raise UserError(
            f"--ray {option}{named}: {one_line(error)[:400]}: start Ray with `{program} start --head` here and "
            f"`{program} start --address=...` on the other machines, then run this command on one of them with --ray "
            "auto"
        ) from None
    interrupt_on_sigterm()  # Ray has put a handler of its own there
    try:
        yield ray
    finally:
        ray.shutdown()


def _cluster_here() -> str | None:
    """The address that RAY_ADDRESS names, else that of the cluster this machine is part of; None: there is none.

    Raises:
        ConnectionError: there are several.
    """
    if named := os.environ.get("RAY_ADDRESS"):
        return named
    from ray._private.services import canonicalize_bootstrap_address_or_die

    try:
        address = canonicalize_bootstrap_address_or_die(AUTO)
        _reach(address)  # Ray remembers the last one that was started here, even when it is gone
    except OSError as error:
        if "multiple" in str(error):
            raise
        return None
    return str(address)


def _reach(address: str) -> None:
    """Look whether anything listens at HOST:PORT: Ray itself goes on trying for minutes.

    Raises:
        OSError: nothing does.
        ValueError: that is no address.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError("an address is HOST:PORT, such as 10.0.0.1:6379")
    socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_SECONDS).close()


def _own_threads() -> int | None:
    try:
        return int(os.environ[THREADS])
    except (KeyError, ValueError):
        return None


def _hush(ray: Any) -> None:
    """Ray prints a paragraph on stdout for every lost process, of which we tell in a sentence: to the debug log."""
    worker: Any = getattr(getattr(ray, "_private", None), "worker", None)
    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = lambda data, *_, **__: log.debug("%s", data)


class EngineRoom:
    """How many engines the cluster has room for, and what each takes.

    Without any GPU in the cluster at the start, engines run on CPUs: `gpus` of them, or one a node. The cluster may
    grow and shrink: `count` is asked again and again.

    Args:
        ray: the connected module.
        gpus: as `--gpus`; 0: all there are.
        tensor_parallel: GPUs of one engine.

    Raises:
        UserError: `gpus` is no multiple of `tensor_parallel`, or no node has that many.
    """

    def __init__(self, ray: Any, gpus: int, tensor_parallel: int) -> None:
        self.ray = ray
        if tensor_parallel < 1 or gpus < 0 or gpus % tensor_parallel:
            raise UserError(
                f"--gpus {gpus}: each engine takes {tensor_parallel} (--engine.tensor_parallel): ask for a multiple"
            )
        self.asked, self.ranks = gpus // tensor_parallel, tensor_parallel
        nodes = self.nodes()
        self.on_gpu = any(node.gpus >= 1 for node in nodes)
        if self.on_gpu:
            largest = max(node.gpus for node in nodes)
            if largest < tensor_parallel:
                raise UserError(
                    f"--engine.tensor_parallel {tensor_parallel}: no node of the Ray cluster has more than {largest:g} "
                    "GPUs, and an engine is not spread over nodes: lower it"
                )
            self.cpus, self.threads = 1.0, 0
        else:
            usable = [node for node in nodes if node.cpus >= 1]
            if not usable:
                raise UserError(
                    "--ray: the cluster offers neither a GPU nor a CPU: start nodes with --num-cpus or GPUs"
                )
            a_node = -(-self.asked // len(usable)) if self.asked else 1
            cores = min(node.cpus for node in usable)
            self.cpus = cores // a_node if cores >= a_node else cores / a_node
            self.threads = max(1, int(self.cpus // tensor_parallel))

    def nodes(self) -> list[Node]:
        found = []
        for entry in self.ray.nodes():
            if entry["Alive"]:
                has = entry["Resources"]
                host = entry["NodeManagerHostname"]
                found.append(Node(entry["NodeID"], host, has.get("CPU", 0.0), has.get("GPU", 0.0)))
        return found

    def count(self, nodes: list[Node]) -> int:
        """Engines that there is room for now, or that were asked for: those without a place wait for one."""
        return self.asked or sum(self.on(node) for node in nodes)

    def on(self, node: Node) -> int:
        """Engines that a node has room for."""
        return int(node.gpus // self.ranks) if self.on_gpu else int(node.cpus >= self.cpus)

    def start(self, *arguments: Any) -> tuple[Any, Any]:
        """Start an engine wherever there is room, at once or later.

        Args:
            arguments: of `RayEngine`, without its threads.

        Returns:
            The actor, and its placement group or None.
        """
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        takes = {"CPU": self.cpus, **({"GPU": float(self.ranks)} if self.on_gpu else {})}
        group: Any = None
        strategy: Any = "SPREAD"
        if self.ranks > 1:  # its GPUs are of one node, and are kept together from the start
            group = placement_group([takes], strategy="STRICT_PACK")
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
        work, marker, folder, environment = arguments
        options = {"num_cpus": takes["CPU"], "num_gpus": takes.get("GPU", 0), "scheduling_strategy": strategy}
        actor = self.ray.remote(RayEngine).options(max_restarts=0, max_concurrency=2, **options)
        return actor.remote(work, marker, folder, self.threads, environment), group

    def end(self, actor: Any, group: Any) -> None:
        """Kill an engine and give its place back."""
        from ray.util.placement_group import remove_placement_group

        with contextlib.suppress(Exception):
            self.ray.kill(actor)
        if group is not None:
            with contextlib.suppress(Exception):
                remove_placement_group(group)


class DeadClaims:
    """Frees claims whose holders are gone, those of other machines of the cluster too. A live writer's stay.

    The machine of the claim looks for the process itself, if it is in the cluster. If Ray calls the holder's node dead,
    the claim must not have been refreshed for `LOST_NODE_SECONDS` as well. For all others the rule of the cache holds.
    """

    def __init__(self, room: EngineRoom, cache: Path) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._room, self._cache, self._pin = room, cache, NodeAffinitySchedulingStrategy
        self._silence = Silence(LOST_NODE_SECONDS)
        self._machines: dict[str, str] = {}  # of nodes
        self._asked: dict[str, Any] = {}  # what is being looked at, by node or by work
        self._looked = 0.0
        self._nodes: dict[str, bool] = {}  # whether they live

    def machine_is(self, node: str, machine: str) -> None:
        """An engine on that node has told so."""
        self._machines[node] = machine

    def free(self, name: str) -> bool:
        """Whether the work called `name` is free, or could be freed; does not wait, so ask again."""
        try:
            return self._free(name)
        except Exception as error:
            if not (isinstance(error, OSError) or is_remote(self._cache)):  # stores' drivers have kinds of their own
                raise
            log.debug("the claim of %s: %s", name, error)  # the storage may answer next time
            return False

    def _free(self, name: str) -> bool:
        if free_if_dead(self._cache, name):
            return True
        holding = held_by(self._cache, name)
        if holding is None:
            return True
        if time.monotonic() - self._looked > 1.0:
            self._nodes = {entry["NodeID"]: entry["Alive"] for entry in self._room.ray.nodes()}
            self._looked = time.monotonic()
        node = self._living_node(holding.machine)
        if node is not None:
            return self._on(node, name, free_if_dead, self._cache, name) is True
        if self._nodes.get(holding.record.get(NODE, "")) is False and self._silence.lasts(holding):
            return free(self._cache, name, holding)
        return False

    def _living_node(self, machine: str) -> str | None:
        """A living node that is a claim's machine."""
        for node, lives in self._nodes.items():
            if lives and node not in self._machines:
                found = self._on(node, node, this_machine)
                if found is not None:
                    self._machines[node] = found
            if lives and self._machines.get(node) == machine:
                return node
        return None

    def _on(self, node: str, key: str, task: Callable[..., Any], *arguments: Any) -> Any:
        """What a task on that node returned, None while it runs or if it failed."""
        ray = self._room.ray
        if key not in self._asked:
            pinned = ray.remote(task).options(
                num_cpus=0, max_retries=0, scheduling_strategy=self._pin(node, soft=False)
            )
            self._asked[key] = pinned.remote(*arguments)
            return None
        if not ray.wait([self._asked[key]], timeout=0)[0]:
            return None
        try:
            return ray.get(self._asked.pop(key))
        except Exception as error:  # the node left
            log.debug("%s on %s: %s", task.__name__, node, error)
            return None
