"""Claims freed by one who knows that their holders are gone, and writers that notice that they lost theirs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pipeline import claim_holders
from pipeline.claim import try_claim
from pipeline.claim_file import HOLDER_FACTS, Claim
from pipeline.claim_holders import Silence, free, free_if_dead, held_by, this_machine
from pipeline.commit import temporary_path
from pipeline.errors import UserError
from pipeline.store import open_path


@pytest.fixture(params=["folder", "store"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path if request.param == "folder" else open_path(f"memory://claims{os.urandom(4).hex()}")


def claim(cache: Path, name: str = "shard-00001") -> Claim:
    found = try_claim(cache, name)
    assert found is not None
    return found


def of_another_machine(cache: Path, **facts: str) -> Claim:
    """A claim that nothing can be known of from here."""
    ours = claim(cache)
    record = {**json.loads(ours.path.read_text()), "machine": "elsewhere", "pid": 1, **facts}
    ours.path.write_text(json.dumps(record))
    return ours


def test_who_holds_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert held_by(cache, "shard-00001") is None
    monkeypatch.setitem(HOLDER_FACTS, "ray_node", "abc")
    with claim(cache) as ours:
        holding = held_by(cache, "shard-00001")
        assert holding is not None and holding.id == ours.id and holding.machine == this_machine()
        assert holding.record["ray_node"] == "abc" and holding.refreshed > 1e9
        assert held_by(cache, "shard-00002") is None
    assert held_by(cache, "shard-00001") is None


def test_a_live_holder_stays_whoever_asks(cache: Path) -> None:
    with claim(cache):
        assert not free_if_dead(cache, "shard-00001")
        assert held_by(cache, "shard-00001") is not None
    assert free_if_dead(cache, "shard-00001")


def test_another_machines_holder_stays_until_it_is_said_to_be_gone(cache: Path) -> None:
    of_another_machine(cache)
    assert not free_if_dead(cache, "shard-00001")
    holding = held_by(cache, "shard-00001")
    assert holding is not None and free(cache, "shard-00001", holding)
    assert held_by(cache, "shard-00001") is None
    claim(cache).release()


def test_freeing_takes_the_temporaries_of_that_holder_only(tmp_path: Path) -> None:
    lost = of_another_machine(tmp_path)
    own, other = (temporary_path(tmp_path / "shard-00001.parquet", id) for id in (lost.id, "host-1-00000000"))
    own.write_text("half"), other.write_text("half")
    holding = held_by(tmp_path, "shard-00001")
    assert holding is not None and free(tmp_path, "shard-00001", holding)
    assert not own.exists() and other.exists()


def test_freeing_spares_a_writer_that_was_faster(tmp_path: Path) -> None:
    of_another_machine(tmp_path)
    holding = held_by(tmp_path, "shard-00001")
    assert holding is not None
    holding.path.unlink()
    with claim(tmp_path) as new:
        assert not free(tmp_path, "shard-00001", holding)
        now = held_by(tmp_path, "shard-00001")
        assert now is not None and now.id == new.id


def test_silence_is_told_by_our_own_clock(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(claim_holders.time, "monotonic", lambda: now)
    ours, silence = claim(cache), Silence(75.0)

    def silent(seconds: float) -> bool:
        nonlocal now
        now += seconds
        holding = held_by(cache, "shard-00001")
        assert holding is not None
        return silence.lasts(holding)

    assert not silent(0) and not silent(74) and silent(1)
    if not isinstance(ours.path, Path):
        return
    os.utime(ours.path, (5.0, 5.0))  # refreshed, by a machine whose clock is wrong
    assert not silent(1) and not silent(74) and silent(1)
    ours.release()


def test_a_writer_that_lost_its_claim_is_told_before_it_commits(cache: Path) -> None:
    slept = claim(cache)
    slept.check()
    holding = held_by(cache, "shard-00001")
    assert holding is not None and free(cache, "shard-00001", holding)
    with claim(cache) as new:
        new.check()
        if isinstance(cache, Path):  # on a store it looks at its own object, which may be there a moment longer
            with pytest.raises(UserError, match="another writer took this work over"):
                slept.check()
    with pytest.raises(UserError, match="another writer took this work over"):
        slept.check()
