"""What it costs to train from an object store: batches a second from a local disk, from a store, and from its copies.

    python -m benchmarks.remote_loader [--cache s3://bucket/folder] [--tokens N]

Without --cache an S3-compatible server (moto) is started on this machine, which says nothing of a real store's network,
but goes the whole way: requests, row groups by range, copies on the local disk, decoding, batches. The rows are random
and look like a teacher's (K=64).
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measured import cpu_name, table, write_results
from benchmarks.random_cache import benchmark_spec, write_random_cache
from pipeline.cache import Cache
from pipeline.local_copies import LocalCopies
from pipeline.store import open_path
from student.data.loader import TrainLoader

BATCH_ROWS = 16
WINDOW = 4
"""Groups mixed: few enough that none stays decoded until the next epoch."""


@contextlib.contextmanager
def local_server() -> Iterator[str]:
    """An S3-compatible server in a process of its own; yields the URL of an empty bucket."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(AWS_ACCESS_KEY_ID="x", AWS_SECRET_ACCESS_KEY="x", AWS_DEFAULT_REGION="us-east-1")
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port)
                connection.request("PUT", "/bucket")
                connection.getresponse()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        yield "s3://bucket/cache"
    finally:
        process.kill()
        process.wait()


def copy_to(cache: Path, url: str) -> None:
    """Every file of a cache to a store."""
    remote = open_path(url)
    for path in sorted(cache.rglob("*")):
        if path.is_file():
            (remote / str(path.relative_to(cache))).write_bytes(path.read_bytes())


def epoch_rate(loader: TrainLoader) -> float:
    """Thousands of tokens a second over one epoch."""
    started, tokens = time.perf_counter(), 0
    for batch in loader:
        tokens += batch.tokens
    return tokens / (time.perf_counter() - started) / 1e3


def run(url: str | None, tokens: int, repetitions: int) -> list[dict[str, object]]:
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as open_things:
        local = Path(scratch) / "cache"
        write_random_cache(local, benchmark_spec(512, 49152, 576), tokens)
        place = url or open_things.enter_context(local_server())
        copy_to(local, place)
        rates: dict[str, list[float]] = {"local disk": [], "store, first epoch": [], "store, later epochs": []}
        for number in range(repetitions):
            copies = Path(scratch) / f"copies-{number}"
            disk = TrainLoader([Cache(local)], BATCH_ROWS, 0, WINDOW)
            remote = TrainLoader([Cache(place, LocalCopies(copies, 10**12))], BATCH_ROWS, 0, WINDOW)
            rates["local disk"].append(epoch_rate(disk))
            rates["store, first epoch"].append(epoch_rate(remote))
            rates["local disk"].append(epoch_rate(disk))
            rates["store, later epochs"].append(epoch_rate(remote))
            shutil.rmtree(copies)
    base = max(rates["local disk"])
    return [
        {"read from": name, "ktok/s": max(found), "of local disk": max(found) / base, "all": found}
        for name, found in rates.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", help="URL of an empty folder on a store; by default a server on this machine")
    parser.add_argument("--tokens", type=int, default=1 << 22, help="tokens of the cache")
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    rows = run(options.cache, options.tokens, options.repetitions)
    print(table(rows, ["read from", "ktok/s", "of local disk"]))
    path = write_results("remote_loader", rows, device=cpu_name(), store=options.cache or "moto on this machine")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
