"""Which GPUs, or cores where there are none, each engine of a dump gets."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from pipeline.errors import UserError

VISIBLE = "CUDA_VISIBLE_DEVICES"
THREADS = "OMP_NUM_THREADS"


@dataclass(frozen=True)
class EngineSlot:
    """Where one engine runs.

    Attributes:
        label: for messages, such as "GPU 3", "GPUs 0,1" or "CPU".
        environment: what its process must have set before torch is imported.
    """

    label: str
    environment: dict[str, str] = field(default_factory=dict)


def engine_slots(gpus: int, tensor_parallel: int) -> list[EngineSlot]:
    """Divide `gpus` GPUs into engines of `tensor_parallel` each, or the cores of a machine that has no GPU.

    An entry of CUDA_VISIBLE_DEVICES may stand there twice: two engines then share that GPU. This process keeps each
    once, since CUDA shows nothing at all otherwise. 0 GPUs: one engine that takes what it finds.

    Raises:
        UserError: the number is negative or no multiple of `tensor_parallel`, or there are fewer GPUs.
    """
    if tensor_parallel < 1:
        raise UserError(f"--engine.tensor_parallel {tensor_parallel}: must be at least 1")
    if gpus < 0:
        raise UserError(f"--gpus {gpus}: must not be negative")
    if gpus % tensor_parallel:
        raise UserError(
            f"--gpus {gpus}: each engine takes {tensor_parallel} GPUs (--engine.tensor_parallel): ask for a multiple"
        )
    if gpus == 0:
        return [EngineSlot("this process")]
    engines = gpus // tensor_parallel
    threads = {THREADS: str(max(1, _threads() // engines))}
    visible = visible_gpus()
    if not visible:
        return [EngineSlot("CPU", threads)] * engines
    if len(visible) < gpus:
        named = os.environ.get(VISIBLE)
        where = f"{VISIBLE} names {named}" if named else f"this machine has {len(visible)}"
        raise UserError(f"--gpus {gpus}: {where}: ask for at most {len(visible)}, or for none to run one engine")
    slots = []
    for first in range(0, gpus, tensor_parallel):
        names = visible[first : first + tensor_parallel]
        label = f"GPU {names[0]}" if len(names) == 1 else f"GPUs {','.join(names)}"
        slots.append(EngineSlot(label, {VISIBLE: ",".join(names), **threads}))
    return slots


def visible_gpus() -> list[str]:
    """Entries of CUDA_VISIBLE_DEVICES, else the numbers of all GPUs; none where torch finds no GPU."""
    import torch

    named = os.environ.get(VISIBLE)
    entries = [entry.strip() for entry in named.split(",") if entry.strip()] if named is not None else None
    if entries:
        os.environ[VISIBLE] = ",".join(dict.fromkeys(entries))
    found = torch.cuda.device_count()
    if not found:
        return []
    return entries if entries is not None else [str(number) for number in range(found)]


def _threads() -> int:
    """What all engines together may use."""
    try:
        return int(os.environ[THREADS])
    except (KeyError, ValueError):
        return len(os.sched_getaffinity(0))
