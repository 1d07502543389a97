"""Caches from strangers are plain data: nothing they say is believed. (Runs: test_untrusted_runs.py.)

Digests match everywhere here: whoever makes a file can make its digest.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_cache import commit_toy_shard, toy_columns, write_toy_cache
from safetensors.numpy import save_file

from pipeline import commit
from pipeline.cache import Cache
from pipeline.claim import clear_dead_claims
from pipeline.claim_file import EXPIRY_SECONDS
from pipeline.commit import commit_json, file_sha256, read_json
from pipeline.errors import UserError
from pipeline.folder_checks import find_missing
from pipeline.manifest import read_manifest
from pipeline.schema import MOST_GROUP_BYTES, MOST_ROW_BYTES
from pipeline.shard import DamagedShard, read_record
from pipeline.teacher_folder import TeacherFolder
from pipeline.verify import verify_cache
from student.data.loader import SplitLoader
from student.model import StudentConfig, check_shape
from teacher_dump.corpus_files import SourceFile

HUGE = 10**400


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_cache(tmp_path_factory.mktemp("made") / "c", units=1, rows=4, length=32, block=8, tied=False)


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "c"))


def edit(path: Path, *keys: str, to: Any) -> None:
    """Change one value of a JSON file, its digest made to match; `...` takes the value out."""
    record = read_json(path)
    here = record
    for key in keys[:-1]:
        here = here[key]
    if to is ...:
        del here[keys[-1]]
    else:
        here[keys[-1]] = to
    commit_json(path, record)


# Text


def put_text(path: Path, text: bytes) -> None:
    """A JSON file of any text, with the right digest."""
    digest = commit.hashlib.sha256(text).hexdigest()
    path.write_bytes(text + f',\n "digest": "{digest}"\n}}\n'.encode())


TEXTS = {
    "nested": b'{\n "a": ' + b"[" * 50 + b"]" * 50,
    "nested beyond Python's stack": b'{\n "a": ' + b"[" * 200_000 + b"]" * 200_000,
    "nested beyond Python's stack, cut": b'{\n "a": ' + b'{"a":' * 200_000,
    "not a number": b'{\n "a": NaN',
    "infinite": b'{\n "a": -Infinity',
    "an integer of many digits": b'{\n "a": ' + b"9" * 10_000,
    "half a character": b'{\n "a": "\\ud83d"',
    "no UTF-8": b'{\n "a": "\xff"',
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_that_is_no_record(name: str, tmp_path: Path) -> None:
    put_text(tmp_path / "x.json", TEXTS[name])
    with pytest.raises(UserError, match=r"x\.json is not valid JSON"):
        read_json(tmp_path / "x.json")


def test_size_is_looked_at_before_reading(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # sparse: reading it would never end
    with pytest.raises(UserError, match=rf"x\.json has more than {commit.MOST_JSON_BYTES} bytes"):
        read_json(path)
    commit_json(path, {"a": ["x" * 1000] * 5000})
    with pytest.raises(UserError, match="has more than"):
        read_json(path)
    assert len(read_json(path, 1 << 23)["a"]) == 5000


def test_a_pipe_in_place_of_a_file_is_not_waited_for(cache: Path) -> None:
    for name in ("manifest.json", "teacher/config.json", "shard-00000.json"):
        (cache / name).unlink()
        os.mkfifo(cache / name)
    with pytest.raises(UserError):
        read_manifest(cache)
    with pytest.raises(UserError):
        TeacherFolder(cache / "teacher").config()
    with pytest.raises(UserError, match="no regular file"):
        read_record(cache / "shard-00000.json")


# Fields

WRONG: list[Any] = [None, "x", [], {}, True, -1, 0, 1.5, HUGE, -HUGE, ["x"], ...]
FIELDS = {
    "manifest.json": {
        **{
            f"spec.{name}": []
            for name in ("length", "vocab_size", "k", "taus", "groups", "width", "packing", "group_tokens")
        },
        **{f"spec.{name}": [0] for name in ("block", "window", "tail_samples")},
        **{name: [] for name in ("schema", "compat", "data", "spec", "compat_id", "data_id")},
        "settings": [{}],
        "teacher_path": ["x"],
        "created": ["x"],
    },
    "shard-00000.json": {
        **{name: [] for name in ("file", "split", "sha256", "footer_sha256")},
        **{name: [] for name in ("bytes", "rows", "tokens")},
        **{name: [-1, 0, 1.5] for name in ("mean_entropy", "mean_tail_mass")},
        **{name: ["x"] for name in ("compat_id", "data_id", "hardware")},
        **{name: [{}] for name in ("source", "versions")},
        "seconds": [0, 1.5],
        "unit": [0],
        "short": [True],
    },
    "teacher/teacher.json": {
        **{f"facts.{name}": ["x"] for name in ("name", "teacher_sha256", "tokenizer_sha256")},
        **{f"facts.{name}": [] for name in ("vocab_size", "width", "layers", "heads", "dtype")},
        **{f"facts.{name}": [-1, 0, 1.5] for name in ("norm_offset", "embedding_scale", "logit_scale")},
        **{f"facts.{name}": [None, -1, 0] for name in ("eos_id", "bos_id", "pad_id")},
        "facts.norm_eps": [0],
        "facts.tied": [True],
        "facts.soft_cap": [None, 1.5],
        "facts.separator_id": [0],
        "facts": [],
        "files": [{}],
        "files.config.json": [],
    },
}
"""File -> field -> which of `WRONG` it may be all the same."""
READERS: dict[str, Callable[[Path], Any]] = {
    "manifest.json": read_manifest,
    "shard-00000.json": lambda cache: read_record(cache / "shard-00000.json"),
    "teacher/teacher.json": lambda cache: TeacherFolder(cache / "teacher"),
}


def refused(what: Callable[[], Any], *names: str) -> None:
    """It ends with one sentence that names these."""
    with pytest.raises(UserError) as raised:
        what()
    told = str(raised.value)
    assert all(name in told for name in names), told
    assert "\n" not in told and len(told) < 1000


@pytest.mark.parametrize(("file", "field"), [(file, field) for file, of in FIELDS.items() for field in of])
def test_every_field_is_of_its_type_and_range(file: str, field: str, cache: Path) -> None:
    good = (cache / file).read_bytes()
    READERS[file](cache)
    *outer, name = ["files", field[6:]] if field.startswith("files.") else field.split(".")
    for wrong in WRONG:
        record = json.loads(good)
        del record["digest"]
        here = record[outer[0]] if outer else record
        if wrong is ...:
            del here[name]
        else:
            here[name] = wrong
        commit_json(cache / file, record)
        if any(wrong is right or (type(wrong), wrong) == (type(right), right) for right in FIELDS[file][field]):
            READERS[file](cache)
        elif field == "files.config.json" and wrong is ...:
            refused(lambda: TeacherFolder(cache / "teacher").config(), "config.json")
        else:
            with pytest.raises(UserError, match=rf"{Path(file).name}.*({name}|identities)") as raised:
                READERS[file](cache)
            assert "\n" not in str(raised.value) and len(str(raised.value)) < 1000


SHAPES: dict[str, dict[str, Any]] = {
    "more ids than the vocabulary has": {"k": 62},
    "no temperature of one": {"taus": [1.2, 1.5]},
    "temperatures twice": {"taus": [1.0, 1.0, 2.0]},
    "a block that does not divide": {"block": 5},
    "a window that does not divide": {"window": 5},
    "rows beyond any memory": {"length": 1 << 24, "vocab_size": 1 << 20, "k": 1 << 10, "block": 0},
    "row groups beyond any memory": {
        "length": 1,
        "vocab_size": 1 << 24,
        "k": 1 << 20,
        "block": 0,
        "group_tokens": 1 << 30,
    },
    "maps beyond any memory": {"length": 1 << 20, "block": 1},
    "hidden states beyond any memory": {"length": 1 << 20, "block": 0, "window": 1, "width": 1 << 20},
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_that_no_cache_has(name: str, cache: Path) -> None:
    record = read_json(cache / "manifest.json")
    record["spec"] |= SHAPES[name]
    commit_json(cache / "manifest.json", record)
    refused(lambda: Cache(cache), "manifest.json: spec: ")


def test_largest_shapes_are_those_stated(cache: Path) -> None:
    spec = read_manifest(cache).spec
    wide = replace(spec, length=32_768, vocab_size=152_000, k=64, block=64, window=1, width=8192)
    assert wide.problem() is None and wide.row_bytes < MOST_ROW_BYTES and wide.group_bytes < MOST_GROUP_BYTES
    assert replace(wide, length=1 << 20).problem() is not None


def test_plan_of_other_types(cache: Path) -> None:
    record = {
        "path": "a",
        "kind": "jsonl.zst",
        "extent": 5,
        "text_bytes": 5,
        "fingerprint": "f",
        "index": [[0, 0], [3, 4]],
    }
    assert SourceFile.from_record(record).index == ((0, 0), (3, 4))
    for field in record:
        for wrong in (None, {}, True, -1, 1.5, HUGE, [[1, 2]], [["x", 0]], [[0]], "nothing"):
            if not (isinstance(wrong, str) and field in ("path", "fingerprint")):
                refused(partial(SourceFile.from_record, {**record, field: wrong}, "plan.json"), "plan.json", field)
    for stride in (None, "x", 1.5, -1, HUGE):
        edit(cache / "plan.json", "stride", to=stride)
        assert any("stride" in problem.message for problem in verify_cache(cache).problems)


def test_student_shapes_of_a_stranger() -> None:
    for field in ("blocks", "heads", "conv_kernel", "mlstm_qkv_blocksize", "mlstm_projection", "slstm_feedforward"):
        for wrong in (None, "x", [], True, -1, 1e300, HUGE):
            refused(partial(check_shape, replace(StudentConfig(), **{field: wrong}), 64), "student", field)
    for field, wrong in (("slstm_at", ("x",)), ("slstm_at", 3), ("final_norm", 1)):
        refused(partial(check_shape, replace(StudentConfig(), **{field: wrong}), 64), f"student.{field}")


# Paths


@pytest.mark.parametrize("name", ["../out.txt", "/etc/hostname", "a/b", "..", "", "x\0y", "a\\b"])
def test_names_of_files_lead_nowhere_else(name: str, cache: Path) -> None:
    (cache / "out.txt").write_text("x")
    record = read_json(cache / "teacher/teacher.json")
    record["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    commit_json(cache / "teacher/teacher.json", record)
    refused(lambda: Cache(cache).teacher, "teacher.json", "plain names")


@pytest.mark.parametrize(
    "name", ["manifest.json", "shard-00000.json", "shard-00000.parquet", "teacher", "teacher/config.json", "teacher/x"]
)
def test_links_out_of_the_cache(name: str, cache: Path, tmp_path: Path) -> None:
    def read() -> None:
        opened = Cache(cache)
        opened.teacher.config()
        with opened.open(opened.shards()[0]) as shard:
            shard.read_group(0)

    outside = tmp_path / "outside"
    if name == "teacher/x":
        outside.write_text("somebody's key")
    else:
        (cache / name).rename(outside)
    (cache / name).symlink_to(outside)
    refused(read, "link out of", Path(name).name)
    (cache / name).unlink()
    outside.rename(cache / "kept")
    (cache / name).symlink_to(cache / "kept" if "/" not in name else Path("..") / "kept")
    if "/" not in name:
        read()  # within the cache a link may lead anywhere
    link = tmp_path / "link"
    link.symlink_to(cache)
    if "/" not in name:
        Cache(link).teacher.config()  # and so may one to the cache itself


def test_a_link_to_itself(cache: Path) -> None:
    (cache / "teacher/config.json").unlink()
    (cache / "teacher/config.json").symlink_to("config.json")
    refused(lambda: Cache(cache).teacher, "config.json", "link out of")


def test_a_claim_leads_to_no_other_files(cache: Path, tmp_path: Path) -> None:
    kept = tmp_path / ".kept.x.tmp"
    kept.write_text("somebody's")
    inside = cache / ".shard-00000.parquet.other-1-00000000.tmp"
    inside.write_text("a live writer's")
    (cache / "claims").mkdir(exist_ok=True)
    for number, owner in enumerate(["*", "x.tmp/../../../.kept.x", "[!.]*", 5, None, ["x"], "../x"]):
        claim = cache / "claims" / f"shard-{number:05d}.json"
        claim.write_text(json.dumps({"id": owner, "machine": "elsewhere", "pid": HUGE}))
        os.utime(claim, (0, time.time() - 2 * EXPIRY_SECONDS))
    (cache / "claims" / "shard-00099.json").write_text("[" * 100_000)
    clear_dead_claims(cache)
    assert kept.is_file() and inside.is_file()


# What is read


def test_header_of_safetensors_is_looked_at(cache: Path) -> None:
    path, record = cache / "teacher/head.safetensors", cache / "teacher/teacher.json"
    good = path.read_bytes()

    def give(data: bytes) -> None:
        path.write_bytes(data)
        files = {**read_json(record)["files"], path.name: {"bytes": len(data), "sha256": file_sha256(path)}}
        edit(record, "files", to=files)

    def tensors(**changed: np.ndarray) -> bytes:
        size = {"embedding.weight": (61, 64), "lm_head.weight": (61, 64), "norm.weight": (64,)}
        save_file({name: changed.get(name.split(".")[0], np.ones(of, np.float32)) for name, of in size.items()}, path)
        return path.read_bytes()

    give(tensors())
    assert Cache(cache).teacher.tensors()["head_VD"].shape == (61, 64)
    header = int.from_bytes(good[:8], "little")
    huge = good[8 : 8 + header].replace(b"[61,64]", b"[1000000000,64]").replace(b"[61, 64]", b"[1000000000,64]")
    for data, said in (
        ((1 << 60).to_bytes(8, "little") + good[8:], "its header claims"),
        (len(huge).to_bytes(8, "little") + huge + good[8 + header :], "cannot be read"),
        (good[:100], "cannot be read"),
        (b"\0" * 8, "cannot be read"),
        (tensors(embedding=np.ones((60, 64), np.float32)), "embedding.weight has shape (60, 64)"),
        (tensors(embedding=np.ones((61, 32), np.float32)), "embedding.weight has shape (61, 32)"),
        (tensors(norm=np.ones((64, 64), np.float32)), "norm.weight has shape (64, 64)"),
        (tensors(lm_head=np.ones((61, 64), np.int64)), "lm_head.weight has shape (61, 64) and type I64"),
    ):
        give(data)
        refused(lambda: Cache(cache).teacher.tensors(), "head.safetensors", said)
        assert any(problem.file == "teacher/head.safetensors" for problem in verify_cache(cache).problems)


def test_teacher_of_another_shape_than_the_manifests(cache: Path) -> None:
    for name, value in (("vocab_size", 80), ("width", 32)):
        record = read_json(cache / "teacher/teacher.json")
        commit_json(cache / "teacher/teacher.json", {**record, "facts": {**record["facts"], name: value}})
        refused(lambda: Cache(cache).teacher, "teacher.json", name)
        commit_json(cache / "teacher/teacher.json", record)


INDICES = {
    "length": (("length", 0), 33),
    "no length": (("length", 0), 0),
    "next_id": (("next_id", 2), 61),
    "input id": (("input_ids", (1, 2)), 61),
    "negative input id": (("input_ids", (1, 2)), -1),
    "top id": (("topk_ids", (0, 0, 3)), 61),
}


@pytest.mark.parametrize("name", INDICES)
def test_training_does_not_index_by_what_a_stranger_says(name: str, cache: Path) -> None:
    (column, place), value = INDICES[name]
    manifest = read_manifest(cache)
    columns = toy_columns(manifest.spec, 0, 4)
    columns[column][place] = value
    commit_toy_shard(cache, manifest, 0, 4, columns=columns)
    opened = Cache(cache)
    with pytest.raises(DamagedShard, match=rf"shard-00000\.parquet: row group 0, column {column}: holds"):
        list(SplitLoader([opened], "train", 4))
    with pytest.raises(DamagedShard, match=column):
        list(opened.groups("train"))


def test_one_name_does_not_make_a_list_of_a_billion(cache: Path) -> None:
    started = time.monotonic()
    missing, problems, _ = find_missing(cache, {0, 2, 999_999_999}, None)
    assert time.monotonic() - started < 30 and missing[:2] == ["shard-00001", "shard-00003"]
    assert problems[-1].message.startswith("999899997") and "more shards are missing" in problems[-1].message
    (cache / "shard-99999999999999999999.json").write_text("{}")
    assert len(Cache(cache).shards()) == 1
