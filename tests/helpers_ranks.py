"""Training on several ranks of this machine: a process each, started as SLURM would start them.

The processes are forked from the tests' server, which has imported the training command already.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from helpers_fork import SERVER


def free_port() -> int:
    with closing(socket.socket()) as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def slurm(rank: int, nodes: int, per_node: int, port: int) -> dict[str, str]:
    """What srun tells a task."""
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": str(nodes * per_node),
        "SLURM_NTASKS_PER_NODE": str(per_node),
        "SLURM_NNODES": str(nodes),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % per_node),
        "SLURM_NODEID": str(rank // per_node),
        "SLURM_NODELIST": "127.0.0.1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def rank_main(
    arguments: list[str], variables: dict[str, str], output: Path, records: Path, stop: int, spoilt: int
) -> None:
    """One rank: the training command with everything that it prints in a file."""
    os.environ.update(variables, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch
    from lightning.pytorch.utilities import rank_zero_only

    from pipeline.errors import run_command
    from student import __main__ as command
    from student.training import ranks

    torch.set_num_threads(1)
    ranks.SHARED_SECONDS = 2.0
    rank = int(variables.get("SLURM_PROCID", "0"))
    rank_zero_only.rank = rank  # type: ignore[attr-defined] # Lightning asks the environment on import, which is past
    is_last = rank == 1 or "SLURM_PROCID" not in variables
    callback = recorder(records, stop if is_last else 0, spoilt if is_last else 0)
    command.TRAINER_DEFAULTS = {**command.TRAINER_DEFAULTS, "callbacks": [callback]}
    status = run_command(lambda: command.main(arguments))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def recorder(path: Path, stop: int, spoilt: int) -> Any:
    """A callback that writes down which rows every step of this rank had; with a SIGINT to itself at step `stop`, and
    NaN in the teacher's logits of the rows of step `spoilt`."""
    from lightning import Callback

    class Recorder(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            with open(path, "a") as file:
                file.write(json.dumps([trainer.global_step - 1, batch.sequence_id_B.tolist()]) + "\n")

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            if stop and trainer.global_step + 1 == stop:
                os.kill(os.getpid(), signal.SIGINT)
            if spoilt and trainer.global_step + 1 == spoilt:
                batch.lse_BT.fill_(float("nan"))
                batch.topk_logits_BTK.fill_(float("nan"))

        def on_validation_batch_start(self, trainer: Any, module: Any, batch: Any, index: int, *_: Any) -> None:
            ids = batch.sequence_id_B[(batch.target_BT >= 0).any(1)].tolist()
            with open(path.with_suffix(".heldout"), "a") as file:
                file.write(json.dumps([trainer.current_epoch, ids]) + "\n")

    return Recorder()


class Ranks:
    """One sitting: as many processes as ranks, and what became of them.

    Attributes:
        status: exit status of every rank.
        said: what every rank printed.
        rows: optimiser step -> sorted sequence ids of the batch, over all ranks.
        heldout: epoch -> ids of the held-out rows that were counted, over all ranks, sorted.
    """

    def __init__(
        self, folder: Path, arguments: list[str], nodes: int = 1, per_node: int = 1, stop: int = 0, **options: Any
    ) -> None:
        folder.mkdir(parents=True)
        ranks, port = nodes * per_node, free_port()
        self.processes = []
        for rank in range(ranks):
            variables = slurm(rank, nodes, per_node, port) if ranks > 1 else {}
            own = [*arguments, *options.get("of_rank", {}).get(rank, [])]
            paths = (folder / f"{rank}.out", folder / f"{rank}.rows")
            given = (own, variables, *paths, stop, options.get("spoilt", 0))
            process = SERVER.Process(target=rank_main, args=given)
            process.start()
            self.processes.append(process)
        for process in self.processes:
            process.join(120)
            if process.exitcode is None:
                process.kill()
        self.status = [process.exitcode for process in self.processes]
        self.said = [(folder / f"{rank}.out").read_text() for rank in range(ranks)]
        self.rows = gathered(sorted(folder.glob("*.rows")))
        self.heldout = gathered(sorted(folder.glob("*.heldout")))


def gathered(files: list[Path]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for file in files:
        for line in file.read_text().splitlines():
            number, ids = json.loads(line)
            found.setdefault(number, []).extend(ids)
    return {number: sorted(ids) for number, ids in sorted(found.items())}
