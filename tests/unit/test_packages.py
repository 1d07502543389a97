"""Files out of packages: fetched by the real pip from a local folder, checked by content, one builder at a time."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.packages import PackageFile, exclusive, fetch

WHEEL = "tiny_thing-1.0-py3-none-any.whl"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one wheel, which is all that pip may look at."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        info = "tiny_thing-1.0.dist-info/"
        wheel.writestr("tiny_thing.py", "")
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: tiny-thing\nVersion: 1.0\n")
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(info + "RECORD", "")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def package(index: Path, sha256: str | None = None) -> PackageFile:
    return PackageFile("tiny-thing==1.0", WHEEL, sha256 or hashlib.sha256((index / WHEEL).read_bytes()).hexdigest())


def test_fetch_downloads_once(index: Path, tmp_path: Path) -> None:
    wanted = package(index)
    final = fetch(wanted, tmp_path / "downloads")
    assert [path.name for path in (tmp_path / "downloads").iterdir()] == [WHEEL]
    (index / WHEEL).unlink()  # nothing to download from any more
    assert fetch(wanted, tmp_path / "downloads") == final


def test_a_damaged_download_is_fetched_again(index: Path, tmp_path: Path) -> None:
    wanted = package(index)
    final = fetch(wanted, tmp_path / "downloads")
    final.write_bytes(b"half")
    assert fetch(wanted, tmp_path / "downloads").read_bytes() == (index / WHEEL).read_bytes()


def test_another_file_of_the_same_name_is_refused(index: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the index serves another file"):
        fetch(package(index, "0" * 64), tmp_path / "downloads")
    assert list((tmp_path / "downloads").iterdir()) == []


def test_no_network_is_one_sentence(index: Path, tmp_path: Path) -> None:
    wanted = package(index)
    (index / WHEEL).unlink()
    with pytest.raises(UserError, match=r"tiny-thing==1.0 .* could not be downloaded with pip .* by hand") as caught:
        fetch(wanted, tmp_path / "downloads")
    assert "\n" not in str(caught.value)


def test_whoever_builds_clears_what_was_interrupted(tmp_path: Path) -> None:
    (tmp_path / ".corpus.jsonl.other-1-ab.tmp").write_text("half")
    (tmp_path / ".corpus.dir.tmp").mkdir()
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / ".download.host-999999999-ab").mkdir()
    (tmp_path / "downloads" / f".download.host-{os.getpid()}-ab").mkdir()
    (tmp_path / ".teacher.x.tmp").mkdir()
    with exclusive(tmp_path, "corpus"):
        left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {".corpus.lock", "downloads", f"downloads/.download.host-{os.getpid()}-ab", ".teacher.x.tmp"}


def test_one_builder_at_a_time_even_across_processes(tmp_path: Path) -> None:
    probe = "import fcntl, sys; fcntl.flock(open(sys.argv[1], 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    command = [sys.executable, "-c", probe, str(tmp_path / ".corpus.lock")]
    with exclusive(tmp_path, "corpus"):
        assert "BlockingIOError" in subprocess.run(command, capture_output=True, text=True).stderr
    assert subprocess.run(command, capture_output=True).returncode == 0
    with open(tmp_path / ".corpus.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
