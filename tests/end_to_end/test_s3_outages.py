"""What `verify` and a student say of a store that is out, and that a repair removes what is damaged, never what is out
of reach."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_cache import commit_toy_shard, write_toy_cache
from helpers_s3 import BUCKET, FaultyProxy, s3_here, s3_server

from pipeline.__main__ import main
from pipeline.cache import Cache
from pipeline.claim import try_claim
from pipeline.errors import run_command
from pipeline.schema import HELDOUT_UNIT, unit_name
from pipeline.store import StoreError, is_file, names_in, open_path, remove, sizes_in
from pipeline.verify import verify_cache


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with s3_server() as port:
        yield port


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_cache(
        tmp_path_factory.mktemp("outages") / "c", units=3, heldout_units=1, rows=4, length=32, block=8
    )


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up soon: what is tried again how often is tested elsewhere."""
    import s3fs

    monkeypatch.setattr("pipeline.store.ATTEMPTS", 2)
    monkeypatch.setattr("pipeline.store.LONGEST_WAIT", 0.01)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")


@pytest.fixture
def proxy(server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """Between this process and the server; nothing goes wrong yet."""
    monkeypatch.setenv("DISTIL_XLSTM_CACHE", str(tmp_path / "copies"))
    proxy = FaultyProxy(server, share=0.0, seed=0)
    with s3_here(proxy.port):
        yield proxy
    proxy.close()


@pytest.fixture
def cache(proxy: FaultyProxy, whole: Path, tmp_path: Path) -> Path:
    """The toy cache on the server, under this test's name."""
    path: Any = open_path(f"s3://{BUCKET}/{tmp_path.name}")
    for file in (file for file in sorted(whole.rglob("*")) if file.is_file()):
        path.fs.put_file(str(file), f"{path.path}/{file.relative_to(whole)}")
    return path


def damage(path: Any, offset: int = 700) -> None:
    data = bytearray(path.fs.cat_file(path.path))
    data[offset] ^= 0x10
    path.fs.pipe_file(path.path, bytes(data))


OUT = [
    *("shard-00001.parquet", "^GET .*shard-00001.parquet", "shard-00001.json"),
    *("manifest.json", "head.safetensors", "list-type"),
]


@pytest.mark.parametrize("out", OUT)
def test_an_outage_is_no_damage(cache: Path, proxy: FaultyProxy, out: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sizes_in(cache)
    proxy.out = out
    status = run_command(lambda: main(["verify", "--cache", str(cache), "--repair", "remove"]))
    proxy.out = None
    told = capsys.readouterr()
    assert status == 2 and "the store does not answer: look at its endpoint and credentials" in told.err
    assert str(cache) in told.err and ("reduce your" in told.err or "Unavailable" in told.err)
    assert "missing" not in told.out + told.err
    assert sizes_in(cache) == before and verify_cache(cache).ok


@pytest.mark.parametrize("out", ["shard-00001.parquet", "shard-00001.json"])
def test_a_reader_does_not_take_an_outage_for_damage(cache: Path, proxy: FaultyProxy, out: str) -> None:
    record = Cache(cache).record(1)
    proxy.out = out
    with pytest.raises(StoreError, match="does not answer") as told:
        Cache(cache).open(record) if out.endswith("parquet") else Cache(cache).record(1)
    assert told.value.filename == f"{cache}/{out}"
    with pytest.raises(StoreError):
        is_file(cache / out)
    with pytest.raises(StoreError):
        remove(cache / out)
    proxy.out = None
    assert is_file(cache / out)


def test_an_outage_that_arrow_meets_is_no_damage(
    cache: Path, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.parts.PartsFile.hold", lambda self, start, end: None)  # Arrow's reads go to the store
    opened = Cache(cache)
    with opened.open(opened.record(1)) as shard:
        shard.check_pages(0)
        proxy.out = "shard-00001.parquet"
        with pytest.raises(StoreError, match="does not answer"):
            shard.read_group(0)


def test_a_claim_out_of_reach_is_not_taken_over(cache: Path, proxy: FaultyProxy) -> None:
    claim = try_claim(cache, "shard-00001")
    assert claim is not None
    for out in ("claims", "list-type"):
        proxy.out = out
        with pytest.raises(StoreError):
            try_claim(cache, "shard-00001")
    proxy.out = None
    assert list(names_in(cache / "claims")) == [claim.path.name] and claim.is_ours()
    claim.release()
    assert list(names_in(cache / "claims")) == []


@pytest.mark.parametrize(("unit", "harm"), [(1, "parquet"), (1, "json"), (1, "gone"), (HELDOUT_UNIT, "parquet")])
def test_what_is_damaged_is_removed_and_dumped_again(cache: Path, whole: Path, unit: int, harm: str) -> None:
    name = unit_name(unit)
    if harm == "gone":
        remove(cache / f"{name}.parquet")
    else:
        damage(cache / f"{name}.{harm}", 700 if harm == "parquet" else 100)
    before = sizes_in(cache)
    repair = verify_cache(cache, repair="remove").repair
    assert repair is not None and repair.dump_again == [name]
    gone = [f"{name}.json", *([] if harm == "gone" else [f"{name}.parquet"])]
    assert repair.removed == gone and sizes_in(cache).keys() == before.keys() - set(gone)
    commit_toy_shard(cache, Cache(cache).manifest, unit, 4)
    assert verify_cache(cache).ok
    assert (cache / f"{name}.parquet").read_bytes() == (whole / f"{name}.parquet").read_bytes()


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_a_server_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    with s3_here(1):
        url = f"s3://{BUCKET}/cache"
        status = run_command(lambda: main([command, "--cache", url]))
    told = capsys.readouterr().err
    assert status == 2 and f"{url}/manifest.json" in told and "http://127.0.0.1:1" in told
    assert "the store does not answer: look at its endpoint and credentials" in told and "is no cache" not in told


def test_where_there_is_no_cache_that_is_said(proxy: FaultyProxy, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: main(["verify", "--cache", f"s3://{BUCKET}/nothing"])) == 2
    assert "is no cache (manifest.json is missing)" in capsys.readouterr().err
