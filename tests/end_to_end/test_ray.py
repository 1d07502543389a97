"""Stage one on Ray: the rows are those of one engine on one machine, whoever is lost on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers_dump import REPOSITORY, SHARDS, assert_same_rows, dump, dump_command, environment, rows
from helpers_ray import RayCluster, can_unshare, replayed, start_dump, within

from pipeline.verify import verify_cache

pytest.importorskip("ray")
ALL = {"heldout-00000", *(f"shard-{i:05d}" for i in range(SHARDS))}


STARTS = "import ray; ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False); print(ray.get(ray.put(7)))"


@pytest.fixture(scope="module", autouse=True)
def ray_starts() -> None:
    """Ray needs loopback ports, shared memory and processes of its own: some sandboxes do not give it these."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", STARTS], env=environment(), capture_output=True, text=True, timeout=120
        )
        told = done.stderr[-300:] if done.returncode or "7" not in done.stdout else ""
    except subprocess.TimeoutExpired:
        told = "it did not start in two minutes"
    if told:
        pytest.skip(f"Ray itself does not run on this machine: {told}")


@pytest.fixture(scope="module")
def one_cluster() -> Iterator[RayCluster]:
    with RayCluster() as cluster:
        yield cluster


@pytest.fixture
def cluster(one_cluster: RayCluster) -> Iterator[RayCluster]:
    """With one node, whatever an earlier test did."""
    one_cluster.add()
    yield one_cluster
    one_cluster.remove_all()


def check(cache: Path, undisturbed: Path) -> None:
    """All rows are there once, to the bit, and nothing is left over."""
    found = rows(cache)
    assert set(found) == ALL
    assert_same_rows(rows(undisturbed), found)
    assert verify_cache(cache).problems == []
    assert not list(cache.glob(".*.tmp")) and not list((cache / "claims").glob("*.json"))


def holders(cache: Path) -> set[int]:
    found = set()
    for path in (cache / "claims").glob("*.json"):
        try:
            found.add(int(json.loads(path.read_text())["pid"]))
        except FileNotFoundError:
            continue
    return found


def waits_at(shard: int, until: Path, **more: object) -> str:
    """The script of engines that wait at that shard until there is a file."""
    return json.dumps({"pace": 0.1, "waits_at": f"shard-{shard:05d}", "until": str(until), **more})


def committed(cache: Path) -> int:
    return len(list(cache.glob("shard-*.json")))


