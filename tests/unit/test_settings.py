"""Settings that cannot work are refused with a sentence; identities hold what decides the rows and nothing else."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.manifest import identity
from pipeline.teacher_folder import TeacherFacts
from teacher_dump.corpus import CorpusConfig
from teacher_dump.engine import EngineOptions
from teacher_dump.settings import DumpConfig, resolve_engine, to_plain

FACTS = TeacherFacts(
    name="toy",
    teacher_sha256="a" * 64,
    tokenizer_sha256="b" * 64,
    vocab_size=100,
    width=16,
    layers=4,
    heads=2,
    tied=True,
    norm_eps=1e-5,
    norm_offset=0.0,
    embedding_scale=1.0,
    logit_scale=1.0,
    soft_cap=None,
    dtype="float32",
    separator_id=0,
    eos_id=0,
    bos_id=None,
    pad_id=None,
)
GOOD = DumpConfig(
    corpus=CorpusConfig("a.txt"), cache=Path("c"), shards=2, tokens_per_shard=512, length=128, k=8, block=32, groups=2
)


def test_good_settings_pass() -> None:
    GOOD.check(FACTS)
    replace(GOOD, block=0, groups=9, window=0).check(FACTS)
    replace(GOOD, k=100).check(FACTS)
    replace(GOOD, units="1:2").check(FACTS)
    replace(GOOD, taus=(0.5, 1.0)).check(FACTS)


@pytest.mark.parametrize(
    "units, numbers", [("", range(8)), ("0:8", range(8)), ("2:5", range(2, 5)), (":3", range(3)), ("6:", range(6, 8))]
)
def test_a_range_of_units(units: str, numbers: range) -> None:
    assert replace(GOOD, shards=8, units=units).unit_range() == numbers


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"units": "3"}, "--units 3: must be FIRST:END, such as 0:64"),
        ({"units": "1:3"}, "--units 1:3: must be a part of 0:2 (--shards), and not empty"),
        ({"units": "1:1"}, "--units 1:1: must be a part of 0:2 (--shards), and not empty"),
        ({"shards": 0}, "--shards 0: must be at least 1"),
        ({"shards": -3}, "--shards -3"),
        ({"k": 0}, "--k 0: must be at least 1"),
        ({"k": 101}, "--k 101: the teacher's vocabulary has only 100 ids"),
        ({"length": 0}, "--length 0"),
        ({"tokens_per_shard": 0}, "--tokens_per_shard 0"),
        ({"tokens_per_shard": 500}, "--tokens_per_shard 500: must be a multiple of --length 128"),
        ({"tokens_per_shard": 64}, "--tokens_per_shard 64: must be a multiple of --length 128"),
        ({"heldout_shards": -1}, "--heldout_shards -1: must not be negative"),
        ({"block": -1}, "--block -1"),
        ({"block": 48}, "--length 128: must be a multiple of --block 48"),
        ({"block": 256}, "--length 128: must be a multiple of --block 256"),
        ({"window": 3}, "--length 128: must be a multiple of --window 3"),
        ({"window": -1}, "--window -1"),
        ({"groups": 0}, "--groups 0"),
        ({"groups": 5}, "--groups 5: the teacher has only 4 layers"),
        ({"tail_samples": -1}, "--tail_samples -1"),
        ({"tail_samples": 2, "k": 100}, "--tail_samples 2: with --k 100 there is no tail"),
        ({"taus": ()}, "--taus []"),
        ({"taus": (1.5, 2.0)}, "--taus [1.5, 2.0]: must be different positive temperatures, 1 among them"),
        ({"taus": (1.0, 1.0)}, "--taus [1.0, 1.0]"),
        ({"taus": (-1.0, 1.0)}, "--taus [-1.0, 1.0]"),
        ({"taus": (0.0, 1.0)}, "--taus [0.0, 1.0]"),
        ({"taus": (1.0, math.nan)}, "--taus [1.0, nan]"),
        ({"taus": (1.0, math.inf)}, "--taus [1.0, inf]"),
        ({"taus": (2.0, 1.0)}, "--taus [2.0, 1.0]: must be in ascending order"),
        ({"corpus": CorpusConfig("a", heldout_fraction=1.0)}, "--corpus.heldout_fraction 1.0"),
        ({"corpus": CorpusConfig("a", heldout_fraction=-0.1)}, "--corpus.heldout_fraction -0.1"),
        ({"corpus": CorpusConfig("a", heldout_fraction=math.nan)}, "--corpus.heldout_fraction nan"),
        ({"corpus": CorpusConfig("a", bytes_per_token=0.0)}, "--corpus.bytes_per_token 0.0"),
        ({"corpus": CorpusConfig("a", bytes_per_token=math.nan)}, "--corpus.bytes_per_token nan"),
        ({"corpus": CorpusConfig("a", range_bytes=0)}, "--corpus.range_bytes 0"),
        ({"corpus": CorpusConfig("a", max_document_bytes=0)}, "--corpus.max_document_bytes 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_setting_gives_its_sentence(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as raised:
        replace(GOOD, **change).check(FACTS)
    assert str(raised.value).startswith(said) and "\n" not in str(raised.value)


def data_id(config: DumpConfig, corpus: str = "text") -> str:
    engine = resolve_engine(config.engine, config.length, FACTS.dtype)
    return identity(replace(config, engine=engine).data_fields(FACTS, corpus))


@pytest.mark.parametrize(
    "change",
    [
        {"shards": 128},
        {"heldout_shards": 0},
        {"cache": Path("elsewhere")},
        {"data": Path("elsewhere")},
        {"teacher": "another/name/for/it"},
        {"seed": 5},  # draws nothing without tail samples
        {"gpus": 8},
        {"corpus": CorpusConfig("moved/a.txt", hub_revision="abc", max_document_bytes=1 << 30)},
        {"engine": EngineOptions(gpu_memory_utilization=0.5, quiet=False)},
    ],
    ids=str,
)
def test_what_does_not_decide_the_rows_is_not_in_the_identity(change: dict[str, Any]) -> None:
    assert data_id(replace(GOOD, **change)) == data_id(GOOD)


@pytest.mark.parametrize(
    "change",
    [
        {"tokens_per_shard": 1024},
        {"length": 64},
        {"packing": "document"},
        {"k": 9},
        {"taus": (1.0, 2.0)},
        {"block": 64},
        {"groups": 3},
        {"window": 16},
        {"tail_samples": 2},
        {"corpus": CorpusConfig("a.txt", text_field="body")},
        {"corpus": CorpusConfig("a.txt", heldout_fraction=0.1)},
        {"corpus": CorpusConfig("a.txt", range_bytes=1)},
        {"engine": EngineOptions(dtype="float16")},
        {"engine": EngineOptions(rows_per_step=3)},
    ],
    ids=str,
)
def test_what_decides_the_rows_is_in_the_identity(change: dict[str, Any]) -> None:
    assert data_id(replace(GOOD, **change)) != data_id(GOOD)
    assert data_id(GOOD, "other text") != data_id(GOOD)


def test_seed_counts_where_something_is_drawn() -> None:
    drawing = replace(GOOD, tail_samples=2)
    assert data_id(replace(drawing, seed=5)) != data_id(drawing)


def test_compatibility_is_the_teachers() -> None:
    engine = resolve_engine(GOOD.engine, GOOD.length, FACTS.dtype)
    config = replace(GOOD, engine=engine)
    fields = config.compat_fields(FACTS)
    assert replace(config, length=64, k=4, shards=9).compat_fields(FACTS) == fields
    assert config.compat_fields(replace(FACTS, soft_cap=30.0)) != fields
    assert config.compat_fields(replace(FACTS, teacher_sha256="c" * 64)) != fields
    assert replace(config, engine=replace(engine, head_dtype="float32")).compat_fields(FACTS) != fields


def test_engine_options_left_open_are_resolved() -> None:
    resolved = resolve_engine(EngineOptions(), 128, "float32")
    assert resolved.dtype == "bfloat16" and resolved.rows_per_step >= 1
    assert resolve_engine(EngineOptions(), 10**9, "float16").rows_per_step == 1
    assert resolve_engine(EngineOptions(), 128, "float16").dtype == "float16"
    kept = EngineOptions(dtype="float32", rows_per_step=5)
    assert resolve_engine(kept, 128, "float16") == kept


def test_shape_of_rows_follows_the_settings() -> None:
    spec = replace(GOOD, window=16, tail_samples=2).spec(FACTS)
    assert (spec.vocab_size, spec.width, spec.blocks, spec.windows) == (100, 16, 4, 8)
    assert spec.shapes()["attn_map"] == (2, 4, 4) and spec.shapes()["hidden"] == (8, 16)
    without = replace(GOOD, block=0).spec(FACTS)
    assert without.groups == 0 and "attn_map" not in without.shapes()
    assert type(without).from_record(json.loads(json.dumps(without.to_record()))) == without


def test_resolved_configuration_is_json() -> None:
    plain = to_plain(GOOD)
    assert json.loads(json.dumps(plain)) == plain
    assert plain["cache"] == "c" and plain["corpus"]["source"] == "a.txt" and plain["taus"] == [1.0, 1.2, 1.5, 2.0]
