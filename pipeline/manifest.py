"""`manifest.json`: what a cache is. Created once, exclusively, and never rewritten.

Two identities: `compat_id` must match between cache, student and checkpoint; `data_id` must match for an exact resume
and between the shards of one cache.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.commit import canonical_json, commit_json, read_json
from pipeline.errors import UserError
from pipeline.fields import Fields, check_stays
from pipeline.schema import SCHEMA_MAJOR, SCHEMA_MINOR, CacheSpec
from pipeline.store import is_file

MANIFEST = "manifest.json"


def identity(content: dict[str, Any]) -> str:
    """Hex sha256 (first 32 digits) of a dictionary's canonical JSON."""
    return hashlib.sha256(canonical_json(content)).hexdigest()[:32]


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`.

    Attributes:
        compat: fields that decide whether a student can learn from the cache at all: teacher, tokenizer, vocabulary,
            head dtype, scale, cap, schema major.
        data: fields that decide the rows: corpus, length, K, temperatures, pooling, packing, seeds.
        spec: shape of the rows.
        settings: the resolved configuration of the dump that created the cache (for people; not compared).
        teacher_path: where the teacher's weights were read, for `--full_kl`; a hint, not part of the identity.
    """

    compat: dict[str, Any]
    data: dict[str, Any]
    spec: CacheSpec
    settings: dict[str, Any]
    teacher_path: str
    created: str

    @property
    def compat_id(self) -> str:
        return identity(self.compat)

    @property
    def data_id(self) -> str:
        return identity(self.data)

    def to_record(self) -> dict[str, Any]:
        return {
            "schema": f"{SCHEMA_MAJOR}.{SCHEMA_MINOR}",
            "created": self.created,
            "compat_id": self.compat_id,
            "data_id": self.data_id,
            "compat": self.compat,
            "data": self.data,
            "spec": self.spec.to_record(),
            "settings": self.settings,
            "teacher_path": self.teacher_path,
        }


def read_manifest(cache: Path) -> Manifest:
    """Read `manifest.json` of a cache.

    Raises:
        UserError: no cache there, a damaged manifest, or one of a newer major version.
        OSError: it cannot be read, or a store does not answer.
    """
    path = cache / MANIFEST
    if not is_file(path):
        raise UserError(
            f"{cache} is no cache ({MANIFEST} is missing): name a cache folder, or make one with dump-teacher"
        )
    check_stays(cache, path)
    record = Fields(read_json(path), path)
    schema = record.text("schema", 20)
    major = schema.partition(".")[0]
    if major != str(SCHEMA_MAJOR):
        newer = major.isdecimal() and int(major) > SCHEMA_MAJOR
        raise UserError(
            f"{path} has schema {schema}, this version reads {SCHEMA_MAJOR}.x: "
            + ("upgrade this software" if newer else "dump the cache again")
        )
    manifest = Manifest(
        compat=record.object("compat"),
        data=record.object("data"),
        spec=CacheSpec.from_record(record.object("spec"), f"{path}: spec"),
        settings=record.object("settings"),
        teacher_path=record.text("teacher_path"),
        created=record.text("created"),
    )
    if (manifest.compat_id, manifest.data_id) != (record.text("compat_id"), record.text("data_id")):
        raise UserError(f"{path}: its identities do not follow from its fields: it was edited; restore it from a copy")
    return manifest


def create_or_match(cache: Path, wanted: Manifest) -> Manifest:
    """Create the manifest, or check that the cache there was made with the same identity.

    Raises:
        UserError: the cache was made with other settings; names every field that differs and both values.
    """
    try:
        commit_json(cache / MANIFEST, wanted.to_record(), exclusive=True)
        return wanted
    except FileExistsError:
        found = read_manifest(cache)
    differences = describe_difference(found.compat, wanted.compat) + describe_difference(found.data, wanted.data)
    if differences:
        raise UserError(
            f"{cache} was made with other settings than this run asks for: {'; '.join(differences)}. "
            "Use the settings of the cache, or another folder (CACHE=..., --cache)"
        )
    return found


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(field, found value, wanted value) wherever two identity dictionaries differ; a field one lacks is "nothing"."""

    def spelled(fields: dict[str, Any], key: str) -> tuple[bytes, str]:
        # By their JSON, as identities are: 1 and 1.0 differ, and so do null and nothing at all.
        return (canonical_json(fields[key]), repr(fields[key])) if key in fields else (b"", "nothing")

    pairs = [(key, spelled(found, key), spelled(wanted, key)) for key in sorted(found.keys() | wanted.keys())]
    return [(key, a[1], b[1]) for key, a, b in pairs if a[0] != b[0]]


def describe_difference(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Human sentences for the fields in which two identity dictionaries differ."""
    return [f"{key}: cache has {a}, asked for {b}" for key, a, b in differences(found, wanted)]
