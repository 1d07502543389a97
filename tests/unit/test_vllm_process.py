"""How an engine is ended."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from teacher_dump.vllm_process import shut_down, sockets_of


class Queue:
    """A message queue of vLLM's, as far as its sockets go."""

    def __init__(self, context: zmq.Context[Any]) -> None:
        self.local_socket, self.remote_socket = context.socket(zmq.PUB), None
        self._spin_condition = SimpleNamespace(local_notify_socket=context.socket(zmq.PUB))


def test_sockets_of_an_executor_that_has_lost_a_worker_are_closed() -> None:
    """It forgets its queues then, and its own shutdown fails."""
    context: zmq.Context[Any] = zmq.Context()
    queue, answers = Queue(context), Queue(context)
    executor = SimpleNamespace(rpc_broadcast_mq=queue, response_mqs=[answers], workers=[])
    engine = SimpleNamespace(model_executor=executor)
    sockets = sockets_of(engine)
    assert len(sockets) == 4 and not any(socket.closed for socket in sockets)
    executor.rpc_broadcast_mq, executor.response_mqs = None, []

    def shutdown() -> None:
        raise KeyboardInterrupt

    engine.engine_core = SimpleNamespace(shutdown=shutdown)
    with pytest.raises(KeyboardInterrupt):
        shut_down(engine, sockets)
    assert all(socket.closed for socket in sockets)
    context.term()  # waits for ever where a socket is open


def test_an_engine_of_one_process_has_no_sockets() -> None:
    assert sockets_of(SimpleNamespace()) == []