def test_ray_started_for_one_worker(teacher: Path, corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    done = dump(teacher, corpus, tmp_path / "cache", SHARDS, "--ray", "local")
    assert done.returncode == 0, done.stderr
    assert "1 CPU worker, 1 Ray node" in done.stderr
    assert "of 25, 1 worker): 8 rows" in done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'cache'}: 25 shards, 12,800 tokens (25 shards written now")
    check(tmp_path / "cache", undisturbed)


def test_four_workers_share_the_work(
    cluster: RayCluster, teacher: Path, corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    cache, steps, begin = tmp_path / "cache", tmp_path / "steps", tmp_path / "begin"
    for _ in range(3):
        cluster.add()
    script = waits_at(1, begin, rows=8, steps_file=str(steps))
    process = start_dump(cluster, replayed(teacher, corpus, cache, SHARDS, undisturbed, script))
    assert within(120, lambda: len(holders(cache)) == 4, process)
    begin.touch()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "of 25, 4 workers): " in output, output
    check(cache, undisturbed)
    work = [line.split() for line in steps.read_text().splitlines()]
    assert sorted(name for name, _, _ in work) == sorted(ALL), "every shard once: a step is all of its rows"
    assert len({process for _, _, process in work}) == 4


def test_two_workers_and_one_killed(
    cluster: RayCluster, teacher: Path, corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """The real engine: a worker is killed while it writes, another one takes its place, not a bit is different."""
    cache = tmp_path / "cache"
    process = start_dump(cluster, dump_command(teacher, corpus, cache, SHARDS, "--gpus", "2"))
    assert within(240, lambda: committed(cache) > 1 and bool(holders(cache)), process)
    os.kill(min(holders(cache)), signal.SIGKILL)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    told = [line for line in output.splitlines() if "its process was killed or crashed" in line]
    assert len(told) == 2 and "stopped while it held " in told[0] and told[1].startswith("note: worker "), output
    check(cache, undisturbed)


def test_a_node_joins_and_one_leaves(
    cluster: RayCluster, teacher: Path, corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    cache, done = tmp_path / "cache", tmp_path / "done"
    leaving = cluster.add()
    process = start_dump(cluster, replayed(teacher, corpus, cache, SHARDS, undisturbed, waits_at(3, done)))
    assert within(60, lambda: len(holders(cache)) == 2 and committed(cache) > 0, process)
    first = holders(cache)
    cluster.add()
    assert within(60, lambda: bool(holders(cache) - first), process)
    cluster.remove(leaving)
    done.touch()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "its node left the Ray cluster" in output and "worker 3 (" not in output.split("note:")[-1], output
    assert (
        max(
            int(line.split(" worker")[0].split()[-1])
            for line in output.splitlines()
            if " worker" in line and "committed" in line
        )
        in (2, 3)  # the loss of the second may not be known at once
    )
    check(cache, undisturbed)


def test_a_driver_killed_and_started_again(
    cluster: RayCluster, teacher: Path, corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    cache, done = tmp_path / "cache", tmp_path / "done"
    command = replayed(teacher, corpus, cache, SHARDS, undisturbed, waits_at(12, done), "--gpus", "2")
    first = start_dump(cluster, command)
    assert within(60, lambda: committed(cache) > 2, first)
    first.kill()
    first.communicate(timeout=240)
    done.touch()
    before = committed(cache)
    assert before < SHARDS
    again = start_dump(cluster, command)
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0, output
    assert json.loads(output.splitlines()[-1])["written"] <= SHARDS + 1 - before
    check(cache, undisturbed)


def test_two_drivers_share_the_work(
    cluster: RayCluster, teacher: Path, corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Claims keep two drivers, one of them stopped by SIGTERM, from doing anything twice."""
    cache, steps, begin = tmp_path / "cache", tmp_path / "steps", tmp_path / "begin"
    script = waits_at(1, begin, pace=0.25, rows=8, steps_file=str(steps))
    command = replayed(teacher, corpus, cache, SHARDS, undisturbed, script, "--gpus", "1")
    cluster.add()
    both = [start_dump(cluster, command), start_dump(cluster, command)]
    assert within(60, lambda: len(holders(cache)) == 2, both[0])
    begin.touch()
    assert within(60, lambda: committed(cache) > 0, both[0])
    both[0].terminate()
    output, _ = both[0].communicate(timeout=240)
    assert both[0].returncode == 130 and "run the same command to go on" in output, output
    output, _ = both[1].communicate(timeout=120)
    assert both[1].returncode == 0, output
    check(cache, undisturbed)
    done = [line.split()[0] for line in steps.read_text().splitlines()]
    assert len(done) - len(set(done)) <= 3  # what the stopped one had in its hands


def test_a_shard_that_ends_its_workers_is_given_up_and_named(
    cluster: RayCluster, teacher: Path, corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    script = json.dumps({"dies_at": ["shard-00003"]})
    process = start_dump(cluster, replayed(teacher, corpus, cache, SHARDS, undisturbed, script))
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 2, output
    last = output.splitlines()[-1]
    assert last.startswith("error: 1 shard could not be written in 3 attempts, each of which ended a worker: "), output
    assert "shard-00003: its process was killed or crashed" in last
    found = rows(cache)
    assert set(found) == ALL - {"shard-00003"}
    assert_same_rows(rows(undisturbed), found)


def test_two_gpus_an_engine(
    cluster: RayCluster, teacher: Path, corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Ray is told of GPUs that are not there: places are counted and given out in pairs, all of one node."""
    cache = tmp_path / "cache"
    cluster.add(num_gpus=3)
    cluster.add(num_gpus=2)
    command = replayed(teacher, corpus, cache, SHARDS, undisturbed, '{"rows": 512}', "--engine.tensor_parallel", "2")
    output, _ = start_dump(cluster, command).communicate(timeout=120)
    assert "on 2 GPU workers of 2 GPUs, 4 Ray nodes" in output, output
    assert json.loads((cache / "manifest.json").read_text())["settings"]["engine"]["rows_per_step"] == 512
    check(cache, undisturbed)
    refused = start_dump(cluster, dump_command(teacher, corpus, cache, 1, "--engine.tensor_parallel", "4"))
    output, _ = refused.communicate(timeout=240)
    assert "error: --engine.tensor_parallel 4: no node of the Ray cluster has more than 3 GPUs" in output


@pytest.mark.skipif(not can_unshare(), reason="needs the right to make namespaces")
def test_workers_of_another_machine(
    cluster: RayCluster, teacher: Path, corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Whose processes cannot be looked at from here: a killed driver's claims there do not stop the next one."""
    cache = tmp_path / "cache"
    cluster.remove(cluster.nodes[0])
    cluster.add_apart()
    done = tmp_path / "done"
    command = replayed(teacher, corpus, cache, SHARDS, undisturbed, waits_at(6, done))
    first = start_dump(cluster, command)
    assert within(60, lambda: committed(cache) > 2, first)
    first.kill()
    first.communicate(timeout=240)
    done.touch()
    assert holders(cache), "nothing was held: the trial shows nothing"
    output, _ = start_dump(cluster, command).communicate(timeout=240)  # long before claims expire
    check(cache, undisturbed)


@pytest.mark.skipif(not can_unshare(), reason="needs the right to make namespaces")
def test_a_machine_with_another_folder_of_that_name_is_refused(
    cluster: RayCluster, teacher: Path, corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    cluster.add_apart(hidden=cache)
    script = json.dumps({"pace": 0.1})
    output, _ = start_dump(cluster, replayed(teacher, corpus, cache, SHARDS, undisturbed, script)).communicate(
        timeout=120
    )
    sentence = f"cannot write to the cache {cache} (No such file or directory): a dump on several machines needs"
    assert sentence in output, output
    check(cache, undisturbed)


def test_without_ray_the_extra_is_named(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nsys.modules['ray'] = None\n"
        f"sys.argv = {['teacher_dump', *dump_command(teacher, corpus, tmp_path / 'cache', 1, '--ray', 'auto')[3:]]!r}\n"
        "from pipeline.errors import run_command\nfrom teacher_dump.__main__ import main\nsys.exit(run_command(main))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert (
        "error: --ray auto: Ray is not installed here: install it with `pip install 'distil-xlstm[ray]'`" in done.stderr
    )


@pytest.mark.parametrize(
    "address, told",
    [
        ("ray://head:10001", "Ray Client is not supported"),
        ("head", "an address is HOST:PORT"),
        ("127.0.0.1:1", "Connection refused"),
    ],
)
def test_addresses_that_lead_nowhere(address: str, told: str, teacher: Path, corpus: Path, tmp_path: Path) -> None:
    done = dump(teacher, corpus, tmp_path / "cache", 1, "--ray", address)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --ray {address}: ") and told in done.stderr
